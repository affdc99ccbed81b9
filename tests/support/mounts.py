"""Real mounts for tests, and their removal whatever happened to the test."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

from csi.mount_table import mount_table

if TYPE_CHECKING:
    from pathlib import Path

MNT_DETACH = 2


def detach_below(folder: Path) -> None:
    """Detach every mount at or below ``folder``, newest first."""
    library = ctypes.CDLL(None, use_errno=True)
    for _ in range(1000):
        if not mounts_below(folder):
            return
        for mountpoint in reversed(mounts_below(folder)):
            library.umount2(os.fsencode(mountpoint), MNT_DETACH)
    raise AssertionError(f"cannot be removed: {mounts_below(folder)}")


def mounts_below(folder: Path) -> list[str]:
    """The mountpoints at or below ``folder``."""
    return [
        mount.mountpoint
        for mount in mount_table()
        if mount.mountpoint == str(folder) or mount.mountpoint.startswith(f"{folder}/")
    ]
