"""The kernel's table of mounts: who is mounted where, answered without touching any file system.

``stat`` on a mount whose server is dead may never return; the table always does.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from fetcher.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MOUNT_TABLE: Final = Path("/proc/self/mountinfo")

LOCKED_OPTIONS: Final = frozenset({"ro", "nosuid", "nodev"})
"""What every mount that a pod sees has, whatever the pod asked for."""

_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")
_DELETED: Final = "//deleted"


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo, proc_pid_mountinfo(5)."""

    id: int
    parent: int
    device: str
    """``major:minor`` of the file system."""
    root: str
    """The folder within the file system that is shown; ends in ``//deleted`` if it is gone."""
    mountpoint: str
    options: frozenset[str]
    """Of this mount alone; the file system may be read-only besides."""
    type: str
    source: str = ""
    """What was mounted, as whoever mounted it named it: a device, or a text of his choice."""

    @property
    def origin(self) -> str:
        """What is shown: equal for two mounts of the same folder, and stable while it lasts."""
        return f"{self.device} {self.root}"

    @property
    def locked(self) -> bool:
        """Whether nobody can write, gain privileges or open devices through this mount."""
        return self.options >= LOCKED_OPTIONS

    @property
    def deleted(self) -> bool:
        """Whether the folder that is shown was removed from its file system."""
        return self.root.endswith(_DELETED)


def mount_table() -> list[Mount]:
    """All mounts of this process's namespace. Never blocks on a file system."""
    try:
        return parse_mount_table(MOUNT_TABLE.read_bytes())
    except OSError as error:
        raise Unavailable(f"{MOUNT_TABLE} cannot be read: {error.strerror}") from error


def mount_at(target: Path) -> Mount | None:
    """The mount that is seen at ``target``, a path without symlinks; None if it is no mount."""
    return topmost(mount_table(), target)


def topmost(table: Sequence[Mount], target: Path) -> Mount | None:
    """The last of the mounts that are stacked at ``target``.

    A mount on top has the one beneath as its parent. Of mounts that are hidden below another
    folder's mount the newest counts.
    """
    here = [mount for mount in table if mount.mountpoint == str(target)]
    covered = {mount.parent for mount in here if mount.parent != mount.id}
    return next((mount for mount in reversed(here) if mount.id not in covered), None)


def shows_below(table: Sequence[Mount], mount: Mount, folder: Path) -> bool:
    """Whether ``mount`` shows a folder that lies below ``folder`` (absolute, without symlinks).

    Decided by file system and path within it, so it holds for a mount whose source was deleted and
    for one that an earlier process made.
    """
    return any(shown_below(table, folder, (mount,)))


def shown_below(
    table: Sequence[Mount], folder: Path, mounts: Sequence[Mount] | None = None
) -> Iterator[tuple[Mount, PurePosixPath]]:
    """Those of ``mounts`` (all, unless given) that show something below ``folder``, and what.

    What is shown is a path relative to ``folder``. See :func:`shows_below`.
    """
    holder = _holding(table, folder)
    if holder is None:
        return
    inside = PurePosixPath(holder.root) / folder.relative_to(holder.mountpoint)
    for mount in table if mounts is None else mounts:
        shown = PurePosixPath(mount.root.removesuffix(_DELETED))
        if mount.device == holder.device and inside in shown.parents:
            yield mount, shown.relative_to(inside)


def _holding(table: Sequence[Mount], path: Path) -> Mount | None:
    """The mount on whose file system ``path`` lies."""
    for folder in (path, *path.parents):
        mount = topmost(table, folder)
        if mount is not None:
            return mount
    return None


def parse_mount_table(content: bytes) -> list[Mount]:
    """Read mountinfo. A line that is not one is a kernel that we do not know: Unavailable."""
    return [_parse_line(line) for line in content.split(b"\n") if line]


def _parse_line(line: bytes) -> Mount:
    # 36 35 98:0 /mnt1 /mnt/parent rw,noatime master:1 - ext3 /dev/root rw,errors=continue
    fields = line.split(b" ")
    try:
        separator = fields.index(b"-", 6)
        return Mount(
            id=int(fields[0]),
            parent=int(fields[1]),
            device=os.fsdecode(fields[2]),
            root=_unescaped(fields[3]),
            mountpoint=_unescaped(fields[4]),
            options=frozenset(os.fsdecode(fields[5]).split(",")),
            type=_unescaped(fields[separator + 1]),
            source=_unescaped(fields[separator + 2]),
        )
    except (ValueError, IndexError) as error:
        raise Unavailable(f"a line of {MOUNT_TABLE} cannot be read: {line[:200]!r}") from error


def _unescaped(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))
