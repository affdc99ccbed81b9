"""Chunk digests: what proves each chunk of a blob by itself, in any order, from any source.

A blob's digest proves nothing before all of the blob is there. A list of chunk digests tells, for
the end of each chunk but the last, the intermediate hash value (:mod:`fetcher.sha2`) that the
computation of the blob's own digest has there. A chunk is right if it leads from the value before
it to the value behind it; the last one leads to the digest. So chunks are proven in parallel, and
once all of them are, the blob's own digest is: it needs no second pass, and *nobody has to believe
the author of the list*. A wrong list is found out at the latest when one of its chunks cannot be
had.

Whoever shows single chunks before that does believe the author; ``docs/security.md`` says what that
means.

On the wire it is one JSON document, the layer of a manifest whose ``subject`` is the model's::

    {"version": 1, "algorithm": "sha2-intermediate", "chunk_size": 4194304,
     "blobs": {"sha256:…": {"size": 16400000000, "chunks": "<base64 of the values, in order>"}}}

A blob may have a ``chunk_size`` of its own; blobs of one chunk are not in it. No I/O here.
"""

from __future__ import annotations

import base64
import binascii
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from fetcher.errors import DigestMismatch, InvalidArtifact
from fetcher.sha2 import MAX_BLOCK_BYTES, VALUE_BYTES, Sha2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fetcher.oci import Descriptor, Digest

LIST_TYPE: Final = "application/vnd.model-csi.chunk-digests.v1+json"
"""The media type of a list, and the artifact type of its manifest."""
CHUNK_SIZE_KEY: Final = "org.model-csi.chunk-size"
"""The annotation of a list's manifest that tells its chunk size."""
MAX_LIST_BYTES: Final = 4 * 1024 * 1024
LEAST_CHUNK: Final = 64 * 1024
MOST_CHUNK: Final = 64 * 1024 * 1024

_VERSION: Final = 1
_ALGORITHM: Final = "sha2-intermediate"
_MAX_BLOBS: Final = 10_000


@dataclass(frozen=True, slots=True)
class BlobChunks:
    """The chunk digests of one blob."""

    digest: Digest
    size: int
    chunk_size: int
    values: bytes = field(repr=False)
    """The intermediate hash values at the end of each chunk but the last."""

    def __post_init__(self) -> None:
        wanted = (self.count - 1) * VALUE_BYTES[self.digest.algorithm]
        if len(self.values) != wanted:
            raise InvalidArtifact(
                f"the chunk digests of blob {self.digest} have {len(self.values)} bytes, where "
                f"{self.count} chunks need {wanted}"
            )

    @property
    def count(self) -> int:
        """How many chunks it has; at least one."""
        return max(-(-self.size // self.chunk_size), 1)

    def check(self, number: int, blocks: Iterable[bytes | memoryview]) -> bool:
        """Whether the bytes of ``blocks``, in order, are chunk ``number``.

        Hashes them without the interpreter's lock, in the calling thread.
        """
        start = number * self.chunk_size
        running = Sha2(self.digest.algorithm, self._value(number), start)
        length = 0
        for block in blocks:
            running.update(block)
            length += len(block)
        if length != min(self.chunk_size, self.size - start):
            return False
        if number + 1 == self.count:
            return running.hexdigest() == self.digest.hex
        return running.value == self._value(number + 1)

    def _value(self, number: int) -> bytes | None:
        """What the computation begins chunk ``number`` with; None for the first one."""
        if not 0 <= number < self.count:
            raise ValueError(f"there is no chunk {number} of {self.count}")
        width = VALUE_BYTES[self.digest.algorithm]
        return self.values[(number - 1) * width : number * width] if number else None


class ChunkHasher:
    """Makes the chunk digests of one blob, from its bytes in order."""

    def __init__(self, digest: Digest, size: int, chunk_size: int) -> None:
        """``chunk_size`` is one that :func:`is_chunk_size` is true for."""
        self._digest = digest
        self._size = size
        self._chunk_size = chunk_size
        self._running = Sha2(digest.algorithm)
        self._values = bytearray()
        self.length = 0
        """Bytes that were taken."""

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        view = memoryview(data)
        while view:
            piece = view[: self._chunk_size - self.length % self._chunk_size]
            self._running.update(bytes(piece) if piece.readonly else piece)
            self.length += len(piece)
            view = view[len(piece) :]
            if self.length % self._chunk_size == 0 and self.length < self._size:
                self._values += self._running.value

    def rewind(self, number: int) -> None:
        """Go back to the begin of chunk ``number``, which was reached before."""
        width = VALUE_BYTES[self._digest.algorithm]
        start = number * self._chunk_size
        value = bytes(self._values[(number - 1) * width : number * width]) if number else None
        self._running = Sha2(self._digest.algorithm, value, start)
        del self._values[number * width :]
        self.length = start

    def finish(self) -> BlobChunks:
        """The chunk digests. Raises :class:`DigestMismatch` where the bytes were not the blob."""
        if self.length != self._size or self._running.hexdigest() != self._digest.hex:
            raise DigestMismatch(
                f"what was read for blob {self._digest} is something else: no list was made of it",
                digest=self._digest,
            )
        return BlobChunks(self._digest, self._size, self._chunk_size, bytes(self._values))


@dataclass(frozen=True, slots=True)
class ChunkDigests:
    """The list of a model: chunk digests by blob."""

    chunk_size: int
    """Of blobs that have none of their own."""
    blobs: Mapping[Digest, BlobChunks] = field(repr=False, hash=False)

    @classmethod
    def over(cls, blobs: Iterable[BlobChunks], chunk_size: int) -> ChunkDigests:
        """A list of these blobs."""
        found = {one.digest: one for one in blobs}
        return cls(chunk_size, types.MappingProxyType(found))

    def of(self, blob: Digest) -> BlobChunks | None:
        """What is told about a blob; None where nothing is, as about small ones."""
        return self.blobs.get(blob)

    def encode(self) -> bytes:
        """The document; the same list gives the same bytes."""
        document = _List(
            version=_VERSION,
            algorithm=_ALGORITHM,
            chunk_size=self.chunk_size,
            blobs={
                str(digest): _Blob(
                    size=blob.size,
                    chunks=base64.b64encode(blob.values).decode(),
                    chunk_size=None if blob.chunk_size == self.chunk_size else blob.chunk_size,
                )
                for digest, blob in sorted(self.blobs.items())
            },
        )
        return msgspec.json.encode(document)

    @classmethod
    def parse(cls, body: bytes, blobs: Iterable[Descriptor]) -> ChunkDigests:
        """Read a document about some of ``blobs``; what it tells of others is left out.

        Raises :class:`InvalidArtifact` for what is none, and where it contradicts their sizes.
        """
        document = _decode(body)
        found = []
        for blob in {one.digest: one for one in blobs}.values():
            told = document.blobs.get(str(blob.digest))
            if told is not None:
                found.append(_blob_chunks(blob, told, document.chunk_size))
        return cls.over(found, document.chunk_size)


class _Blob(msgspec.Struct, frozen=True, omit_defaults=True):
    size: int
    chunks: str
    chunk_size: int | None = None


class _List(msgspec.Struct, frozen=True):
    version: int
    algorithm: str
    chunk_size: int
    blobs: dict[str, _Blob]


def is_chunk_size(size: int) -> bool:
    """Whether a list may tell of chunks of so many bytes."""
    return LEAST_CHUNK <= size <= MOST_CHUNK and size % MAX_BLOCK_BYTES == 0


def list_bytes(blobs: Iterable[tuple[Descriptor, int]]) -> int:
    """How long the list of these blobs, each with its chunk size, gets at most."""
    return 256 + sum(
        256 + -(-blob.size // chunk_size) * VALUE_BYTES[blob.digest.algorithm] * 4 // 3
        for blob, chunk_size in blobs
    )


def _decode(body: bytes) -> _List:
    if len(body) > MAX_LIST_BYTES:
        raise InvalidArtifact(f"the list of chunk digests has more than {MAX_LIST_BYTES} bytes")
    try:
        document = msgspec.json.decode(body, type=_List)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error)[:200]
        raise InvalidArtifact(f"the list of chunk digests cannot be read: {reason}") from error
    if (document.version, document.algorithm) != (_VERSION, _ALGORITHM):
        raise InvalidArtifact(
            f"the list of chunk digests has version {document.version} and algorithm "
            f"{document.algorithm[:60]!r}, which are not known here"
        )
    if not is_chunk_size(document.chunk_size) or len(document.blobs) > _MAX_BLOBS:
        raise InvalidArtifact("the list of chunk digests has a size that no list has")
    return document


def _blob_chunks(blob: Descriptor, told: _Blob, chunk_size: int) -> BlobChunks:
    if told.size != blob.size:
        raise InvalidArtifact(
            f"the list of chunk digests gives blob {blob.digest} {told.size} bytes, and the "
            f"manifest {blob.size}"
        )
    own = told.chunk_size or chunk_size
    if not is_chunk_size(own):
        raise InvalidArtifact(f"the list has chunks of {own} bytes for blob {blob.digest}")
    try:
        values = base64.b64decode(told.chunks, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArtifact(f"the chunk digests of blob {blob.digest} are no base64") from error
    return BlobChunks(blob.digest, blob.size, own, values)
