"""What a record and the mount table together say of a volume. Decisions only, nothing is touched.

A mount counts only with a record that says *published*; a record counts only with its mount.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from csi.mount_table import mount_at, mount_table
from csi.mounts import binds_in_one_step
from csi.served import MountedTree, mounted_trees
from csi.state import Shown, VolumeState

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from csi.mount_table import Mount
    from csi.served import Folders
    from csi.state import VolumeRecord


class Remedy(enum.Enum):
    """What a start does about a record."""

    KEEP = "keep"
    """Record and mount agree, or what is mounted is not ours to touch."""
    FINISH = "finish"
    """All was done but the last word: record it as published."""
    UNDO = "undo"
    """Take a half-made mount away; the record keeps its digest for the next call."""
    FORGET = "forget"
    """Take away whatever is left, and the record."""


def remedy(record: VolumeRecord, folders: Folders, *, has_place: bool) -> Remedy:
    """What to do about ``record`` after a start.

    ``has_place`` says whether the folder that holds its target is there: in Kubernetes the pod's.
    """
    mount = mount_at(record.target)
    match record.state:
        case VolumeState.PUBLISHED if mount is not None:
            return Remedy.KEEP
        case VolumeState.PUBLISHING if has_place:
            right = mount is not None and shows(mount, record, folders)
            return Remedy.FINISH if right else Remedy.UNDO
        case _:
            return Remedy.FORGET


def shows(mount: Mount, record: VolumeRecord, folders: Folders) -> bool:
    """Whether ``mount`` is what the last step of publishing ``record`` makes.

    The tree of that model, or what its worker serves at present; read-only here and, as it was made
    in one step, wherever it propagated to.
    """
    if not mount.locked or mount.deleted or not binds_in_one_step():
        return False
    tree = whole_tree(mount, folders)
    if tree is None or (str(tree.model), tree.selection) != (record.model, record.selection):
        return False
    if not tree.lazy:
        return record.shown is Shown.BIND
    # of a worker that died another file system is there, if any
    serving = mount_at(folders.mountpoint(tree.key))
    return record.shown is Shown.LAZY and serving is not None and serving.device == mount.device


def whole_tree(mount: Mount, folders: Folders) -> MountedTree | None:
    """The tree that ``mount`` shows; None if it shows something within one, or something else."""
    trees = mounted_trees(mount_table(), folders, (mount,))
    return next((tree for tree in trees if tree.whole), None)


def problem(record: VolumeRecord) -> str | None:
    """What is wrong with a published volume's mount, as the mount table tells it."""
    mount = mount_at(record.target)
    if mount is None:
        return "the mount is gone"
    if mount.deleted:
        return "the model's files were removed from the node"
    if mount.origin != record.origin:
        return "something else is mounted over it"
    if not mount.locked:
        return "the mount is not read-only, nosuid and nodev any more"
    return None


def is_shown(record: VolumeRecord) -> bool:
    """Whether the volume is published, and its mount is as it should be."""
    return record.state is VolumeState.PUBLISHED and problem(record) is None


def unknown_mounts(
    records: Iterable[VolumeRecord], folders: Folders, folder: Path
) -> list[MountedTree]:
    """Mounts of whole trees below ``folder`` that no record knows, as after a lost ``state.db``.

    A pod may read them, so they are for people to look at. ``folder`` is without symlinks.
    """
    known = {record.target for record in records}
    found = {
        tree.target: tree
        for tree in mounted_trees(mount_table(), folders)
        if tree.whole and tree.target not in known and tree.target.is_relative_to(folder)
    }
    return list(found.values())
