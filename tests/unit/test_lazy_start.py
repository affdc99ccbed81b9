"""What goes before filling a lazy model in the background, and how long that may take."""

from __future__ import annotations

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
                await trio.sleep(first / 2)
                read.was_read()

            nursery.start_soon(live)
            assert await seconds(read) == 1 + first / 2

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
