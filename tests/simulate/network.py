"""Links that many transfers share: rates by water-filling, step by step, for thousands of nodes."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_ARRAYS: Final = ("_source", "_goal", "_from", "_to", "_stop", "_base", "_weight", "_live")
_ROUNDS: Final = 6
"""Of water-filling: enough to fill links to within a few per cent."""


class Network:
    """Transfers of pieces between ends, each with an up and a down link of its own.

    A piece that is passed on while it arrives never overtakes what it comes from. Transfers differ
    in how much of a link they get, as connections of TCP do.
    """

    def __init__(self, up: Floats, down: Floats, unfairness: float, seed: int) -> None:
        self.up, self.down = up, down
        self.sent = np.zeros(len(up))
        self.received = np.zeros(len(down))
        self._random = np.random.default_rng(seed)
        self._unfairness = unfairness
        room = 1024
        self._source: Ints = np.zeros(room, np.int64)
        self._goal: Ints = np.zeros(room, np.int64)
        self._from: Ints = np.full(room, -1, np.int64)
        self._to: Ints = np.zeros(room, np.int64)
        self._stop: Floats = np.zeros(room)
        self._base: Floats = np.zeros(room)
        self._weight: Floats = np.zeros(room)
        self._live = np.zeros(room, np.bool_)
        self._free = list(range(room - 1, -1, -1))
        self.there: Floats = np.zeros(room)
        """Bytes that are there, by place."""
        self._coming: Floats = np.zeros(room)
        self._places = 0

    def place(self) -> int:
        """A new place for the bytes of one piece."""
        if self._places == len(self.there):
            self.there = np.concatenate([self.there, np.zeros(len(self.there))])
            self._coming = np.concatenate([self._coming, np.zeros(len(self._coming))])
        self._places += 1
        return self._places - 1

    def start(
        self, source: int, goal: int, origin: int, place: int, stop: float, base: float = 0.0
    ) -> int:
        """Send from ``source`` to ``goal`` until ``place`` has ``stop`` bytes.

        ``origin`` is the place at the source, or -1 where all is there; what comes to ``place``
        begins there at the byte ``base``.
        """
        if not self._free:
            self._grow()
        number = self._free.pop()
        self._source[number], self._goal[number] = source, goal
        self._from[number], self._to[number], self._stop[number] = origin, place, stop
        self._base[number] = base
        self._weight[number] = self._random.lognormal(0.0, self._unfairness)
        self._live[number] = True
        return number

    def shorten(self, number: int, stop: float) -> None:
        """It ends earlier."""
        self._stop[number] = stop

    def continue_at(self, number: int, place: int) -> None:
        """What it sends goes on at another place, behind what is there."""
        self._stop[number] += self._base[number]
        self._base[number] = 0.0
        self._to[number] = place

    def end(self, number: int) -> None:
        """No more of it is sent."""
        self._live[number] = False
        self._free.append(number)

    def step(self, seconds: float) -> list[int]:
        """Let time pass; the transfers that have come to their end."""
        live = np.flatnonzero(self._live)
        if not len(live):
            return []
        source, goal, to = self._source[live], self._goal[live], self._to[live]
        origin = self._from[live]
        wanted = self._stop[live] - self.there[to]
        passed_on = origin >= 0
        at = self._base[live] + self.there[to]
        ahead = self.there[origin] + self._coming[origin] * seconds - at
        wanted = np.where(passed_on, np.minimum(wanted, np.maximum(ahead, 0.0)), wanted)
        rate = self._fill(source, goal, self._weight[live], wanted / seconds)
        moved = rate * seconds
        np.add.at(self.there, to, moved)
        np.add.at(self.sent, source, moved)
        np.add.at(self.received, goal, moved)
        self._coming[:] = 0.0
        self._coming[to] = rate
        done = self.there[to] >= self._stop[live] - 0.5
        return [int(one) for one in live[done]]

    def _fill(self, source: Ints, goal: Ints, weight: Floats, most: Floats) -> Floats:
        up, down = self.up.copy(), self.down.copy()
        rate = np.zeros(len(source))
        hungry = most > 0
        for _ in range(_ROUNDS):
            shares = np.where(hungry, weight, 0.0)
            ups = np.bincount(source, shares, len(up))
            downs = np.bincount(goal, shares, len(down))
            with np.errstate(divide="ignore", invalid="ignore"):
                level = np.minimum(up[source] / ups[source], down[goal] / downs[goal])
            more = np.where(hungry, np.minimum(level * weight, most - rate), 0.0)
            rate += more
            up -= np.bincount(source, more, len(up))
            down -= np.bincount(goal, more, len(down))
            hungry &= (rate < most) & (up[source] > 1.0) & (down[goal] > 1.0)
            if not hungry.any():
                break
        return rate

    def _grow(self) -> None:
        room = len(self._source)
        self._free = list(range(2 * room - 1, room - 1, -1))
        for name in _ARRAYS:
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
