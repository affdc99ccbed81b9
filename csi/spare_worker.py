"""A worker that is there before anybody wants it.

Most of what a worker takes to start is its interpreter and what it imports, and a pod waits for it.
So one process has done that and waits for a model; the next one is started when all is calm again.
It is the driver's own until it serves: it ends with the driver, however that ends.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, Final

import trio

from csi.worker_processes import launch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from csi.worker_processes import Launched, WorkerSettings

logger = logging.getLogger(__name__)

_FIRST_PAUSE: Final = 10.0
_LONGEST_PAUSE: Final = 600.0
"""Seconds before it is tried again where it does not stay, or cannot be."""


class SpareWorker:
    """At most one process that waits to serve a model. Belongs to the trio thread."""

    def __init__(self, settings: WorkerSettings, root: Path) -> None:
        self._settings = settings
        self._root = root
        self._spare: Launched | None = None
        self._waiting = trio.CancelScope()

    def take(self) -> Launched | None:
        """The process, which is the caller's then; None if there is none."""
        taken, self._spare = self._spare, None
        self._waiting.cancel()
        return taken

    async def keep(self, obstacle: Callable[[], str | None]) -> None:
        """Have one ready where no ``obstacle`` is told of, until cancelled; not if the settings do
        not want it.
        """
        calm = pause = self._settings.spare
        while calm is not None and pause is not None:
            # a pod reads first, after the driver's start and after one was taken
            await trio.sleep(pause)
            if obstacle() is not None:
                pause = _LONGEST_PAUSE
                continue
            try:
                await self._keep_one()
            except OSError as error:
                pause = min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)
                logger.warning(
                    "no process waits to serve the next lazy volume: %s; it is started again in "
                    "%.0f s",
                    error.strerror,
                    pause,
                )
            else:
                pause = calm

    async def _keep_one(self) -> None:
        """Start one, and wait until it is taken. Raises OSError, also when it ends before that."""
        spare = launch(self._settings, self._root)
        self._spare = spare
        try:
            await self._end_of(spare)
            if self._spare is spare:
                raise ChildProcessError(errno.ECHILD, "it ended by itself")
        finally:
            if self._spare is spare:
                self._spare = None
                spare.drop()

    async def _end_of(self, spare: Launched) -> None:
        """Wait until it is taken or has ended. Raises OSError."""
        # whoever takes the process watches the other descriptor of it
        descriptor = os.dup(spare.process.descriptor)
        try:
            with trio.CancelScope() as self._waiting:
                await trio.lowlevel.wait_readable(descriptor)
        finally:
            os.close(descriptor)
