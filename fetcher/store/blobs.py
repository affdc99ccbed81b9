"""Blobs below ``<root>/blobs``: sparse files that fill, chunk by chunk, until they are complete.

Bytes here are *fetched* until the digest of the whole was verified; only the store turns a partial
blob into a complete one, and only after its data was synchronised to the disk.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from typing import TYPE_CHECKING, Final

from fetcher.errors import ModelError, NoSpace
from fetcher.ranges import Range, join_chunks
from fetcher.store.chunks import ChunkMap
from fetcher.threads import Stopped

if TYPE_CHECKING:
    from pathlib import Path

    from fetcher.oci import Digest

_VERIFY_BYTES: Final = 1024 * 1024
_STOP_SECONDS: Final = 0.2
"""How long a waiting thread sleeps before it looks whether it should stop."""

_SYNC_FILE_RANGE_WRITE: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)
_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def disk_error(error: OSError, path: Path) -> ModelError:
    """What a failed write means for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(
            f"the disk below {path} is full: free some space there, or give the store another root",
            path=path,
        )
    return ModelError(f"{path} cannot be used: {error.strerror or error}", path=path)


def sync_folder(folder: Path) -> None:
    """Put the names in ``folder`` on the disk. Raises :class:`OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PartialBlob:
    """A blob on its way: its sparse file and its chunk map.

    Any number of threads may write different ranges of it and one may verify it at the same time;
    who starts them sees to it that no two write the same range, and that all have ended before
    :meth:`close`.
    """

    def __init__(
        self, path: Path, chunks: Path, digest: Digest, size: int, chunk_size: int
    ) -> None:
        """Open what is there of the blob, or start it. Raises :class:`ModelError`."""
        self.digest = digest
        self.size = size
        self._path = path
        self._arrival = threading.Condition()
        try:
            # the map comes first: a blob without one counts as complete
            self._chunks = ChunkMap(chunks, size, chunk_size)
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o444)
                os.ftruncate(self._file, size)
            except OSError:
                self._chunks.close()
                raise
        except OSError as error:
            raise disk_error(error, path) from error
        self.done = self._chunks.done()
        """Bytes that are there, in whole chunks."""

    def missing(self) -> list[Range]:
        """The ranges that are not there, ascending, joined."""
        return list(join_chunks(self._chunks.missing(), self._chunks.chunk_size, self.size))

    def sink(self, wanted: Range) -> ChunkSink:
        """A writer for the consecutive bytes of ``wanted``, which starts at a chunk's start."""
        return ChunkSink(self, wanted)

    def verify(self, stop: threading.Event) -> bool:
        """Follow the arriving chunks in order and hash them; whether the whole is what it should
        be.

        Reads while the bytes are still in the page cache. Raises :class:`fetcher.threads.Stopped`.
        """
        hasher = self.digest.hasher()
        buffer = memoryview(bytearray(min(_VERIFY_BYTES, max(self.size, 1))))
        offset = 0
        while offset < self.size:
            arrived = self._wait_past(offset, stop)
            while offset < arrived:
                if stop.is_set():
                    raise Stopped
                read = os.preadv(self._file, [buffer[: arrived - offset]], offset)
                if read == 0:
                    return False  # the file is shorter than its map says
                hasher.update(buffer[:read])
                offset += read
        return hasher.hexdigest() == self.digest.hex

    def _wait_past(self, offset: int, stop: threading.Event) -> int:
        """Wait for the byte at ``offset``; how far the bytes go on from there."""
        chunk = offset // self._chunks.chunk_size
        with self._arrival:
            while (end := self._chunks.contiguous(chunk)) == chunk:
                if stop.is_set():
                    raise Stopped
                self._arrival.wait(_STOP_SECONDS)
        return min(end * self._chunks.chunk_size, self.size)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put ``data`` at ``offset``. Raises :class:`ModelError`; says nothing of presence."""
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._file, view, offset)
                view = view[written:]
                offset += written
        except OSError as error:
            raise disk_error(error, self._path) from error

    def covers(self, wanted: Range) -> bool:
        """Whether all of ``wanted``, which is not empty, is there."""
        first, last = wanted.start // self.chunk_size, (wanted.stop - 1) // self.chunk_size
        return self._chunks.contiguous(first) > last

    def has(self, chunk: int) -> bool:
        """Whether ``chunk`` is there."""
        return self._chunks.has(chunk)

    def mark(self, chunk: int) -> None:
        """Say that ``chunk`` has been written, and have the kernel start to put it on the disk."""
        length = self._chunks.length(chunk)
        # only a hint that spreads the writing over the download: its failure costs time, not data
        _sync_file_range(
            self._file, chunk * self._chunks.chunk_size, length, _SYNC_FILE_RANGE_WRITE
        )
        with self._arrival:
            self._chunks.mark(chunk)
            self.done += length
            self._arrival.notify_all()

    @property
    def chunk_size(self) -> int:
        """Bytes in every chunk but the last."""
        return self._chunks.chunk_size

    def checkpoint(self, _: threading.Event) -> None:
        """Put on the disk what is there, so that a power loss does not take it."""

    def finish(self, _: threading.Event) -> None:
        """Wait until the data and the name are on the disk. Raises :class:`ModelError`."""
        try:
            os.fsync(self._file)
            sync_folder(self._path.parent)
        except OSError as error:
            raise disk_error(error, self._path) from error

    def close(self) -> None:
        """Release its descriptors; what is there stays."""
        os.close(self._file)
        self._chunks.close()


class ChunkSink:
    """Writes consecutive bytes of a partial blob and marks each chunk that they fill.

    It keeps its place: after a failure, fetching goes on at :attr:`remaining`, at the very byte.
    """

    def __init__(self, blob: PartialBlob, wanted: Range) -> None:
        if wanted.start % blob.chunk_size:
            raise ValueError(f"{wanted} does not start at a chunk's start")
        self._blob = blob
        self._position = wanted.start
        self._stop = wanted.stop
        self._skipping = False

    @property
    def remaining(self) -> Range:
        """What is still to come."""
        return Range(self._position, self._stop)

    def whole(self) -> bool:
        """Take the rest of the blob too, if this is where the blob starts and nothing came yet."""
        if self._position:
            return False
        self._stop = self._blob.size
        return True

    def __call__(self, data: bytes) -> bool:
        """Take the next bytes; false if they go beyond what was wanted.

        Bytes of a chunk that is there already are passed over, as they may have been hashed.
        """
        if len(data) > self._stop - self._position:
            return False
        view = memoryview(data)
        while view:
            chunk, into = divmod(self._position, self._blob.chunk_size)
            end = min((chunk + 1) * self._blob.chunk_size, self._blob.size)
            piece = view[: end - self._position]
            if into == 0:
                self._skipping = self._blob.has(chunk)
            if not self._skipping:
                self._blob.write(self._position, piece)
            self._position += len(piece)
            if self._position == end and not self._skipping:
                self._blob.mark(chunk)
            view = view[len(piece) :]
        return True
