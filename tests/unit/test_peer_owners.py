"""Who owns which chunk: equal shares, one crossing per zone, nobody waits for somebody behind."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fetcher.modelpack import Position
from fetcher.oci import Digest
from fetcher.peers.owners import Deal, Member, Owners, order

BLOB = "sha256:" + "ab" * 32


def members(*zones: int) -> list[Member]:
    """So many members in each zone."""
    return [
        Member(f"node-{zone}-{number}", f"10.{zone}.0.{number}:5000", f"zone-{zone}")
        for zone, count in enumerate(zones)
        for number in range(count)
    ]


clusters = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(lambda zones: members(*zones))


def test_every_node_computes_the_same_order_whatever_it_heard_first() -> None:
    nodes = members(5)
    assert order(BLOB, nodes) == order(BLOB, reversed(nodes))
    assert order(BLOB, nodes) != order(BLOB.replace("ab", "cd"), nodes)


@given(clusters, st.integers(1, 40))
def test_shares_differ_by_one_chunk_at_most(nodes: list[Member], chunks: int) -> None:
    owners = Owners(BLOB, nodes)
    homes = Counter(owners.home(chunk) for chunk in range(chunks))
    shares = [homes[one] for one in nodes]
    assert max(shares) - min(shares) <= 1


@given(clusters, st.integers(1, 40), st.integers(1, 3))
def test_many_small_blobs_of_a_model_are_dealt_out_evenly(
    nodes: list[Member], blobs: int, count: int
) -> None:
    model, homes = Digest.of(b"model"), Counter[Member | None]()
    for index in range(blobs):
        deal = Deal.of(Digest.of(b"%d" % index), Position(model, index))
        owners = Owners(deal.order, nodes)
        homes.update(owners.home(deal.first + chunk) for chunk in range(count))
    shares = [homes[one] for one in nodes]
    assert max(shares) - min(shares) <= count


def test_a_blob_without_a_model_is_dealt_out_by_itself() -> None:
    assert Deal.of(Digest.parse(BLOB), None) == Deal(BLOB)


@given(clusters, st.integers(1, 5))
def test_shares_within_a_zone_are_equal_too(nodes: list[Member], rounds: int) -> None:
    owners = Owners(BLOB, nodes)
    for zone in {one.zone for one in nodes}:
        local = [one for one in nodes if one.zone == zone]
        shares = Counter(owners.line(chunk, zone)[0] for chunk in range(rounds * len(nodes)))
        counts = [shares[one] for one in local]
        assert max(counts) - min(counts) <= 1


@given(clusters, st.integers(0, 100))
def test_one_member_of_a_zone_crosses_its_border(nodes: list[Member], chunk: int) -> None:
    owners = Owners(BLOB, nodes)
    home = owners.home(chunk)
    assert home is not None
    for zone in {one.zone for one in nodes}:
        local = [one for one in nodes if one.zone == zone]
        first = [one for one in local if not owners.asked_by(one, chunk)[:1]]
        crossing = [
            one
            for one in local
            if owners.asked_by(one, chunk)[:1] and owners.asked_by(one, chunk)[0].zone != zone
        ]
        if zone == home.zone:
            assert (first, crossing) == ([home], [])
        else:
            assert (first, len(crossing)) == ([], 1)
            assert crossing[0] == owners.line(chunk, zone)[0]


@given(clusters, st.integers(0, 100))
def test_nobody_waits_for_somebody_who_waits_for_it(nodes: list[Member], chunk: int) -> None:
    owners = Owners(BLOB, nodes)
    asks = {one.name: {other.name for other in owners.asked_by(one, chunk)} for one in nodes}
    seen: dict[str, bool] = {}

    def check(name: str) -> None:
        assert seen.get(name, True), "a circle"
        if name not in seen:
            seen[name] = False
            for other in asks[name]:
                check(other)
            seen[name] = True

    for name in asks:
        check(name)


@given(clusters, st.integers(0, 100))
def test_whoever_is_asked_fills(nodes: list[Member], chunk: int) -> None:
    owners = Owners(BLOB, nodes)
    for one in nodes:
        for other in owners.asked_by(one, chunk):
            assert owners.fills(other, chunk)


def test_the_chunks_of_one_owner_are_taken_over_by_all_others() -> None:
    nodes = members(8)
    owners = Owners(BLOB, nodes)
    lost = owners.line(0, "zone-0")[0]
    lines = [owners.line(chunk, "zone-0") for chunk in range(7 * 8)]
    stand_ins = Counter(line[1] for line in lines if line[0] == lost)
    assert stand_ins == {one: 1 for one in nodes if one != lost}


def test_a_zone_of_one_member_asks_homes_and_serves_its_share() -> None:
    nodes = members(1, 7)
    owners, alone = Owners(BLOB, nodes), nodes[0]
    asked = [owners.asked_by(alone, chunk) for chunk in range(8)]
    assert [line[0].zone for line in asked if line] == ["zone-1"] * 7


def test_one_that_serves_nobody_asks_owners() -> None:
    nodes = members(3)
    owners, guest = Owners(BLOB, nodes), Member("guest", "", "zone-0")
    assert {owners.asked_by(guest, chunk)[0] for chunk in range(3)} == set(nodes)
    stranger = Member("stranger", "", "elsewhere")
    assert owners.asked_by(stranger, 0) == owners.line(0, "zone-0")


@pytest.mark.parametrize("chunk", [0, 7])
def test_without_members_nobody_is_asked(chunk: int) -> None:
    owners = Owners(BLOB, [])
    assert owners.home(chunk) is None
    assert owners.asked_by(Member("alone", ""), chunk) == ()
