"""The order of sources as a pure policy, with a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fetcher.sources import BlobSources, Choice, Health

MIRRORS = ["one", "two"]
HOME = "registry"


def choose(sources: BlobSources, now: float, begun: float = 0.0) -> Choice:
    return sources.choose(MIRRORS, HOME, now, begun)


def test_mirrors_come_in_their_order_and_the_registry_last() -> None:
    sources = BlobSources(Health())
    assert choose(sources, 0) == Choice("one")
    sources.lacks("one")
    assert choose(sources, 0) == Choice("two")
    sources.lacks("two")
    assert choose(sources, 0) == Choice(HOME)
    assert choose(BlobSources(sources.health), 0) == Choice("one")


def test_a_host_that_fails_rests_twice_as_long_each_time_and_comes_back() -> None:
    health = Health()
    now = 100.0
    rests = []
    for _ in range(8):
        rests.append(health.failed("one", now, started=now))
        assert choose(BlobSources(health), now + rests[-1] - 0.01) == Choice("two")
        now += rests[-1]
        assert choose(BlobSources(health), now) == Choice("one")
    assert rests == [1, 2, 4, 8, 16, 32, 60, 60]
    health.succeeded("one")
    assert health.failed("one", now, started=now) == 1


def test_requests_that_fail_together_count_once() -> None:
    health = Health()
    assert health.failed("one", now=10, started=5) == 1
    assert health.failed("one", now=10.5, started=6) == 0.5
    assert health.failed("one", now=11, started=9) == 0
    assert health.failed("one", now=12, started=11) == 2


def test_a_wish_to_be_left_alone_is_granted_within_reason() -> None:
    health = Health()
    assert health.failed("one", 0, 0, retry_after=40) == 40
    assert health.failed("two", 0, 0, retry_after=1e9) == 600
    assert health.failed("three", 0, 0, retry_after=0) == 1


def test_a_host_without_ranges_is_asked_for_the_whole_at_the_start_only() -> None:
    health = Health()
    sources = BlobSources(health)
    health.ignored_range("one", now=0)
    assert choose(sources, 0) == Choice("two")
    health.failed("two", 0, 0)
    assert choose(sources, 0.5) == Choice("one", whole=True)
    assert choose(sources, 0.5, begun=0.5) == Choice(HOME)
    health.ignored_range(HOME, now=0)
    health.ignored_range("two", now=0)
    assert choose(sources, 0.5, begun=0.05) == Choice("one", whole=True)
    assert choose(sources, 2, begun=0.5) == Choice("one", whole=True)
    sources.lacks("one")
    sources.lacks("two")
    assert choose(sources, 2, begun=0.5) == Choice(HOME, whole=True)
    assert choose(sources, 601) == Choice(HOME)


def test_a_host_that_answers_a_range_knows_ranges() -> None:
    health = Health()
    health.ignored_range(HOME, now=0)
    assert not health.knows_ranges(HOME, 1)
    health.answered_range(HOME)
    assert health.knows_ranges(HOME, 1)


def test_a_mirror_that_fails_at_this_blob_only_is_given_up_for_it() -> None:
    """Other blobs come from there, and the registry is away: it would be waited for for ever."""
    health = Health()
    sources = BlobSources(health, attempts=3)
    now = 0.0
    asked: list[str] = []
    sources.lacks("two")
    while len(asked) < 10:
        health.left(HOME, now)
        choice = choose(sources, now, begun=0.5)
        if not choice.wait:
            asked.append(choice.host)
        if choice.host == HOME and not choice.wait:
            break
        began, now = now, now + max(choice.wait, 0.1)
        if choice.host == "one":
            sources.failed("one", now, began)
            sources.failed("one", now, began)  # of the same moment
            health.succeeded("one")
    assert asked == ["one"] * 3 + [HOME]
    sources.moved()
    assert choose(sources, now + 60).host == "one"


def test_a_byte_makes_good_for_failures() -> None:
    sources = BlobSources(Health(), attempts=2)
    for now in range(0, 1000, 100):
        sources.failed("one", now, now)
        sources.brought("one")
    assert choose(sources, 2000) == Choice("one")


def test_a_registry_that_is_away_is_worth_a_short_wait_for_a_mirror() -> None:
    health = Health()
    sources = BlobSources(health)
    health.left(HOME, now=0)
    for mirror in MIRRORS:
        health.failed(mirror, 0, 0)
    assert choose(sources, 0.25) == Choice(HOME, wait=0.75)
    for mirror in MIRRORS:
        health.failed(mirror, 1, 1, retry_after=30)
    assert choose(sources, 1) == Choice(HOME)
    health.succeeded(HOME)
    assert not health.is_away(HOME, 1)
    health.left(HOME, now=1)
    assert health.is_away(HOME, 60)
    assert not health.is_away(HOME, 61)


def test_who_lied_is_not_trusted_and_the_registry_is_told_apart() -> None:
    health = Health()
    sources = BlobSources(health)
    sources.brought("one")
    sources.brought(HOME)
    assert sources.distrust(HOME, now=0) == ["one"]
    assert health.rest("one", 0) == 300
    assert choose(sources, 1000) == Choice("two")
    sources.brought(HOME)
    assert sources.distrust(HOME, now=0) == []


def test_the_order_of_hosts_that_may_resolve() -> None:
    health = Health()
    assert health.order(["a", "b", "a", "c"], 0) == ["a", "b", "c"]
    health.failed("a", 0, 0, retry_after=9)
    health.failed("b", 0, 0)
    assert health.order(["a", "b", "c"], 0.5) == ["c", "b", "a"]
    assert health.order(["a", "b", "c"], 5) == ["b", "c", "a"]


def test_what_is_known_is_bounded() -> None:
    health = Health()
    for number in range(5000):
        health.left(f"https://{number}", now=0)
    assert health.is_away("https://4999", 1)
    assert not health.is_away("https://0", 1)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["failed", "lied", "ignored_range", "lacks", "succeeded", "left"]),
        st.sampled_from([*MIRRORS, HOME]),
        st.floats(0, 30),
    ),
    max_size=40,
)


@given(EVENTS, st.floats(0, 1))
def test_there_is_always_somebody_to_ask(
    events: list[tuple[str, str, float]], begun: float
) -> None:
    """Whatever happened: a host of the list, awake and not lacking, or the registry; and no wait
    goes on for ever.
    """
    health = Health()
    sources = BlobSources(health)
    now = 0.0
    lacking = set()
    for what, host, later in events:
        now += later
        match what:
            case "failed":
                health.failed(host, now, now)
            case "lacks":
                sources.lacks(host)
                lacking.add(host)
            case "succeeded":
                health.succeeded(host)
            case _:
                getattr(health, what)(host, now)
    waits = 0
    while (choice := sources.choose(MIRRORS, HOME, now, begun)).wait:
        now += choice.wait
        waits += 1
        assert waits <= len(MIRRORS)
    if choice.host != HOME:
        assert choice.host not in lacking
        assert not health.rest(choice.host, now)
