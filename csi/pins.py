"""Which trees must stay: what a record names, and what a mount shows though no record knows it.

The one place where ``<root>/models/<algorithm>/<hex>[.<selection>]`` is read back from a mount.
Nothing here touches the file system of a mount.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from csi.mount_table import mount_table, shown_below
from fetcher.errors import InvalidArtifact
from fetcher.oci import Digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import PurePosixPath

    from csi.mount_table import Mount
    from csi.state import VolumeRecords


@dataclass(frozen=True, slots=True)
class MountedTree:
    """A tree of the store, or something within one, that is mounted somewhere."""

    model: Digest
    selection: str
    target: Path
    whole: bool
    """Whether the tree itself is shown; a pod's ``subPath`` shows something within."""


def pinned_trees(records: VolumeRecords, models_folder: Path) -> set[tuple[Digest, str]]:
    """Model digest and selection key of every tree that a volume has, or may have.

    Those of records in any state, and those that the mount table shows, as after a lost
    ``state.db``. ``models_folder`` is absolute. Raises :class:`ModelError` where records or table
    cannot be read: then nothing may be taken for unused.
    """
    pins = {
        (digest, selection)
        for model, selection in records.pins()
        if (digest := _digest(model)) is not None
    }
    for tree in mounted_trees(mount_table(), models_folder):
        pins.add((tree.model, tree.selection))
    return pins


def mounted_trees(
    table: Sequence[Mount], models_folder: Path, mounts: Sequence[Mount] | None = None
) -> list[MountedTree]:
    """What ``mounts`` (all of ``table``, unless given) show of the trees below ``models_folder``.

    One entry for each mount.
    """
    shown = shown_below(table, models_folder.resolve(), mounts)
    found = (_mounted(mount, path) for mount, path in shown)
    return [tree for tree in found if tree is not None]


def _mounted(mount: Mount, shown: PurePosixPath) -> MountedTree | None:
    if len(shown.parts) < 2:
        return None
    algorithm, name, *within = shown.parts
    encoded, _, selection = name.partition(".")
    digest = _digest(f"{algorithm}:{encoded}")
    if digest is None:
        return None
    return MountedTree(digest, selection, Path(mount.mountpoint), whole=not within)


def _digest(text: str) -> Digest | None:
    try:
        return Digest.parse(text)
    except InvalidArtifact:
        return None
