"""The memory of reads: so many buffers, and not one more however many readers there are."""

from __future__ import annotations

from typing import Final

import trio

BUFFER_BYTES: Final = 1024 * 1024
"""The most that the kernel asks for at one time."""

_BUFFERS: Final = 24


class Buffers:
    """Buffers of :data:`BUFFER_BYTES`, lent for one read each; first come, first served."""

    def __init__(self, count: int = _BUFFERS) -> None:
        self._left = count
        self._free: list[memoryview] = []
        self._waiting = trio.lowlevel.ParkingLot()
        self.threads = trio.CapacityLimiter(count)
        """Of reads from the disk. One that never comes back keeps its thread, and its buffer."""

    async def take(self) -> memoryview:
        """A buffer, to be given back or lost."""
        while not self._left:
            await self._waiting.park()
        self._left -= 1
        return self._free.pop() if self._free else memoryview(bytearray(BUFFER_BYTES))

    def give(self, buffer: memoryview) -> None:
        """Give a buffer back. What is in it stays until the next checkpoint of the caller, as only
        this thread lends buffers.
        """
        self._free.append(buffer)
        self.lose()

    def lose(self) -> None:
        """Give up a buffer that a thread may still write to; another one takes its place."""
        self._left += 1
        self._waiting.unpark()
