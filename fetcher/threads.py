"""Blocking work in threads that can be told to stop, awaited from trio."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    import outcome

T = TypeVar("T")


class Stopped(Exception):
    """Raised by a worker that saw its stop event; never reaches a user."""


async def run_stoppable(work: Callable[[threading.Event], T]) -> T:
    """Run ``work(stop)`` in a thread of its own and return what it returns.

    When the caller is cancelled, ``stop`` is set, and the thread is waited for before the
    cancellation goes on: nothing that the thread uses can be taken away under it. ``work`` must
    look at ``stop`` often, and should then raise :class:`Stopped`; a result that arrives in spite
    of the cancellation is returned. Unlike ``trio.to_thread`` there is no shared limit on threads:
    who starts work here bounds it, as one slow blob must not keep another one from starting.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    task = trio.lowlevel.current_task()
    token = trio.lowlevel.current_trio_token()
    stop = threading.Event()

    def deliver(result: outcome.Outcome[T]) -> None:
        try:
            token.run_sync_soon(trio.lowlevel.reschedule, task, result)
        except trio.RunFinishedError:
            # the loop ended under the thread: nobody is left to hear of it
            return

    def abort(_: Callable[[], None]) -> trio.lowlevel.Abort:
        stop.set()
        return trio.lowlevel.Abort.FAILED

    trio.lowlevel.start_thread_soon(lambda: work(stop), deliver)
    try:
        result: T = await trio.lowlevel.wait_task_rescheduled(abort)
    except Stopped:
        await trio.lowlevel.checkpoint_if_cancelled()
        raise
    return result
