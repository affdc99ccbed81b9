"""Chunk maps: which chunks of a blob are there, one byte each, in a file that readers may map.

The file is a header of 64 bytes, one byte per chunk, then four bytes per chunk that say how much of
it has been written while it arrives, then the name that trusted chunks came from. Marks are set
only after the bytes were written, so a killed process loses nothing. Power loss may lose bytes
whose mark survived: the header keeps the kernel's boot id, and in a map of an earlier boot only
those chunks are believed that a checkpoint had put on the disk.

Readers in other processes read it with ``pread``: it is cut to nothing when a blob is begun anew,
and what was mapped would be a ``SIGBUS`` then.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import struct
import threading
from dataclasses import dataclass
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
TRUSTED: Final = 8
"""Its bytes came from the registry itself, by the name that the map is for, or matched a digest of
their own: they may be shown before the whole blob was verified."""

VERDICT_OFFSET: Final = _HEADER.size
"""The byte of the header that says how the blob ended, for whoever has the map open then."""


class Verdict(enum.IntEnum):
    """What became of a blob, as its map says at last."""

    OPEN = 0
    VERIFIED = 1
    """The whole is right and stays; written before the map is removed."""
    SPOILED = 2
    """The bytes proved wrong; written before they are dropped."""


_FILL: Final = struct.Struct("<I")
_FRAMED_FILL: Final = 1 << 31
"""The bit of a fill whose bytes are in the frame."""
_TRUSTED_FILL: Final = 1 << 30
"""The bit of a fill all of whose bytes are trusted."""
MAX_CHUNK_BYTES: Final = _TRUSTED_FILL - 1

NAME_BYTES: Final = 32
_NO_NAME: Final = bytes(NAME_BYTES)

_AFTER_POWER_LOSS: Final = bytes(
    state if state & SYNCED and not state & FRAMED else 0 for state in range(256)
)
_WITHOUT_TRUST: Final = bytes(state & ~TRUSTED for state in range(256))


@dataclass(frozen=True, slots=True)
class MapHeader:
    """What the first bytes of a map say."""

    size: int
    chunk_size: int
    boot: bytes
    """As :func:`boot_id`, of when it was written."""
    form: int
    """How the blob is laid out: the ``form`` of a :class:`fetcher.store.places.Place`."""
    verdict: int

    @property
    def name_offset(self) -> int:
        """Where in the map it says by whose name chunks are trusted; see :func:`name_mark`."""
        return HEADER_BYTES + -(-self.size // self.chunk_size) * (1 + _FILL.size)


def read_header(content: bytes) -> MapHeader | None:
    """Read the header of a map, for whoever only reads it; None where it is none."""
    if len(content) < HEADER_BYTES:
        return None
    magic, size, chunk_size, boot, form = _HEADER.unpack_from(content)
    if magic != _MAGIC or chunk_size < 1:
        return None
    return MapHeader(size, chunk_size, boot, form, content[VERDICT_OFFSET])


def name_mark(name: str) -> bytes:
    """What stands in a map for the name by which its chunks are trusted."""
    return hashlib.sha256(name.encode()).digest()


@functools.cache
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
        self._lock = threading.Lock()
        """Held while a state is changed that another thread may change too."""
        self._is_blank = False
        """The file was made by this process, and no chunk was begun in it: no power loss can bring
        back a state of it in which something is trusted."""
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
        self._is_blank = not content
        if len(content) < HEADER_BYTES:
            return None
        magic, size, chunk_size, boot, found = _HEADER.unpack_from(content)
        if (magic, size, found) != (_MAGIC, self.size, form) or chunk_size < 1:
            return None
        count = -(-size // chunk_size)
        names = HEADER_BYTES + count * (1 + _FILL.size)
        if len(content) != names + NAME_BYTES:
            return None
        self._states = bytearray(content[HEADER_BYTES : HEADER_BYTES + count])
        self._fills = [fill for (fill,) in _FILL.iter_unpack(content[HEADER_BYTES + count : names])]
        self._name = content[names:]
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
        self._name = _NO_NAME
        os.pwrite(self._file, bytes(self.count * (1 + _FILL.size) + NAME_BYTES), HEADER_BYTES)

    def forget_unsynced(self) -> None:
        """Believe only chunks that are on the disk. Raises :class:`OSError`."""
        self._states = bytearray(self._states.translate(_AFTER_POWER_LOSS))
        self._fills = [0] * self.count
        os.pwrite(self._file, self._states + bytes(self.count * _FILL.size), HEADER_BYTES)

    def mark(self, chunk: int, *, framed: bool = False, trusted: bool = False) -> None:
        """Say that the bytes of ``chunk`` have been written. Raises :class:`OSError`."""
        state = THERE | (FRAMED if framed else 0) | (TRUSTED if trusted else 0)
        with self._lock:
            self._set(chunk, state)

    def mark_settled(self, chunk: int) -> None:
        """Say that a chunk is not in the frame any more. Raises :class:`OSError`."""
        with self._lock:
            self._set(chunk, self._states[chunk] & ~FRAMED)

    def mark_trusted(self, chunk: int) -> None:
        """Say that the bytes of a chunk are trusted, if it is there still. Raises
        :class:`OSError`."""
        with self._lock:
            if self._states[chunk]:
                self._set(chunk, self._states[chunk] | TRUSTED)

    def unmark(self, chunk: int) -> None:
        """Say that a chunk is not there: its bytes proved wrong, from the first one on.

        Raises :class:`OSError`.
        """
        # what it was before it was whole is no beginning any more
        self.set_fill(chunk, 0, framed=False)
        with self._lock:
            self._set(chunk, 0)

    def mark_synced(self, chunks: Iterable[int]) -> None:
        """Say that these chunks, if they are there still, are on the disk, durably.

        Raises :class:`OSError`.
        """
        for chunk in chunks:
            with self._lock:
                if self._states[chunk]:
                    self._set(chunk, self._states[chunk] | SYNCED)
        os.fsync(self._file)

    def _set(self, chunk: int, state: int) -> None:
        self._is_blank = False
        # the file first: who is told that a chunk is there may read the map in another process
        os.pwrite(self._file, state.to_bytes(1, "little"), HEADER_BYTES + chunk)
        self._states[chunk] = state

    def trust(self, name: str) -> None:
        """Let trusted chunks be those that came by ``name``, a registry and a repository.

        What came by another name is trusted no longer: whoever may push there may have put
        anything below the digest. Durable, in this order. Raises :class:`OSError`.
        """
        if self.is_for(name):
            return
        if not self._is_blank:
            self._distrust()
        self._name = name_mark(name)
        os.pwrite(self._file, self._name, HEADER_BYTES + self.count * (1 + _FILL.size))

    def _distrust(self) -> None:
        with self._lock:
            self._states = bytearray(self._states.translate(_WITHOUT_TRUST))
            self._fills = [fill & ~_TRUSTED_FILL for fill in self._fills]
            fills = b"".join(map(_FILL.pack, self._fills))
            os.pwrite(self._file, self._states + fills, HEADER_BYTES)
        os.fsync(self._file)

    def is_for(self, name: str) -> bool:
        """Whether trusted chunks are those that came by ``name``."""
        return self._name == name_mark(name)

    def conclude(self, verdict: Verdict) -> None:
        """Tell whoever reads the map what became of the blob. Raises :class:`OSError`."""
        os.pwrite(self._file, verdict.to_bytes(1, "little"), VERDICT_OFFSET)

    def set_fill(self, chunk: int, fill: int, *, framed: bool, trusted: bool = False) -> None:
        """Say that the first ``fill`` bytes of ``chunk`` have been written, in the frame or not.

        Raises :class:`OSError`.
        """
        self._is_blank = False
        value = fill | (_FRAMED_FILL if framed else 0) | (_TRUSTED_FILL if trusted else 0)
        self._fills[chunk] = value
        offset = HEADER_BYTES + self.count + chunk * _FILL.size
        os.pwrite(self._file, _FILL.pack(value), offset)

    def fill(self, chunk: int) -> tuple[int, bool]:
        """How many bytes of a chunk that is not there have been written, and whether framed."""
        value = self._fills[chunk]
        fill = value & MAX_CHUNK_BYTES
        # a whole chunk would have been marked
        return (fill if fill < self.length(chunk) else 0), bool(value & _FRAMED_FILL)

    def is_fill_trusted(self, chunk: int) -> bool:
        """Whether all that has been written of a chunk that is not there is trusted."""
        return bool(self._fills[chunk] & _TRUSTED_FILL)

    def has(self, chunk: int) -> bool:
        """Whether the bytes of ``chunk`` have been written."""
        return self._states[chunk] != 0

    def states(self) -> bytes:
        """A byte for each chunk, which is 0 where its bytes have not been written."""
        return bytes(self._states)

    def is_framed(self, chunk: int) -> bool:
        """Whether the bytes of ``chunk`` wait in the frame."""
        return bool(self._states[chunk] & FRAMED)

    def is_trusted(self, chunk: int) -> bool:
        """Whether ``chunk`` is there and its bytes may be shown."""
        return bool(self._states[chunk] & TRUSTED)

    def is_any_trusted(self) -> bool:
        """Whether any chunk is trusted."""
        return any(state & TRUSTED for state in bytes(self._states))

    def is_all_trusted(self) -> bool:
        """Whether all chunks are there and trusted."""
        return all(state & TRUSTED for state in bytes(self._states))

    def missing(self) -> Iterator[int]:
        """The numbers of the chunks that are not there, ascending."""
        return (chunk for chunk in range(self.count) if not self.has(chunk))

    def unsynced(self) -> list[int]:
        """The chunks that lie where they belong, and may not be on the disk yet."""
        dirty = (THERE, THERE | TRUSTED)
        return [chunk for chunk, state in enumerate(bytes(self._states)) if state in dirty]

    def contiguous(self, chunk: int) -> int:
        """The first chunk at or after ``chunk`` that is not there; the count if there is none."""
        found = self._states.find(_ABSENT, chunk)
        return self.count if found < 0 else found

    def verdict(self) -> Verdict:
        """What an earlier process said of the blob. Raises :class:`OSError`."""
        told = os.pread(self._file, 1, VERDICT_OFFSET)
        return Verdict(told[0]) if told and told[0] in tuple(Verdict) else Verdict.OPEN

    def length(self, chunk: int) -> int:
        """Bytes in ``chunk``; the last one may be shorter."""
        return min(self.chunk_size, self.size - chunk * self.chunk_size)

    def done(self) -> int:
        """Bytes in the chunks that are there."""
        return sum(self.length(chunk) for chunk in range(self.count) if self.has(chunk))

    def close(self) -> None:
        """Close it."""
        os.close(self._file)


def trust_only(path: Path, name: str) -> bool:
    """Let no chunk be trusted in the map at ``path`` that came by another name than ``name``.

    For a map that nobody has open to write. Whether it was for that name. Raises :class:`OSError`.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        header = read_header(os.pread(file, HEADER_BYTES, 0))
        if header is None:
            return False
        if os.pread(file, NAME_BYTES, header.name_offset) == name_mark(name):
            return True
        states = os.pread(file, -(-header.size // header.chunk_size), HEADER_BYTES)
        if any(state & TRUSTED for state in states):
            os.pwrite(file, states.translate(_WITHOUT_TRUST), HEADER_BYTES)
            os.fsync(file)
        return False
    finally:
        os.close(file)
