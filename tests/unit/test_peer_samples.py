"""By which chunks a liar is looked for."""

from __future__ import annotations

from fetcher.peers.samples import samples, sent_by

CONTRIBUTORS = {
    0: {"a": True},
    1: {"a": True, "b": False},
    2: {"b": False},
    3: {"a": True},
    4: {"c": True},
}


def test_one_chunk_of_each_that_is_the_only_sender_of_one() -> None:
    found = [samples(CONTRIBUTORS, lambda chunk: chunk != 4) for _ in range(50)]
    assert {frozenset(one) for one in found} == {frozenset({0, 2}), frozenset({3, 2})}
    assert samples({}, lambda _: True) == set()
    assert samples(CONTRIBUTORS, lambda _: False) == set()


def test_those_that_sent_most_where_there_are_many() -> None:
    crowd = {number: {f"peer-{number}": True} for number in range(100)}
    much = {100 + number: {"most": True} for number in range(9)}
    found = samples(crowd | much, lambda _: True)
    assert len(found) == 16
    assert found & much.keys()


def test_all_that_somebody_sent_some_of() -> None:
    assert sent_by(CONTRIBUTORS, {"b"}) == [1, 2]
    assert sent_by(CONTRIBUTORS, {"a", "c"}) == [0, 1, 3, 4]
