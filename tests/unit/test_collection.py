"""What is evicted: a decision over rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from fetcher.store.collection import EVERYTHING, HeldContent, HeldTree, Plan, plan

if TYPE_CHECKING:
    from collections.abc import Set

NAMES = [f"c{number}" for number in range(6)]
TIMES = st.integers(0, 9).map(float)

contents = st.lists(
    st.builds(HeldContent, st.sampled_from(NAMES), st.integers(1, 100), TIMES),
    unique_by=lambda content: content.name,
)
trees = st.lists(
    st.builds(
        HeldTree,
        st.integers(0, 5).map(lambda number: f"t{number}"),
        st.integers(1, 3),
        TIMES,
        st.frozensets(st.sampled_from(NAMES)),
    ),
    unique_by=lambda tree: tree.name,
)
kept = st.frozensets(st.sampled_from([*NAMES, *(f"t{number}" for number in range(6))]))
wanted = st.one_of(st.integers(-5, 400), st.just(EVERYTHING))


def names(planned: Plan) -> set[str]:
    return {victim.name for victim in planned.victims}


def needed(all_trees: list[HeldTree], gone: Set[str]) -> set[str]:
    return {name for tree in all_trees if tree.name not in gone for name in tree.contents}


@given(trees, contents, kept, wanted)
def test_nothing_goes_that_is_kept_or_that_a_remaining_tree_needs(
    all_trees: list[HeldTree], all_contents: list[HeldContent], keep: Set[str], want: float
) -> None:
    gone = names(plan(all_trees, all_contents, keep, want))
    assert not gone & keep
    assert not gone & needed(all_trees, gone)
    assert len(gone) == len(plan(all_trees, all_contents, keep, want).victims)


@given(trees, contents, kept, wanted)
def test_enough_goes_or_all_that_may(
    all_trees: list[HeldTree], all_contents: list[HeldContent], keep: Set[str], want: float
) -> None:
    planned = plan(all_trees, all_contents, keep, want)
    if planned.bytes >= want:
        return
    staying = needed(all_trees, names(planned))
    for tree in all_trees:
        assert tree.name in keep or tree.name in names(planned)
    for content in all_contents:
        assert content.name in keep | names(planned) | staying


@given(trees, contents, kept, st.integers(-5, 400))
def test_no_tree_goes_for_nothing(
    all_trees: list[HeldTree], all_contents: list[HeldContent], keep: Set[str], want: int
) -> None:
    """Without the last tree or loose content, and what went with it, there was not enough."""
    planned = plan(all_trees, all_contents, keep, want)
    if not planned.victims:
        return
    loose = {content.name for content in all_contents} - needed(all_trees, set())
    starts = [
        number
        for number, victim in enumerate(planned.victims)
        if isinstance(victim, HeldTree) or victim.name in loose
    ]
    assert sum(victim.bytes for victim in planned.victims[: starts[-1]]) < want


@given(trees, contents, wanted)
def test_the_least_recently_used_goes_first(
    all_trees: list[HeldTree], all_contents: list[HeldContent], want: float
) -> None:
    gone = names(plan(all_trees, all_contents, frozenset(), want))
    # with nothing kept, the times alone decide
    latest = max((tree.used for tree in all_trees if tree.name in gone), default=-1.0)
    for tree in all_trees:
        assert tree.name in gone or tree.used >= latest


def test_a_shared_content_stays_until_its_last_tree_goes() -> None:
    old = HeldTree("old", 1, 1.0, frozenset({"own", "shared"}))
    new = HeldTree("new", 1, 2.0, frozenset({"shared"}))
    held = [HeldContent("own", 10, 0.0), HeldContent("shared", 100, 0.0)]
    assert [v.name for v in plan([old, new], held, set(), 5).victims] == ["old", "own"]
    everything = plan([old, new], held, set(), EVERYTHING)
    assert [v.name for v in everything.victims] == ["old", "own", "new", "shared"]


def test_what_gives_nothing_back_goes_last() -> None:
    pinned = HeldTree("pinned", 1, 3.0, frozenset({"a"}))
    part = HeldTree("part", 1, 1.0, frozenset({"a"}))
    other = HeldTree("other", 1, 2.0, frozenset({"b"}))
    held = [HeldContent("a", 100, 0.0), HeldContent("b", 100, 0.0)]
    planned = plan([pinned, part, other], held, {"pinned"}, 50)
    assert [victim.name for victim in planned.victims] == ["other", "b"]


def test_a_download_that_nobody_goes_on_with_goes_by_its_own_time() -> None:
    tree = HeldTree("tree", 1, 2.0, frozenset({"a"}))
    held = [HeldContent("a", 100, 9.0), HeldContent("half", 10, 1.0), HeldContent("new", 10, 3.0)]
    planned = plan([tree], held, set(), 50)
    assert [victim.name for victim in planned.victims] == ["half", "tree", "a"]
