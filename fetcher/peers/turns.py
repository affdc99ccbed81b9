"""Which of a node's downloads asks peers next: in one order, the same on every node.

All of them share the room for requests. What an owner is asked for by one node first, the others
ask it for first, too: it is fetched once, and passed on to all while it arrives. That order is the
manifest's, as nodes open the blobs of a model in it, a few dozen at a time: an owner that is asked
for a late one first would let its asker wait behind all that others ask of it. And only who may ask
looks what to ask for: there may be hundreds of blobs on their way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    Order = tuple[int, str]

_MOMENT: Final = 0.2
"""Seconds after which all look again: some had to be left alone for a while."""
_OPENING_SECONDS: Final = 1.0
"""How long those behind it wait for a download that is about to begin."""


class Asking(Protocol):
    """A download."""

    @property
    def order(self) -> Order:
        """Those with less of it come first. May become less."""

    def wake(self) -> None:
        """Have it look what to ask for."""

    def has_work(self) -> bool:
        """Whether it has anything left to ask for."""

    def is_choosing(self) -> bool:
        """Whether it looks when it is woken, and passes its turn on."""

    def is_opening(self) -> bool:
        """Whether it will be choosing in a moment, for the first time."""

    def is_asked(self) -> bool:
        """Whether other nodes wait for some of it: it comes first."""

    def is_waiting(self) -> bool:
        """Whether requests of it are under way."""

    def may_ask(self) -> bool:
        """Whether it might ask for something now, room or not."""


class Turns:
    """The downloads of a node that ask peers. Belongs to the trio thread."""

    def __init__(self, has_room: Callable[[], bool], clock: Callable[[], float]) -> None:
        """``has_room`` says whether another request may go out."""
        self._has_room = has_room
        self._clock = clock
        self._all: list[Asking] = []
        self._since: dict[Asking, float] = {}
        self._turn: Asking | None = None
        self._next: list[Asking] = []
        """Whose turn it is afterwards, the first one last."""
        self._began_at = float("-inf")

    def attend(self, one: Asking) -> None:
        """Give it its turns from now on."""
        self._all.append(one)
        self._since[one] = self._clock()

    def leave(self, one: Asking) -> None:
        """Not any more."""
        self._all.remove(one)
        del self._since[one]
        self.pass_on(one)

    @property
    def is_idle(self) -> bool:
        """Whether none has anything left to ask for."""
        return not any(one.has_work() for one in self._all)

    def begin(self) -> None:
        """There may be room for another request: the first one looks, and then those behind it.

        With nothing left to ask for, those that wait see to what takes long.
        """
        self._began_at = self._clock()
        if not self._has_room():
            return
        waiting = [one for one in self._all if one.has_work() or self._is_opening(one)]
        if not waiting:
            for one in self._all:
                if one.is_waiting():
                    one.wake()
            return
        waiting.sort(key=_rank)
        self._next = waiting[::-1]
        self._give()

    def is_first(self, one: Asking) -> bool:
        """Whether it is the first of those that look when they are woken."""
        return next((other for other in self._all if other.is_choosing()), None) is one

    def may_look(self, one: Asking) -> bool:
        """Whether it is its turn."""
        if self._clock() >= self._began_at + _MOMENT:
            self.begin()
        return self._turn is one

    def pass_on(self, one: Asking) -> None:
        """It has found nothing more to ask for now: the next one looks, if it was its turn."""
        if self._turn is one:
            self._turn = None
            if self._has_room():
                self._give()

    def _give(self) -> None:
        self._turn = None
        while self._next and self._turn is None:
            one = self._next.pop()
            if one not in self._since:
                continue
            if self._is_opening(one):
                # it begins a round itself once it is open
                return
            if one.is_choosing() and one.may_ask():
                self._turn = one
                one.wake()

    def _is_opening(self, one: Asking) -> bool:
        return one.is_opening() and self._clock() < self._since[one] + _OPENING_SECONDS


def _rank(one: Asking) -> tuple[bool, Order]:
    # what others wait for comes first, else all nodes have the same order
    return not one.is_asked(), one.order
