"""How much of the disk a root takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fetcher.threads import Stopped

if TYPE_CHECKING:
    import threading
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """Bytes of a root, and of the file system that it is on."""

    used: int
    free: int
    """What is left for whoever is not root."""
    total: int


def disk_usage(root: Path, stop: threading.Event) -> DiskUsage:
    """Count what lies below ``root``, every inode once, in a worker thread.

    What vanishes meanwhile is not counted. Raises :class:`OSError` when ``root`` cannot be read.
    """
    seen: set[int] = set()
    used = 0
    for folder, _, names in os.walk(root):
        if stop.is_set():
            raise Stopped
        for name in names:
            try:
                status = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:
                continue
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                used += status.st_blocks * 512
    state = os.statvfs(root)
    return DiskUsage(used, state.f_bavail * state.f_frsize, state.f_blocks * state.f_frsize)
