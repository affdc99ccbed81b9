"""Cancelling an asynchronous call at each of its checkpoints, one after the other.

Those of the tasks that it starts are checkpoints of the call too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class _CancelAtStep(trio.abc.Instrument):
    """Cancels ``scope`` when its task, or one below it, is about to take the given step."""

    def __init__(self, task: trio.lowlevel.Task, scope: trio.CancelScope, step: int) -> None:
        self._task = task
        self._scope = scope
        self.left = step

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._is_below(task):
            self.left -= 1
            if self.left == 0:
                self._scope.cancel()

    def _is_below(self, task: trio.lowlevel.Task | None) -> bool:
        while task is not None and task is not self._task:
            task = None if task.parent_nursery is None else task.parent_nursery.parent_task
        return task is not None


async def cancelled_at(step: int, call: Callable[[], Awaitable[object]]) -> bool:
    """Run ``call``, cancelled when it has taken ``step`` steps; whether it ever came so far.

    ``step`` 0 cancels it before it begins. A call that has fewer steps has been tried at all.
    """
    with trio.CancelScope() as scope:
        instrument = _CancelAtStep(trio.lowlevel.current_task(), scope, step)
        if step == 0:
            scope.cancel()
        trio.lowlevel.add_instrument(instrument)
        try:
            await call()
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return instrument.left <= 0
