"""The page cache that reads of the store leave behind, and how it is given back.

What pods read lies in the page cache as pages of the mount. The store's file beneath was read for
it, or has just been written, and its pages would be there a second time: so they are dropped behind
the readers. Pages that are not on the disk yet cannot be dropped; those are gone over again later.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from fetcher.ranges import Range, join_chunks

if TYPE_CHECKING:
    from collections.abc import Callable

_ENOUGH: Final = 16 * 1024 * 1024
"""So much behind its readers is dropped at once."""

_SOON: Final = 1.0
"""Seconds after which also less than that is dropped."""

_AGAIN: Final = (3.0, 12.0, 45.0)
"""Seconds after which it is gone over again: the kernel writes what is dirty within half a
minute."""

_BLOCK: Final = 64 * 1024
"""What is read is counted in these: the store writes in such pieces, and the kernel drops whole
folios only."""

_LONG: Final = 1024 * 1024
"""A range of at least this was read by somebody who reads on. What lies around it goes with it,
whatever brought it there, and again later, as it may have been written just now. Of what is read
here and there only that goes, once: the rest may serve others."""

_EDGE: Final = 2 * 1024 * 1024
"""No folio is larger than this."""


Identity = tuple[int, int]
"""Device and inode number of a file."""


@dataclass(slots=True)
class _Fresh:
    """What was read of one file and not dropped yet."""

    since: float
    blocks: set[int] = field(default_factory=set)
    bytes: int = 0

    def ranges(self) -> tuple[Range, ...]:
        return tuple(map(_with_edges, join_chunks(sorted(self.blocks), _BLOCK, sys.maxsize)))


@dataclass(frozen=True, slots=True)
class _Round:
    """What is gone over again at a time."""

    when: float
    number: int
    file: Identity
    ranges: tuple[Range, ...]


class Behind:
    """What to drop of which file, and when. Times are passed in; no I/O."""

    def __init__(self) -> None:
        self._fresh: dict[Identity, _Fresh] = {}
        self._rounds: list[_Round] = []

    def read(self, file: Identity, part: Range, now: float) -> bool:
        """Tell of bytes that were read; whether something is due at once."""
        fresh = self._fresh.get(file)
        if fresh is None:
            fresh = self._fresh[file] = _Fresh(now)
        fresh.bytes += len(part)
        fresh.blocks.update(range(part.start // _BLOCK, -(-part.stop // _BLOCK)))
        return fresh.bytes >= _ENOUGH

    def due(self, now: float) -> list[tuple[Identity, Range]]:
        """What is to be dropped now."""
        ripe = [
            file
            for file, fresh in self._fresh.items()
            if fresh.bytes >= _ENOUGH or now - fresh.since >= _SOON
        ]
        found = [_Round(now, 0, file, self._fresh.pop(file).ranges()) for file in ripe]
        found += [one for one in self._rounds if one.when <= now]
        self._rounds = [one for one in self._rounds if one.when > now]
        for one in found:
            long = tuple(part for part in one.ranges if len(part) >= _LONG)
            if long and one.number < len(_AGAIN):
                when = now + _AGAIN[one.number]
                self._rounds.append(_Round(when, one.number + 1, one.file, long))
        return [(one.file, part) for one in found for part in one.ranges]

    def next_due(self) -> float | None:
        """When :meth:`due` has something next, if nothing else is read."""
        times = [fresh.since + _SOON for fresh in self._fresh.values()]
        times += [one.when for one in self._rounds]
        return min(times, default=None)

    def files(self) -> set[Identity]:
        """The files of which something is still to be dropped."""
        return {*self._fresh, *(one.file for one in self._rounds)}


def _with_edges(part: Range) -> Range:
    if len(part) < _LONG:
        return part
    return Range(part.start // _EDGE * _EDGE, -(-part.stop // _EDGE) * _EDGE)


class Droppings:
    """Drops pages of the store's files behind their readers."""

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        self._behind = Behind()
        self._files: dict[Identity, int] = {}
        """Descriptors of our own, as readers close theirs."""
        self._clock = clock
        self._wake = trio.Event()

    def read(self, file: Identity, descriptor: int, part: Range) -> None:
        """Tell of bytes that were read of a file, which the descriptor leads to."""
        if file not in self._files:
            try:
                self._files[file] = os.dup(descriptor)
            except OSError:
                # the reader has his bytes: pages that stay are no reason to fail him
                return
            self._wake.set()
        if self._behind.read(file, part, self._clock()):
            self._wake.set()

    async def run(self) -> None:
        """Drop until cancelled."""
        while True:
            due = self._behind.due(self._clock())
            pairs = [(self._files[file], part) for file, part in due]
            if pairs:
                await trio.to_thread.run_sync(_drop, pairs)
            self._close_done()
            self._wake = trio.Event()
            when = self._behind.next_due()
            with trio.move_on_at(float("inf") if when is None else when):
                await self._wake.wait()

    def _close_done(self) -> None:
        for file in self._files.keys() - self._behind.files():
            os.close(self._files.pop(file))


def _drop(pairs: list[tuple[int, Range]]) -> None:
    for descriptor, part in pairs:
        os.posix_fadvise(descriptor, part.start, len(part), os.POSIX_FADV_DONTNEED)
