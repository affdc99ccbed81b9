"""One process that serves a lazily shown model: its start, what it says of itself, its end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from fetcher.worker_protocol import Order, pair, read_ready, send_order

if TYPE_CHECKING:
    import socket
    from pathlib import Path

logger = logging.getLogger(__name__)

_LINE: Final = 3
"""The descriptor at which a worker finds its end of the line."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How workers are started."""

    read_timeout: float = 60.0
    """Seconds in which a read of missing bytes has to end."""
    cgroup: Path | None = None
    """The cgroup that they are put into; None for the driver's own."""
    log_format: str = "text"
    log_level: str = "info"
    spare: float | None = 3.0
    """Seconds of calm after which one is started that waits for its model; None: none is."""
    command: tuple[str, ...] = (sys.executable, "-P", "-m", "fuse")


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


@dataclass(frozen=True, eq=False, slots=True)
class Launched:
    """A process that waits to be told what to serve; it ends once nobody has the other end of its
    line.
    """

    process: WorkerProcess
    line: socket.socket

    def order(self, order: Order, log: int) -> bool:
        """Say what to serve; it writes to ``log`` from then on. False if it has ended."""
        try:
            send_order(self.line, order, log)
        except OSError:
            return False
        return True

    def drop(self) -> None:
        """Nobody needs it: it is killed."""
        self.line.close()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process.descriptor, signal.SIGKILL)
        os.close(self.process.descriptor)
        reaped(self.process.pid)


def launch(settings: WorkerSettings, root: Path) -> Launched:
    """Start a process that will serve a model of the store at ``root``.

    Until it knows which, it writes to this process's standard error. ``posix_spawn`` has no moment
    at which this process, with all of its threads, exists twice. Raises OSError.
    """
    command = [
        *(*settings.command, "--root", str(root)),
        *("--read-timeout", f"{settings.read_timeout:g}"),
        *("--ready-fd", str(_LINE)),
        *("--log-format", settings.log_format, "--log-level", settings.log_level),
    ]
    ours, theirs = pair()
    try:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, 2, 1),
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), _LINE),
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
        ours.close()
        raise
    finally:
        theirs.close()
    process = WorkerProcess(pid, os.pidfd_open(pid))
    if settings.cgroup is not None:
        _move(pid, settings.cgroup)
    return Launched(process, ours)


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


async def problem_of(line: socket.socket) -> str | None:
    """What keeps a worker from serving, as it says itself; None once it serves."""
    while True:
        try:
            answer = read_ready(line)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(line)
            continue
        except ValueError:
            return "what it says of itself cannot be read"
        if answer is None:
            return "it ended before it was ready"
        return None if answer.ready else answer.error or "it does not say why"
