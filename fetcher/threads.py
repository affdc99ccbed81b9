"""Blocking work in threads that can be told to stop, awaited from trio."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Any, Final, TypeVar

import outcome
import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    _Job = tuple[Callable[[], Any], Callable[[outcome.Outcome[Any]], object]]
    _Inbox = queue.SimpleQueue[_Job | None]

T = TypeVar("T")

_KEPT: Final[trio.lowlevel.RunVar[_KeptThreads | None]] = trio.lowlevel.RunVar("kept threads", None)


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

    kept = _KEPT.get()
    start = trio.lowlevel.start_thread_soon if kept is None else kept.start
    start(lambda: work(stop), deliver)
    try:
        result: T = await trio.lowlevel.wait_task_rescheduled(abort)
    except Stopped:
        await trio.lowlevel.checkpoint_if_cancelled()
        raise
    return result


@contextlib.contextmanager
def kept_threads(count: int) -> Iterator[None]:
    """Inside the block, which is in a trio run, ``count`` threads wait for what is to be run.

    Those that trio keeps end after 10 s. So a pull would begin with the start of some twenty, and
    the loop waits for each of them until a processor has run it. What comes when all of them work
    has a thread of trio's at once.
    """
    kept = _KeptThreads(count)
    token = _KEPT.set(kept)
    try:
        yield
    finally:
        _KEPT.reset(token)
        kept.end()


class _KeptThreads:
    """Threads that wait, each at an inbox of its own."""

    def __init__(self, count: int) -> None:
        self._waiting: list[_Inbox] = []
        """The last one is taken: it has run most lately. To append and to pop is atomic."""
        self._is_over = False
        for number in range(count):
            inbox: _Inbox = queue.SimpleQueue()
            name = f"kept thread {number}"
            # as trio's: one that hangs must not keep the process from ending
            threading.Thread(target=self._serve, args=(inbox,), name=name, daemon=True).start()
            self._waiting.append(inbox)

    def start(self, work: Callable[[], T], deliver: Callable[[outcome.Outcome[T]], object]) -> None:
        """As ``trio.lowlevel.start_thread_soon``."""
        try:
            inbox = self._waiting.pop()
        except IndexError:
            trio.lowlevel.start_thread_soon(work, deliver)
        else:
            inbox.put((work, deliver))

    def _serve(self, inbox: _Inbox) -> None:
        while (job := inbox.get()) is not None:
            work, deliver = job
            result = outcome.capture(work)
            # nothing is held while it waits, nor while somebody goes on with the result
            del job, work
            # before it is delivered: what follows from it may come back to this thread
            self._waiting.append(inbox)
            if self._is_over:
                # also of this one; a job that came in between is still done
                self.end()
            deliver(result)
            del deliver, result

    def end(self) -> None:
        """Let the threads end: those that wait at once, the others once they have delivered."""
        self._is_over = True
        with contextlib.suppress(IndexError):
            while True:
                self._waiting.pop().put(None)
