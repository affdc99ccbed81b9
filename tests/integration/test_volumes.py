"""Volumes with real mounts and a real database; downloads are made by hand. Needs root."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from csi.attributes import Mode
from csi.mount_table import mount_at
from csi.state import VolumeState
from fetcher.errors import (
    AccessDenied,
    Conflict,
    InProgress,
    InvalidRequest,
    NotFound,
    Unsupported,
)
from fetcher.modelpack import Selection
from fetcher.oci import Digest
from tests.support.mounts import (
    mount_bind,
    mount_tmpfs,
    mounts_below,
    remount_writable,
    umount,
)
from tests.support.node import MODEL, Node, running_node, untouched

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path) as running:
        yield running


# -- the plain way ---------------------------------------------------------------------------------


def test_there_and_back(node: Node) -> None:
    async def main() -> None:
        target = await node.publish()
        mount = mount_at(target)
        assert mount is not None
        assert mount.locked
        assert (target / "model.txt").read_bytes() == b"one"
        record = node.record()
        assert record is not None
        assert (record.state, record.made_target) == (VolumeState.PUBLISHED, True)
        assert record.digest == str(Digest.of(b"one"))
        assert node.volumes.list() == [record]
        await node.unpublish()
        node.assert_nothing_left()
        assert (node.models / "sha256" / Digest.of(b"one").hex / "model.txt").exists()

    trio.run(main)


def test_a_volume_that_is_right_asks_nobody(node: Node) -> None:
    async def main() -> None:
        await node.publish()
        node.pulls.refused = True
        await node.publish(wait=0)
        assert len(node.pulls.asked) == 1
        assert len(mounts_below(node.pods)) == 1

    trio.run(main)


def test_it_is_still_right_after_a_restart(node: Node) -> None:
    async def main() -> None:
        await node.publish()
        node.restart()
        await node.volumes.reconcile()
        node.pulls.refused = True
        await node.publish()
        await node.unpublish()
        node.assert_nothing_left()

    trio.run(main)


def test_a_retry_that_is_refused_does_not_hold_the_pull_of_the_first_try(node: Node) -> None:
    async def main() -> None:
        node.pulls.hold()
        with pytest.raises(InProgress):
            await node.publish(wait=0)
        assert node.pulls.holders
        node.pulls.refused = True
        with pytest.raises(AccessDenied):
            await node.publish(wait=0)
        assert not node.pulls.holders
        await node.unpublish()

    trio.run(main)


def test_ten_volumes_show_the_same_files(node: Node) -> None:
    async def main() -> None:
        targets = [await node.publish(f"pod-{number}") for number in range(10)]
        assert len({(target / "model.txt").stat().st_ino for target in targets}) == 1
        for number in range(10):
            await node.unpublish(f"pod-{number}")
        assert node.volumes.list() == []
        assert mounts_below(node.pods) == []

    trio.run(main)


def test_selections_are_trees_of_their_own(node: Node) -> None:
    async def main() -> None:
        whole = await node.publish()
        part = await node.publish("two", selection=Selection(exclude_weights=True))
        assert mount_at(whole).origin != mount_at(part).origin  # type: ignore[union-attr]

    trio.run(main)


def test_a_folder_that_was_there_stays_there(node: Node) -> None:
    async def main() -> None:
        node.target().mkdir()
        await node.publish()
        await node.unpublish()
        assert node.target().is_dir()
        assert node.volumes.list() == []

    trio.run(main)


def test_a_target_reached_by_a_symlink_is_the_same_target(node: Node) -> None:
    async def main() -> None:
        (node.folder / "kubelet").symlink_to(node.pods)
        request = node.request()
        linked = replace(request, target=node.folder / "kubelet" / "one" / "mount")
        await node.volumes.publish(linked, 5)
        await node.volumes.publish(request, 5)
        assert len(mounts_below(node.pods)) == 1
        await node.volumes.unpublish(request.volume_id, linked.target)
        node.assert_nothing_left()

    trio.run(main)


# -- what is refused -------------------------------------------------------------------------------


def test_other_parameters_are_a_conflict_that_names_them(node: Node) -> None:
    async def main() -> None:
        await node.publish()
        with pytest.raises(Conflict, match="other attributes: mode, prefetch"):
            await node.publish(mode=Mode.AUTO)
        # and at another target too
        other = replace(node.request("two", mode=Mode.AUTO), volume_id="csi-one")
        with pytest.raises(Conflict, match="other attributes: mode, prefetch"):
            await node.volumes.publish(other, 5)
        assert not node.target("two").exists()
        assert len(node.pulls.asked) == 1

    trio.run(main)


def test_lazy_needs_what_serves_it(node: Node) -> None:
    with pytest.raises(Unsupported, match="shows none that way"):
        trio.run(lambda: node.publish(mode=Mode.LAZY))
    assert node.pulls.joined == 0
    node.assert_nothing_left()


def test_auto_is_eager(node: Node) -> None:
    async def main() -> None:
        target = await node.publish(mode=Mode.AUTO)
        assert (target / "model.txt").read_bytes() == b"one"

    trio.run(main)


@pytest.mark.parametrize("kind", ["file", "symlink", "full", "foreign mount", "no parent"])
def test_what_is_in_the_way_stays(kind: str, node: Node) -> None:
    target = node.target()
    if kind == "file":
        target.write_text("x")
    elif kind == "symlink":
        target.symlink_to(node.folder)
    elif kind == "full":
        target.mkdir()
        (target / "x").write_text("x")
    elif kind == "foreign mount":
        target.mkdir()
        mount_tmpfs(target)
    request = node.request()
    if kind == "no parent":
        request = replace(request, target=node.pods / "none" / "mount")
    with untouched(node.pods), pytest.raises((Conflict, InvalidRequest)):
        trio.run(node.volumes.publish, request, 5)
    assert node.pulls.asked == []
    assert node.volumes.list() == []


def test_a_target_of_another_volume_stays(node: Node) -> None:
    async def main() -> None:
        target = await node.publish()
        request = replace(node.request(), volume_id="csi-other")
        with pytest.raises(Conflict, match="belongs to volume csi-one"):
            await node.volumes.publish(request, 5)
        with pytest.raises(Conflict, match="belongs to volume csi-one"):
            await node.volumes.unpublish("csi-other", target)
        assert mount_at(target) is not None

    trio.run(main)


@pytest.mark.parametrize("volume_id", ["", "a\nb", "a\0", "x" * 1025, "\udcff"])
def test_ids_that_cannot_be_recorded(volume_id: str, node: Node) -> None:
    async def main() -> None:
        request = replace(node.request(), volume_id=volume_id)
        with pytest.raises(InvalidRequest):
            await node.volumes.publish(request, 5)
        with pytest.raises(InvalidRequest):
            await node.volumes.unpublish(volume_id, request.target)

    trio.run(main)


@pytest.mark.parametrize("path", ["relative", "/a/../b", "/", "/\udcff"])
def test_targets_that_cannot_be_paths(path: str, node: Node) -> None:
    async def main() -> None:
        with pytest.raises(InvalidRequest):
            await node.volumes.publish(replace(node.request(), target=Path(path)), 5)
        with pytest.raises(InvalidRequest):
            await node.volumes.unpublish("csi-one", Path(path))

    trio.run(main)


# -- unpublish -------------------------------------------------------------------------------------


def test_unpublish_succeeds_whatever_is_there(node: Node) -> None:
    async def main() -> None:
        await node.unpublish()
        await node.volumes.unpublish("csi-one", node.pods / "none" / "mount")
        node.target().mkdir()
        await node.unpublish()
        assert not node.target().exists()
        await node.publish()
        await node.unpublish()
        await node.unpublish()
        node.assert_nothing_left()
        await node.publish()
        umount(node.target())
        await node.unpublish()
        node.assert_nothing_left()
        await node.publish()
        umount(node.target())
        node.target().rmdir()
        await node.unpublish()
        node.assert_nothing_left()

    trio.run(main)


@pytest.mark.parametrize("kind", ["file", "symlink", "full"])
def test_unpublish_deletes_nothing(kind: str, node: Node) -> None:
    target = node.target()
    if kind == "file":
        target.write_text("x")
    elif kind == "symlink":
        target.symlink_to(node.folder)
    else:
        target.mkdir()
        (target / "x").write_text("x")
    with untouched(node.pods):
        trio.run(node.unpublish)


def test_files_beneath_the_mount_are_not_deleted(node: Node) -> None:
    async def main() -> None:
        target = await node.publish()
        umount(target)
        (target / "kept").write_text("x")
        mount_bind(node.models / "sha256", target)
        umount(target)
        await node.unpublish()
        assert (target / "kept").exists()
        assert node.volumes.list() == []

    trio.run(main)


def test_a_mount_of_something_else_is_not_removed(node: Node) -> None:
    async def main() -> None:
        node.target().mkdir()
        mount_tmpfs(node.target())
        with untouched(node.pods), pytest.raises(Conflict):
            await node.unpublish()
        # over our own one too
        target = await node.publish("two")
        mount_tmpfs(target)
        with untouched(node.pods), pytest.raises(Conflict):
            await node.unpublish("two")
        record = node.record("two")
        assert record is not None
        assert record.state is VolumeState.PUBLISHED
        umount(target)
        await node.unpublish("two")
        assert mount_at(target) is None

    trio.run(main)


def test_a_volume_in_use_is_unpublished(node: Node) -> None:
    async def main() -> None:
        target = await node.publish()
        with (target / "model.txt").open() as held:
            await node.unpublish()
            assert held.read() == "one"
        node.assert_nothing_left()

    trio.run(main)


def test_what_a_lost_state_left_is_still_ours(node: Node) -> None:
    async def main() -> None:
        await node.publish()
        await node.publish("two")
        node.lose_state()
        await node.volumes.reconcile()
        assert len(mounts_below(node.pods)) == 2
        # kubelet publishes again, or unpublishes
        await node.publish()
        assert len(mounts_below(node.pods)) == 2
        await node.unpublish()
        await node.unpublish("two")
        node.assert_nothing_left()
        node.assert_nothing_left("two")

    trio.run(main)


def test_a_model_whose_files_were_removed_is_mounted_anew(node: Node) -> None:
    async def main() -> None:
        target = await node.publish()
        tree = node.models / "sha256" / Digest.of(b"one").hex
        (tree / "model.txt").unlink()
        tree.rmdir()
        stats = await node.volumes.stats("csi-one", target)
        assert stats.abnormal
        assert "removed from the node" in stats.message
        await node.publish()
        assert (target / "model.txt").read_bytes() == b"one"
        await node.unpublish()
        node.assert_nothing_left()

    trio.run(main)


# -- stats -----------------------------------------------------------------------------------------


def test_stats_of_a_healthy_volume(node: Node) -> None:
    async def main() -> None:
        target = await node.publish()
        stats = await node.volumes.stats("csi-one", target)
        assert (stats.bytes_used, stats.files, stats.abnormal) == (3, 1, False)
        assert f"{MODEL}:v1 ({Digest.of(b'one')}): mounted read-only" in stats.message

    trio.run(main)


def test_stats_of_a_volume_whose_files_were_found_to_be_damaged(node: Node) -> None:
    async def main() -> None:
        target = await node.publish()
        node.pulls.damaged.add((str(Digest.of(b"one")), ""))
        stats = await node.volumes.stats("csi-one", target)
        assert stats.abnormal
        assert "damaged" in stats.message

    trio.run(main)


def test_stats_of_what_is_not_published(node: Node) -> None:
    async def main() -> None:
        with pytest.raises(NotFound):
            await node.volumes.stats("csi-one", node.target())
        node.pulls.hold()
        with pytest.raises(InProgress):
            await node.publish(wait=0)
        with pytest.raises(NotFound):
            await node.volumes.stats("csi-one", node.target())
        node.pulls.arrived.set()
        await node.publish()
        with pytest.raises(NotFound):
            await node.volumes.stats("csi-two", node.target())
        with pytest.raises(NotFound):
            await node.volumes.stats("csi-one", node.target("two"))

    trio.run(main)


def test_stats_tell_what_is_wrong_with_a_mount(node: Node) -> None:
    async def main() -> None:
        target = await node.publish()
        remount_writable(target)
        assert "not read-only" in (await node.volumes.stats("csi-one", target)).message
        mount_tmpfs(target)
        assert "mounted over" in (await node.volumes.stats("csi-one", target)).message
        umount(target)
        umount(target)
        stats = await node.volumes.stats("csi-one", target)
        assert stats.abnormal
        assert "the mount is gone" in stats.message

    trio.run(main)
