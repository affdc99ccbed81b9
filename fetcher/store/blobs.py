"""Blobs on their way: they fill, chunk by chunk, until they are complete.

Bytes here are *fetched* until the digest of the whole was verified; only the store turns a partial
blob into a complete one, and only after its data was synchronised to the disk.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Final

from fetcher.ranges import Range, join_chunks
from fetcher.store.chunks import ChunkMap
from fetcher.store.disk import WritesLost, disk_error
from fetcher.threads import Stopped

if TYPE_CHECKING:
    from pathlib import Path

    from fetcher.errors import ModelError
    from fetcher.oci import Digest
    from fetcher.store.places import Place

_VERIFY_BYTES: Final = 256 * 1024
"""Read and hashed at one time: every blob on its way has so much memory of its own."""

_STOP_SECONDS: Final = 0.2
"""How long a waiting thread sleeps before it looks whether it should stop."""


class PartialBlob:
    """A blob on its way: the place of its bytes and its chunk map.

    Any number of threads may write different ranges of it, one may verify it and one make
    checkpoints at the same time; who starts them sees to it that no two write the same range, and
    that all have ended before :meth:`close`.
    """

    def __init__(
        self, place: Place, chunks: Path, digest: Digest, size: int, chunk_size: int
    ) -> None:
        """Open what is there of the blob, or start it. Raises :class:`ModelError`."""
        self.digest = digest
        self.size = size
        self._place = place
        self._arrival = threading.Condition()
        try:
            self._chunks = ChunkMap(chunks, size, chunk_size, place.form)
            try:
                self._open(place)
            except BaseException:
                self._chunks.close()
                raise
        except OSError as error:
            raise disk_error(error, place.path) from error
        self.done = self._chunks.done()
        """Bytes that are there, in whole chunks."""

    def _open(self, place: Place) -> None:
        intact = place.open(self.size)
        try:
            if not intact:
                self._chunks.clear()
            place.begin(self._there)
            self._forget_lost_fills()
        except BaseException:
            place.close()
            raise

    def _forget_lost_fills(self) -> None:
        """Give up begun chunks whose place is not known any more."""
        for chunk in self._chunks.missing():
            fill, framed = self._chunks.fill(chunk)
            if fill and not framed and not self.knows(chunk):
                self._chunks.set_fill(chunk, 0, framed=False)

    def missing(self) -> list[Range]:
        """The ranges that are not there, ascending, joined; of begun chunks their rest."""
        ranges: list[Range] = []
        for joined in join_chunks(self._chunks.missing(), self._chunks.chunk_size, self.size):
            for chunk in joined.split(self._chunks.chunk_size):
                fill, _ = self._chunks.fill(chunk.start // self._chunks.chunk_size)
                if fill or not ranges or ranges[-1].stop != chunk.start:
                    ranges.append(Range(chunk.start + fill, chunk.stop))
                else:
                    ranges[-1] = Range(ranges[-1].start, chunk.stop)
        return ranges

    def sink(self, wanted: Range) -> ChunkSink:
        """A writer for the consecutive bytes of ``wanted``.

        It starts at a chunk's start, or where the rest of a begun one does.
        """
        return ChunkSink(self, wanted)

    def rest(self) -> ChunkSink:
        """A writer for everything from the first missing byte on, of which there is one.

        What is there behind it is passed over. Nobody else may write to the blob meanwhile.
        """
        return ChunkSink(self, Range(self.missing()[0].start, self.size))

    def fill(self, number: int) -> tuple[int, bool]:
        """How many bytes of a chunk that is not there have been written, and whether framed."""
        return self._chunks.fill(number)

    def set_fill(self, number: int, fill: int, *, framed: bool) -> None:
        """Say so, that a killed process does not fetch them again. Raises :class:`ModelError`."""
        try:
            self._chunks.set_fill(number, fill, framed=framed)
        except OSError as error:
            raise disk_error(error, self._place.path) from error

    def verify(self, stop: threading.Event) -> bool:
        """Follow the arriving chunks in order and hash them; whether the whole is what it should
        be.

        Reads while the bytes are still in the page cache, and moves framed chunks on the way.
        Raises :class:`fetcher.threads.Stopped` and :class:`ModelError`.
        """
        hasher = self.digest.hasher()
        buffer = memoryview(bytearray(min(_VERIFY_BYTES, max(self.size, 1))))
        try:
            for number in range(self._chunks.count):
                self._wait_for(number, stop)
                chunk, framed = self.chunk(number), self._chunks.is_framed(number)
                offset = chunk.start
                while offset < chunk.stop:
                    if stop.is_set():
                        raise Stopped
                    wanted = buffer[: chunk.stop - offset]
                    read = self._place.read(offset, wanted, framed=framed)
                    if read == 0:
                        return False  # the file is shorter than its map says
                    hasher.update(wanted[:read])
                    offset += read
                if framed:
                    self._settle(number, chunk)
        except OSError as error:
            raise disk_error(error, self._place.path) from error
        return hasher.hexdigest() == self.digest.hex

    def _settle(self, number: int, chunk: Range) -> None:
        """Move a framed chunk where it belongs; a kill in between finds it in the frame still."""
        self._place.settle(chunk)
        self._chunks.mark(number)
        self._place.release(chunk)

    def _wait_for(self, chunk: int, stop: threading.Event) -> None:
        if self._chunks.has(chunk):
            return
        with self._arrival:
            while not self._chunks.has(chunk):
                if stop.is_set():
                    raise Stopped
                self._arrival.wait(_STOP_SECONDS)

    def _there(self, offset: int) -> int:
        """Where the bytes that are there from ``offset`` on end."""
        end = self._chunks.contiguous(offset // self._chunks.chunk_size)
        return min(end * self._chunks.chunk_size, self.size)

    def knows(self, chunk: int) -> bool:
        """Whether the place of ``chunk`` is known; it has to be written *framed* otherwise."""
        return self._place.knows(self.chunk(chunk))

    def write(self, offset: int, data: memoryview, *, framed: bool) -> None:
        """Put ``data`` at ``offset``. Raises :class:`ModelError`; says nothing of presence."""
        try:
            self._place.write(offset, data, framed=framed)
        except OSError as error:
            raise disk_error(error, self._place.path) from error

    def has(self, chunk: int) -> bool:
        """Whether ``chunk`` is there."""
        return self._chunks.has(chunk)

    def mark(self, number: int, *, framed: bool) -> None:
        """Say that a chunk has been written, and have the kernel start to put it on the disk.

        Raises :class:`ModelError`.
        """
        chunk = self.chunk(number)
        try:
            self._chunks.mark(number, framed=framed)
            self._place.arrived(chunk, framed=framed)
        except OSError as error:
            raise disk_error(error, self._place.path) from error
        with self._arrival:
            self.done += len(chunk)
            self._arrival.notify_all()

    def chunk(self, number: int) -> Range:
        """The bytes of a chunk."""
        start = number * self._chunks.chunk_size
        return Range(start, min(start + self._chunks.chunk_size, self.size))

    @property
    def chunk_size(self) -> int:
        """Bytes in every chunk but the last."""
        return self._chunks.chunk_size

    def checkpoint(self, _: threading.Event) -> None:
        """Put on the disk what is there, and then the map that says so.

        After a power loss the chunks of the last checkpoint are believed. Raises
        :class:`ModelError`.
        """
        # what is marked now was written before, and is synchronised by what follows
        marked = self._chunks.unsynced()
        if not marked:
            return
        try:
            self._place.sync()
            self._chunks.mark_synced(marked)
        except OSError as error:
            raise self._failed(error) from error

    def finish(self, stop: threading.Event) -> None:
        """Put data and names on the disk as they will stay, once the digest was right.

        Raises :class:`fetcher.errors.InvalidArtifact` for a tar that is broken or hostile, other
        :class:`ModelError`, and :class:`fetcher.threads.Stopped`.
        """
        try:
            self._place.finish(stop)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> ModelError:
        """What to raise; bytes that the disk may not have are not believed any more."""
        if isinstance(error, WritesLost):
            with contextlib.suppress(OSError):
                self._chunks.forget_unsynced()
        return disk_error(error, self._place.path)

    def close(self) -> None:
        """Release its descriptors; what is there stays."""
        self._place.close()
        self._chunks.close()


class ChunkSink:
    """Writes consecutive bytes of a partial blob and marks each chunk that they fill.

    It keeps its place: after a failure, fetching goes on at :attr:`remaining`, at the very byte.
    """

    def __init__(self, blob: PartialBlob, wanted: Range) -> None:
        self._blob = blob
        self._position = wanted.start
        self._stop = wanted.stop
        self._skipping = False
        self._framed = False
        number, into = divmod(wanted.start, blob.chunk_size)
        if into:
            fill, self._framed = blob.fill(number)
            if into != fill:
                raise ValueError(f"{wanted} starts neither at a chunk's start nor at its rest")

    @property
    def remaining(self) -> Range:
        """What is still to come."""
        return Range(self._position, self._stop)

    def whole(self) -> bool:
        """Whether the whole blob is what is wanted, so that it will do."""
        return self._position == 0 and self._stop == self._blob.size

    def restart(self) -> None:
        """Take the whole blob from its first byte, for an answer that knows no ranges.

        Nobody else may write to the blob meanwhile.
        """
        self._position, self._stop = 0, self._blob.size

    def __call__(self, data: bytes) -> bool:
        """Take the next bytes; false if they go beyond what was wanted.

        Bytes of a chunk that is there already are passed over, as they may have been hashed.
        """
        if len(data) > self._stop - self._position:
            return False
        view = memoryview(data)
        while view:
            number, into = divmod(self._position, self._blob.chunk_size)
            chunk = self._blob.chunk(number)
            piece = view[: chunk.stop - self._position]
            if into == 0:
                self._begin(number)
            if not self._skipping:
                self._blob.write(self._position, piece, framed=self._framed)
            self._position += len(piece)
            if not self._skipping:
                self._tell(number, chunk)
            view = view[len(piece) :]
        return True

    def _begin(self, number: int) -> None:
        self._skipping = self._blob.has(number)
        if not self._skipping:
            if self._blob.fill(number)[0]:
                # begun before, perhaps elsewhere: what is said of it must not outlive that
                self._blob.set_fill(number, 0, framed=False)
            self._framed = not self._blob.knows(number)

    def _tell(self, number: int, chunk: Range) -> None:
        """Say what is there now of the chunk that was written to."""
        if self._position == chunk.stop:
            self._blob.mark(number, framed=self._framed)
        else:
            self._blob.set_fill(number, self._position - chunk.start, framed=self._framed)
