"""Which bytes come next: a policy without I/O, over chunks that a test marks by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fetcher.ranges import Range
from fetcher.schedule import Piece, Schedule, Urgency, Want

CHUNK = 10


@dataclass
class Chunks:
    """What there is of a blob, as a test says it."""

    size: int = 20 * CHUNK
    chunk_size: int = CHUNK
    there: set[int] = field(default_factory=set)
    trusted: set[int] = field(default_factory=set)
    fills: dict[int, int] = field(default_factory=dict)
    trusted_fills: set[int] = field(default_factory=set)

    @property
    def count(self) -> int:
        return -(-self.size // self.chunk_size)

    def has(self, chunk: int) -> bool:
        return chunk in self.there

    def is_trusted(self, chunk: int) -> bool:
        return chunk in self.trusted

    def first_missing(self, chunk: int) -> int:
        return next((one for one in range(chunk, self.count) if one not in self.there), self.count)

    def fill(self, number: int) -> tuple[int, bool]:
        return self.fills.get(number, 0), False

    def is_fill_trusted(self, number: int) -> bool:
        return number in self.trusted_fills

    def take(self, piece: Piece) -> None:
        self.there.update(piece.chunks)
        if piece.trusted:
            self.trusted.update(piece.chunks)


def chunks(first: int, stop: int) -> Range:
    return Range(first * CHUNK, stop * CHUNK)


def whole(urgency: Urgency = Urgency.BACKGROUND, order: int = 0) -> Want:
    return Want(Range(0, 20 * CHUNK), urgency, order)


def test_the_most_urgent_comes_first_whoever_came_first() -> None:
    schedule, there = Schedule(), Chunks()
    schedule.add(whole())
    schedule.add(Want(chunks(5, 6), Urgency.WHOLE))
    schedule.add(Want(chunks(9, 10), Urgency.AHEAD))
    schedule.add(Want(Range(123, 125), Urgency.URGENT))
    found = [schedule.next(there, 1) for _ in range(5)]
    assert [one.wanted for one in found if one] == [
        chunks(12, 13),
        chunks(9, 10),
        chunks(5, 6),
        chunks(0, 1),
        chunks(1, 2),
    ]


def test_the_lower_order_comes_first_and_else_who_came_first() -> None:
    schedule, there = Schedule(), Chunks()
    schedule.add(Want(chunks(3, 4), Urgency.BACKGROUND, order=2))
    schedule.add(Want(chunks(1, 2), Urgency.BACKGROUND, order=1))
    schedule.add(Want(chunks(0, 1), Urgency.BACKGROUND, order=1))
    found = [schedule.next(there, 4) for _ in range(4)]
    assert [one and one.chunks for one in found] == [range(1, 2), range(1), range(3, 4), None]


def test_what_is_under_way_is_not_asked_for_again_and_matters_more() -> None:
    schedule, there = Schedule(), Chunks()
    schedule.add(whole())
    piece = schedule.next(there, 8)
    assert piece is not None
    urgent = Want(chunks(3, 10), Urgency.URGENT, trusted=True)
    assert schedule.add(urgent) == [piece.demand]
    assert piece.demand.urgency is Urgency.URGENT
    rest = schedule.next(there, 8)
    assert rest is not None
    assert (rest.chunks, rest.trusted) == (range(8, 10), True)
    assert schedule.under_way(Urgency.URGENT) == 2
    assert schedule.under_way(Urgency.BACKGROUND) == 0
    assert schedule.add(Want(chunks(0, 1), Urgency.AHEAD)) == []
    there.take(rest)
    schedule.release(rest)
    there.there.update(piece.chunks)
    schedule.release(piece)
    # what came from somebody who is not trusted is asked for once more
    again = schedule.next(there, 8)
    assert again is not None
    assert (again.chunks, again.trusted) == (range(3, 8), True)
    there.take(again)
    assert schedule.is_met(urgent, there)


def test_a_begun_chunk_goes_on_where_it_stopped_unless_it_is_to_be_trusted() -> None:
    there = Chunks(fills={2: 4, 5: 3, 6: 2}, trusted_fills={6})
    for trusted, starts in ((False, [0, 24, 53, 62]), (True, [0, 20, 50, 62])):
        schedule = Schedule()
        schedule.add(Want(chunks(0, 8), Urgency.URGENT, trusted=trusted))
        found = []
        while (piece := schedule.next(there, 8)) is not None:
            found.append(piece.wanted.start)
        assert found == starts


def test_urgencies_that_are_not_allowed_are_passed_over() -> None:
    schedule, there = Schedule(), Chunks()
    schedule.add(Want(chunks(7, 8), Urgency.URGENT))
    schedule.add(whole())
    piece = schedule.next(there, 1, lambda urgency: urgency is not Urgency.URGENT)
    assert piece is not None
    assert piece.chunks == range(1)


def test_a_chunk_that_proved_wrong_is_fetched_by_whoever_wants_it_still() -> None:
    schedule, there = Schedule(), Chunks(there=set(range(20)))
    schedule.add(whole())
    assert schedule.next(there, 8) is None
    reader = Want(chunks(4, 5), Urgency.URGENT, trusted=True)
    schedule.add(reader)
    piece = schedule.next(there, 8)
    assert piece is not None
    there.there.discard(4)
    schedule.release(piece)
    schedule.remove(reader)
    again = schedule.next(there, 8)
    assert again is not None
    assert (again.chunks, again.trusted) == (range(4, 5), False)


@pytest.mark.parametrize("size", [0, 1, CHUNK, 10 * CHUNK + 3])
def test_a_blob_of_any_size_comes_to_its_end(size: int) -> None:
    schedule, there = Schedule(), Chunks(size=size)
    want = Want(Range(0, size), Urgency.WHOLE)
    schedule.add(want)
    got = 0
    while (piece := schedule.next(there, 3)) is not None:
        got += len(piece.wanted)
        there.take(piece)
        schedule.release(piece)
    assert got == size
    assert schedule.is_met(want, there)
    assert not schedule.has_work(there)


_WANTS = st.lists(
    st.tuples(st.integers(0, 19), st.integers(1, 20), st.sampled_from(Urgency), st.booleans()),
    max_size=6,
)


@given(_WANTS, st.sets(st.integers(0, 19)), st.sets(st.integers(0, 19)), st.integers(1, 8))
def test_every_want_is_met_and_nothing_comes_twice(
    wants: list[tuple[int, int, Urgency, bool]], there: set[int], proven: set[int], most: int
) -> None:
    state = Chunks(there=there | proven, trusted=set(proven))
    schedule = Schedule()
    added = []
    for first, count, urgency, trusted in wants:
        want = Want(chunks(first, min(first + count, 20)), urgency, trusted=trusted)
        schedule.add(want)
        added.append(want)
    asked: list[tuple[int, bool]] = []
    flying: list[Piece] = []
    while True:
        piece = schedule.next(state, most)
        if piece is not None:
            assert 0 < len(piece.chunks) <= most
            flying.append(piece)
            asked += [(one, piece.trusted) for one in piece.chunks]
            if len(flying) < 3:
                continue
        if not flying:
            break
        landed = flying.pop(0)
        state.take(landed)
        schedule.release(landed)
    assert all(schedule.is_met(want, state) for want in added)
    assert len(asked) == len(set(asked))
    # what is trusted already is never asked for, and what is there only to be trusted
    assert not {one for one, _ in asked} & proven
