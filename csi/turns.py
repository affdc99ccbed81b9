"""One call at a time for a volume at a target: a try-lock that an unpublish can take over.

Nobody queues: kubelet asks again by itself. But the deletion of a pod must not wait for the two
minutes that a publish may wait for a download, so an unpublish interrupts it.

The key is the target. Two volumes at one target exclude each other; two pods that mount one claim
on one node have two targets, and wait for their common download side by side.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from fetcher.errors import InProgress

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TAKE_OVER_TIMEOUT: Final = 20.0
"""Seconds in which an interrupted call has to be gone; what it may still do is bounded by less."""


@dataclass(eq=False)
class Turn:
    """The right of one call to work on a volume at a target."""

    volume_id: str
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    interruptible: bool = False
    released: trio.Event = field(default_factory=trio.Event)

    @contextmanager
    def interruptibly(self) -> Iterator[None]:
        """Let a take-over cancel the block. Raises :class:`InProgress` if one did."""
        self.interruptible = True
        with self.scope:
            yield
        if self.scope.cancelled_caught:
            raise InProgress(f"volume {self.volume_id} is being unpublished")


class Turns:
    """Who works where. Belongs to the trio thread."""

    def __init__(self) -> None:
        self._held: dict[Path, Turn] = {}

    @contextmanager
    def take(self, volume_id: str, target: Path) -> Iterator[Turn]:
        """Have the turn for the block; :class:`InProgress` at once if another call has it."""
        if target in self._held:
            raise _busy(self._held[target])
        turn = self._held[target] = Turn(volume_id)
        try:
            yield turn
        finally:
            del self._held[target]
            turn.released.set()

    async def interrupt(self, volume_id: str, target: Path) -> None:
        """End what publishes ``volume_id`` at ``target``; on return :meth:`take` succeeds.

        That holds until the caller's next checkpoint. Raises :class:`InProgress` when the call that
        has the turn is of another kind or another volume, or is not gone in time.
        """
        deadline = trio.current_time() + TAKE_OVER_TIMEOUT
        # again after each wait: another publish may have been faster
        while (turn := self._held.get(target)) is not None:
            if not turn.interruptible or turn.volume_id != volume_id:
                raise _busy(turn)
            turn.scope.cancel()
            with trio.move_on_at(deadline) as waiting:
                await turn.released.wait()
            if waiting.cancelled_caught:
                raise _busy(turn)


def _busy(turn: Turn) -> InProgress:
    return InProgress(
        f"another call works on volume {turn.volume_id}: ask again", volume=turn.volume_id
    )
