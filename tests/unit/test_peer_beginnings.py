"""Whom a node asks for what it is to fetch for all: the others where it joins them, else nobody."""

from __future__ import annotations

import itertools

import pytest

from fetcher.peers.beginnings import Beginnings
from fetcher.peers.choice import BlobChoice, Flow, Help, Pick
from fetcher.peers.members import Members
from fetcher.peers.owners import Member
from fetcher.peers.protocol import Have
from fetcher.peers.standings import Standings

CHUNK = 1024
COUNT = 64
BLOB = f"sha256:{7:064x}"
OTHER = f"sha256:{8:064x}"


def choice_of(blob: str = BLOB, standings: Standings | None = None, nodes: int = 8) -> BlobChoice:
    """The first of some nodes."""
    members = Members("node-0")
    members.replace(Member(f"node-{n}", f"10.0.0.{n}:1") for n in range(nodes))
    return BlobChoice(blob, CHUNK, COUNT * CHUNK, members, standings or Standings())


def own(choice: BlobChoice) -> list[int]:
    return [one for one in range(COUNT) if not choice.line(one)]


def begun(choice: BlobChoice, chunks: list[int], now: float) -> Pick:
    found = choice.next(chunks, now)
    assert found is not None
    choice.began(found)
    chunks.remove(found.chunk)
    return found


def test_a_chunk_that_is_adopted_is_this_nodes_own() -> None:
    choice = choice_of()
    chunk = next(one for one in range(COUNT) if choice.line(one))
    choice.adopt([chunk])
    assert not choice.line(chunk)
    assert choice.again(chunk, 0.0) == Pick(chunk, None)


def test_each_member_is_asked_for_one_chunk_until_it_has_answered() -> None:
    choice = choice_of()
    wanted = [one for one in range(COUNT) if choice.line(one)]
    first = [begun(choice, wanted, 0.0).member for _ in range(7)]
    assert len(set(first)) == 7
    assert choice.next(wanted, 0.0) is None
    [answering, *_] = first
    assert answering is not None
    choice.standings.answered(answering.name, 0.1)
    assert begun(choice, wanted, 0.1).member == answering
    assert choice.next(wanted, 0.1) is None


def test_one_member_is_asked_for_the_last_chunk_of_its_own() -> None:
    choice = choice_of()
    mine = own(choice)
    question = begun(choice, mine, 0.0)
    assert question.chunk == own(choice)[-1]
    assert question.member is not None
    # the others wait for the answer
    assert choice.next(mine, 0.1) is None
    choice.lacks(question.member, question.chunk, 0.1)
    choice.ended(question)
    assert begun(choice, mine, 0.1) == Pick(own(choice)[0], None)


def test_nobody_is_waited_for_once_others_have_just_begun_as_well() -> None:
    choice = choice_of()
    mine = own(choice)
    question = begun(choice, mine, 0.0)
    assert choice.standings.beginnings.asked(BLOB, 0.1)
    assert begun(choice, mine, 0.1) == Pick(own(choice)[0], None)
    assert question.chunk not in mine
    # and nobody is asked at all where that is known from the first
    standings = Standings()
    standings.beginnings.asked(BLOB, 0.0)
    early = choice_of(standings=standings)
    assert begun(early, own(early), 0.1).member is None


def test_who_joins_others_has_its_own_chunks_from_them() -> None:
    choice = choice_of()
    mine = own(choice)
    question = begun(choice, mine, 0.0)
    assert question.member is not None
    choice.told(question.member, Have.all())
    choice.brought(question.chunk, question.member, has_all=True)
    choice.ended(question)
    assert begun(choice, mine, 0.1).member == question.member


def test_what_one_lacked_is_not_asked_for_again_soon_and_later_each_time() -> None:
    standings, now, pauses = Standings(), 0.0, []
    for number in range(8):
        choice = choice_of(f"sha256:{number:064x}", standings)
        while (question := choice.next(own(choice), now)) is None or question.member is None:
            now += 1.0
        pauses.append(now)
        choice.began(question)
        choice.lacks(question.member, question.chunk, now)
        choice.ended(question)
    steps = [later - earlier for earlier, later in itertools.pairwise(pauses)]
    assert steps == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


@pytest.mark.parametrize("blob", [BLOB, OTHER])
def test_that_a_blob_was_asked_for_says_nothing_of_others(blob: str) -> None:
    beginnings = Beginnings()
    assert beginnings.asked(BLOB, 0.0)
    assert not beginnings.asked(BLOB, 1.0)
    assert beginnings.is_early(blob, 2.0) == (blob == BLOB)
    assert not beginnings.is_early(blob, 20.0)
    assert beginnings.asked(BLOB, 20.0)


def test_what_is_remembered_is_bounded() -> None:
    beginnings = Beginnings()
    for number in range(5000):
        beginnings.asked(str(number), 0.0)
    assert not beginnings.is_early("0", 0.0)
    assert beginnings.is_early("4999", 0.0)


def test_requests_are_spread_over_owners_and_past_chunks_that_they_lack() -> None:
    choice = choice_of()
    left = [one for one in range(COUNT) if choice.line(one)]
    owner = choice.line(left[0])[0]
    lacked = [one for one in left if choice.line(one)[0] == owner][:3]
    for one in lacked:
        choice.lacks(owner, one, 0.0)
    for member in choice.members.nearby:
        choice.standings.answered(member.name, 0.1)
    asked = [begun(choice, left, 0.1) for _ in range(10)]
    counts: dict[str, int] = {}
    for pick in asked:
        assert pick.member is not None
        counts[pick.member.name] = counts.get(pick.member.name, 0) + 1
        if pick.chunk in lacked:
            assert pick.member != owner
    assert len(counts) == 7
    assert max(counts.values()) == 2


@pytest.mark.parametrize(("nodes", "seconds"), [(8, 2.65), (1000, 5.0)])
def test_what_fell_silent_comes_from_the_registry_where_nobody_can_help(
    nodes: int, seconds: float
) -> None:
    """Later in a crowd, where what is passed on comes in fits and starts."""
    choice = choice_of(nodes=nodes)
    # nobody is asked who may have it or not
    choice.standings.guessed_at, choice.standings.guess_pause = 0.0, 60.0
    chunk = next(one for one in range(COUNT) if choice.line(one))
    flow = Flow(Pick(chunk, choice.line(chunk)[0]), 0.0, got=10, left=CHUNK - 10, moved_at=0.1)
    assert choice.help([flow], seconds) is None
    assert choice.help([flow], seconds + 0.2) == Help(flow, None, CHUNK - 10)
