"""Showing a model at a target, and clearing the target again, record by record.

A record is written before anything is done and taken back after it was undone. Whoever calls this
has the target's turn (:mod:`csi.turns`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from csi import targets
from csi.conditions import shows, whole_tree
from csi.mount_table import mount_at, mount_table, shows_below
from csi.mounts import bind_over, bind_read_only, unmount, unmount_all_but_lowest
from csi.served import served
from csi.state import VolumeState
from csi.targets import Found
from fetcher.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from csi.mount_table import Mount
    from csi.served import Folders, MountedTree
    from csi.state import VolumeRecord, VolumeRecords


class Placement:
    """The targets of a node. Belongs to the trio thread."""

    def __init__(self, records: VolumeRecords, folders: Folders) -> None:
        """``folders`` hold everything that is bound."""
        self._records = records
        self.folders = folders

    async def show(self, source: Path, record: VolumeRecord) -> None:
        """Bind ``source`` and record it as published.

        A mount that a killed call left, or whose record was lost, stays if it is right, as a pod
        may read it already; else it makes way.
        """
        target = record.target
        mount = mount_at(target)
        if mount is None or not shows(mount, record, self.folders):
            await unmount(target, self._ours(record))
            missing = await targets.inspect(target) is Found.MISSING
            record = replace(record, made_target=record.made_target or missing)
            # with the mount, all that a start needs to record the volume as published
            self._records.save(record)
            if missing:
                await targets.make(target)
            await bind_read_only(source, target)
        # no checkpoint from the end of the bind to the record: a cancellation finds both or neither
        self.finish(record)

    def finish(self, record: VolumeRecord) -> None:
        """Record a volume as published: its mount is there. Raises :class:`Unavailable` if not."""
        mount = mount_at(record.target)
        if mount is None or not mount.locked:
            raise Unavailable(f"{record.target} was mounted, and is not read-only or gone again")
        self._records.save(replace(record, state=VolumeState.PUBLISHED, origin=mount.origin))

    async def renew(self, source: Path, record: VolumeRecord) -> None:
        """Show ``source``, what the worker serves that took a dead one's place, at a target.

        The mount of the worker that died first stays beneath: what is mounted upon it appears in
        every container that has a copy of it with ``mountPropagation: HostToContainer``; a mount
        that took its place would not. A target that shows it already is left as it is.
        """
        target = record.target
        mount = mount_at(target)
        if mount is not None and shows(mount, record, self.folders):
            # a kill between the bind and its record
            self.finish(record)
            return
        await self._put_over(source, target, record)
        self.finish(record)

    async def renew_unrecorded(self, source: Path, target: Path) -> None:
        """As :meth:`renew`, at a target of which the record was lost."""
        mount, serving = mount_at(target), mount_at(source)
        if mount is not None and serving is not None and mount.device != serving.device:
            await self._put_over(source, target, None)

    async def _put_over(self, source: Path, target: Path, record: VolumeRecord | None) -> None:
        await unmount_all_but_lowest(target, self._ours(record))
        if mount_at(target) is None:
            await bind_read_only(source, target)
        else:
            await bind_over(source, target)

    async def undo(self, record: VolumeRecord) -> None:
        """Remove a half-made mount of ours; the record stays."""
        await unmount(record.target, self._ours(record))

    async def clear(self, volume_id: str, target: Path) -> None:
        """Unmount what is ours, remove the folder that we made, then the record.

        Raises :class:`Conflict` for a mount that is not ours.
        """
        record = self._records.get(volume_id, target)
        mount = mount_at(target)
        if record is not None and (mount is None or self.is_ours(mount, record)):
            self._records.save(replace(record, state=VolumeState.UNPUBLISHING))
        await unmount(target, self._ours(record))
        # without a record (a lost state, an unknown volume) an empty folder is taken for ours
        if record is None or record.made_target:
            await targets.remove(target)
        self._records.remove(volume_id, target)

    def is_ours(self, mount: Mount, record: VolumeRecord | None) -> bool:
        """Whether the record names the mount, or it shows a tree of the store, or a worker's."""
        if record is not None and record.origin == mount.origin:
            return True
        if any(served((mount,), self.folders.lazy)):
            return True
        return shows_below(mount_table(), mount, self.folders.models)

    def tree_of(self, mount: Mount) -> MountedTree | None:
        """The tree of the store that ``mount`` shows, if it shows a whole one."""
        return whole_tree(mount, self.folders)

    def _ours(self, record: VolumeRecord | None) -> Callable[[Mount], bool]:
        return lambda mount: self.is_ours(mount, record)
