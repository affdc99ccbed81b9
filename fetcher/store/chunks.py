"""Chunk maps: which chunks of a blob are there, one byte each, in a file that readers may map.

The file is a header of 64 bytes, one byte per chunk, then four bytes per chunk that say how much of
it has been written while it arrives. Both are set only after the bytes were written, so a killed
process loses nothing. Power loss may lose bytes whose mark survived: the header keeps the kernel's
boot id, and in a map of an earlier boot only those chunks are believed that a checkpoint had put on
the disk.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

HEADER_BYTES: Final = 64
_HEADER: Final = struct.Struct("<8sQQ36sB")
_MAGIC: Final = b"MCSICHK2"
_ABSENT: Final = b"\0"

THERE: Final = 1
"""The bit of every chunk whose bytes have been written."""
SYNCED: Final = 2
"""Its bytes are on the disk, where they belong: true after a power loss, too."""
FRAMED: Final = 4
"""Its bytes wait in the frame of a tar layer for the place that its headers give them."""

_FILL: Final = struct.Struct("<I")
_FRAMED_FILL: Final = 1 << 31
"""The bit of a fill whose bytes are in the frame."""
MAX_CHUNK_BYTES: Final = _FRAMED_FILL - 1

_AFTER_POWER_LOSS: Final = bytes(
    state if state & SYNCED and not state & FRAMED else 0 for state in range(256)
)


def boot_id() -> bytes:
    """The kernel's name for this boot, 36 characters."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()


class ChunkMap:
    """The chunk map of one blob, open for writing by one process.

    Its methods may be called from several threads for different chunks.
    """

    def __init__(self, path: Path, size: int, chunk_size: int, form: int = 0) -> None:
        """Open the map at ``path`` for a blob of ``size`` bytes; start anew where it is no use.

        A map that is there keeps its own chunk size, whatever is configured now. One of another
        blob size, or of a blob that was laid out in another ``form``, is emptied. Raises
        :class:`OSError`.
        """
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.size = size
            kept = self._read(form)
            self.chunk_size = chunk_size if kept is None else kept
            self.count = -(-size // self.chunk_size)
            if kept is None:
                self._begin(form)
        except BaseException:
            os.close(self._file)
            raise

    def _read(self, form: int) -> int | None:
        """Take over what the file says; the chunk size, None where it is no use."""
        content = os.pread(self._file, os.fstat(self._file).st_size, 0)
        if len(content) < HEADER_BYTES:
            return None
        magic, size, chunk_size, boot, found = _HEADER.unpack_from(content)
        if (magic, size, found) != (_MAGIC, self.size, form) or chunk_size < 1:
            return None
        count = -(-size // chunk_size)
        if len(content) != HEADER_BYTES + count * (1 + _FILL.size):
            return None
        self._states = bytearray(content[HEADER_BYTES : HEADER_BYTES + count])
        self._fills = [fill for (fill,) in _FILL.iter_unpack(content[HEADER_BYTES + count :])]
        if boot != boot_id():
            self.count = count
            # the marks go before the boot id comes: a second power loss in between finds the same
            self.forget_unsynced()
            os.fsync(self._file)
            self._write_header(chunk_size, form)
        return int(chunk_size)

    def _begin(self, form: int) -> None:
        os.ftruncate(self._file, 0)
        # zeros that are written take their room now, not when the disk has become full
        os.pwrite(self._file, bytes(HEADER_BYTES), 0)
        self.clear()
        self._write_header(self.chunk_size, form)

    def _write_header(self, chunk_size: int, form: int) -> None:
        os.pwrite(self._file, _HEADER.pack(_MAGIC, self.size, chunk_size, boot_id(), form), 0)

    def clear(self) -> None:
        """No chunk is there: the bytes are gone. Raises :class:`OSError`."""
        self._states = bytearray(self.count)
        self._fills = [0] * self.count
        os.pwrite(self._file, bytes(self.count * (1 + _FILL.size)), HEADER_BYTES)

    def forget_unsynced(self) -> None:
        """Believe only chunks that are on the disk. Raises :class:`OSError`."""
        self._states = bytearray(self._states.translate(_AFTER_POWER_LOSS))
        self._fills = [0] * self.count
        os.pwrite(self._file, self._states + bytes(self.count * _FILL.size), HEADER_BYTES)

    def mark(self, chunk: int, *, framed: bool = False) -> None:
        """Say that the bytes of ``chunk`` have been written. Raises :class:`OSError`."""
        self._set(chunk, THERE | FRAMED if framed else THERE)

    def mark_synced(self, chunks: Iterable[int]) -> None:
        """Say that these chunks are on the disk, durably. Raises :class:`OSError`."""
        for chunk in chunks:
            self._set(chunk, THERE | SYNCED)
        os.fsync(self._file)

    def _set(self, chunk: int, state: int) -> None:
        self._states[chunk] = state
        os.pwrite(self._file, state.to_bytes(1, "little"), HEADER_BYTES + chunk)

    def set_fill(self, chunk: int, fill: int, *, framed: bool) -> None:
        """Say that the first ``fill`` bytes of ``chunk`` have been written, in the frame or not.

        Raises :class:`OSError`.
        """
        value = fill | (_FRAMED_FILL if framed else 0)
        self._fills[chunk] = value
        offset = HEADER_BYTES + self.count + chunk * _FILL.size
        os.pwrite(self._file, _FILL.pack(value), offset)

    def fill(self, chunk: int) -> tuple[int, bool]:
        """How many bytes of a chunk that is not there have been written, and whether framed."""
        value = self._fills[chunk]
        fill = value & MAX_CHUNK_BYTES
        # a whole chunk would have been marked
        return (fill if fill < self.length(chunk) else 0), bool(value & _FRAMED_FILL)

    def has(self, chunk: int) -> bool:
        """Whether the bytes of ``chunk`` have been written."""
        return self._states[chunk] != 0

    def is_framed(self, chunk: int) -> bool:
        """Whether the bytes of ``chunk`` wait in the frame."""
        return bool(self._states[chunk] & FRAMED)

    def missing(self) -> Iterator[int]:
        """The numbers of the chunks that are not there, ascending."""
        return (chunk for chunk in range(self.count) if not self.has(chunk))

    def unsynced(self) -> list[int]:
        """The chunks that lie where they belong, and may not be on the disk yet."""
        return [chunk for chunk, state in enumerate(bytes(self._states)) if state == THERE]

    def contiguous(self, chunk: int) -> int:
        """The first chunk at or after ``chunk`` that is not there; the count if there is none."""
        found = self._states.find(_ABSENT, chunk)
        return self.count if found < 0 else found

    def length(self, chunk: int) -> int:
        """Bytes in ``chunk``; the last one may be shorter."""
        return min(self.chunk_size, self.size - chunk * self.chunk_size)

    def done(self) -> int:
        """Bytes in the chunks that are there."""
        return sum(self.length(chunk) for chunk in range(self.count) if self.has(chunk))

    def close(self) -> None:
        """Close it."""
        os.close(self._file)
