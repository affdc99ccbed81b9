"""Whose turn it is to ask peers."""

from __future__ import annotations

from dataclasses import dataclass, field

from fetcher.peers.turns import Turns


@dataclass(eq=False)
class Blob:
    """A download that finds something to ask for as often as it is told."""

    name: str
    woken: list[str]
    place: int = 0
    work: bool = True
    choosing: bool = True
    opening: bool = False
    asked: bool = False
    waiting: bool = False
    able: bool = True

    def wake(self) -> None:
        self.woken.append(self.name)

    @property
    def order(self) -> tuple[int, str]:
        return self.place, self.name

    def has_work(self) -> bool:
        return self.work

    def is_choosing(self) -> bool:
        return self.choosing

    def is_opening(self) -> bool:
        return self.opening

    def is_asked(self) -> bool:
        return self.asked

    def is_waiting(self) -> bool:
        return self.waiting

    def may_ask(self) -> bool:
        return self.able


@dataclass
class Node:
    woken: list[str] = field(default_factory=list)
    room: int = 100
    now: float = 100.0

    def __post_init__(self) -> None:
        self.turns = Turns(lambda: self.room > 0, lambda: self.now)

    def attend(self, *names: str) -> list[Blob]:
        blobs = [Blob(name, self.woken) for name in names]
        for one in blobs:
            self.turns.attend(one)
        return blobs


def test_all_look_in_one_order_whoever_came_first() -> None:
    node = Node()
    c, a, b = node.attend("c", "a", "b")
    node.turns.begin()
    for one in (a, b, c):
        assert node.turns.may_look(one)
        node.turns.pass_on(one)
    assert node.woken == ["a", "b", "c"]
    assert not node.turns.may_look(a)


def test_one_whose_place_becomes_known_later_moves_there() -> None:
    node = Node()
    a, b, c = node.attend("a", "b", "c")
    a.place, b.place = 3, 2
    c.place = 9
    node.turns.begin()
    assert node.turns.may_look(b)
    c.place = 1
    node.turns.begin()
    for one in (c, b, a):
        assert node.turns.may_look(one)
        node.turns.pass_on(one)


def test_what_others_wait_for_comes_first() -> None:
    node = Node()
    a, b = node.attend("a", "b")
    b.asked = True
    node.turns.begin()
    assert node.turns.may_look(b)
    node.turns.pass_on(b)
    assert node.turns.may_look(a)


def test_nobody_looks_while_there_is_no_room() -> None:
    node = Node(room=0)
    [a] = node.attend("a")
    node.turns.begin()
    assert not node.turns.may_look(a)
    assert not node.woken


def test_a_round_ends_once_there_is_no_room() -> None:
    node = Node()
    a, b = node.attend("a", "b")
    node.turns.begin()
    node.room = 0
    node.turns.pass_on(a)
    assert not node.turns.may_look(b)


def test_after_a_moment_a_round_begins_by_itself() -> None:
    node = Node()
    a, b = node.attend("a", "b")
    node.turns.begin()
    node.turns.pass_on(a)
    assert node.turns.may_look(b)
    node.now += 0.3
    assert not node.turns.may_look(b)
    assert node.turns.may_look(a)


def test_one_that_does_not_look_is_passed_over() -> None:
    node = Node()
    a, b, c = node.attend("a", "b", "c")
    a.choosing, b.work = False, False
    node.turns.begin()
    assert node.turns.may_look(c)


def test_one_that_cannot_ask_is_passed_over() -> None:
    node = Node()
    a, b = node.attend("a", "b")
    a.able = False
    node.turns.begin()
    assert node.turns.may_look(b)
    assert node.woken == ["b"]


def test_the_first_that_looks_looks_for_all() -> None:
    node = Node()
    a, b, c = node.attend("a", "b", "c")
    a.choosing = False
    assert [node.turns.is_first(one) for one in (a, b, c)] == [False, True, False]
    node.turns.leave(b)
    assert node.turns.is_first(c)


def test_one_that_leaves_passes_its_turn_on() -> None:
    node = Node()
    a, b, c = node.attend("a", "b", "c")
    node.turns.begin()
    node.turns.leave(b)
    node.turns.leave(a)
    assert node.turns.may_look(c)


def test_those_behind_one_that_opens_wait_for_a_while() -> None:
    node = Node()
    a, b = node.attend("a", "b")
    a.opening, a.choosing = True, False
    node.turns.begin()
    assert not node.turns.may_look(b)
    node.now += 2.0
    assert node.turns.may_look(b)


def test_with_nothing_left_to_ask_for_those_that_wait_are_woken() -> None:
    node = Node()
    a, b = node.attend("a", "b")
    a.work = b.work = False
    b.waiting = True
    assert node.turns.is_idle
    node.turns.begin()
    assert node.woken == ["b"]
