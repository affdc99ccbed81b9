"""What of the store is mounted where: trees that are bound, and models that workers serve.

The one place where ``<root>/models/<algorithm>/<hex>[.<selection>]`` and
``<root>/lazy/<algorithm>/<hex>[.<selection>]`` are read back from a mount. Nothing here touches the
file system of a mount.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from csi.mount_table import shown_below
from fetcher import lazy_plan
from fetcher.errors import InvalidArtifact
from fetcher.oci import Digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from csi.mount_table import Mount

FUSE_TYPE: Final = "fuse.model-csi"
"""The type of the file system of every worker."""


@dataclass(frozen=True, slots=True)
class TreeKey:
    """What of which model: it names a tree, and the worker that serves it while it is fetched."""

    model: Digest
    selection: str
    """The key of what is left out; empty when nothing is."""

    @classmethod
    def of(cls, model: str, selection: str) -> TreeKey | None:
        """The key of a record's two texts; None if they are none."""
        digest = _digest(model)
        return None if digest is None else cls(digest, selection)


@dataclass(frozen=True, slots=True)
class Folders:
    """Where below a root the sources of all binds lie. Absolute, without symlinks."""

    root: Path
    models: Path
    lazy: Path

    @classmethod
    def of(cls, root: Path) -> Folders:
        """Those of ``root``, which exists."""
        root = root.resolve()
        return cls(root, root / "models", root / lazy_plan.LAZY)

    def mountpoint(self, key: TreeKey) -> Path:
        """Where the worker of ``key`` mounts it."""
        return lazy_plan.mountpoint(self.root, key.model, key.selection)


@dataclass(frozen=True, slots=True)
class MountedTree:
    """A tree of the store, or something within one, that is mounted somewhere."""

    model: Digest
    selection: str
    target: Path
    whole: bool
    """Whether the tree itself is shown; a pod's ``subPath`` shows something within."""
    lazy: bool = False
    """Whether a worker serves it."""

    @property
    def key(self) -> TreeKey:
        return TreeKey(self.model, self.selection)


def mounted_trees(
    table: Sequence[Mount], folders: Folders, mounts: Sequence[Mount] | None = None
) -> list[MountedTree]:
    """What ``mounts`` (all of ``table``, unless given) show of the store's trees and models.

    One entry for each mount; see :func:`shown_by_workers`.
    """
    found = [_bound(mount, path) for mount, path in shown_below(table, folders.models, mounts)]
    found += [
        MountedTree(key.model, key.selection, Path(mount.mountpoint), mount.root == "/", lazy=True)
        for mount, key in shown_by_workers(table if mounts is None else mounts, folders.lazy)
    ]
    return [tree for tree in found if tree is not None]


def served(mounts: Sequence[Mount], lazy: Path) -> Iterator[tuple[Mount, TreeKey]]:
    """Those of ``mounts`` that show what a worker serves whose mount is below the folder ``lazy``.

    That of a dead one too.
    """
    for mount in mounts:
        source = PurePosixPath(mount.source)
        if mount.type != FUSE_TYPE or PurePosixPath(lazy) not in source.parents:
            continue
        key, within = _key(source.relative_to(lazy))
        if key is not None and not within:
            yield mount, key


def shown_by_workers(mounts: Sequence[Mount], lazy: Path) -> Iterator[tuple[Mount, TreeKey]]:
    """As :func:`served`, without what workers mounted for themselves: what others made of it.

    The worker's own mount is seen at more than one path where the node's folders are mounted once
    more, as within a container that looks after the node.
    """
    for mount, key in served(mounts, lazy):
        own = PurePosixPath(mount.source).relative_to(lazy.parent)
        if PurePosixPath(mount.mountpoint).parts[-len(own.parts) :] != own.parts:
            yield mount, key


def key_of_name(algorithm: str, name: str) -> TreeKey | None:
    """What ``<algorithm>/<hex>[.<selection>]`` stands for; None for what is not one of ours."""
    encoded, _, selection = name.partition(".")
    digest = _digest(f"{algorithm}:{encoded}")
    return None if digest is None else TreeKey(digest, selection)


def _bound(mount: Mount, shown: PurePosixPath) -> MountedTree | None:
    key, within = _key(shown)
    if key is None:
        return None
    return MountedTree(key.model, key.selection, Path(mount.mountpoint), whole=not within)


def _key(path: PurePosixPath) -> tuple[TreeKey | None, tuple[str, ...]]:
    """The key that a path below one of the folders begins with, and what of it comes behind."""
    if len(path.parts) < 2:
        return None, ()
    algorithm, name, *within = path.parts
    return key_of_name(algorithm, name), tuple(within)


def _digest(text: str) -> Digest | None:
    try:
        return Digest.parse(text)
    except InvalidArtifact:
        return None
