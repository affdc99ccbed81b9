"""Turns: nobody queues, and an unpublish interrupts a publish."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import trio
import trio.testing

from csi.turns import TAKE_OVER_TIMEOUT, Turns
from fetcher.errors import InProgress

HERE = Path("/pods/one/mount")
THERE = Path("/pods/two/mount")


def test_one_call_at_a_time() -> None:
    turns = Turns()
    with turns.take("volume", HERE):
        with pytest.raises(InProgress, match="another call works on volume volume"):
            turns.take("volume", HERE).__enter__()
        with pytest.raises(InProgress), turns.take("another volume", HERE):
            pass
        with turns.take("volume", THERE):
            pass
    with turns.take("volume", HERE):
        pass


def test_a_turn_ends_with_an_error() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns.take("volume", HERE):
        raise KeyError
    with turns.take("volume", HERE):
        pass


def test_a_publish_gives_way() -> None:
    async def main() -> None:
        turns = Turns()
        answers: list[str] = []

        async def publish() -> None:
            try:
                with turns.take("volume", HERE) as turn, turn.interruptibly():
                    await trio.sleep_forever()
            except InProgress as error:
                answers.append(error.message)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish)
            await trio.testing.wait_all_tasks_blocked()
            await turns.interrupt("volume", HERE)
            with turns.take("volume", HERE):
                pass
        assert answers == ["volume volume is being unpublished"]

    trio.run(main)


def test_a_cancelled_publish_is_cancelled_and_nothing_else() -> None:
    async def main() -> None:
        turns = Turns()
        with (
            trio.move_on_after(0) as scope,
            turns.take("volume", HERE) as turn,
            turn.interruptibly(),
        ):
            await trio.sleep_forever()
        assert scope.cancelled_caught
        with turns.take("volume", HERE):
            pass

    trio.run(main)


def test_nothing_to_interrupt() -> None:
    trio.run(Turns().interrupt, "volume", HERE)


@pytest.mark.parametrize("volume", ["volume", "another volume"])
def test_what_does_not_give_way(volume: str) -> None:
    async def main() -> None:
        turns = Turns()
        with turns.take("volume", HERE) as turn:
            with pytest.raises(InProgress):
                await turns.interrupt(volume, HERE)
            assert not turn.scope.cancel_called
            with turn.interruptibly():
                if volume != "volume":
                    with pytest.raises(InProgress):
                        await turns.interrupt(volume, HERE)
                    assert not turn.scope.cancel_called

    trio.run(main)


def test_a_publish_that_does_not_leave_is_not_waited_for_for_ever() -> None:
    async def main() -> None:
        turns = Turns()

        async def publish() -> None:
            with (
                contextlib.suppress(InProgress),
                turns.take("volume", HERE) as turn,
                turn.interruptibly(),
                trio.CancelScope(shield=True),
            ):
                await trio.sleep(10 * TAKE_OVER_TIMEOUT)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish)
            await trio.testing.wait_all_tasks_blocked()
            begin = trio.current_time()
            with pytest.raises(InProgress, match="another call works"):
                await turns.interrupt("volume", HERE)
            assert trio.current_time() - begin == TAKE_OVER_TIMEOUT

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_publish_that_is_faster_than_the_unpublish_is_interrupted_too() -> None:
    async def main() -> None:
        turns = Turns()
        interrupted = 0

        async def publish_again_and_again() -> None:
            nonlocal interrupted
            for _ in range(3):
                try:
                    with turns.take("volume", HERE) as turn, turn.interruptibly():
                        await trio.sleep_forever()
                except InProgress:
                    interrupted += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish_again_and_again)
            await trio.testing.wait_all_tasks_blocked()
            await turns.interrupt("volume", HERE)
            with turns.take("volume", HERE):
                assert interrupted == 3

    trio.run(main)
