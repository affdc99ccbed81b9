"""Writing the consecutive bytes of a range into a blob that is on its way, chunk by chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fetcher.errors import ChunkMismatch
from fetcher.ranges import Range

if TYPE_CHECKING:
    from fetcher.store.blobs import PartialBlob


class ChunkSink:
    """Writes consecutive bytes of a partial blob and marks each chunk that they fill.

    It keeps its place: after a failure, fetching goes on at :attr:`remaining`, at the very byte.
    A chunk that is there is never written again, as it may have been hashed; but one that is not
    trusted is compared with what comes from a trusted source, and replaced where it differs.
    """

    def __init__(self, blob: PartialBlob, wanted: Range, *, trusted: bool = False) -> None:
        self.trusted = trusted
        """Whether the bytes that come next may be shown before the whole blob was verified.

        Changes with who is asked; a chunk is trusted if all of its bytes were.
        """
        self.sender = ""
        """Who sends the bytes that come next."""
        self._senders: set[str] = set()
        """Who sent those of the current chunk that were written."""
        self._blob = blob
        self._position = wanted.start
        self._stop = wanted.stop
        self._there = False
        """The current chunk was there when it began."""
        self._all_trusted = True
        """What has come of the current chunk so far."""
        self._framed = False
        number, into = divmod(wanted.start, blob.chunk_size)
        if into:
            fill, self._framed = blob.fill(number)
            self._all_trusted = blob.is_fill_trusted(number)
            # begun before, by nobody knows whom
            self._senders.add("")
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

    def __call__(self, data: bytes | bytearray | memoryview) -> bool:
        """Take the next bytes; false if they go beyond what was wanted."""
        if len(data) > self._stop - self._position:
            return False
        view = memoryview(data)
        while view:
            number, into = divmod(self._position, self._blob.chunk_size)
            chunk = self._blob.chunk(number)
            piece = view[: chunk.stop - self._position]
            if into == 0:
                self._begin(number)
            self._all_trusted &= self.trusted
            if self._there and self._all_trusted and not self._blob.is_trusted(number):
                self._compare(number, chunk, piece)
            if not self._there:
                self._blob.write(self._position, piece, framed=self._framed)
                self._senders.add(self.sender)
            self._position += len(piece)
            self._tell(number, chunk)
            view = view[len(piece) :]
        return True

    def _begin(self, number: int) -> None:
        self._there, self._all_trusted = self._blob.has(number), True
        self._senders.clear()
        if not self._there:
            if self._blob.fill(number)[0]:
                # begun before, perhaps elsewhere: what is said of it must not outlive that
                self._blob.set_fill(number, 0, framed=False)
            self._framed = not self._blob.knows(number)

    def _compare(self, number: int, chunk: Range, piece: memoryview) -> None:
        """Look whether what is there is what comes; what differs is replaced from here on."""
        found = memoryview(bytearray(len(piece)))
        read = self._blob.read_on(self._position, found)
        if read == len(piece) and found == piece:
            return
        self._there, self._framed = False, self._blob.drop(number)
        self._blob.replaced.add(number)
        # what came before it is the same
        fill = self._position - chunk.start
        self._blob.set_fill(number, fill, framed=self._framed, trusted=True)

    def _tell(self, number: int, chunk: Range) -> None:
        """Say what is there now of the chunk that was written to, or compared."""
        blob, trusted = self._blob, self._all_trusted
        whole = self._position == chunk.stop
        if self._there:
            if whole and trusted and not blob.is_trusted(number):
                blob.mark_trusted(number)
        elif whole:
            self._mark(number, chunk, trusted=trusted)
        else:
            fill = self._position - chunk.start
            blob.set_fill(number, fill, framed=self._framed, trusted=trusted)

    def _mark(self, number: int, chunk: Range, *, trusted: bool) -> None:
        try:
            self._blob.mark(number, framed=self._framed, trusted=trusted)
        except ChunkMismatch as error:
            # all of it comes again, from one who can be told
            self._position = chunk.start
            error.senders = frozenset(self._senders)
            raise
