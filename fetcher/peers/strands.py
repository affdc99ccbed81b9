"""One chunk that several sources bring, each a part of it, and that is written in order.

What the first of them brings is written as it comes, so that others can be passed it on meanwhile.
What those behind it bring waits in memory: at most a chunk, of which no byte is asked for twice.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from fetcher.ranges import Range

if TYPE_CHECKING:
    from fetcher.store.sinks import ChunkSink


_LITTLE: Final = 32 * 1024
_MUCH: Final = 256 * 1024
_LEAST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.16
"""How long is waited for more where little came: a dozen slow transfers would keep a processor busy
with a packet at a time, at each node that it is passed on to.
"""


class Cut(Exception):
    """The rest of what this source sends comes from another one; never reaches a user."""


class Rope:
    """The strands of one chunk, in order. Its sink is used by one thread at a time."""

    def __init__(self, sink: ChunkSink) -> None:
        self.sink = sink
        self.lock = threading.Lock()
        wanted = sink.remaining
        self.first = Strand(self, wanted)
        self._strands = [self.first]

    @property
    def is_split(self) -> bool:
        """Whether several sources bring parts of it, or of what is left."""
        return len(self._strands) > 1

    def is_front(self, strand: Strand) -> bool:
        """Whether it is this one's turn to be written."""
        return self._strands[0] is strand

    def split(self, strand: Strand, count: int) -> Strand | None:
        """A strand of its own for the last ``count`` bytes of one.

        None where less than that is left, or the strand is busy for the moment.
        """
        if not self.lock.acquire(blocking=False):
            return None
        try:
            left = strand.remaining
            if strand not in self._strands or not 0 < count <= len(left):
                return None
            middle = left.stop - count
            behind = Strand(self, Range(middle, left.stop))
            self._strands.insert(self._strands.index(strand) + 1, behind)
            strand.shorten(middle)
            if not strand.remaining:
                self.advance()
            return behind
        finally:
            self.lock.release()

    def advance(self) -> None:
        """Write what waited behind strands that have come to their end. The lock is held."""
        while len(self._strands) > 1 and not self._strands[0].remaining:
            del self._strands[0]
            self._strands[0].flush()


class Strand:
    """The sink of one source for its part of a chunk; see :class:`fetcher.answers.Sink`."""

    def __init__(self, rope: Rope, wanted: Range) -> None:
        self.rope = rope
        self._position, self._stop = wanted.start, wanted.stop
        self._waiting: list[tuple[bytes, bool, str]] = []
        self.trusted = False
        """As of :class:`ChunkSink`; of the bytes that come next."""
        self.sender = ""
        self._pause = _LEAST_PAUSE

    @property
    def remaining(self) -> Range:
        """What is still to come."""
        return Range(self._position, self._stop)

    def shorten(self, stop: int) -> None:
        """It ends earlier. The lock is held."""
        self._stop = stop

    def whole(self) -> bool:
        """A whole blob will not do for a part of a chunk."""
        return False

    def __call__(self, data: memoryview) -> bool:
        """Take the next bytes. Raises :class:`Cut` where others bring what comes behind them."""
        with self.rope.lock:
            wanted = data[: self._stop - self._position]
            if wanted:
                self._take(wanted)
                if not self.remaining:
                    self.rope.advance()
            if len(wanted) < len(data):
                raise Cut
        if len(data) >= _LITTLE:
            self._pause = max(self._pause / 2, _LEAST_PAUSE)
        elif len(self.remaining) > _MUCH:
            time.sleep(self._pause)
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        return True

    def _take(self, data: memoryview) -> None:
        if self.rope.is_front(self):
            self._write(data, self.trusted, self.sender)
        else:
            self._waiting.append((bytes(data), self.trusted, self.sender))
        self._position += len(data)

    def flush(self) -> None:
        """Write what has waited for its turn. The lock is held."""
        waiting, self._waiting = self._waiting, []
        for data, trusted, sender in waiting:
            self._write(memoryview(data), trusted, sender)

    def _write(self, data: memoryview, trusted: bool, sender: str) -> None:
        sink = self.rope.sink
        sink.trusted, sink.sender = trusted, sender
        sink(data)
