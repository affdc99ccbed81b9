"""Timing whole commands while the machine does nothing else."""

from __future__ import annotations

import mmap
import os
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MIB: Final = 1024 * 1024
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PROCESSORS: Final = os.cpu_count() or 1

_LOOK_SECONDS: Final = 0.5
_PATIENCE_SECONDS: Final = 20.0
_QUIET: Final = 0.08
"""The part of the processors that may be busy before a run."""
_DISTURBED: Final = 0.20
"""The part that others may use during a run; the kernel's own threads count as others."""
_TRIES: Final = 3


@dataclass(frozen=True)
class Run:
    """One finished command: seconds."""

    wall: float
    user: float
    system: float
    server: float
    """Processor time of the registry meanwhile."""
    elsewhere: float
    """Processor time of everything else meanwhile."""
    peak_mib: float
    """Of the largest of its processes."""

    @property
    def busy(self) -> float:
        """The part of the machine's processors that it and the registry used."""
        return (self.user + self.system + self.server) / (self.wall * _PROCESSORS)

    @property
    def disturbed(self) -> bool:
        """Whether others used so much of the machine that the run says little."""
        return self.elsewhere > _DISTURBED * self.wall * _PROCESSORS


def median(runs: Sequence[Run], value: Callable[[Run], float]) -> float:
    """The median of ``value`` over ``runs``."""
    return statistics.median(value(run) for run in runs)


def timed(command: Sequence[str], server_pid: int) -> Run:
    """Run ``command`` to its end; exits the program if it fails."""
    os.sync()
    server, all_before = processor_seconds(server_pid), _busy_seconds()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    stderr = process.stderr
    said = stderr.read() if stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        text = said.decode(errors="replace")[-2000:]
        raise SystemExit(f"{command[0]} failed with status {process.returncode}: {text}")
    served = processor_seconds(server_pid) - server
    used = usage.ru_utime + usage.ru_stime + served
    elsewhere = max(0.0, _busy_seconds() - all_before - used)
    peak = usage.ru_maxrss / 1024
    return Run(wall, usage.ru_utime, usage.ru_stime, served, elsewhere, peak)


def undisturbed(attempt: Callable[[], Run]) -> Run:
    """A run during which nothing else used much of the machine; the last of several if none is."""
    for _ in range(_TRIES - 1):
        _wait_until_quiet()
        run = attempt()
        if not run.disturbed:
            return run
    return attempt()


def _wait_until_quiet() -> None:
    until = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < until:
        before = _busy_seconds()
        time.sleep(_LOOK_SECONDS)
        if _busy_seconds() - before < _QUIET * _LOOK_SECONDS * _PROCESSORS:
            return


def touch_memory(count: int) -> None:
    """Have the kernel hold ``count`` bytes of memory that it need not ask for any more.

    The host of a virtual machine takes back memory that is free, and the first use of each page of
    it costs much more than what is measured does with it.
    """
    # as much as there is to spare, and all of it at once
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    mmap.mmap(-1, max(min(count, free // 2), mmap.PAGESIZE), flags=flags).close()


def processor_seconds(pid: int) -> float:
    """Processor time that a running process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _busy_seconds() -> float:
    """Processor time that anything has used since the machine started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, fields)
    return (user + nice + system + interrupts + soft_interrupts + stolen) / _TICKS
