"""What goes before filling a lazy model in the background, and how long that may take."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from fetcher.lazy_start import Start


async def seconds(start: Start) -> float:
    begun = trio.current_time()
    await start.over()
    return trio.current_time() - begun


def test_nothing_is_waited_for_unless_said_so() -> None:
    async def main() -> None:
        assert await seconds(Start()) == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_filling_begins_with_the_first_answer_and_after_a_while_without() -> None:
    async def main() -> None:
        assert await seconds(Start(3)) == 3
        silent = Start(3)
        silent.attached()
        first = await seconds(silent)
        assert 0 < first < 1
        # what is opened later waits for nothing any more
        silent.attached()
        assert await seconds(silent) == 0
        read = Start(3)
        async with trio.open_nursery() as nursery:

            async def live() -> None:
                await trio.sleep(1)
                read.attached()
                read.reads()
                read.was_read()

            nursery.start_soon(live)
            assert await seconds(read) == 1

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("took", [0.125, 0.25, 2.0])
def test_a_read_that_is_there_is_answered_first_but_not_waited_for_for_ever(took: float) -> None:
    most = 0.5

    async def main() -> None:
        slow = Start(3)
        slow.attached()
        calm = await seconds(slow)
        async with trio.open_nursery() as nursery:

            async def live() -> None:
                read.attached()
                await trio.sleep(calm / 2)
                read.reads()
                await trio.sleep(took)
                read.was_read()
                # of no account any more
                read.reads()
                read.was_read()

            read = Start(3)
            nursery.start_soon(live)
            # other nodes may wait for theirs as long as this one did, or longer
            assert await seconds(read) == calm / 2 + took + min(took, most)
        stuck = Start(3)
        stuck.attached()
        stuck.reads()
        assert calm < await seconds(stuck) < 10
        # others that wait do not begin it anew
        stuck.reads()
        assert await seconds(stuck) == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
