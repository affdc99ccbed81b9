"""Who reads a file one byte after another, and how far ahead of him to fetch. No I/O.

The kernel tells the inode, not the reader: several threads may read one file through one
descriptor, each its own part. So readers are told apart by where they read: a *stream* is a run of
reads each of which goes on near where the one before stopped. Its window grows with it; whoever
jumps about gets none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fetcher.ranges import Range

STEP: Final = 4 * 1024 * 1024
"""The first window: a chunk, as long as nobody says otherwise."""

MOST_STEPS: Final = 64

_MOST_STREAMS: Final = 64
"""Of one file; beyond that the one is forgotten that read longest ago."""

_PROOF: Final = 1024 * 1024
"""More than this was read in a row by whoever reads on: a read here or there may come in pieces,
and has at most so much."""

_GAP: Final = 128 * 1024
"""A reader that begins to be a stream may leave out this much: the kernel's first read-ahead."""

_SETTLED: Final = 4
"""After so many reads in a row it is one, and its reads may come out of order."""

_SLACK: Final = 8 * 1024 * 1024
"""Twice what the kernel reads ahead: so far apart are the reads that it sends at one time."""


@dataclass(slots=True)
class _Stream:
    start: int
    position: int
    """Up to here it has read."""
    ahead: int
    """Up to here it was fetched ahead."""
    reads: int = 1
    window: int = 0
    last: int = 0
    """When it read last, counted in reads of the file."""

    def goes_on_with(self, wanted: Range) -> bool:
        """Whether this read may be the next one of this stream."""
        behind = self.position - wanted.start
        if self.reads >= _SETTLED:
            return -_SLACK <= behind <= _SLACK
        return -_GAP <= behind <= len(wanted)


class Streams:
    """The streams of one file of ``size`` bytes."""

    def __init__(self, size: int, step: int = STEP) -> None:
        self._size = size
        self._step = step
        self._streams: list[_Stream] = []
        self._reads = 0

    def read(self, wanted: Range) -> Range | None:
        """Tell of a read; what to fetch ahead because of it, if anything."""
        self._reads += 1
        stream = min(
            (stream for stream in self._streams if stream.goes_on_with(wanted)),
            key=lambda stream: abs(stream.position - wanted.start),
            default=None,
        )
        if stream is None:
            self._begin(wanted)
            return None
        stream.last = self._reads
        stream.reads += 1
        stream.position = max(stream.position, wanted.stop)
        return self._grow(stream) if stream.position - stream.start > _PROOF else None

    def _begin(self, wanted: Range) -> None:
        if len(self._streams) >= _MOST_STREAMS:
            self._streams.remove(min(self._streams, key=lambda stream: stream.last))
        self._streams.append(_Stream(wanted.start, wanted.stop, wanted.stop, last=self._reads))

    def _grow(self, stream: _Stream) -> Range | None:
        """The next window, once half of the one before was read."""
        if stream.ahead - stream.position > stream.window // 2:
            return None
        stream.window = min(max(2 * stream.window, self._step), MOST_STEPS * self._step)
        start = max(stream.ahead, stream.position)
        stop = min(stream.position + stream.window, self._size)
        stream.ahead = max(stream.ahead, stop)
        return Range(start, stop) if start < stop else None
