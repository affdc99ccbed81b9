"""What workers write, brought into the driver's own log.

A worker writes to a file beside its mount and not to a pipe of the driver, which would break with
the driver. Whoever runs the driver at the time reads on where the last one stopped: what was passed
on is cut off the file.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from csi.served import TreeKey

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0
MAX_BYTES: Final = 256 * 1024
"""At one look. Of more than that, as of a worker that goes round in circles, the end is kept."""

_MODE: Final = 0o600


def _to_standard_error(content: bytes) -> None:
    try:
        sys.stderr.buffer.write(content)
        sys.stderr.buffer.flush()
    except (OSError, ValueError, AttributeError):
        # whoever read this process's log went away: no reason to stop
        return


class WorkerLogs:
    """The files that workers write to. Belongs to the trio thread."""

    def __init__(self, write: Callable[[bytes], None] = _to_standard_error) -> None:
        """``write`` takes whole lines, which have the form of this process's own."""
        self._write = write
        self._files: dict[TreeKey, Path] = {}

    def open(self, key: TreeKey, mountpoint: Path) -> int:
        """A descriptor for a worker to write to; what others wrote there before is passed on."""
        self.follow(key, mountpoint)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self._files[key], flags, _MODE)

    def follow(self, key: TreeKey, mountpoint: Path) -> None:
        """Pass on what the worker writes from now on, whoever started it."""
        self._files[key] = mountpoint.with_name(mountpoint.name + ".log")

    def forget(self, key: TreeKey, mountpoint: Path) -> None:
        """The worker has ended for good."""
        self.follow(key, mountpoint)
        self._files.pop(key).unlink(missing_ok=True)

    async def forward(self) -> None:
        """Pass on what is written, looked at every second, until cancelled."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            for key in list(self._files):
                self.drain(key)

    def drain(self, key: TreeKey) -> None:
        """Pass on what is there, and cut it off. The files are short, and on the node's own disk.

        A line that is written between the two is lost: there is no lock that a worker would wait
        for.
        """
        path = self._files.get(key)
        if path is None:
            return
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return
        try:
            size = os.fstat(descriptor).st_size
            if size == 0:
                return
            content = os.pread(descriptor, MAX_BYTES, max(size - MAX_BYTES, 0))
            os.ftruncate(descriptor, 0)
        except OSError as error:
            logger.warning("%s cannot be read: %s", path, error.strerror)
            return
        finally:
            os.close(descriptor)
        self._write(content if content.endswith(b"\n") else content + b"\n")
