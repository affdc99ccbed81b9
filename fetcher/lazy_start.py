"""The first moments of a lazy model: a pod's first read comes before what nobody waits for.

Where many nodes begin together, what is fetched ahead takes the links, those of owners and of the
registry too, and processors that the worker needs to start. So it waits for the worker and for the
first read, but not for long: a pod may read late, and a worker may never come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import trio

_CALM_SECONDS: Final = 0.5
"""How long the first read is waited for, once there is a worker."""


@dataclass(eq=False)
class Start:
    """How far it has come. Belongs to the trio thread."""

    patience: float = 0.0
    """How long the worker is waited for, in seconds; 0: nothing is waited for."""
    _attached: trio.Event = field(default_factory=trio.Event)
    _read: trio.Event = field(default_factory=trio.Event)
    _calm_until: float = math.inf

    def attached(self) -> None:
        """The worker is there."""
        if not self._attached.is_set():
            self._calm_until = trio.current_time() + _CALM_SECONDS
            self._attached.set()

    def was_read(self) -> None:
        """The first read was answered."""
        self._read.set()

    async def over(self) -> None:
        """Wait until what nobody waits for may be fetched."""
        if not self.patience:
            return
        with trio.move_on_after(self.patience) as waiting:
            await self._attached.wait()
        if not waiting.cancelled_caught:
            with trio.move_on_at(self._calm_until):
                await self._read.wait()
