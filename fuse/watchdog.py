"""Wakes the worker when a read of the kernel's requests got stuck.

A request may be taken back, its program killed, between the moment when the kernel says that there
is one and the moment when it is read: then the read waits for the next one, with it the only
thread that answers, and readers would miss their deadlines until somebody else wants something.
So if the loop does not turn, something is asked of the mount.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from pathlib import Path

_SECONDS: Final = 2.0


class Watchdog:
    """Looks whether the loop turns, from outside of it."""

    def __init__(self, mount: Path, seconds: float = _SECONDS) -> None:
        self._mount = mount
        self._seconds = seconds
        self._turned = time.monotonic()
        self._stop = threading.Event()

    async def run(self) -> None:
        """Until cancelled."""
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            while True:
                self._turned = time.monotonic()
                await trio.sleep(self._seconds / 2)
        finally:
            self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(self._seconds):
            if time.monotonic() - self._turned > self._seconds:
                with contextlib.suppress(OSError):
                    os.statvfs(self._mount)
