"""Threads that can be told to stop."""

import threading

import pytest
import trio
import trio.testing

from fetcher.threads import Stopped, run_stoppable


def test_a_result_comes_back() -> None:
    assert trio.run(run_stoppable, lambda _: 42) == 42


def test_an_exception_comes_back() -> None:
    def fail(_: threading.Event) -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        trio.run(run_stoppable, fail)


def test_cancelling_stops_the_thread_and_waits_for_it() -> None:
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

    assert trio.run(main)


def test_nothing_starts_for_a_cancelled_caller() -> None:
    ran: list[int] = []

    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await run_stoppable(lambda _: ran.append(1))

    trio.run(main)
    assert ran == []


def test_a_result_that_comes_in_spite_of_the_cancellation_is_kept() -> None:
    async def main() -> int:
        result = 0

        def work(stop: threading.Event) -> int:
            stop.wait(30)
            return 7

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def run() -> None:
                    nonlocal result
                    result = await run_stoppable(work)

                nursery.start_soon(run)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        return result

    assert trio.run(main) == 7
