"""Where the bytes of a blob lie while it is fetched: one file, or the final files of a tar layer.

A raw or compressed layer is one sparse file. An uncompressed tar is written straight into the files
that trees will link to: its headers, read as they arrive, say which bytes belong where. What comes
before the headers that place it waits in the *frame*, a sparse file with the blob's own offsets,
where the headers and the padding stay; once a chunk was moved, its place there becomes a hole. So
neither form ever takes its size twice.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
from typing import TYPE_CHECKING, Final, Protocol

from fetcher.archives import (
    MAX_EXTENSION_BYTES,
    MAX_HEADERS_BYTES,
    NotThere,
    TarWalk,
    UnpackLimits,
)
from fetcher.artifacts import Entry, FileEntry, Tree
from fetcher.compression import BoundedReader
from fetcher.errors import InvalidArtifact
from fetcher.ranges import Range
from fetcher.store.disk import (
    finish_file,
    publish_folder,
    punch_hole,
    start_writing,
    sync_file,
    sync_folder,
    write_at,
    write_durably,
)
from fetcher.store.layers import FRAME, INDEX, encode_index
from fetcher.store.parts import Parts, open_writable
from fetcher.store.segments import Segments
from fetcher.threads import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

_BLOCK: Final = 4096
_COPY_BYTES: Final = 1024 * 1024
_NAME_BYTES: Final = 64
"""What a file's name takes in its folder, at most."""
_OTHER_BYTES: Final = 8 * _BLOCK
"""What a layer's folder, index, frame and map take by being there."""
_MAX_HEADERS: Final = MAX_HEADERS_BYTES + 2 * MAX_EXTENSION_BYTES
"""More than all headers of one entry may have: what is missing beyond is the archive's end."""

_NEW_INDEX: Final = f"{INDEX}.new"

WHOLE_FILE: Final = 1
TAR_FILES: Final = 2


class Place(Protocol):
    """Where a blob's bytes go. Errors of the disk are :class:`OSError`.

    Used by several threads; no two write or read the same chunk at one time.
    """

    form: int
    path: Path

    def open(self, size: int) -> bool:
        """Open or make the files; whether what was there before can be believed."""

    def begin(self, there: Callable[[int], int]) -> None:
        """Look at what was there before; ``there`` gives where the bytes from an offset on end."""

    def knows(self, chunk: Range) -> bool:
        """Whether it is known where these bytes belong; what is not is *framed*."""

    def write(self, offset: int, data: memoryview, *, framed: bool) -> None:
        """Put ``data`` at ``offset`` of the blob."""

    def read(self, offset: int, buffer: memoryview, *, framed: bool) -> int:
        """Fill some of ``buffer`` from ``offset``; 0 if there is nothing."""

    def arrived(self, chunk: Range, *, framed: bool) -> None:
        """A chunk was written, and marked."""

    def settle(self, chunk: Range) -> None:
        """Put a framed chunk where it belongs; all that is before it is there."""

    def release(self, chunk: Range) -> None:
        """A settled chunk was marked: its place in the frame is not needed any more."""

    def awaited(self) -> int | None:
        """Where the bytes begin that must come before more headers of an archive can be read."""

    def read_headers(self) -> None:
        """Read the headers of an archive that can be read by now; nobody else is at it after."""

    def headers(self) -> list[Range]:
        """What of an archive is not the content of its files, as far as is known."""

    def write_index(self) -> None:
        """Write down what an archive holds, once :meth:`awaited` is None.

        Raises :class:`fetcher.errors.InvalidArtifact`.
        """

    def forget_index(self) -> None:
        """What was written down of an archive may be wrong: nobody is to read it."""

    def sync(self) -> None:
        """Put what was written so far on the disk."""

    def finish(self, stop: threading.Event) -> None:
        """Put everything on the disk, as it will stay; the digest was right.

        Raises :class:`fetcher.errors.InvalidArtifact` and :class:`fetcher.threads.Stopped`.
        """

    def close(self) -> None:
        """Close its files."""


class WholeFile:
    """A blob in one file."""

    form = WHOLE_FILE

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1

    def open(self, size: int) -> bool:
        self._file, intact = _open_sparse(self.path, size)
        return intact

    def begin(self, there: Callable[[int], int]) -> None:
        """A file has nothing to be looked at."""

    def knows(self, chunk: Range) -> bool:
        return True

    def write(self, offset: int, data: memoryview, *, framed: bool) -> None:
        write_at(self._file, offset, data)

    def read(self, offset: int, buffer: memoryview, *, framed: bool) -> int:
        return os.preadv(self._file, [buffer], offset)

    def arrived(self, chunk: Range, *, framed: bool) -> None:
        start_writing(self._file, chunk.start, len(chunk))

    def settle(self, chunk: Range) -> None:
        raise ValueError("nothing is framed here")

    release = settle

    def awaited(self) -> int | None:
        return None

    def read_headers(self) -> None:
        """A file is no archive."""

    def headers(self) -> list[Range]:
        return []

    def write_index(self) -> None:
        """A file is no archive."""

    def forget_index(self) -> None:
        """A file is no archive."""

    def sync(self) -> None:
        sync_file(self._file)
        sync_folder(self.path.parent)

    def finish(self, stop: threading.Event) -> None:
        self.sync()

    def close(self) -> None:
        os.close(self._file)


def _open_sparse(path: Path, size: int) -> tuple[int, bool]:
    """An open file of ``size`` bytes, and whether it was one before. Raises :class:`OSError`."""
    descriptor = open_writable(path)
    try:
        intact = os.fstat(descriptor).st_size == size
        if not intact:
            os.ftruncate(descriptor, 0)
            os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, intact


class _ArrivedReader(BoundedReader):
    """The frame of a tar as a stream in which bytes are missing."""

    def __init__(self, frame: int, there: Callable[[int], int], size: int) -> None:
        super().__init__(io.BytesIO(), size)
        self._frame = frame
        self._there = there

    def readinto(self, buffer: memoryview) -> int:
        wanted = buffer[: self.left]
        if not wanted:
            return 0
        there = self._there(self.position) - self.position
        if there <= 0:
            raise NotThere
        count = os.preadv(self._frame, [wanted[:there]], self.position)
        self.position += count
        return count

    def skip(self, size: int) -> int:
        count = min(size, self.left)
        self.position += count
        return count


class TarFiles:
    """An uncompressed tar in the files that it holds."""

    form = TAR_FILES

    def __init__(self, path: Path, grow: Callable[[int], None]) -> None:
        """The frame is ``path``, the files are beside it until :meth:`finish`.

        ``grow`` is told of bytes that the layer takes beyond its size, and may raise
        :class:`fetcher.errors.NoSpace`.
        """
        self.path = path
        self._parts = path.with_name(path.name + ".parts")
        self._grow = grow
        self._lock = threading.Lock()
        """Of what is known, and of what has to be synchronised."""
        self._indexing = threading.Lock()
        """Of the index, until the layer is finished."""
        self._finished = False
        self._segments = Segments()
        self._problem: InvalidArtifact | None = None
        self._resting = False
        """Only the archive's end is missing, or nothing: headers are not looked for any more."""
        self._dirty: set[int] = set()

    def open(self, size: int) -> bool:
        self._frame, intact = _open_sparse(self.path, size)
        try:
            intact = intact and self._parts.is_dir()
            if not intact and self._parts.exists():
                shutil.rmtree(self._parts)
            self._parts.mkdir(mode=0o700, exist_ok=True)
            # what an earlier process wrote may not be on the disk either
            self._dirty = {int(name) for name in os.listdir(self._parts) if name.isdecimal()}
            self._files = Parts(self._parts)
        except OSError:
            os.close(self._frame)
            raise
        self._size = size
        return intact

    def begin(self, there: Callable[[int], int]) -> None:
        reader = _ArrivedReader(self._frame, there, self._size)
        self._walk = TarWalk(reader, UnpackLimits(max_bytes=self._size))
        self._walk_on()

    def knows(self, chunk: Range) -> bool:
        with self._lock:
            return chunk.stop <= self._segments.known

    def _pieces(self, wanted: Range) -> list[tuple[Range, int | None, int]]:
        with self._lock:
            return list(self._segments.pieces(wanted))

    def write(self, offset: int, data: memoryview, *, framed: bool) -> None:
        if framed:
            write_at(self._frame, offset, data)
            return
        for piece, number, there in self._pieces(Range(offset, offset + len(data))):
            part = data[piece.start - offset : piece.stop - offset]
            if number is None:
                write_at(self._frame, there, part)
                continue
            with self._files.use(number) as file:
                write_at(file, there, part)
            with self._lock:
                # after it was written: whoever finds it in here synchronises what it wrote
                self._dirty.add(number)

    def read(self, offset: int, buffer: memoryview, *, framed: bool) -> int:
        if framed:
            return os.preadv(self._frame, [buffer], offset)
        piece, number, there = self._pieces(Range(offset, offset + len(buffer)))[0]
        if number is None:
            return os.preadv(self._frame, [buffer[: len(piece)]], there)
        with self._files.use(number) as file:
            return os.preadv(file, [buffer[: len(piece)]], there)

    def arrived(self, chunk: Range, *, framed: bool) -> None:
        if not framed:
            for piece, number, there in self._pieces(chunk):
                if number is not None:
                    with self._files.use(number) as file:
                        start_writing(file, there, len(piece))
        elif not self._resting and self._walk.reached < chunk.stop:
            self._walk_on()

    def _walk_on(self) -> None:
        """Read the headers that are there by now."""
        with self._lock:
            known_files = self._segments.files
            if not self._resting:
                self._read_headers()
            new_files = self._segments.files - known_files
        if new_files:
            self._grow(new_files * (_BLOCK + _NAME_BYTES))

    def _read_headers(self) -> None:
        segments, walk = self._segments, self._walk
        try:
            for entry, offset in walk.advance():
                segments.add(entry, offset)
        except NotThere:
            segments.known = max(segments.known, walk.position)
            self._resting = walk.reached - walk.position > _MAX_HEADERS
        except InvalidArtifact as error:
            # the bytes may be wrong, or the archive: which of the two, the digest will say
            self._problem = error
            self._resting = True
        else:
            self._resting = True
        if self._resting:
            segments.known = self._size

    def awaited(self) -> int | None:
        with self._lock:
            return None if self._resting else self._walk.reached

    def read_headers(self) -> None:
        if not self._resting:
            self._walk_on()

    def headers(self) -> list[Range]:
        return [piece for piece, number, _ in self._pieces(Range(0, self._size)) if number is None]

    def write_index(self) -> None:
        if self._problem is not None:
            raise self._problem
        entries = self._segments.entries
        _check_entries(entry for entry, _ in entries)
        index = encode_index(entries)
        with self._indexing:
            if not self._finished:
                self._grow(len(index) + _BLOCK)
                self._write_index(index)

    def forget_index(self) -> None:
        with self._indexing:
            if not self._finished:
                (self._parts / INDEX).unlink(missing_ok=True)
                sync_folder(self._parts)

    def _write_index(self, index: bytes) -> None:
        scratch = self._parts / _NEW_INDEX
        scratch.unlink(missing_ok=True)
        write_durably(scratch, index)
        scratch.rename(self._parts / INDEX)
        sync_folder(self._parts)

    def settle(self, chunk: Range) -> None:
        self._walk_on()
        buffer = memoryview(bytearray(min(_COPY_BYTES, len(chunk))))
        for piece, number, there in self._pieces(chunk):
            if number is None:
                continue
            with self._files.use(number) as file:
                for part in piece.split(len(buffer)):
                    view = buffer[: len(part)]
                    if os.preadv(self._frame, [view], part.start) < len(part):
                        raise OSError(errno.EIO, "the frame is shorter than it was")
                    write_at(file, there + part.start - piece.start, view)
                start_writing(file, there, len(piece))
            with self._lock:
                self._dirty.add(number)

    def release(self, chunk: Range) -> None:
        for piece, number, _ in self._pieces(chunk):
            start = -(-piece.start // _BLOCK) * _BLOCK
            stop = piece.stop // _BLOCK * _BLOCK
            if number is not None and start < stop:
                punch_hole(self._frame, start, stop - start)

    def sync(self) -> None:
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        try:
            for number in sorted(dirty):
                with self._files.use(number) as file:
                    sync_file(file)
            sync_file(self._frame)
            sync_folder(self._parts)
            sync_folder(self.path.parent)
        except BaseException:
            with self._lock:
                self._dirty |= dirty
            raise

    def finish(self, stop: threading.Event) -> None:
        self._resting = False
        self._walk_on()
        if self._problem is not None:
            raise self._problem
        entries = self._segments.entries
        _check_entries(entry for entry, _ in entries)
        frame = [piece for piece, number, _ in self._pieces(Range(0, self._size)) if number is None]
        index = encode_index(entries)
        self._grow(sum(len(piece) for piece in frame) + len(index) + _OTHER_BYTES)
        files = [entry for entry, _ in entries if isinstance(entry, FileEntry)]
        for number, entry in enumerate(files):
            if stop.is_set():
                raise Stopped
            with self._files.use(number) as file:
                if os.fstat(file).st_size != entry.size:
                    raise OSError(errno.EIO, f"the bytes of {entry.path} are not all there")
                finish_file(file, executable=entry.executable, mtime_ns=entry.mtime_ns)
                sync_file(file)
        with self._indexing:
            self._finished = True
        (self._parts / FRAME).unlink(missing_ok=True)
        self._copy_frame(frame)
        self._write_index(index)
        publish_folder(self._parts, self.path.with_name(self.path.name + ".files"))

    def _copy_frame(self, pieces: list[Range]) -> None:
        """Write headers and padding one after the other, into the file that is kept."""
        with (self._parts / FRAME).open("xb", buffering=_COPY_BYTES) as file:
            for piece in pieces:
                for part in piece.split(_COPY_BYTES):
                    file.write(os.pread(self._frame, len(part), part.start))
            file.flush()
            sync_file(file.fileno())

    def close(self) -> None:
        self._files.close()
        os.close(self._frame)


def _check_entries(entries: Iterable[Entry]) -> None:
    """Raise :class:`InvalidArtifact` for entries that contradict each other."""
    tree = Tree()
    for entry in entries:
        tree.add(entry)
    tree.entries()
