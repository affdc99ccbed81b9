"""Real mounts for tests, and their removal whatever happened to the test."""

from __future__ import annotations

import ctypes
import os
import subprocess
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


def mount_tmpfs(target: Path) -> None:
    """Mount something that is not ours."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", target], check=True)


def mount_bind(source: Path, target: Path) -> None:
    """Bind as others do: writable."""
    subprocess.run(["mount", "--bind", source, target], check=True)


def remount_writable(target: Path) -> None:
    """Take the read-only flag off a mount."""
    subprocess.run(["mount", "-o", "remount,bind,rw", target], check=True)


def umount(target: Path) -> None:
    """Remove a mount as an administrator would."""
    subprocess.run(["umount", target], check=True)
