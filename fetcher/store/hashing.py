"""How far a blob on its way is hashed.

Bytes are hashed in order. Those that come in order are hashed by whoever receives them, out of his
buffer: that saves reading them back, and the hand-over from thread to thread. What comes out of its
turn is read back later.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from fetcher.chunk_digests import ChunkHasher, is_chunk_size
from fetcher.errors import DigestMismatch
from fetcher.sha2 import is_available

if TYPE_CHECKING:
    from fetcher.chunk_digests import BlobChunks
    from fetcher.oci import Digest, Hasher


class Hashing:
    """The running hash of one blob. Whoever holds :attr:`turn` may take it further, or back."""

    def __init__(self, digest: Digest, size: int, chunk_size: int) -> None:
        self._digest = digest
        self._size = size
        self._chunk_size = chunk_size
        self.turn = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._hasher = self._new_hasher()
        self.reached = 0
        """The next byte to hash."""

    def _new_hasher(self) -> ChunkHasher | Hasher:
        """What hashes all of it, and makes its chunk digests on the way where that can be done."""
        if is_available() and is_chunk_size(self._chunk_size):
            return ChunkHasher(self._digest, self._size, self._chunk_size)
        return self._digest.hasher()

    def along(self, offset: int, data: memoryview) -> None:
        """Hash what was just written at ``offset``, if it is what comes next and nobody else is
        hashing.
        """
        if offset == self.reached and self.turn.acquire(blocking=False):
            try:
                if offset == self.reached:
                    self.update(data)
            finally:
                self.turn.release()

    def update(self, data: memoryview) -> None:
        """Hash the next bytes, without the interpreter's lock; the turn is the caller's."""
        self._hasher.update(data)
        self.reached += len(data)

    def go_back(self, chunk: int) -> None:
        """Let no byte of ``chunk``, or behind it, be hashed; the turn is the caller's."""
        start = chunk * self._chunk_size
        if self.reached <= start:
            return
        if isinstance(self._hasher, ChunkHasher) and chunk:
            self._hasher.rewind(chunk)
            self.reached = start
        else:
            self._begin()

    def finish(self) -> tuple[bool, BlobChunks | None]:
        """Whether all that was hashed is what it should be, and its chunk digests if they were
        made; the turn is the caller's.
        """
        if not isinstance(self._hasher, ChunkHasher):
            return self._hasher.hexdigest() == self._digest.hex, None
        try:
            return True, self._hasher.finish()
        except DigestMismatch:
            return False, None
