"""Chunk maps: which chunks of a blob are there, one byte each, in a file that readers map.

The file is a header of 64 bytes, then one byte per chunk. A chunk is marked only after its bytes
were written, so a killed process loses nothing. Power loss may lose bytes whose mark survived: the
header keeps the kernel's boot id, and a map of an earlier boot is not believed.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER_BYTES: Final = 64
_HEADER: Final = struct.Struct("<8sQQ36s")
_MAGIC: Final = b"MCSICHK1"
ABSENT: Final = 0
FETCHED: Final = 1


def boot_id() -> bytes:
    """The kernel's name for this boot, 36 characters."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()


def _chunk_size_of(descriptor: int, size: int) -> int | None:
    """The chunk size of an open map, if it is one of a blob of ``size`` bytes and of this boot."""
    header = os.pread(descriptor, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        return None
    magic, recorded, chunk_size, boot = _HEADER.unpack(header)
    if (magic, recorded, boot) != (_MAGIC, size, boot_id()) or chunk_size < 1:
        return None
    length = HEADER_BYTES + -(-size // chunk_size)
    return int(chunk_size) if os.fstat(descriptor).st_size == length else None


class ChunkMap:
    """The chunk map of one blob, open for writing. Not for two writers at once."""

    def __init__(self, path: Path, size: int, chunk_size: int) -> None:
        """Open the map at ``path`` for a blob of ``size`` bytes; start anew where it is no use.

        A map that is there keeps its own chunk size, whatever is configured now. One of another
        blob size or boot is emptied. Raises :class:`OSError`.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.size = size
            kept = _chunk_size_of(descriptor, size)
            self.chunk_size = kept or chunk_size
            self.count = -(-size // self.chunk_size)
            length = HEADER_BYTES + self.count
            if kept is None:
                os.ftruncate(descriptor, 0)
                os.ftruncate(descriptor, length)
                os.pwrite(descriptor, _HEADER.pack(_MAGIC, size, chunk_size, boot_id()), 0)
            self._map = mmap.mmap(descriptor, length)
        finally:
            os.close(descriptor)

    def mark(self, chunk: int) -> None:
        """Say that the bytes of ``chunk`` have been written."""
        self._map[HEADER_BYTES + chunk] = FETCHED

    def has(self, chunk: int) -> bool:
        """Whether the bytes of ``chunk`` have been written."""
        return self._map[HEADER_BYTES + chunk] != ABSENT

    def missing(self) -> Iterator[int]:
        """The numbers of the chunks that are not there, ascending."""
        return (chunk for chunk in range(self.count) if not self.has(chunk))

    def contiguous(self, chunk: int) -> int:
        """The first chunk at or after ``chunk`` that is not there; the count if there is none."""
        found = self._map.find(ABSENT.to_bytes(1, "little"), HEADER_BYTES + chunk)
        return self.count if found < 0 else found - HEADER_BYTES

    def length(self, chunk: int) -> int:
        """Bytes in ``chunk``; the last one may be shorter."""
        return min(self.chunk_size, self.size - chunk * self.chunk_size)

    def done(self) -> int:
        """Bytes in the chunks that are there."""
        return sum(self.length(chunk) for chunk in range(self.count) if self.has(chunk))

    def close(self) -> None:
        """Unmap it."""
        self._map.close()
