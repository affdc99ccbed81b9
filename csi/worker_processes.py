"""One process that serves a lazily shown model: its start, what it says of itself, its end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec
import trio

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

_MAX_READY_BYTES: Final = 16 * 1024
_READY_DESCRIPTOR: Final = 3


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How workers are started."""

    read_timeout: float = 60.0
    """Seconds in which a read of missing bytes has to end."""
    cgroup: Path | None = None
    """The cgroup that they are put into; None for the driver's own."""
    log_format: str = "text"
    log_level: str = "info"
    command: tuple[str, ...] = (sys.executable, "-P", "-m", "fuse")


class _Ready(msgspec.Struct):
    """What a worker says once: that it has mounted, or why not."""

    ready: bool = False
    error: str = ""


@dataclass(eq=False)
class WorkerProcess:
    """A worker that lives, or did when it was last looked at."""

    pid: int
    descriptor: int
    """Its pidfd."""
    ended: trio.Event = field(default_factory=trio.Event)
    """Set by whoever watches it, who then closes the descriptor."""
    stopping: bool = False
    """Whether its end is wanted, and nothing to tell of."""


def launch(settings: WorkerSettings, which: Sequence[str], log: int) -> tuple[WorkerProcess, int]:
    """Start a process; with where it says that it is ready, for :func:`problem_of`.

    ``which`` are the arguments that name what it serves; it writes to ``log``, which is closed.
    ``posix_spawn`` has no moment at which this process, with all of its threads, exists twice.
    Raises OSError.
    """
    command = [
        *settings.command,
        *which,
        *("--read-timeout", f"{settings.read_timeout:g}"),
        *("--ready-fd", str(_READY_DESCRIPTOR)),
        *("--log-format", settings.log_format, "--log-level", settings.log_level),
    ]
    ready, said = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # in this order: the log may have the number of the pipe's place
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
            (os.POSIX_SPAWN_DUP2, said, _READY_DESCRIPTOR),
        ]
        pid = os.posix_spawn(
            command[0],
            command,
            _environment(),
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=(signal.SIGPIPE,),
        )
    except BaseException:
        os.close(ready)
        raise
    finally:
        os.close(said)
        os.close(log)
    worker = WorkerProcess(pid, os.pidfd_open(pid))
    if settings.cgroup is not None:
        _move(pid, settings.cgroup)
    return worker, ready


def _environment() -> dict[str, str]:
    """What a worker needs of ours: where its interpreter finds its parts, and nothing secret."""
    names = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    return {name: os.environ[name] for name in names if name in os.environ}


async def kill(worker: WorkerProcess, seconds: float) -> bool:
    """Kill a process: whether it has ended within so many seconds."""
    if worker.ended.is_set():
        # its descriptor may mean something else by now
        return True
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(worker.descriptor, signal.SIGKILL)
    return await has_ended(worker, seconds)


async def has_ended(worker: WorkerProcess, seconds: float) -> bool:
    """Whether the worker ends within so many seconds; one that nobody watches is reaped here."""
    with trio.move_on_after(seconds):
        if worker.stopping:
            await worker.ended.wait()
        else:
            await trio.lowlevel.wait_readable(worker.descriptor)
            reaped(worker.pid)
        return True
    return False


def reaped(pid: int) -> str:
    """What a process ended with, as far as this one may know."""
    try:
        _, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return "another process started it"
    code = os.waitstatus_to_exitcode(status)
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _move(pid: int, cgroup: Path) -> None:
    """Put a process into a cgroup of its own kind; without it, it dies with the driver's pod."""
    try:
        cgroup.mkdir(exist_ok=True)
        (cgroup / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        logger.warning(
            "process %d stays in the driver's cgroup, and may end with it: %s: %s",
            pid,
            cgroup,
            error.strerror,
        )


async def problem_of(ready: int) -> str | None:
    """What keeps a worker from serving, as it says itself; None once it serves."""
    said = b""
    while not said.endswith(b"\n") and len(said) < _MAX_READY_BYTES:
        try:
            piece = os.read(ready, _MAX_READY_BYTES)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(ready)
            continue
        if not piece:
            break
        said += piece
    if not said:
        return "it ended before it was ready"
    try:
        answer = msgspec.json.decode(said, type=_Ready)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "what it says of itself cannot be read"
    return None if answer.ready else answer.error or "it does not say why"
