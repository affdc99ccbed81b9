"""Threads that can be told to stop."""

from __future__ import annotations

import functools
import threading
import weakref
from typing import TYPE_CHECKING, Protocol, TypeVar

import pytest
import trio
import trio.testing

from fetcher.threads import Stopped, kept_threads, run_stoppable
from tests.support.commands import wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")


class Run(Protocol):
    """As ``trio.run``."""

    def __call__(self, main: Callable[[], Awaitable[T]]) -> T: ...


@pytest.fixture(params=[None, 0, 1], ids=["trio's", "none is free", "kept"])
def run(request: pytest.FixtureRequest) -> Run:
    """Threads are trio's, or kept ones as far as there are any."""

    async def within(main: Callable[[], Awaitable[T]]) -> T:
        if request.param is None:
            return await main()
        with kept_threads(request.param):
            return await main()

    return lambda main: trio.run(within, main)


def _give(thing: T, _: threading.Event) -> T:
    return thing


def test_a_result_comes_back(run: Run) -> None:
    async def main() -> list[int]:
        return [await run_stoppable(functools.partial(_give, number)) for number in range(3)]

    assert run(main) == [0, 1, 2]


def test_an_exception_comes_back(run: Run) -> None:
    def fail(_: threading.Event) -> None:
        raise ValueError("wrong")

    async def main() -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match="wrong"):
                await run_stoppable(fail)

    run(main)


def test_cancelling_stops_the_thread_and_waits_for_it(run: Run) -> None:
    ended = threading.Event()
    started = threading.Event()

    def work(stop: threading.Event) -> None:
        started.set()
        stop.wait(30)
        ended.set()
        raise Stopped

    async def main() -> bool:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_stoppable, work)
                await trio.to_thread.run_sync(started.wait, 30)
                scope.cancel()
        assert ended.is_set()
        return scope.cancelled_caught

    assert run(main)


def test_nothing_starts_for_a_cancelled_caller(run: Run) -> None:
    ran: list[int] = []

    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await run_stoppable(lambda _: ran.append(1))

    run(main)
    assert ran == []


def test_a_result_that_comes_in_spite_of_the_cancellation_is_kept(run: Run) -> None:
    async def main() -> int:
        result = 0

        def work(stop: threading.Event) -> int:
            stop.wait(30)
            return 7

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def start() -> None:
                    nonlocal result
                    result = await run_stoppable(work)

                nursery.start_soon(start)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        return result

    assert run(main) == 7


# -- threads that are kept -------------------------------------------------------------------------


def kept_names() -> set[str]:
    return {one.name for one in threading.enumerate() if one.name.startswith("kept thread")}


def test_kept_threads_run_what_comes_and_no_limit_is_shared() -> None:
    """However many there are, none waits for another one to end."""
    all_at_once = threading.Barrier(5, timeout=30)
    names: list[str] = []

    def work(_: threading.Event) -> None:
        names.append(threading.current_thread().name)
        all_at_once.wait()

    async def main() -> None:
        with kept_threads(2):
            for _ in range(2):
                async with trio.open_nursery() as nursery:
                    for _ in range(5):
                        nursery.start_soon(run_stoppable, work)

    trio.run(main)
    assert sorted(names)[-4:] == ["kept thread 0"] * 2 + ["kept thread 1"] * 2


def test_kept_threads_end_with_their_block_and_after_their_work() -> None:
    go_on = threading.Event()

    async def work() -> None:
        assert await run_stoppable(lambda _: go_on.wait(30))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            with kept_threads(3):
                assert len(kept_names()) == 3
                nursery.start_soon(work)
                await trio.testing.wait_all_tasks_blocked()
            await trio.to_thread.run_sync(wait_until, lambda: len(kept_names()) == 1, "two end")
            # a thread of another kind: there are none that are kept any more
            assert await run_stoppable(lambda _: threading.current_thread().name) not in (
                kept_names()
            )
            go_on.set()

    trio.run(main)
    wait_until(lambda: not kept_names(), "the last one ends")


def test_what_comes_when_kept_threads_end_is_still_done() -> None:
    """The thread may not have come back from what it did before."""
    done: list[int] = []

    async def main() -> None:
        for number in range(300):
            async with trio.open_nursery() as nursery:
                with kept_threads(1):
                    assert await run_stoppable(lambda _: True)
                    nursery.start_soon(run_stoppable, lambda _, number=number: done.append(number))
                    # it has been handed over, and waits for its result
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.deadline = trio.current_time() + 20
        assert done == list(range(300))

    trio.run(main)


def test_a_thread_that_waits_holds_nothing_of_what_it_ran() -> None:
    class Thing:
        pass

    async def main() -> None:
        with kept_threads(1):
            thing = Thing()
            known = weakref.ref(thing)
            assert await run_stoppable(functools.partial(_give, thing)) is thing
            del thing
            await trio.to_thread.run_sync(wait_until, lambda: known() is None, "it is gone")

    trio.run(main)
