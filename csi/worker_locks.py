"""Which process serves a lazily shown model: what its lock file says, and whether it lives.

A worker holds ``flock`` on ``<root>/lazy/<algorithm>/<hex>[.<selection>].lock`` from before it
mounts until it ends, and writes into it who it is. So a driver that was started again finds the
workers of the one before, and takes no process for one that merely has the same number.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOST_BYTES: Final = 4096
_START_TIME_FIELD: Final = 22
"""Of ``/proc/<pid>/stat``, counted as proc_pid_stat(5) does."""


class _Content(msgspec.Struct):
    pid: int
    started: int | str


@dataclass(frozen=True, slots=True)
class LiveWorker:
    """A worker that lives. ``descriptor`` is its pidfd, which whoever asked has to close."""

    pid: int
    descriptor: int


def is_held(lock: Path) -> bool:
    """Whether some process holds the lock."""
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def holder(lock: Path) -> LiveWorker | None:
    """The process that holds the lock; None where none does, or it has not said yet who it is."""
    if not is_held(lock):
        return None
    try:
        said = msgspec.json.decode(lock.read_bytes()[:_MOST_BYTES], type=_Content)
        descriptor = os.pidfd_open(said.pid)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, OverflowError):
        return None
    # asked after the descriptor was opened: from now on it means the process that was looked at
    if said.pid <= 0 or started(said.pid) != str(said.started):
        os.close(descriptor)
        return None
    return LiveWorker(said.pid, descriptor)


def started(pid: int) -> str | None:
    """When a process started, in ticks since the machine did; None if there is none."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # the name of the program is in parentheses, and may have any character
    fields = content.rpartition(")")[2].split()
    place = _START_TIME_FIELD - 3
    return fields[place] if len(fields) > place else None


def locks(folder: Path) -> Iterator[Path]:
    """Every lock file below the folder of lazy models."""
    yield from sorted(folder.glob("*/*.lock"))
