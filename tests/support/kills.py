"""Killing a process at each call of our own functions that may do something, one after the other.

Finer than the checkpoints of :mod:`tests.support.steps`: also between two writes that no checkpoint
is between. What is killed is a fork of a small process without threads, so that hundreds are quick.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

_REPOSITORY = Path(__file__).parents[2]
_OURS = tuple(f"{_REPOSITORY}/{package}/" for package in ("csi", "fetcher"))
_READERS = (
    *("csi/mount_table.py", "csi/pins.py", "csi/served.py", "csi/conditions.py", "fetcher/oci.py"),
)
"""Modules that change nothing: a kill in them is one before the next call of another."""


class Killing:
    """Runs functions that are killed in the middle."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, work: Callable[[Path], None], folder: Path, at: int) -> bool:
        """Call ``work(folder)``, killed at event number ``at``; whether it came so far.

        Raises when it failed by itself.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"module": work.__module__, "name": work.__name__, "folder": str(folder), "at": at}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        assert status in (0, -signal.SIGKILL), f"{work.__name__} failed by itself: {status}"
        return status != 0


@contextmanager
def killing() -> Iterator[Killing]:
    """The process whose forks are killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from tests.support.kills import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_REPOSITORY,
    )
    with process:
        try:
            yield Killing(process)
        finally:
            process.kill()


def serve() -> None:
    """Take orders from standard input until it ends."""
    for line in sys.stdin:
        order = json.loads(line)
        work = getattr(importlib.import_module(order["module"]), order["name"])
        child = os.fork()
        if child == 0:
            # a fork must never go on as its parent
            try:
                _be_killed(work, Path(order["folder"]), order["at"])
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _counts(file: str) -> bool:
    return file.startswith(_OURS) and not file.endswith(_READERS)


def _be_killed(work: Callable[[Path], None], folder: Path, at: int) -> None:
    left = at

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        if event == "call" and _counts(frame.f_code.co_filename):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(count)
    sys.setprofile(count)
    work(folder)
    os._exit(0)
