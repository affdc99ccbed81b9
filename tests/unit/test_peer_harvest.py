"""What all peers bring together, against the registry."""

from __future__ import annotations

import pytest

from fetcher.peers.harvest import Harvest

MB = 1_000_000


def looks(harvest: Harvest, pace: float, *, begin: float = 0.0, count: int = 9) -> list[bool]:
    """Whether peers were found to be poor, at looks 0.2 s apart while they bring ``pace``."""
    found = []
    for number in range(count):
        harvest.brought(int(pace / 5))
        found.append(harvest.is_poor(begin + number / 5))
    return found


@pytest.mark.parametrize(
    ("pace", "registry", "poor"),
    [(MB, 10 * MB, True), (3 * MB, 10 * MB, False), (75 * MB, 25 * MB, False), (0, MB, True)],
)
def test_the_registry_has_to_be_much_quicker(pace: float, registry: float, poor: bool) -> None:
    harvest = Harvest(answering=3)
    harvest.measured(registry, 0.0)
    assert any(looks(harvest, pace)) is poor


def test_peers_that_have_not_answered_are_not_judged() -> None:
    harvest = Harvest()
    harvest.measured(100 * MB, 0.0)
    assert not any(looks(harvest, 0))
    assert not harvest.wants_trial


def test_a_registry_of_which_nothing_is_known_is_tried_once_in_a_while() -> None:
    harvest = Harvest(answering=1)
    assert not any(looks(harvest, MB, count=4))
    assert harvest.wants_trial
    looks(harvest, MB, begin=1.0, count=4)
    assert not harvest.wants_trial


def test_peers_that_bring_much_are_not_worth_a_trial() -> None:
    harvest = Harvest(answering=1)
    looks(harvest, 12 * MB, count=10)
    assert not harvest.wants_trial


def test_what_a_registry_brought_long_ago_is_forgotten() -> None:
    harvest = Harvest(answering=1)
    harvest.measured(100 * MB, 0.0)
    assert not any(looks(harvest, MB, begin=100.0))


def test_peers_rest_longer_each_time_until_they_bring_enough() -> None:
    harvest = Harvest(answering=1)
    harvest.measured(100 * MB, 0.0)
    assert [harvest.rest(0.0), harvest.rest(0.0)] == [60.0, 120.0]
    assert harvest.is_resting(119.0)
    assert not harvest.is_resting(120.0)
    harvest.measured(10 * MB, 120.0)
    looks(harvest, 50 * MB, begin=120.0)
    assert harvest.rest(130.0) == 60.0
