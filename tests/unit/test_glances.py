"""What is looked at once a second, however many want to know."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from fetcher.glances import GLANCE_SECONDS, Glance
from tests.support.clocks import HandClock


class Sight:
    """Something that changes, and counts who looks; a look takes a moment."""

    def __init__(self) -> None:
        self.state = "first"
        self.before: list[str | None] = []
        self.failure: Exception | None = None

    async def look(self, before: str | None) -> str:
        self.before.append(before)
        seen = self.state
        await trio.sleep(0.1)
        if self.failure is not None:
            raise self.failure
        return seen


def test_what_was_seen_will_do_for_a_second() -> None:
    sight, clock = Sight(), HandClock()
    glance = Glance(sight.look, clock)

    async def main() -> None:
        assert await glance.seen() == "first"
        sight.state = "second"
        clock.pass_by(0.9 * GLANCE_SECONDS)
        assert await glance.seen() == "first"
        clock.pass_by(0.1 * GLANCE_SECONDS)
        assert await glance.seen() == "second"
        assert sight.before == [None, "first"]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_one_look_is_for_all_that_wait_and_not_for_one_of_them() -> None:
    """Though the one that began with it leaves."""
    sight, clock = Sight(), HandClock()
    glance = Glance(sight.look, clock)
    seen: list[str] = []

    async def want() -> None:
        seen.append(await glance.seen())

    async def want_in(scope: trio.CancelScope) -> None:
        with scope:
            await want()

    async def main() -> None:
        first = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(want_in, first)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(10):
                nursery.start_soon(want)
            await trio.testing.wait_all_tasks_blocked()
            first.cancel()
        assert seen == ["first"] * 10
        assert sight.before == [None, None]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_look_that_fails_is_none() -> None:
    sight, clock = Sight(), HandClock()
    glance = Glance(sight.look, clock)

    async def main() -> None:
        sight.failure = OSError("away")
        with pytest.raises(OSError, match="away"):
            await glance.seen()
        sight.failure = None
        assert await glance.seen() == "first"

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
