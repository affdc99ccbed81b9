"""Making the list of a model's chunk digests: each large blob is read once, in order.

What the store has complete is read there; everything else comes from the registry, and is kept
nowhere. The blobs' digests are verified on the way, so that no list is made of wrong bytes.
"""

from __future__ import annotations

import logging
import os
import random
from typing import TYPE_CHECKING, Final, Protocol

import trio

from fetcher.answers import Piece, RangeIgnored
from fetcher.chunk_digests import (
    MAX_LIST_BYTES,
    MOST_CHUNK,
    BlobChunks,
    ChunkDigests,
    ChunkHasher,
    list_bytes,
)
from fetcher.chunk_sizes import chunk_size_for
from fetcher.errors import (
    AccessDenied,
    DigestMismatch,
    InvalidArtifact,
    ModelError,
    Unauthenticated,
    Unavailable,
)
from fetcher.ranges import Range
from fetcher.tasks import for_each
from fetcher.threads import run_stoppable
from fetcher.transport import Connection, TransferSettings

if TYPE_CHECKING:
    import threading
    from contextlib import AbstractContextManager

    from fetcher.credentials import Keychain
    from fetcher.modelpack import Model
    from fetcher.oci import Descriptor, Digest, Reference
    from fetcher.registry import Registry, RegistrySettings
    from fetcher.store.stored import StoredBlob

logger: Final = logging.getLogger(__name__)

_ATTEMPTS: Final = 6
"""Failures in a row, without a byte between them, after which a blob is given up."""
_LONGEST_PAUSE: Final = 20.0


class Contents(Protocol):
    """Where complete blobs may be: :class:`fetcher.store.store.Store` is one."""

    def stored(self, digest: Digest) -> StoredBlob | None:
        """A complete blob, if it is here in a form that has its bytes."""

    def held_content(self, digest: Digest) -> AbstractContextManager[None]:
        """Nothing takes it away inside the block."""


class Indexing:
    """Makes the list of one model."""

    def __init__(
        self,
        registry: Registry,
        reference: Reference,
        keychain: Keychain,
        contents: Contents | None = None,
    ) -> None:
        """What is not in ``contents`` is fetched from the registry of ``reference``."""
        self._registry = registry
        self._reference = reference
        self._keychain = keychain
        self._contents = contents
        self._hashers: dict[Digest, ChunkHasher] = {}
        self._total = 0
        self.fetched = 0
        """Bytes that came from the registry."""

    def progress(self) -> tuple[int, int]:
        """Bytes that were hashed, and bytes in all."""
        return sum(one.length for one in self._hashers.values()), self._total

    async def make(self, model: Model, chunk_size: int) -> ChunkDigests:
        """The list for all blobs of more than one chunk.

        Chunks are larger than ``chunk_size`` where the list would get too long. Raises
        :class:`ModelError`.
        """
        blobs = _large_blobs(model, chunk_size)
        while list_bytes(blobs) > MAX_LIST_BYTES:
            chunk_size *= 2
            if chunk_size > MOST_CHUNK:
                raise InvalidArtifact(f"{self._reference} is too large for a list of its chunks")
            blobs = _large_blobs(model, chunk_size)
        self._total = sum(blob.size for blob, _ in blobs)
        found: list[BlobChunks] = []

        async def one(item: tuple[Descriptor, int]) -> None:
            found.append(await self._index(*item))

        await for_each(blobs, one, len(os.sched_getaffinity(0)))
        return ChunkDigests.over(found, chunk_size)

    async def _index(self, blob: Descriptor, chunk_size: int) -> BlobChunks:
        if self._contents is not None:
            with self._contents.held_content(blob.digest):
                stored = self._contents.stored(blob.digest)
                if stored is not None:
                    # that it is here says nothing of whether the caller may know it
                    await self._registry.head_blob(self._reference, blob.digest, self._keychain)
                    try:
                        return await self._read(blob, chunk_size, stored)
                    except (OSError, DigestMismatch) as error:
                        logger.warning("blob %s in the store: %s", blob.digest, error)
        return await self._fetch(blob, chunk_size)

    def _begin(self, blob: Descriptor, chunk_size: int) -> ChunkHasher:
        self._hashers[blob.digest] = ChunkHasher(blob.digest, blob.size, chunk_size)
        return self._hashers[blob.digest]

    async def _read(self, blob: Descriptor, chunk_size: int, stored: StoredBlob) -> BlobChunks:
        hasher = self._begin(blob, chunk_size)

        def read(stop: threading.Event) -> BlobChunks:
            for block in stored.blocks(stop):
                hasher.update(block)
            return hasher.finish()

        return await run_stoppable(read)

    async def _fetch(self, blob: Descriptor, chunk_size: int) -> BlobChunks:
        """Read the blob from the registry, again and again from where it stopped."""
        hasher = self._begin(blob, chunk_size)
        connection = Connection(_transfer_settings(self._registry.settings))
        failures, refused = 0, False
        try:
            while hasher.length < blob.size:
                before = hasher.length
                try:
                    await self._fetch_some(connection, blob, hasher, renew=refused)
                    refused = False
                except RangeIgnored:
                    # it sends the whole, and that once more
                    hasher = self._begin(blob, chunk_size)
                except (Unauthenticated, AccessDenied):
                    if refused:
                        raise
                    refused = True
                except Unavailable as error:
                    failures = 1 if hasher.length > before else failures + 1
                    await self._pause(error, failures)
            return hasher.finish()
        finally:
            connection.close()

    async def _fetch_some(
        self, connection: Connection, blob: Descriptor, hasher: ChunkHasher, *, renew: bool
    ) -> None:
        access = await self._registry.blob_access(
            self._reference, blob.digest, self._keychain, renew=renew
        )
        before = hasher.length
        piece = Piece(blob.digest, blob.size, Range(before, blob.size))
        sink = _HashingSink(hasher, blob.size)
        try:
            await run_stoppable(lambda stop: connection.fetch(access, piece, sink, stop))
        finally:
            self.fetched += hasher.length - before

    async def _pause(self, error: ModelError, failures: int) -> None:
        if failures >= _ATTEMPTS:
            raise error
        pause = min(0.5 * 2**failures, _LONGEST_PAUSE) * random.SystemRandom().uniform(0.5, 1.0)
        logger.info("%s; trying again in %.1f s", error.message, pause)
        await trio.sleep(pause)


def _transfer_settings(settings: RegistrySettings) -> TransferSettings:
    return TransferSettings(
        settings.connect_timeout, settings.stall_timeout, settings.user_agent, settings.ca_file
    )


def _large_blobs(model: Model, chunk_size: int) -> list[tuple[Descriptor, int]]:
    """Those of more than one chunk, the largest first, each with the size of its chunks."""
    found = {
        layer.descriptor.digest: (layer.descriptor, chunk_size_for(layer, chunk_size))
        for layer in model.layers
        if layer.descriptor.size > chunk_size
    }
    return sorted(found.values(), key=lambda item: -item[0].size)


class _HashingSink:
    """Takes bytes for a hasher; see :class:`fetcher.answers.Sink`."""

    def __init__(self, hasher: ChunkHasher, size: int) -> None:
        self._hasher = hasher
        self._size = size

    def __call__(self, data: bytes | memoryview) -> bool:
        if len(data) > self._size - self._hasher.length:
            return False
        self._hasher.update(data)
        return True

    def whole(self) -> bool:
        return self._hasher.length == 0
