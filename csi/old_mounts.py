"""Containers that kept the mount of a worker that died.

What is mounted at a target again reaches a container only with ``mountPropagation:
HostToContainer``. Without it the container keeps its copy of the dead mount until it is started
again. Nobody tells the driver which containers do that; the mount tables of their processes do,
where the driver sees the node's processes (``hostPID``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from csi.mount_table import mount_table, parse_mount_table, topmost
from csi.served import FUSE_TYPE
from fetcher.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from csi.mount_table import Mount

_PROC: Final = Path("/proc")
_POD: Final = re.compile(r"/pods/(?P<uid>[0-9a-f-]{8,64})/volumes/")


def replaced_devices(target: Path) -> frozenset[str]:
    """The file systems of workers that died, whose mounts lie beneath what ``target`` shows now.

    None of them where nothing was mounted again there.
    """
    table = mount_table()
    top = topmost(table, target)
    return frozenset(
        mount.device
        for mount in table
        if mount.mountpoint == str(target) and mount.type == FUSE_TYPE and mount is not top
    )


def containers_with(devices: frozenset[str], target: Path) -> int:
    """How many containers of the pod that ``target`` belongs to show one of ``devices`` still.

    For a worker thread: looks at every process of the node. 0 where the target does not tell the
    pod, as outside of Kubernetes: who else kept a mount is nobody's trouble here.
    """
    pod = _POD.search(str(target))
    if pod is None:
        return 0
    found = 0
    for process in _one_for_each_namespace():
        try:
            shows = _shows(parse_mount_table((process / "mountinfo").read_bytes()), devices)
            if shows and _is_of_pod(process, pod["uid"]):
                found += 1
        except (OSError, Unavailable):
            # it ended meanwhile
            continue
    return found


def _one_for_each_namespace() -> Iterator[Path]:
    """A process of every mount namespace but our own."""
    seen = {_namespace(_PROC / "self")}
    for process in _PROC.iterdir():
        if not process.name.isdigit():
            continue
        namespace = _namespace(process)
        if namespace is not None and namespace not in seen:
            seen.add(namespace)
            yield process


def _namespace(process: Path) -> str | None:
    try:
        return str((process / "ns/mnt").readlink())
    except OSError:
        return None


def _shows(table: Sequence[Mount], devices: frozenset[str]) -> bool:
    """Whether one of ``devices`` is what is seen anywhere: not beneath a later mount."""
    covered = {(mount.parent, mount.mountpoint) for mount in table}
    return any(
        mount.device in devices
        and mount.type == FUSE_TYPE
        and (mount.id, mount.mountpoint) not in covered
        for mount in table
    )


def _is_of_pod(process: Path, uid: str) -> bool:
    group = (process / "cgroup").read_text(errors="replace")
    # systemd's slices have underscores where the uid has dashes
    return uid in group.replace("_", "-")
