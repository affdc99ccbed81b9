"""What is held of an answer until its sender was tried, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.errors import ChunkMismatch, NotFound
from fetcher.excerpts import EXCERPT_BYTES
from fetcher.peers.trials import Held, Trials
from fetcher.ranges import Range
from fetcher.threads import run_stoppable

if TYPE_CHECKING:
    import threading
    from collections.abc import Awaitable, Callable

WANTED = Range(1_000_000, 1_000_000 + 4 * EXCERPT_BYTES)
RIGHT = bytes(range(256)) * (len(WANTED) // 256)
WRONG = bytes(len(WANTED))
PIECE = 10_000


@dataclass
class Judge:
    """A registry that has :data:`RIGHT`, and what is known of members."""

    proven: bool = False
    sought: bool = False
    silent: bool = False
    patience: float = 0.0
    began: trio.Event = field(default_factory=trio.Event)
    asked: list[Range] = field(default_factory=list)
    banned: list[str] = field(default_factory=list)

    def is_proven(self) -> bool:
        return self.proven

    def awaits_list(self, name: str) -> bool:
        return self.sought

    async def excerpt(self, wanted: Range) -> bytes | None:
        self.asked.append(wanted)
        self.began.set()
        await trio.sleep(self.patience)
        start = wanted.start - WANTED.start
        return None if self.silent else RIGHT[start : start + len(wanted)]

    def ban(self, name: str) -> None:
        self.banned.append(name)


class Kept:
    """A sink in memory."""

    def __init__(self) -> None:
        self.data = b""

    def __call__(self, data: memoryview) -> bool:
        self.data += bytes(data)
        return True

    def whole(self) -> bool:
        return False


def sending(held: Held, data: bytes, *, is_whole: bool = True) -> Callable[[], Awaitable[None]]:
    """An answer with ``data``, as a connection's thread hands it to a sink."""
    token = trio.lowlevel.current_trio_token()

    def work(_: threading.Event) -> None:
        token.run_sync_soon(lambda: held.hear(is_whole=is_whole))
        for start in range(0, len(data), PIECE):
            held(memoryview(data)[start : start + PIECE])

    return lambda: run_stoppable(work)


def answered(
    judge: Judge, data: bytes, *, is_whole: bool = True, trials: Trials | None = None
) -> bytes:
    """What is used of an answer. Raises what the fetching of it does."""

    async def main() -> bytes:
        tried = trials or Trials(judge, len(WANTED), 0)
        kept = Kept()
        held = tried.held("peer", kept)
        if held is None:
            return data
        with trio.fail_after(20):
            try:
                await tried.judged(held, "peer", WANTED, sending(held, data, is_whole=is_whole))
            except NotFound:
                assert kept.data == b""
                raise
        return kept.data

    return trio.run(main)


def test_right_bytes_are_used_once_a_part_of_them_was_compared() -> None:
    judge = Judge()
    assert answered(judge, RIGHT) == RIGHT
    [part] = judge.asked
    assert WANTED.start <= part.start < part.stop <= WANTED.stop
    assert len(part) == EXCERPT_BYTES


def test_which_part_cannot_be_foreseen() -> None:
    judge = Judge()
    for _ in range(8):
        answered(judge, RIGHT)
    assert len({part.start for part in judge.asked}) > 1


def test_nothing_of_wrong_bytes_is_used() -> None:
    judge = Judge()
    with pytest.raises(NotFound, match="sent other bytes than the registry"):
        answered(judge, WRONG)
    assert judge.banned == ["peer"]


def test_who_has_only_some_of_a_blob_is_not_tried() -> None:
    judge = Judge()
    assert answered(judge, WRONG, is_whole=False) == WRONG
    assert judge.asked == []


def test_where_the_registry_does_not_say_what_came_is_used() -> None:
    judge = Judge(silent=True)
    assert answered(judge, WRONG) == WRONG
    assert judge.banned == []


def test_who_was_tried_is_not_tried_again() -> None:
    judge = Judge()
    trials = Trials(judge, len(WANTED), 0)
    for _ in range(3):
        assert answered(judge, RIGHT, trials=trials) == RIGHT
    assert len(judge.asked) == 1


def test_small_blobs_and_proven_ones_are_not_tried() -> None:
    assert Trials(Judge(), 1000, 1001).held("peer", Kept()) is None
    judge = Judge(proven=True)
    assert answered(judge, RIGHT) == RIGHT
    assert judge.asked == []


@pytest.mark.parametrize("is_right", [True, False])
def test_where_chunks_are_proven_the_others_of_a_member_wait_for_the_first(is_right: bool) -> None:
    judge = Judge(proven=True)

    async def main() -> None:
        trials = Trials(judge, len(WANTED), 0)
        sinks = [Kept() for _ in range(4)]
        refused: list[NotFound] = []

        async def ask(kept: Kept) -> None:
            held = trials.held("peer", kept)
            assert held is not None
            send = sending(held, RIGHT)

            async def fetch() -> None:
                await send()
                # by its end a chunk is known to be right, or not
                ended = sum(len(one.data) == len(RIGHT) for one in sinks)
                assert is_right or ended == 1
                if not is_right:
                    raise mismatch("peer")

            try:
                await trials.judged(held, "peer", WANTED, fetch)
            except NotFound as error:
                refused.append(error)
            except ChunkMismatch:
                assert not is_right

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for kept in sinks:
                    nursery.start_soon(ask, kept)
        used = [one for one in sinks if one.data]
        assert len(used) == (4 if is_right else 1)
        assert len(refused) == (0 if is_right else 3)
        # who is known to be right is held no more
        assert (trials.held("peer", Kept()) is None) == is_right
        if not is_right:
            # what spoke against him was no proof
            trials.acquit()
            sinks[:] = [Kept()]
            await ask(sinks[0])
            assert sinks[0].data

    trio.run(main)


def mismatch(sender: str) -> ChunkMismatch:
    """All of a chunk came from one, and was wrong."""
    error = ChunkMismatch("wrong")
    error.senders = frozenset({sender})
    return error


def test_a_list_that_comes_meanwhile_saves_the_question() -> None:
    judge = Judge(sought=True)

    async def main() -> None:
        trials, kept = Trials(judge, len(WANTED), 0), Kept()
        held = trials.held("peer", kept)
        assert held is not None

        async def find() -> None:
            await trio.sleep(0.1)
            judge.proven = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(find)
            await trials.judged(held, "peer", WANTED, sending(held, RIGHT))
        assert kept.data == RIGHT

    trio.run(main)
    assert judge.asked == []


def test_answers_that_come_together_cost_one_question() -> None:
    judge = Judge(patience=0.05)

    async def main() -> None:
        trials = Trials(judge, len(WANTED), 0)
        sinks = [Kept() for _ in range(6)]

        async def ask(kept: Kept) -> None:
            held = trials.held("peer", kept)
            assert held is not None
            await trials.judged(held, "peer", WANTED, sending(held, RIGHT))

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for kept in sinks:
                    nursery.start_soon(ask, kept)
        assert all(kept.data == RIGHT for kept in sinks)

    trio.run(main)
    assert len(judge.asked) == 1


def test_who_is_left_in_the_middle_of_a_trial_lets_another_answer_decide() -> None:
    judge = Judge(patience=3600)

    async def main() -> None:
        trials, kept = Trials(judge, len(WANTED), 0), Kept()
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()

                async def leave() -> None:
                    held = trials.held("peer", Kept())
                    assert held is not None
                    with scope:
                        await trials.judged(held, "peer", WANTED, sending(held, RIGHT))

                nursery.start_soon(leave)
                await judge.began.wait()
                judge.patience = 0
                scope.cancel()
            held = trials.held("peer", kept)
            assert held is not None
            await trials.judged(held, "peer", WANTED, sending(held, RIGHT))
        assert kept.data == RIGHT

    trio.run(main)
    assert len(judge.asked) == 2


def test_an_answer_that_ends_early_is_not_used() -> None:
    judge = Judge()
    assert answered(judge, RIGHT[: EXCERPT_BYTES // 2]) == b""
    assert judge.banned == []


def test_a_small_part_says_nothing_of_the_others() -> None:
    judge = Judge()
    trials = Trials(judge, len(WANTED), 0)

    async def main() -> None:
        kept = Kept()
        held = trials.held("peer", kept)
        assert held is not None
        little = Range(WANTED.start, WANTED.start + 100)
        await trials.judged(held, "peer", little, sending(held, RIGHT[:100]))
        assert kept.data == RIGHT[:100]
        assert trials.held("peer", Kept()) is not None

    trio.run(main)
