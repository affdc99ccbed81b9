"""Blobs on their way: they fill, chunk by chunk, until they are complete.

Bytes here are *fetched* until the digest of the whole was verified; only the store turns a partial
blob into a complete one, and only after its data was synchronised to the disk.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from typing import TYPE_CHECKING, Final

from fetcher.errors import ChunkMismatch
from fetcher.ranges import Range, join_chunks
from fetcher.store.chunks import ChunkMap, Verdict
from fetcher.store.disk import WritesLost, disk_error
from fetcher.store.hashing import Hashing
from fetcher.store.proving import Proving
from fetcher.store.sinks import ChunkSink
from fetcher.threads import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fetcher.chunk_digests import BlobChunks
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
    that all have ended before :meth:`close`. Any thread may read what is there, at any time.
    """

    def __init__(
        self, place: Place, chunks: Path, digest: Digest, size: int, chunk_size: int
    ) -> None:
        """Open what is there of the blob, or start it. Raises :class:`ModelError`."""
        self.digest = digest
        self.size = size
        self._place = place
        self._arrival = threading.Condition()
        """Of chunks that come or go, and of readers."""
        self._moves = threading.Lock()
        """Held while a chunk leaves the frame, or proves to be wrong."""
        self._watchers: tuple[Callable[[int], None], ...] = ()
        self.is_misread = False
        """Headers of an archive were read that proved wrong: where its bytes lie is not known."""
        self.replaced: set[int] = set()
        """Chunks that were others than a trusted source's, when it was asked for them too."""
        self.disproved: set[int] = set()
        """Chunks that were there, and that digests which came later proved wrong."""
        self.doubted: set[int] = set()
        """The same, where the digests are hearsay, and still gone by."""
        self._contradicted: Proving | None = None
        """Hearsay that says otherwise than what a trusted source has sent."""
        self._readers = 0
        self._closed = False
        self.made: BlobChunks | None = None
        """Its chunk digests, once :meth:`verify` has found it to be right."""
        self._hashing = 0
        """The chunk that is hashed next, or is being hashed."""
        self._hash_from: int | None = None
        """The first chunk that was hashed and has proved wrong since."""
        self._proving: Proving | None = None
        """What proves chunks when they come, so that they need not be hashed in order."""
        self._verifying: Proving | None = None
        """What :meth:`verify` goes by; it takes up another one when it begins again."""
        self._trusted_name = ""
        try:
            self._chunks = ChunkMap(chunks, size, chunk_size, place.form)
            try:
                self._open(place)
            except BaseException:
                self._chunks.close()
                raise
        except OSError as error:
            raise disk_error(error, place.path) from error
        self._hash = Hashing(digest, size, self._chunks.chunk_size)
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

    def sink(self, wanted: Range, *, trusted: bool = False) -> ChunkSink:
        """A writer for the consecutive bytes of ``wanted``, from whom its bytes can be trusted.

        It starts at a chunk's start, or where the rest of a begun one does.
        """
        return ChunkSink(self, wanted, trusted=trusted)

    def rest(self, *, trusted: bool = False) -> ChunkSink:
        """A writer for everything from the first missing byte on, of which there is one.

        What is there behind it is passed over. Nobody else may write to the blob meanwhile.
        """
        return ChunkSink(self, Range(self.missing()[0].start, self.size), trusted=trusted)

    def trust(self, name: str) -> None:
        """Let trusted chunks be those that come by ``name``; see :meth:`ChunkMap.trust`.

        Raises :class:`ModelError`.
        """
        with self._map_errors():
            if not self._chunks.is_for(name):
                # before the name: what is listed was read from what the other one sent
                self._place.forget_index()
            self._chunks.trust(name)
        self._trusted_name = name

    def expect(self, chunks: BlobChunks | None, name: str | None = None) -> bool:
        """Check each chunk that comes from now on, and in :meth:`verify` those that are there;
        whether the chunk digests are of use here.

        They are from the registry and repository ``name``, and what they prove is trusted as a part
        of that name; without a name they are hearsay, and nothing is trusted by it. None: do not
        any more, as they proved wrong; everything is hashed then.
        """
        before, fits = self._proving, chunks is not None and self.fits(chunks)
        self._proving = Proving(chunks, name) if chunks is not None and fits else None
        # in this order: who adds to it looks the other way round
        self.doubted = set()
        for number in () if before is None else before.vouched():
            # who is to be believed no more has let it pass
            self.drop(number)
        self.verify_anew()
        return fits

    @property
    def is_contradicted(self) -> bool:
        """Whether what a trusted source has sent is not what hearsay says of it."""
        return self._contradicted is not None and self._contradicted is self._proving

    def fits(self, chunks: BlobChunks) -> bool:
        """Whether chunk digests are of chunks as they are here."""
        theirs = chunks.digest, chunks.size, chunks.chunk_size
        return theirs == (self.digest, self.size, self.chunk_size)

    @property
    def is_proving(self) -> bool:
        """Whether each chunk that comes is trusted, whoever sends it: its own digest proves it."""
        proving = self._proving
        if proving is None or proving.name is None:
            return False
        return proving.name == self._trusted_name

    def fill(self, number: int) -> tuple[int, bool]:
        """How many bytes of a chunk that is not there have been written, and whether framed."""
        return self._chunks.fill(number)

    def is_fill_trusted(self, number: int) -> bool:
        """Whether all that has been written of a chunk that is not there is trusted."""
        return self._chunks.is_fill_trusted(number)

    def set_fill(self, number: int, fill: int, *, framed: bool, trusted: bool = False) -> None:
        """Say so, that a killed process does not fetch them again. Raises :class:`ModelError`."""
        with self._map_errors():
            self._chunks.set_fill(number, fill, framed=framed, trusted=trusted)
        self._tell(number)

    # -- verifying ---------------------------------------------------------------------------------

    def verify(self, stop: threading.Event, patience: float = math.inf) -> bool | None:
        """Follow the arriving chunks in order, and hash those that were not hashed as they came;
        whether the whole is what it should be, or None if chunks proved wrong, or the next one did
        not come within ``patience`` seconds: called again, it goes on at :attr:`hashing`.

        Reads while the bytes are still in the page cache, and moves framed chunks on the way.
        Raises :class:`fetcher.threads.Stopped` and :class:`ModelError`.
        """
        buffer = memoryview(bytearray(min(_VERIFY_BYTES, max(self.size, 1))))
        with self._map_errors():
            while self._hashing < self._chunks.count or self._hash_from is not None:
                if not self._hash_anew(buffer, stop):
                    return None
                if self._hashing == self._chunks.count:
                    continue
                if not self._wait_for(self._hashing, stop, patience):
                    return None
                if self._verifying is not None:
                    if not self._recheck(self._verifying, self._hashing, buffer, stop):
                        return None
                elif not self._catch_up(self._hashing, buffer, stop):
                    return False  # the file is shorter than its map says
                self._hashing += 1
        return self._is_right()

    def _is_right(self) -> bool | None:
        """Whether all that was hashed is what it should be; None where some of it just went."""
        proving = self._verifying
        if proving is not None:
            self.made = proving.chunks if proving.is_complete else None
            return None if self.made is None else True
        with self._hash.turn:
            right, self.made = self._hash.finish()
        if not right:
            # the values before the last chunk are there still
            self.verify_anew(self._chunks.count - 1)
        return right

    @property
    def hashing(self) -> int:
        """The chunk that is hashed next; the number of chunks at the end."""
        return self._hashing

    @property
    def is_awaiting(self) -> bool:
        """Whether :meth:`verify` has nothing to do before the chunk comes that is hashed next."""
        if self._hash_from is not None or self._hashing >= self._chunks.count:
            return False
        return not self._chunks.has(self._hashing)

    def verify_anew(self, first: int = 0) -> None:
        """Let :meth:`verify` begin again at chunk ``first``: bytes that it has seen were replaced.

        Where it cannot, it begins at the first one.
        """
        with self._arrival:
            self._hash_from = first if self._hash_from is None else min(first, self._hash_from)

    def _hash_anew(self, buffer: memoryview, stop: threading.Event) -> bool:
        """Go back to the first chunk that has to be hashed again, if there is one; what is there is
        looked at where its digests came meanwhile. Whether all that is there is right so far.
        """
        with self._arrival:
            first, self._hash_from = self._hash_from, None
        if first is None:
            return True
        before, self._verifying = self._verifying, self._proving
        if self._verifying is not None or before is not None:
            first = 0
        with self._hash.turn:
            self._hash.go_back(first)
            self._hashing = min(first, self._hash.reached // self.chunk_size)
        return self._verifying is None or self._sift(self._verifying, buffer, stop)

    def _sift(self, proving: Proving, buffer: memoryview, stop: threading.Event) -> bool:
        """Look at all chunks that are there and were not proven; whether none of them is wrong."""
        right = True
        for number in range(self.count):
            if stop.is_set():
                self.verify_anew()
                raise Stopped
            if self.has(number) and not proving.has(number) and not self.is_contradicted:
                right &= self._judge(proving, number, buffer)
        return right

    def _judge(self, proving: Proving, number: int, buffer: memoryview) -> bool:
        """Whether a chunk that is there is right, which makes it a trusted one if what proves it
        is trusted; one that is wrong is dropped.

        Hearsay against what a trusted source has sent is not followed.
        """
        trusted, framed = self.is_trusted(number), self._chunks.is_framed(number)
        if not proving.check(number, self._blocks(number, buffer, framed=framed)):
            if trusted and proving.name is None:
                self._contradicted = proving
                return False
            wrong = self.disproved if proving.name is not None else self.doubted
            if proving is self._proving:
                wrong.add(number)
            self.drop(number)
            return False
        if proving.name is not None and proving.name == self._trusted_name:
            self.mark_trusted(number)
        if proving is not self._proving and proving.is_vouched(number):
            # it was given up meanwhile
            self.drop(number)
        return True

    def _catch_up(self, number: int, buffer: memoryview, stop: threading.Event) -> bool:
        """Hash what was not hashed yet of a chunk that is there, if all of it is there, and move it
        where it belongs.
        """
        chunk, framed = self.chunk(number), self._chunks.is_framed(number)
        with self._hash.turn:
            since = max(chunk.start, self._hash.reached)
            for block in self._blocks(number, buffer, framed=framed, since=since):
                if stop.is_set():
                    raise Stopped
                self._hash.update(block)
        if self._hash.reached < chunk.stop:
            return False
        if framed:
            self._settle(number, chunk)
        return True

    def _recheck(
        self, proving: Proving, number: int, buffer: memoryview, stop: threading.Event
    ) -> bool:
        """Whether a chunk that is there was proven, or is; one that is wrong is dropped."""
        framed = self._chunks.is_framed(number)
        if not proving.has(number):
            if stop.is_set():
                raise Stopped
            if not self._judge(proving, number, buffer):
                return False
        if framed:
            self._settle(number, self.chunk(number))
        return True

    def _blocks(
        self, number: int, buffer: memoryview, *, framed: bool, since: int = 0
    ) -> Iterator[memoryview]:
        """What has been written of a chunk, from the blob's byte ``since`` on, in order, in one
        buffer that is used again.
        """
        chunk = self.chunk(number)
        offset = max(chunk.start, since)
        while offset < chunk.stop:
            wanted = buffer[: chunk.stop - offset]
            read = self._place.read(offset, wanted, framed=framed)
            if read == 0:
                return
            yield wanted[:read]
            offset += read

    def _settle(self, number: int, chunk: Range) -> None:
        """Move a framed chunk where it belongs; a kill in between finds it in the frame still."""
        with self._moves:
            if self._chunks.is_framed(number):
                self._place.settle(chunk)
                self._chunks.mark_settled(number)
                self._place.release(chunk)

    def _wait_for(self, chunk: int, stop: threading.Event, patience: float) -> bool:
        if self._chunks.has(chunk):
            return True
        deadline = time.monotonic() + patience
        with self._arrival:
            while not self._chunks.has(chunk):
                if stop.is_set():
                    raise Stopped
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._arrival.wait(min(_STOP_SECONDS, left))
        return True

    # -- presence ----------------------------------------------------------------------------------

    def _there(self, offset: int) -> int:
        """Where the bytes that are there from ``offset`` on end."""
        end = self._chunks.contiguous(offset // self._chunks.chunk_size)
        return min(end * self._chunks.chunk_size, self.size)

    def knows(self, chunk: int) -> bool:
        """Whether the place of ``chunk`` is known; it has to be written *framed* otherwise."""
        return self._place.knows(self.chunk(chunk))

    def write(self, offset: int, data: memoryview, *, framed: bool) -> None:
        """Put ``data`` at ``offset``, and hash it if it is what comes next. Raises
        :class:`ModelError`; says nothing of presence.
        """
        with self._map_errors():
            self._place.write(offset, data, framed=framed)
        if offset < self._hash.reached:
            # a chunk that was begun begins anew
            self.verify_anew(offset // self.chunk_size)
        elif self._proving is None and self._hash_from is None:
            self._hash.along(offset, data)

    def read(self, offset: int, buffer: memoryview) -> int:
        """Fill some of ``buffer`` with what has been written at ``offset``, trusted or not.

        Gives bytes of the one chunk that ``offset`` is in, as many as there are of it; 0 where
        there are none, or the blob was closed. From any thread. Raises :class:`ModelError`.
        """
        number = offset // self._chunks.chunk_size
        with self._kept_open() as is_open, self._map_errors():
            while is_open:
                end, framed = self._written(number)
                if end <= offset:
                    return 0
                read = self._place.read(offset, buffer[: end - offset], framed=framed)
                if self._written(number)[1] == framed:
                    return read
        return 0

    def read_on(self, offset: int, buffer: memoryview) -> int:
        """As :meth:`read`, through several chunks: until all is read, or some of it is missing."""
        done = 0
        while done < len(buffer) and (more := self.read(offset + done, buffer[done:])):
            done += more
        return done

    @contextlib.contextmanager
    def _kept_open(self) -> Iterator[bool]:
        """Whether it is open, and then it stays so inside the block."""
        with self._arrival:
            is_open = not self._closed
            self._readers += is_open
        try:
            yield is_open
        finally:
            with self._arrival:
                self._readers -= is_open
                self._arrival.notify_all()

    def _written(self, number: int) -> tuple[int, bool]:
        """Where the written bytes of a chunk end, and whether they are in the frame."""
        chunk = self.chunk(number)
        fill, fill_framed = self._chunks.fill(number)
        # in this order: a chunk that is marked in between is there
        if self._chunks.has(number):
            return chunk.stop, self._chunks.is_framed(number)
        return chunk.start + fill, fill_framed

    @contextlib.contextmanager
    def watch(self, callback: Callable[[int], None]) -> Iterator[None]:
        """Have ``callback`` called with a chunk's number whenever some of its bytes came.

        It is called in whichever thread received them, and must be quick.
        """
        with self._arrival:
            self._watchers += (callback,)
        try:
            yield
        finally:
            with self._arrival:
                left = list(self._watchers)
                left.remove(callback)
                self._watchers = tuple(left)

    def _tell(self, number: int) -> None:
        for watcher in self._watchers:
            watcher(number)

    def has(self, chunk: int) -> bool:
        """Whether ``chunk`` is there."""
        return self._chunks.has(chunk)

    def states(self) -> bytes:
        """A byte for each chunk, which is 0 where it is not there."""
        return self._chunks.states()

    def is_trusted(self, chunk: int) -> bool:
        """Whether ``chunk`` is there and may be shown before the whole blob was verified."""
        return self._chunks.is_trusted(chunk)

    def is_doubtful(self, chunk: int) -> bool:
        """Whether the chunk is there, and nobody knows if it is right."""
        return self.has(chunk) and not self.is_trusted(chunk)

    @property
    def is_any_trusted(self) -> bool:
        """Whether some of it may be shown."""
        return self._chunks.is_any_trusted()

    @property
    def is_all_trusted(self) -> bool:
        """Whether all of it may be shown."""
        return self._chunks.is_all_trusted()

    def first_missing(self, chunk: int) -> int:
        """The first chunk at or after ``chunk`` that is not there; the count if there is none."""
        return self._chunks.contiguous(chunk)

    def mark(self, number: int, *, framed: bool, trusted: bool = False) -> None:
        """Say that a chunk has been written, and have the kernel start to put it on the disk.

        Where chunk digests are expected, its bytes are checked first: raises
        :class:`ChunkMismatch` if they are wrong, and they are not there then. Raises other
        :class:`ModelError`.
        """
        chunk = self.chunk(number)
        proving = self._proving
        with self._map_errors():
            if proving is not None:
                self._prove(proving, number, framed=framed, trusted=trusted)
                trusted |= proving.name is not None and proving.name == self._trusted_name
            self._chunks.mark(number, framed=framed, trusted=trusted)
            self._place.arrived(chunk, framed=framed)
        with self._arrival:
            self.done += len(chunk)
            self._arrival.notify_all()
        if proving is not self._proving and proving is not None and proving.is_vouched(number):
            self.drop(number)
        self._tell(number)

    def _prove(self, proving: Proving, number: int, *, framed: bool, trusted: bool) -> None:
        """Check what was written of a whole chunk."""
        buffer = memoryview(bytearray(min(_VERIFY_BYTES, self.size)))
        if proving.check(number, self._blocks(number, buffer, framed=framed), alone=not trusted):
            return
        self._chunks.set_fill(number, 0, framed=False)
        error = ChunkMismatch(
            f"what came for chunk {number} of blob {self.digest} is not what its digest says",
            digest=self.digest,
        )
        error.hearsay = None if proving.name is not None else proving.chunks
        raise error

    def mark_trusted(self, number: int) -> None:
        """Say that a trusted source sent what is there of a chunk. Raises :class:`ModelError`."""
        with self._map_errors():
            self._chunks.mark_trusted(number)
        self._tell(number)

    def drop(self, number: int) -> bool:
        """A chunk that is there proved wrong: it is not there any more. Whether it is framed.

        Raises :class:`ModelError`.
        """
        chunk = self.chunk(number)
        proving = self._proving
        with self._map_errors(), self._moves:
            if not self.has(number):
                # two came to the same conclusion
                return False
            framed = self._chunks.is_framed(number)
            self._chunks.unmark(number)
            if proving is not None:
                proving.forget(number)
        self.is_misread |= any(
            piece.start < chunk.stop and chunk.start < piece.stop for piece in self._place.headers()
        )
        with self._arrival:
            self.done -= len(chunk)
        if number <= self._hashing or chunk.start < self._hash.reached:
            self.verify_anew(number)
        return framed

    def drop_untrusted(self, _: threading.Event) -> None:
        """Some of what is not trusted is wrong, and nobody knows what: all of it goes.

        For a worker thread, while nobody writes. Raises :class:`ModelError`.
        """
        for number in range(self.count):
            if self.is_doubtful(number):
                self.drop(number)

    @contextlib.contextmanager
    def _map_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_error(error, self._place.path) from error

    def chunk(self, number: int) -> Range:
        """The bytes of a chunk."""
        start = number * self._chunks.chunk_size
        return Range(start, min(start + self._chunks.chunk_size, self.size))

    def chunks(self, wanted: Range) -> range:
        """The numbers of the chunks in which bytes of ``wanted`` lie."""
        return range(wanted.start // self.chunk_size, -(-wanted.stop // self.chunk_size))

    @property
    def chunk_size(self) -> int:
        """Bytes in every chunk but the last."""
        return self._chunks.chunk_size

    @property
    def count(self) -> int:
        """How many chunks it has."""
        return self._chunks.count

    # -- archives ----------------------------------------------------------------------------------

    def awaited(self) -> int | None:
        """Where the bytes begin that have to come before more headers of a tar can be read; None
        where all have been read, or there are none.
        """
        return self._place.awaited()

    def read_headers(self, _: threading.Event) -> None:
        """Read the headers of a tar that are there; in a worker thread. Raises
        :class:`ModelError`."""
        with self._kept_open() as is_open, self._map_errors():
            if is_open:
                self._place.read_headers()

    def untrusted_headers(self) -> list[Range]:
        """Of a tar whose headers have all been read: the chunks of them that are not trusted."""
        numbers = sorted({one for piece in self._place.headers() for one in self.chunks(piece)})
        return [self.chunk(one) for one in filter(self.is_doubtful, numbers)]

    def write_index(self, _: threading.Event) -> bool:
        """Let readers know what is in a tar, once :meth:`awaited` is None; in a worker thread.

        Whether that was done: not once the blob was closed. Raises
        :class:`fetcher.errors.InvalidArtifact` for one that is broken or hostile, and other
        :class:`ModelError`.
        """
        with self._kept_open() as is_open, self._map_errors():
            if is_open:
                self._place.write_index()
            return is_open

    # -- the end -----------------------------------------------------------------------------------

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

    def conclude(self, verdict: Verdict) -> None:
        """Tell readers in other processes what became of it. Raises :class:`ModelError`."""
        with self._map_errors():
            self._chunks.conclude(verdict)

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called: its file may be another one's from then on."""
        return self._closed

    def close(self) -> None:
        """Release its descriptors, once nobody reads; what is there stays. Again, it does nothing.

        From any thread, if nobody else closes it meanwhile.
        """
        with self._arrival:
            if self._closed:
                return
            self._closed = True
            self._arrival.wait_for(lambda: not self._readers)
        try:
            self._place.close()
        finally:
            self._chunks.close()
