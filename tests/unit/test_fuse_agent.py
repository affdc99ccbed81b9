"""Questions to the agent outlive agents; what may pass is waited for, what is refused is not."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher import lazy_protocol as protocol
from fetcher.errors import AccessDenied, Unavailable
from fetcher.ranges import Range
from fuse.agent import Agent
from tests.support.lazy_agent import CHUNK, SmallAgent
from tests.support.models import ModelBuilder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

DATA = bytes(range(256)) * 1024


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallAgent]:
    builder = ModelBuilder().add_raw("x", DATA)
    agent = SmallAgent(tmp_path, builder.body, lambda _, part: DATA[part.start : part.stop])
    try:
        yield agent
    finally:
        agent.orders.answering.set()
        agent.stop()


def _name(small: SmallAgent) -> str:
    return next(iter(small.names()))


def _run(small: SmallAgent, work: Callable[[Agent], Awaitable[None]]) -> list[tuple[str, str]]:
    """Run ``work`` with a worker's side of the connection; what was spoiled."""
    spoiled: list[tuple[str, str]] = []

    async def main() -> None:
        params = protocol.AttachParams(model="sha256:1", pid=1)

        def noted(name: str, reason: str) -> None:
            spoiled.append((name, reason))

        agent = Agent(small.root, params, noted, lambda: None)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(agent.run)
                await work(agent)
                nursery.cancel_scope.cancel()

    trio.run(main)
    return spoiled


async def _until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 - the agent is another thread, which tells nobody
        await trio.sleep(0.005)


def test_what_is_wanted_comes(small: SmallAgent) -> None:
    async def work(agent: Agent) -> None:
        small.start()
        here = await agent.want(_name(small), Range(0, CHUNK))
        assert not here.complete
        assert small.blob(_name(small)).is_trusted(0)
        assert agent.trouble is None

    _run(small, work)


def test_a_question_waits_for_an_agent_and_for_the_next_one(small: SmallAgent) -> None:
    async def work(agent: Agent) -> None:
        small.orders.answering.clear()
        async with trio.open_nursery() as nursery:
            for chunk in range(3):
                part = Range(chunk * CHUNK, (chunk + 1) * CHUNK)
                nursery.start_soon(agent.want, _name(small), part)
            agent.opened(_name(small), Range(0, 5))
            for times in (1, 2, 3):
                small.start()
                await _until(lambda times=times: len(small.wants()) == 3 * times)  # type: ignore[misc]
                small.stop()
            small.orders.answering.set()
            small.start()
        # each of them was told what is open, and shown what the one before had given
        assert sum(isinstance(one, protocol.Opened) for one in small.asked) == 4
        assert small.tickets == ["", *["first ticket"] * 3]

    _run(small, work)


def test_a_new_ticket_is_shown_to_the_next_agent(small: SmallAgent) -> None:
    async def work(agent: Agent) -> None:
        small.start()
        await _until(lambda: len(small.tickets) == 1)
        small.say(protocol.Ticket("second ticket"))
        await agent.want(_name(small), Range(0, CHUNK))
        small.stop()
        small.start()
        await _until(lambda: len(small.tickets) == 2)

    _run(small, work)
    assert small.tickets == ["", "second ticket"]


def test_many_who_want_the_same_ask_once(small: SmallAgent) -> None:
    async def work(agent: Agent) -> None:
        small.start()
        small.orders.answering.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(agent.want, _name(small), Range(0, CHUNK))
            await _until(lambda: len(small.asked) == 1)
            small.orders.answering.set()
        assert len(small.asked) == 1
        # one who comes later asks anew
        await agent.want(_name(small), Range(0, CHUNK))
        assert len(small.asked) == 2

    _run(small, work)


def test_who_gives_up_lets_the_agent_forget(small: SmallAgent) -> None:
    async def work(agent: Agent) -> None:
        small.start()
        small.orders.answering.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.want, _name(small), Range(0, CHUNK))
            nursery.start_soon(agent.want, _name(small), Range(0, CHUNK))
            with trio.CancelScope() as scope:
                nursery.start_soon(agent.want, _name(small), Range(CHUNK, 2 * CHUNK))
                await _until(lambda: len(small.asked) == 2)
                scope.cancel()
            nursery.cancel_scope.cancel()
        await _until(lambda: len(small.asked) == 4)
        asked = {one.id for one in small.asked if isinstance(one, protocol.Want)}
        forgotten = {one.id for one in small.asked if isinstance(one, protocol.Forget)}
        assert asked == forgotten
        # and it can be asked again
        small.orders.answering.set()
        await agent.want(_name(small), Range(0, CHUNK))

    _run(small, work)


def test_what_is_refused_is_told_at_once(small: SmallAgent) -> None:
    async def work(agent: Agent) -> None:
        small.start()
        small.orders.refusal = AccessDenied("not for you")
        with pytest.raises(AccessDenied, match="not for you"):
            await agent.want(_name(small), Range(0, CHUNK))
        assert agent.trouble == "not for you"

    _run(small, work)


def test_what_may_pass_is_asked_for_again(small: SmallAgent) -> None:
    async def work(agent: Agent) -> None:
        small.start()
        small.orders.refusal = Unavailable("the registry is away")

        def come_back() -> None:
            small.orders.refusal = None

        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.want, _name(small), Range(0, CHUNK))
            await _until(lambda: agent.trouble == "the registry is away")
            come_back()
        assert len(small.asked) >= 2

    _run(small, work)


def test_what_is_spoiled_is_heard(small: SmallAgent) -> None:
    async def work(agent: Agent) -> None:
        small.start()
        await agent.want(_name(small), Range(0, CHUNK))
        small.say(protocol.Spoiled(_name(small), "why"))
        await agent.want(_name(small), Range(CHUNK, 2 * CHUNK))

    assert _run(small, work) == [(_name(small), "why")]


def test_lines_that_nobody_knows_are_passed_over(small: SmallAgent) -> None:
    async def work(agent: Agent) -> None:
        small.start()
        await agent.want(_name(small), Range(0, CHUNK))
        small.say_line(b'{"type": "from the future", "id": 7}\n')
        await agent.want(_name(small), Range(CHUNK, 2 * CHUNK))

    _run(small, work)
    assert len(small.tickets) == 1


def test_what_is_ahead_is_asked_for_and_not_waited_for(small: SmallAgent) -> None:
    async def work(agent: Agent) -> None:
        small.start()
        await agent.want(_name(small), Range(0, CHUNK))
        agent.ahead(_name(small), Range(CHUNK, 3 * CHUNK))
        await _until(lambda: small.blob(_name(small)).is_trusted(2))

    _run(small, work)
    assert [one.ahead for one in small.asked if isinstance(one, protocol.Want)] == [False, True]


def test_what_is_not_an_agent_is_tried_again(small: SmallAgent) -> None:
    """One that closes at once, and says nonsense, until a real one comes."""

    async def work(agent: Agent) -> None:
        rude = threading.Thread(target=small.be_rude, args=[3])
        rude.start()
        await trio.to_thread.run_sync(rude.join)
        small.start()
        await agent.want(_name(small), Range(0, CHUNK))

    _run(small, work)
