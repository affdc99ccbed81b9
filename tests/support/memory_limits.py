"""Memory cgroups of either version, to run processes in that may take so much and no more."""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_FIRST = Path("/sys/fs/cgroup/memory")
_SECOND = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryLimit:
    """A cgroup with a limit."""

    folder: Path

    def take(self, pid: int) -> None:
        """Put a process into it."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def inside(self, *command: str) -> list[str]:
        """A command that runs inside of it from its first byte on."""
        script = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", script, str(self.folder / "cgroup.procs"), *command]

    def killed(self) -> int:
        """How many processes it was too small for."""
        for name in ("memory.oom_control", "memory.events"):
            with contextlib.suppress(FileNotFoundError):
                lines = (self.folder / name).read_text().splitlines()
                return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        raise AssertionError(f"{self.folder} counts nothing")


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[MemoryLimit]:
    """A cgroup whose processes have ``size`` bytes of memory, page cache included."""
    first = (_FIRST / "memory.limit_in_bytes").exists() or (_FIRST / "cgroup.procs").exists()
    controllers = _SECOND / "cgroup.controllers"
    if not first and (not controllers.exists() or "memory" not in controllers.read_text().split()):
        pytest.skip("this machine has no memory cgroups")
    folder = (_FIRST if first else _SECOND) / f"model-csi-{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    try:
        name = "memory.limit_in_bytes" if first else "memory.max"
        (folder / name).write_text(str(size))
        yield MemoryLimit(folder)
    finally:
        for pid in (folder / "cgroup.procs").read_text().split():
            (folder.parent / "cgroup.procs").write_text(pid)
        os.rmdir(folder)
