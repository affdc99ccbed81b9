"""Running a command's work on trio, and ending it when a signal says so."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from fetcher.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The work was ended by a signal."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run ``work`` to its end and return what it returns.

    SIGINT and SIGTERM cancel it, which ends in :class:`Interrupted`; a second one ends the process
    at once. Raises what ``work`` raises, errors for users without the groups of nurseries.
    """
    received: list[signal.Signals] = []
    try:
        results = trio.run(_run, work, received)
    except BaseExceptionGroup as group:
        error = _only_error(group)
        if error is None:
            raise
        raise error from group
    if received and not results:
        raise Interrupted(received[0])
    return results[0]


async def _run(work: Callable[[], Awaitable[T]], received: list[signal.Signals]) -> list[T]:
    """What ``work`` returned, as the only item; nothing when it was cancelled by a signal."""
    results: list[T] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(_cancel_on_signal, nursery.cancel_scope, received)
        results.append(await work())
        nursery.cancel_scope.cancel()
    return results


async def _cancel_on_signal(
    scope: trio.CancelScope,
    received: list[signal.Signals],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        task_status.started()
        async for number in signals:
            received.append(signal.Signals(number))
            break
    for one in _SIGNALS:
        # everything on disk survives a kill: who is in a hurry may have one
        signal.signal(one, signal.SIG_DFL)
    scope.cancel()


def _only_error(group: BaseExceptionGroup[BaseException]) -> ModelError | None:
    """The one error for a user in a group, None when there is anything else in it."""
    found, others = group.split(ModelError)
    if found is None or others is not None:
        return None
    error = innermost(found)
    return error if isinstance(error, ModelError) else None


def innermost(error: BaseException) -> BaseException:
    """The first exception in the groups that nurseries made of it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
