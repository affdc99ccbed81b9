"""Finding the list of a model's chunk digests: what publishes it is :mod:`fetcher.publishing`.

A list is taken from the model's own registry and repository alone, over the connection that the
credentials of whoever pulls are good for. None is no failure, and looking for one costs a bounded
time: what was found, and that nothing was, is remembered.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import trio

from fetcher.chunk_digests import (
    CHUNK_SIZE_KEY,
    LIST_TYPE,
    MAX_LIST_BYTES,
    ChunkDigests,
)
from fetcher.errors import InvalidArtifact, ModelError
from fetcher.oci import Manifest
from fetcher.referrers import Referrers
from fetcher.sha2 import is_available
from fetcher.store.lists import ListRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from fetcher.chunk_digests import BlobChunks
    from fetcher.credentials import Keychain
    from fetcher.modelpack import Model
    from fetcher.oci import Descriptor, Digest, Reference
    from fetcher.registry import Registry
    from fetcher.store.store import Store

logger: Final = logging.getLogger(__name__)

_NONE_SECONDS: Final = 600.0
"""How long it is believed that there is no list."""
_FAILED_SECONDS: Final = 60.0
"""How long nobody asks again after that failed."""
_CONTRADICTED_SECONDS: Final = 86400.0
"""How long no list is looked for after the registry's own bytes were others than it said."""
_TRIED: Final = 4
"""Lists of one model that are looked at."""
_MAX_MISSED: Final = 4096


@dataclass(frozen=True, slots=True)
class KnownList:
    """A list that was found, and where."""

    digests: ChunkDigests
    reference: Reference
    model: Digest
    contradicted: Callable[[], None] = field(repr=False, compare=False)
    """To be called when the registry's own bytes were others than it says: it is used no more."""
    is_hearsay: bool = False
    """Whether it is a peer's: then nothing is shown to anybody by its word."""

    @property
    def name(self) -> str | None:
        """The registry and the repository whose list it is; None of hearsay."""
        return None if self.is_hearsay else self.reference.name


class AskingPeers(Protocol):
    """Lists of other members; :class:`fetcher.peers.lists.PeerLists` has them."""

    def seeking(self, model: Model, chunk_size: int) -> AbstractContextManager[None]:
        """Inside the block the registry is asked for a list of the model."""

    async def follow(
        self,
        reference: Reference,
        model: Model,
        keychain: Keychain,
        chunk_size: int,
        offer: Callable[[KnownList], None],
    ) -> None:
        """Have ``offer`` called with a list of the model once there is one."""


class ChunkLists:
    """The lists that this node knows. Belongs to the trio thread."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        chunk_size: int,
        patience: float = 3.0,
        peers: AskingPeers | None = None,
    ) -> None:
        """``patience`` is how long a list is waited for, in seconds; ``peers`` are asked beside the
        download where the registry has none.

        Of several lists the one with chunks of ``chunk_size`` bytes is preferred.
        """
        self._peers = peers
        self._store = store
        self._records = store.lists
        self._registry = registry
        self._chunk_size = chunk_size
        self._patience = patience
        self._missed: dict[tuple[str, Digest], float] = {}

    async def find(
        self, reference: Reference, model: Model, keychain: Keychain
    ) -> KnownList | None:
        """The list of a model in the repository of ``reference``, if there is one.

        Raises nothing that is meant for a user.
        """
        large = any(one.descriptor.size > self._chunk_size for one in model.layers)
        if not large or not is_available():
            return None
        peers = self._peers
        try:
            seeking = peers.seeking(model, self._chunk_size) if peers else contextlib.nullcontext()
            with seeking:
                found = await self._find(reference, model, keychain)
        except ModelError as error:
            logger.info("no chunk digests of %s: %s", reference, error.message)
            self._miss(reference, model, _FAILED_SECONDS)
            return None
        return None if found is None else self._known(found, reference, model)

    def _known(self, found: ChunkDigests, reference: Reference, model: Model) -> KnownList:
        contradicted = functools.partial(self.contradicted, reference, model.digest)
        return KnownList(found, reference, model.digest, contradicted)

    async def follow(
        self,
        reference: Reference,
        model: Model,
        keychain: Keychain,
        offer: Callable[[KnownList], None],
    ) -> None:
        """Have ``offer`` called with what peers send of a model, as long as it is of use."""
        if self._peers is not None and is_available():
            await self._peers.follow(reference, model, keychain, self._chunk_size, offer)

    def known(self, reference: Reference, model: Model) -> KnownList | None:
        """The list that was found before, without asking anybody."""
        if not is_available():
            return None
        record = self._records.get(reference.name, model.digest)
        if record is None or record.body is None:
            return None
        try:
            found = _read(record.body, model)
        except InvalidArtifact:
            return None
        return self._known(found, reference, model)

    async def keep(
        self, reference: Reference, model: Model, made: Mapping[Digest, BlobChunks]
    ) -> None:
        """Keep the chunk digests of a model all of which was hashed here, where no list is known.

        They are for others, and for the next time that it is fetched. Raises nothing that is meant
        for a user.
        """
        blobs = [layer.descriptor for layer in model.layers]
        large = {blob.digest for blob in blobs if blob.size > self._chunk_size}
        record = self._records.get(reference.name, model.digest)
        known = record is not None and record.body is not None
        if known or not large or not large <= made.keys():
            return
        body = ChunkDigests.over((made[digest] for digest in large), self._chunk_size).encode()
        if len(body) > MAX_LIST_BYTES:
            return
        try:
            await self._store.rooms.check_records(len(body))
            self._records.put(reference.name, model.digest, ListRecord(body, time.time()))
        except ModelError as error:
            logger.info("the chunk digests of %s are not kept: %s", reference, error.message)

    def contradicted(self, reference: Reference, model: Digest) -> None:
        """The registry's own bytes were others than its list says: it is not used any more."""
        record = ListRecord(None, time.time() + _CONTRADICTED_SECONDS)
        try:
            self._records.put(reference.name, model, record)
        except ModelError as error:
            logger.info("%s", error.message)

    async def _find(
        self, reference: Reference, model: Model, keychain: Keychain
    ) -> ChunkDigests | None:
        record = self._records.get(reference.name, model.digest)
        if record is not None and record.body is not None:
            return _read(record.body, model)
        if (record is not None and time.time() < record.until) or self._is_missed(reference, model):
            return None
        with trio.move_on_after(self._patience) as waiting:
            body = await self._ask(reference, model, keychain)
        if waiting.cancelled_caught:
            logger.info("no chunk digests of %s came in %g s", reference, self._patience)
            self._miss(reference, model, _FAILED_SECONDS)
            return None
        found = None if body is None else _read(body, model)
        await self._store.rooms.check_records(len(body or b""))
        record = ListRecord(body, time.time() + _NONE_SECONDS)
        self._records.put(reference.name, model.digest, record)
        if found is not None:
            logger.info("%s has chunk digests for %d blobs", reference, len(found.blobs))
        return found

    async def _ask(self, reference: Reference, model: Model, keychain: Keychain) -> bytes | None:
        """The best list that the registry has."""
        referrers = Referrers(self._registry)
        listed = await referrers.of(reference, model.digest, LIST_TYPE, keychain)
        wanted = str(self._chunk_size)
        ordered = sorted(listed, key=lambda one: one.annotations.get(CHUNK_SIZE_KEY) != wanted)
        for row in ordered[:_TRIED]:
            try:
                body = await self._fetch(reference, row, model, keychain)
                _read(body, model)
            except InvalidArtifact as error:
                logger.warning("the chunk digests %s are not used: %s", row.digest, error.message)
            else:
                return body
        return None

    async def _fetch(
        self, reference: Reference, row: Descriptor, model: Model, keychain: Keychain
    ) -> bytes:
        manifest = await self._registry.manifest(reference.with_digest(row.digest), keychain)
        if not isinstance(manifest, Manifest) or manifest.artifact_type != LIST_TYPE:
            raise InvalidArtifact("it is no manifest of a list")
        if _subject(manifest) != str(model.digest):
            raise InvalidArtifact("it is about another model")
        [layer] = manifest.layers if len(manifest.layers) == 1 else [None]
        if layer is None or layer.media_type != LIST_TYPE or layer.size > MAX_LIST_BYTES:
            raise InvalidArtifact("it has not one list in it, of a size that is read")
        return await self._registry.blob(reference, layer.digest, layer.size, keychain)

    def _miss(self, reference: Reference, model: Model, seconds: float) -> None:
        self._missed[reference.name, model.digest] = trio.current_time() + seconds
        while len(self._missed) > _MAX_MISSED:
            del self._missed[next(iter(self._missed))]

    def _is_missed(self, reference: Reference, model: Model) -> bool:
        until = self._missed.get((reference.name, model.digest))
        return until is not None and trio.current_time() < until


class _Subject(msgspec.Struct):
    digest: str = ""


class _WithSubject(msgspec.Struct):
    subject: _Subject | None = None


def _subject(manifest: Manifest) -> str:
    found = msgspec.json.decode(manifest.body, type=_WithSubject).subject
    return found.digest if found is not None else ""


def _read(body: bytes, model: Model) -> ChunkDigests:
    return ChunkDigests.parse(body, (layer.descriptor for layer in model.layers))
