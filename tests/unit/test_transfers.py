"""How the node's connections are dealt out, with a clock of the test's own and no network."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from fetcher.transfers import Slot, Transfers
from fetcher.transport import TransferSettings

Work = Callable[[Slot], Awaitable[None]]


def play(main: Callable[[Transfers, trio.Nursery], Awaitable[None]], connections: int = 3) -> None:
    """Run ``main`` with so many connections, in no time at all."""

    async def run() -> None:
        transfers = Transfers(connections, TransferSettings())
        async with trio.open_nursery() as nursery:
            await main(transfers, nursery)
            nursery.cancel_scope.cancel()
        transfers.close()

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


def lasting(seconds: float) -> Work:
    async def work(_: Slot) -> None:
        await trio.sleep(seconds)

    return work


async def fill(transfers: Transfers, nursery: trio.Nursery, group: str, count: int) -> None:
    """Start requests that never end."""
    for _ in range(count):
        nursery.start_soon(transfers.run, group, lasting(float("inf")))
    await trio.testing.wait_all_tasks_blocked()


def test_who_waits_alone_is_never_interrupted() -> None:
    async def main(transfers: Transfers, nursery: trio.Nursery) -> None:
        ended = []

        async def one() -> None:
            ended.append(await transfers.run("one", lasting(100)))

        for _ in range(7):
            nursery.start_soon(one)
        await trio.sleep(301)
        assert ended == [None] * 7

    play(main)


@pytest.mark.parametrize("waiting", [0, 20])
def test_a_registry_that_is_slow_leaves_others_their_share(waiting: int) -> None:
    async def main(transfers: Transfers, nursery: trio.Nursery) -> None:
        await fill(transfers, nursery, "slow", 3 + waiting)
        begin = trio.current_time()
        assert await transfers.run("fast", lasting(0.1)) is None
        # one was asked to make room, once it had had its time
        assert trio.current_time() - begin < 6
        for _ in range(20):
            await transfers.run("fast", lasting(0.1))
        assert trio.current_time() - begin < 110

    play(main)


def test_more_registries_than_slots_take_turns() -> None:
    async def main(transfers: Transfers, nursery: trio.Nursery) -> None:
        turns: dict[str, int] = {}

        async def again_and_again(group: str) -> None:
            while True:
                stopped = await transfers.run(group, lasting(float("inf")))
                assert stopped is not None
                assert stopped >= 5
                turns[group] = turns.get(group, 0) + 1

        for group in "abcdefg":
            nursery.start_soon(again_and_again, group)
        await trio.sleep(200)
        assert sorted(turns) == list("abcdefg")
        # who is next of those that wait alike is up to the order in which their tasks run
        assert max(turns.values()) <= 2 * min(turns.values())

    play(main)


def test_shares_that_are_as_equal_as_can_be_stay() -> None:
    async def main(transfers: Transfers, nursery: trio.Nursery) -> None:
        stopped = []

        async def note(group: str) -> None:
            stopped.append(await transfers.run(group, lasting(60)))

        for group in ("slow", "slow", "fast", "slow", "fast"):
            nursery.start_soon(note, group)
            # one after the other: tasks that are started together begin in any order
            await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(119)
        assert [one for one in stopped if one is not None] == []

    play(main)


def test_what_would_start_anew_goes_on_beside_the_slots() -> None:
    async def main(transfers: Transfers, nursery: trio.Nursery) -> None:
        ended = []

        async def whole(slot: Slot) -> None:
            slot.keep = lambda: True
            await trio.sleep(1000)

        async def note() -> None:
            ended.append(await transfers.run("whole", whole))

        for _ in range(3):
            nursery.start_soon(note)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(20):
            await transfers.run("ranged", lasting(1))
        assert trio.current_time() < 100
        await trio.sleep(1000)
        assert ended == [None] * 3

    play(main)


def test_not_even_wholes_without_end_keep_others_waiting() -> None:
    async def main(transfers: Transfers, nursery: trio.Nursery) -> None:
        async def whole(slot: Slot) -> None:
            slot.keep = lambda: True
            await trio.sleep_forever()

        async def again() -> None:
            while True:
                await transfers.run("drips", whole)

        for _ in range(200):
            nursery.start_soon(again)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(1000):
            for _ in range(30):
                await transfers.run("fast", lasting(1))

    play(main)


def test_who_leaves_the_queue_or_a_slot_takes_nothing_along() -> None:
    async def main(transfers: Transfers, nursery: trio.Nursery) -> None:
        for when in (0.0, 0.5, 4.9, 5.0, 5.1, 7.0):
            async with trio.open_nursery() as inner:
                await fill(transfers, inner, "slow", 2)
                with trio.move_on_after(when):
                    await transfers.run("other", lasting(100))
                inner.cancel_scope.cancel()
        with trio.fail_after(1):
            await transfers.run("other", lasting(0.5))

    play(main, connections=1)


def test_blobs_share_the_connections() -> None:
    async def main(transfers: Transfers, nursery: trio.Nursery) -> None:
        forever = lasting(float("inf"))
        assert transfers.share("first") == 4
        for _ in range(3):
            nursery.start_soon(transfers.run, "one", forever, None, "first")
        nursery.start_soon(transfers.run, "two", lasting(5), None, "second")
        await trio.testing.wait_all_tasks_blocked()
        assert [transfers.share(blob) for blob in ("first", "second", "third")] == [2, 2, 1]
        for blob in "third", "fourth", "fifth", "sixth":
            # with more of them than connections each has one, in turn
            nursery.start_soon(transfers.run, "one", forever, None, blob)
        await trio.testing.wait_all_tasks_blocked()
        assert transfers.share("first") == 1

    play(main, connections=4)
