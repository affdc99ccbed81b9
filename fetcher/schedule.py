"""Which bytes of a blob are fetched next: pure policy, over what is there and who wants what.

Somebody who waits for bytes comes first, then what is likely to be asked for next, then what is
wanted whole, then the rest. What is being fetched is not asked for again: it only gets the urgency
of whoever wants it now.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fetcher.ranges import Range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Prefetch(enum.Enum):
    """What a lazy volume fetches besides what is read; the value is the volume attribute's."""

    ALL = "all"
    OPENED = "opened"
    NONE = "none"


class Urgency(enum.IntEnum):
    """Who waits for bytes; the lower comes first."""

    URGENT = 0
    """Somebody waits for these very bytes: nothing else may be in their way."""
    AHEAD = 1
    """They are asked for next, as it seems."""
    WHOLE = 2
    """Somebody waits for all of the blob, or has opened the file that they are in."""
    BACKGROUND = 3
    """Nobody waits."""


@dataclass(eq=False, slots=True)
class Demand:
    """How much a request for bytes matters; it may come to matter more while it is under way."""

    urgency: Urgency = Urgency.WHOLE
    order: int = 0
    """Among equally urgent ones, the lower comes first."""


class Presence(Protocol):
    """What there is of a blob; :class:`fetcher.store.blobs.PartialBlob` is one."""

    size: int

    @property
    def chunk_size(self) -> int: ...
    @property
    def count(self) -> int: ...
    def has(self, chunk: int) -> bool: ...
    def is_trusted(self, chunk: int) -> bool: ...
    def first_missing(self, chunk: int) -> int: ...
    def fill(self, number: int) -> tuple[int, bool]: ...
    def is_fill_trusted(self, number: int) -> bool: ...


@dataclass(eq=False, slots=True)
class Want:
    """Some bytes that are wanted, by somebody; a want is itself and equals no other."""

    wanted: Range
    urgency: Urgency
    order: int = 0
    trusted: bool = False
    """Whether chunks that are there, but not trusted, are wanted from a trusted source."""
    before: int = 0
    """All chunks below this one that are wanted are there."""


@dataclass(eq=False, slots=True)
class Piece:
    """Consecutive bytes to fetch with one request."""

    wanted: Range
    chunks: range
    trusted: bool
    """From a trusted source alone."""
    demand: Demand = field(default_factory=Demand)


class Schedule:
    """What is wanted of one blob, and what of it is being fetched. Belongs to the trio thread."""

    def __init__(self) -> None:
        self._wants: list[Want] = []
        self._flying: dict[int, Piece] = {}
        """Pieces that are being fetched, by each of their chunks."""

    # -- what is wanted ----------------------------------------------------------------------------

    def add(self, want: Want) -> list[Demand]:
        """Take in a want. Gives the demands of requests under way that matter more by it."""
        self._wants.append(want)
        self._wants.sort(key=lambda one: (one.urgency, one.order))
        hurried = []
        for piece in set(self._flying.values()):
            if want.urgency < piece.demand.urgency and _overlap(piece.wanted, want.wanted):
                piece.demand.urgency, piece.demand.order = want.urgency, want.order
                hurried.append(piece.demand)
        return hurried

    def remove(self, want: Want) -> None:
        """Nobody wants it any more; what of it is under way goes on."""
        if want in self._wants:
            self._wants.remove(want)

    def is_met(self, want: Want, there: Presence) -> bool:
        """Whether all chunks of a want are there, as it wants them."""
        return next(self._lacking(want, there), None) is None

    def look_again(self) -> None:
        """Chunks that were there are there no more."""
        for want in self._wants:
            want.before = 0

    @property
    def is_watched(self) -> bool:
        """Whether more is wanted than the whole, sooner or later."""
        return any(want.urgency is not Urgency.WHOLE for want in self._wants)

    @property
    def is_hurried(self) -> bool:
        """Whether somebody waits for these very bytes."""
        return bool(self._wants) and self._wants[0].urgency <= Urgency.AHEAD

    @property
    def is_asked(self) -> bool:
        """Whether others than those of this node wait for some of it."""
        return bool(self._wants) and self._wants[0].order < 0

    # -- what is fetched ---------------------------------------------------------------------------

    def next(
        self,
        there: Presence,
        most: int,
        allowed: Callable[[Urgency], bool] = lambda _: True,
        pick: Callable[[Want, Iterator[int]], int | None] = lambda _, chunks: next(chunks, None),
    ) -> Piece | None:
        """What to fetch next, of at most ``most`` chunks; it is under way until :meth:`release`.

        Wants of an urgency that is not ``allowed`` are passed over. Of the chunks that one lacks,
        ascending, ``pick`` takes the first of the piece, or none.
        """
        for want in self._wants:
            if not allowed(want.urgency):
                continue
            first = pick(want, filter(self._is_idle, self._lacking(want, there)))
            if first is not None:
                piece = self._piece(want, first, there, most)
                self._flying.update(dict.fromkeys(piece.chunks, piece))
                return piece
        return None

    def release(self, piece: Piece) -> None:
        """A piece is not being fetched any more, whether it came or not."""
        for chunk in piece.chunks:
            if self._flying.get(chunk) is piece:
                del self._flying[chunk]
        if piece.trusted:
            # what was there may have proved wrong, and is not there any more
            self.look_again()

    def under_way(self, urgency: Urgency) -> int:
        """How many pieces of this urgency, or of a higher one that is not the highest."""
        pieces = set(self._flying.values())
        if urgency is Urgency.URGENT:
            return sum(one.demand.urgency is urgency for one in pieces)
        return sum(Urgency.URGENT < one.demand.urgency <= urgency for one in pieces)

    def has_work(self, there: Presence) -> bool:
        """Whether anything that is wanted is not there, and is not being fetched."""
        return any(self._is_idle(one) for want in self._wants for one in self._lacking(want, there))

    def _is_idle(self, chunk: int) -> bool:
        return chunk not in self._flying

    def _lacking(self, want: Want, there: Presence) -> Iterator[int]:
        """The chunks that a want still waits for, ascending."""
        if not want.wanted:
            return
        size = there.chunk_size
        chunk = max(want.wanted.start // size, want.before)
        stop = -(-want.wanted.stop // size)
        found = False
        while chunk < stop:
            if not want.trusted:
                chunk = there.first_missing(chunk)
            if chunk >= stop:
                break
            if not (there.is_trusted(chunk) if want.trusted else there.has(chunk)):
                if not found:
                    found, want.before = True, chunk
                yield chunk
            chunk += 1
        if not found:
            want.before = stop

    def _piece(self, want: Want, first: int, there: Presence, most: int) -> Piece:
        """As many chunks from ``first`` on as are alike: all missing, or all to be proven."""
        stop = min(first + most, -(-want.wanted.stop // there.chunk_size))
        proving = there.has(first)
        last = first + 1
        while (
            last < stop
            and self._is_idle(last)
            and there.has(last) == proving
            and not (there.is_trusted(last) if proving else there.fill(last)[0])
        ):
            last += 1
        start = first * there.chunk_size
        if not proving and (not want.trusted or there.is_fill_trusted(first)):
            start += there.fill(first)[0]
        wanted = Range(start, min(last * there.chunk_size, there.size))
        demand = Demand(want.urgency, want.order)
        return Piece(wanted, range(first, last), want.trusted, demand)


def _overlap(one: Range, other: Range) -> bool:
    return one.start < other.stop and other.start < one.stop
