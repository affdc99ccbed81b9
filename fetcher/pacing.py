"""Letting background transfers give way: to those that somebody waits for, and to a rate limit.

A transfer that gives way is not read from for a moment, and the sender stops by itself when its
window is full. Nothing that is on its way is lost, as it would be if the connection were closed.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

from fetcher.schedule import Urgency

if TYPE_CHECKING:
    from fetcher.answers import Sink
    from fetcher.schedule import Demand

_LONGEST_PAUSE: Final = 1.0
"""Seconds for which a transfer is not read from: its sender must not take it for dead."""
_PATIENCE: Final = 1.0
"""Seconds without a byte after which nobody gives way any more to who is waited for."""
_STOP_SECONDS: Final = 0.2
_BURST_SECONDS: Final = 0.5
"""For so long the rate may be made up for, after it was not used."""


class Pacing:
    """What the node's transfers know of each other. For threads, but where it says otherwise."""

    def __init__(self, rate: float | None = None) -> None:
        """``rate`` is a limit in bytes per second, of all background transfers together."""
        self._rate = rate
        self._change = threading.Condition()
        self._first: set[Demand] = set()
        """Those that others give way to."""
        self._moved = 0.0
        """When the last byte came for one of these."""
        self._due = 0.0
        """When what has come so far would have come at the limited rate."""

    def begin(self, demand: Demand) -> None:
        """A transfer begins, or its demand has become more urgent."""
        if demand.urgency <= Urgency.AHEAD:
            with self._change:
                self._first.add(demand)
                self._moved = time.monotonic()
                self._change.notify_all()

    def end(self, demand: Demand) -> None:
        """A transfer has ended."""
        with self._change:
            self._first.discard(demand)
            self._change.notify_all()

    def took(self, demand: Demand, count: int, stop: threading.Event) -> None:
        """So many bytes came: wait as long as the next ones have to."""
        if demand.urgency <= Urgency.AHEAD:
            self._moved = time.monotonic()
            return
        self._give_way(demand, stop)
        if self._rate is not None and demand.urgency is Urgency.BACKGROUND:
            self._slow_down(demand, count / self._rate, stop)

    def _give_way(self, demand: Demand, stop: threading.Event) -> None:
        if not self._first:
            return
        until = time.monotonic() + _LONGEST_PAUSE
        with self._change:
            while self._first and demand not in self._first and not stop.is_set():
                left = min(until, self._moved + _PATIENCE) - time.monotonic()
                if left <= 0:
                    return
                self._change.wait(min(left, _STOP_SECONDS))

    def _slow_down(self, demand: Demand, seconds: float, stop: threading.Event) -> None:
        with self._change:
            self._due = max(self._due, time.monotonic() - _BURST_SECONDS) + seconds
            due = self._due
            while demand.urgency is Urgency.BACKGROUND and not stop.is_set():
                left = due - time.monotonic()
                if left <= 0:
                    return
                self._change.wait(min(left, _STOP_SECONDS))


class PacedSink:
    """A sink that takes what comes, and then waits as long as it has to."""

    def __init__(self, sink: Sink, demand: Demand, pacing: Pacing, stop: threading.Event) -> None:
        self._sink = sink
        self._demand = demand
        self._pacing = pacing
        self._stop = stop

    def whole(self) -> bool:
        return self._sink.whole()

    def __call__(self, data: memoryview) -> bool:
        taken = self._sink(data)
        self._pacing.took(self._demand, len(data), self._stop)
        return taken
