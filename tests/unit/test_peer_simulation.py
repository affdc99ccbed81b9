"""Small clusters of the simulation: links stay full, the registry sends everything about once."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.simulate.__main__ import memory
from tests.simulate.cluster import MIB, Cluster, Scenario

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def same_guesses() -> Iterator[None]:
    """The policy's own guesses are the same in each run."""
    state = random.getstate()
    random.seed(1)
    yield
    random.setstate(state)


def ran(scenario: Scenario) -> Cluster:
    cluster = Cluster(scenario)
    cluster.run()
    return cluster


def test_eight_nodes_take_hardly_longer_than_one() -> None:
    cluster = ran(Scenario())
    assert cluster.slowest <= 1.1 * cluster.alone
    assert cluster.egress <= 1.02


def test_many_small_blobs_are_shared_evenly_though_their_owners_are_not() -> None:
    cluster = ran(Scenario(blobs=(MIB,) * 64))
    assert cluster.slowest <= 1.15 * cluster.alone
    assert cluster.egress <= 1.02


def test_those_that_are_left_finish_in_time_without_three_that_died() -> None:
    cluster = ran(Scenario(killed=((1, 8.0), (3, 8.0), (5, 8.0))))
    assert cluster.slowest <= 1.3 * cluster.alone
    assert all(node.finished for node in cluster.nodes if not node.is_dead)


def test_a_zone_of_one_node_does_not_starve() -> None:
    cluster = ran(Scenario(nodes=3, zones=2, blobs=(64 * MIB,)))
    assert cluster.slowest <= 1.3 * cluster.alone
    assert cluster.egress <= 1.02


def test_connections_of_a_node_are_bounded_in_a_crowd() -> None:
    cluster = ran(Scenario(nodes=100, blobs=(32 * MIB,), registry=1000, step=0.1))
    assert all(node.finished for node in cluster.nodes)
    assert max(node.most_uploads for node in cluster.nodes) <= 32
    assert max(node.most_downloads for node in cluster.nodes) <= 40
    assert cluster.egress <= 1.02


def test_thousands_of_members_need_little_memory() -> None:
    assert memory(5000) < 8 * MIB
