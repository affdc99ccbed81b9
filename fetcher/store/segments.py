"""A tar as a sequence of segments: the contents of its files, and the frame between them."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from fetcher.artifacts import Entry, FileEntry
from fetcher.ranges import Range

if TYPE_CHECKING:
    from collections.abc import Iterator


class Segments:
    """Which ranges of a tar are the contents of its files, as far as that is known."""

    def __init__(self) -> None:
        self.known = 0
        """Up to here it is known."""
        self.files = 0
        """How many regular files there are before that."""
        self.entries: list[tuple[Entry, int]] = []
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._numbers: list[int] = []

    def add(self, entry: Entry, offset: int) -> None:
        """The next entry, its content at ``offset``."""
        self.entries.append((entry, offset))
        if isinstance(entry, FileEntry):
            if entry.size:
                self._starts.append(offset)
                self._stops.append(offset + entry.size)
                self._numbers.append(self.files)
            self.files += 1
            offset += entry.size
        self.known = offset

    def pieces(self, wanted: Range) -> Iterator[tuple[Range, int | None, int]]:
        """``wanted`` as consecutive pieces: each with the number of its file, None for the frame,
        and its offset there.
        """
        position = wanted.start
        index = bisect.bisect_right(self._stops, position)
        while position < wanted.stop:
            if index == len(self._starts) or wanted.stop <= self._starts[index]:
                yield Range(position, wanted.stop), None, position
                return
            start, stop = self._starts[index], min(self._stops[index], wanted.stop)
            if position < start:
                yield Range(position, start), None, position
                position = start
            yield Range(position, stop), self._numbers[index], position - start
            position = stop
            index += 1
