"""Files that may change at any time: looked at once a second, and not each time that they matter.

A pull asks dozens of times who speaks for its registry, and in whose name. Each look takes a thread
and some milliseconds of a busy processor, and finds the same nearly always.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

GLANCE_SECONDS: Final = 1.0
"""How long is gone by what was seen."""


class Glance(Generic[T]):
    """What was seen at the last look. Belongs to the trio thread."""

    def __init__(
        self,
        look: Callable[[T | None], Awaitable[T]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``look`` is given what it saw before, and gives what there is now, which is not None."""
        self._look = look
        self._clock = clock
        self._seen: T | None = None
        self._until = float("-inf")
        self._looking = trio.Lock()
        """Held during a look: one will do for all who want to know meanwhile."""

    async def seen(self) -> T:
        """What there is, or was a second ago. Raises what ``look`` does, which looks again then."""
        seen = self._fresh()
        if seen is None:
            async with self._looking:
                seen = self._fresh()
                if seen is None:
                    seen = await self._look(self._seen)
                    self._seen, self._until = seen, self._clock() + GLANCE_SECONDS
        return seen

    def _fresh(self) -> T | None:
        return self._seen if self._clock() < self._until else None
