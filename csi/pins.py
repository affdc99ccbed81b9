"""Which trees must stay: what a record names, and what a mount shows though no record knows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from csi.mount_table import mount_table
from csi.served import TreeKey, mounted_trees, served

if TYPE_CHECKING:
    from csi.served import Folders
    from csi.state import VolumeRecords
    from fetcher.oci import Digest


def pinned_trees(records: VolumeRecords, folders: Folders) -> set[tuple[Digest, str]]:
    """Model digest and selection key of every tree that a volume has, or may have.

    Those of records in any state, and those that the mount table shows, bound or served by a
    worker, as after a lost ``state.db``. Raises :class:`ModelError` where records or table cannot
    be read: then nothing may be taken for unused.
    """
    table = mount_table()
    keys = {TreeKey.of(model, selection) for model, selection in records.pins()}
    keys |= {tree.key for tree in mounted_trees(table, folders)}
    # a worker reads what it serves, whether or not a volume shows it
    keys |= {key for _, key in served(table, folders.lazy)}
    return {(key.model, key.selection) for key in keys if key is not None}
