"""Showing a model's tree at a target, and clearing the target again, record by record.

A record is written before anything is done and taken back after it was undone. Whoever calls this
has the target's turn (:mod:`csi.turns`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from csi import targets
from csi.conditions import shows, whole_tree
from csi.mount_table import mount_at, mount_table, shows_below
from csi.mounts import bind_read_only, unmount
from csi.state import VolumeState
from csi.targets import Found
from fetcher.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from csi.mount_table import Mount
    from csi.pins import MountedTree
    from csi.state import VolumeRecord, VolumeRecords
    from fetcher.store import ModelTree


class Placement:
    """The targets of a node. Belongs to the trio thread."""

    def __init__(self, records: VolumeRecords, models_folder: Path) -> None:
        """``models_folder`` holds every tree that is bound, and exists."""
        self._records = records
        self.models_folder = models_folder.resolve()

    async def show(self, tree: ModelTree, record: VolumeRecord) -> None:
        """Bind the tree and record it as published.

        A mount that a killed call left, or whose record was lost, stays if it is right, as a pod
        may read it already; else it makes way.
        """
        target = record.target
        record = replace(record, size=tree.size, files=tree.files)
        mount = mount_at(target)
        if mount is None or not shows(mount, record, self.models_folder):
            await unmount(target, self._ours(record))
            missing = await targets.inspect(target) is Found.MISSING
            record = replace(record, made_target=record.made_target or missing)
            # with the mount, all that a start needs to record the volume as published
            self._records.save(record)
            if missing:
                await targets.make(target)
            await bind_read_only(tree.path, target)
        # no checkpoint from the end of the bind to the record: a cancellation finds both or neither
        self.finish(record)

    def finish(self, record: VolumeRecord) -> None:
        """Record a volume as published: its mount is there. Raises :class:`Unavailable` if not."""
        mount = mount_at(record.target)
        if mount is None or not mount.locked:
            raise Unavailable(f"{record.target} was mounted, and is not read-only or gone again")
        self._records.save(replace(record, state=VolumeState.PUBLISHED, origin=mount.origin))

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
        """Whether the record names the mount, or it shows a tree of the store."""
        if record is not None and record.origin == mount.origin:
            return True
        return shows_below(mount_table(), mount, self.models_folder)

    def tree_of(self, mount: Mount) -> MountedTree | None:
        """The tree of the store that ``mount`` shows, if it shows a whole one."""
        return whole_tree(mount, self.models_folder)

    def _ours(self, record: VolumeRecord | None) -> Callable[[Mount], bool]:
        return lambda mount: self.is_ours(mount, record)
