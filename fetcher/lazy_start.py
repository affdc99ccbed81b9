"""The first moments of a lazy model: a pod's first read comes before what nobody waits for.

Where many nodes begin together, what is fetched ahead takes the links, those of owners and of the
registry too, and processors that the worker needs to start. So it waits for the worker and for the
first read to be answered, but not for long: a pod may read late, and a worker may never come. And
as long again as that answer took: where it took long, other nodes wait for theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

import trio

_CALM_SECONDS: Final = 0.5
"""How long the first read is waited for, once there is a worker."""
_READ_SECONDS: Final = 3.0
"""How long its answer is."""
_OTHERS_SECONDS: Final = 0.5
"""How long those of other nodes are, at most."""


@dataclass(eq=False)
class Start:
    """How far it has come. Belongs to the trio thread."""

    patience: float = 0.0
    """How long the worker is waited for, in seconds; 0: nothing is waited for."""
    _attached: trio.Event = field(default_factory=trio.Event)
    _read_since: float | None = None
    _was_read: bool = False
    _calm_until: float = math.inf
    _changed: trio.Event = field(default_factory=trio.Event)

    def attached(self) -> None:
        """The worker is there."""
        if not self._attached.is_set():
            self._attached.set()
            if self._read_since is None:
                self._be_calm(_CALM_SECONDS)

    def reads(self) -> None:
        """A read is there, the first one or another."""
        if self._read_since is None:
            self._read_since = trio.current_time()
            self._be_calm(_READ_SECONDS)

    def was_read(self) -> None:
        """A read was answered."""
        if not self._was_read and self._read_since is not None:
            self._was_read = True
            self._be_calm(min(trio.current_time() - self._read_since, _OTHERS_SECONDS))

    def _be_calm(self, seconds: float) -> None:
        self._calm_until = trio.current_time() + seconds
        self._changed.set()
        self._changed = trio.Event()

    async def over(self) -> None:
        """Wait until what nobody waits for may be fetched."""
        if not self.patience:
            return
        with trio.move_on_after(self.patience) as waiting:
            await self._attached.wait()
        if waiting.cancelled_caught:
            return
        while trio.current_time() < self._calm_until:
            with trio.move_on_at(self._calm_until):
                await self._changed.wait()
