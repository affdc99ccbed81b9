"""Which trees are pinned, by real records and real mounts. Needs root."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from csi.mount_table import mount_table
from csi.pins import pinned_trees
from csi.served import Folders, MountedTree, mounted_trees
from csi.state import VolumeState
from fetcher.errors import InProgress, ModelError
from fetcher.modelpack import Selection
from fetcher.oci import Digest
from tests.support.mounts import mount_bind, mount_tmpfs, umount
from tests.support.node import Node, running_node

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ONE = Digest.of(b"one")
WEIGHTLESS = Selection(exclude_weights=True)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path) as running:
        yield running


def pins(node: Node) -> set[tuple[Digest, str]]:
    return pinned_trees(node.records, Folders.of(node.folder))


@pytest.mark.parametrize("state", VolumeState)
def test_a_record_pins_in_every_state(node: Node, state: VolumeState) -> None:
    assert pins(node) == set()
    trio.run(node.publish)
    umount(node.target())
    record = node.record()
    assert record is not None
    node.records.save(replace(record, state=state))
    assert pins(node) == {(ONE, "")}
    trio.run(node.unpublish)
    assert pins(node) == set()


def test_a_download_pins_what_it_will_be(node: Node) -> None:
    async def main() -> None:
        node.pulls.hold()
        with pytest.raises(InProgress):
            await node.publish(wait=0, selection=WEIGHTLESS)

    trio.run(main)
    assert pins(node) == {(ONE, WEIGHTLESS.key)}


@pytest.mark.parametrize("selection", [Selection(), WEIGHTLESS])
def test_a_mount_pins_after_the_state_was_lost(node: Node, selection: Selection) -> None:
    async def main() -> None:
        await node.publish(selection=selection)

    trio.run(main)
    before = pins(node)
    node.lose_state()
    assert pins(node) == before == {(ONE, selection.key)}
    # also when its folder is gone already
    shutil.rmtree(node.models)
    node.models.mkdir()
    assert pins(node) == before


def test_a_pods_sub_path_pins_the_tree_that_it_is_in(node: Node) -> None:
    trio.run(node.publish)
    tree = node.models / "sha256" / ONE.hex
    inside, file = tree / "inside", node.folder / "file"
    inside.mkdir()
    file.touch()
    place = node.folder / "place"
    place.mkdir()
    trio.run(node.unpublish)
    mount_bind(inside, place)
    mount_bind(tree / "model.txt", file)
    assert pins(node) == {(ONE, "")}
    assert mounted_trees(mount_table(), Folders.of(node.folder)) == [
        MountedTree(ONE, "", place, whole=False),
        MountedTree(ONE, "", file, whole=False),
    ]


def test_what_is_no_tree_pins_nothing(node: Node) -> None:
    trio.run(node.publish)
    trio.run(node.unpublish)
    for number, shown in enumerate((node.models, node.models / "sha256", node.pods)):
        place = node.folder / f"place-{number}"
        place.mkdir()
        mount_bind(shown, place)
    odd = node.models / "sha256" / "not-a-digest"
    odd.mkdir()
    (node.folder / "odd").mkdir()
    mount_bind(odd, node.folder / "odd")
    assert pins(node) == set()


def test_the_root_may_be_a_mount_of_any_kind(tmp_path: Path) -> None:
    """A disk of its own, a folder of another one, and seen through a symlink."""
    disk, bound, link = tmp_path / "disk", tmp_path / "bound", tmp_path / "link"
    for folder in (disk, bound):
        folder.mkdir()
    with running_node(tmp_path):
        mount_tmpfs(disk)
        (disk / "deep").mkdir()
        mount_bind(disk / "deep", bound)
        link.symlink_to(bound)
        for folder in (disk, bound, link):
            with running_node(folder) as node:
                trio.run(node.publish)
                node.lose_state()
                # one file system, so all three name the tree by the place at which it really is
                assert pinned_trees(node.records, Folders.of(node.folder)) == {(ONE, "")}
                assert pinned_trees(node.records, Folders.of(folder)) == {(ONE, "")}


def test_nothing_is_unused_where_the_records_cannot_be_read(node: Node) -> None:
    with node.database.transaction() as connection:
        connection.execute("DROP TABLE volumes")
    with pytest.raises(ModelError, match="cannot be read"):
        pins(node)
