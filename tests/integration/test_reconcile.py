"""What a start makes of what the last process left: records and mounts, no network. Needs root."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from csi.mount_table import mount_at
from csi.mounts import bind_read_only, binds_in_one_step
from csi.served import MountedTree
from csi.state import VolumeState
from fetcher.errors import Conflict, InProgress, NotFound, Unavailable
from fetcher.modelpack import Selection
from fetcher.oci import Digest, Reference
from tests.support.kills import Killing, killing
from tests.support.mounts import mount_bind, mounts_below, remount_writable, umount
from tests.support.node import MODEL, Node, assert_consistent, running_node
from tests.support.old_kernel import lose_the_mount_api

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ONE = Digest.of(b"one")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def kills() -> Iterator[Killing]:
    with killing() as running:
        yield running


async def left_publishing(node: Node, target: Path) -> None:
    """As after a kill between the bind and the last record."""
    await node.publish()
    record = node.record()
    assert record is not None
    assert record.target == target
    node.records.save(replace(record, state=VolumeState.PUBLISHING, origin=None))
    node.restart()


# -- half-done publishes ---------------------------------------------------------------------------


def test_a_publish_that_lacks_its_last_word_is_finished(node: Node) -> None:
    async def main() -> None:
        await node.publish()
        before, mount = node.record(), mount_at(node.target())
        await left_publishing(node, node.target())
        node.pulls.asked.clear()
        await node.volumes.reconcile()
        assert node.record() == before
        assert mount_at(node.target()) == mount
        # and kubelet's next call finds it right, without a word to the registry
        await node.publish(wait=0)
        assert node.pulls.asked == []
        stats = await node.volumes.stats("csi-one", node.target())
        assert (stats.bytes_used, stats.files, stats.abnormal) == (3, 1, False)

    trio.run(main)


@pytest.mark.parametrize("wrong", ["writable", "another model", "another selection", "a part"])
def test_a_mount_that_is_not_right_is_undone(wrong: str, node: Node) -> None:
    async def main() -> None:
        await left_publishing(node, node.target())
        record = node.record()
        assert record is not None
        tree = node.models / "sha256" / ONE.hex
        if wrong == "writable":
            remount_writable(node.target())
        elif wrong == "a part":
            umount(node.target())
            (tree / "part").mkdir()
            await bind_read_only(tree / "part", node.target())
        else:
            key = Selection(exclude_weights=True).key
            other = replace(record, model=str(Digest.of(b"two")))
            node.records.save(
                replace(record, selection=key) if wrong == "another selection" else other
            )
        await node.volumes.reconcile()
        assert mounts_below(node.pods) == []
        left = node.record()
        assert left is not None
        assert left.state is VolumeState.PUBLISHING
        await node.publish()
        assert_consistent(node)

    trio.run(main)


def test_a_pod_that_is_gone_has_no_half_done_volume(node: Node) -> None:
    async def main() -> None:
        node.pulls.hold()
        with pytest.raises(InProgress):
            await node.publish(wait=0)
        (node.pods / "one").rmdir()
        node.restart()
        await node.volumes.reconcile()
        assert node.volumes.list() == []

    trio.run(main)


def test_many_volumes_of_a_node_that_restarted_are_forgotten(node: Node) -> None:
    async def main() -> None:
        for number in range(40):
            target = await node.publish(f"pod-{number}")
            umount(target)
        node.restart()
        await node.volumes.reconcile()
        assert node.volumes.list() == []
        assert not list(node.pods.glob("*/mount"))

    trio.run(main)


# -- mounts that nobody knows ----------------------------------------------------------------------


def test_mounts_of_a_lost_state_are_named_and_stay(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        await node.publish()
        await node.publish("two")
        mount = mount_at(node.target())
        node.lose_state()
        await node.publish("two")
        await node.volumes.reconcile()
        assert node.volumes.unknown_mounts() == [MountedTree(ONE, "", node.target(), whole=True)]
        lines = [line for line in caplog.messages if "no volume is known" in line]
        assert len(lines) == 1
        assert str(node.target()) in lines[0]
        assert mount_at(node.target()) == mount
        # a publish takes it as it is
        await node.publish()
        assert mount_at(node.target()) == mount
        assert node.volumes.unknown_mounts() == []
        assert_consistent(node)
        # and what is unpublished is gone
        await node.unpublish("two")
        await node.unpublish()
        node.assert_nothing_left()

    trio.run(main)


def test_what_is_no_volume_of_a_pod_is_not_named(node: Node) -> None:
    """A pod's sub-path within a volume, and what is mounted outside of kubelet's folder."""

    async def main() -> None:
        await node.publish()
        tree = node.models / "sha256" / ONE.hex
        (tree / "part").mkdir()
        for place, shown in ((node.pods / "part", tree / "part"), (node.folder / "out", tree)):
            place.mkdir()
            mount_bind(shown, place)
        assert node.volumes.unknown_mounts() == []

    trio.run(main)


@pytest.mark.parametrize("lost", [True, False])
def test_a_publish_that_fails_leaves_the_mount_that_it_found(lost: bool, node: Node) -> None:
    async def main() -> None:
        await node.publish()
        if lost:
            node.lose_state()
        else:
            # something that only a new publish would mend
            remount_writable(node.target())
        record, mount = node.record(), mount_at(node.target())
        node.pulls.failure = Unavailable("the registry is down")
        with pytest.raises(Unavailable):
            await node.publish()
        assert mount_at(node.target()) == mount
        assert node.record() == record
        node.pulls.failure = None
        await node.publish()
        assert_consistent(node)

    trio.run(main)


@pytest.mark.parametrize("restarted", [True, False])
def test_a_mount_of_a_lost_state_stays_though_the_tag_moved(restarted: bool, node: Node) -> None:
    """A pod reads it: the model is the volume's, also for a start in the middle of a publish."""

    async def main() -> None:
        await node.publish()
        record, mount = node.record(), mount_at(node.target())
        assert record is not None
        node.lose_state()
        node.pulls.tags[f"{MODEL}:moved"] = b"one"
        node.pulls.tags[f"{MODEL}:v1"] = b"two"
        node.pulls.hold()
        with pytest.raises(InProgress):
            await node.publish(wait=0)
        assert mount_at(node.target()) == mount
        if restarted:
            node.restart()
            await node.volumes.reconcile()
            assert_consistent(node)
        node.pulls.arrived.set()
        await node.publish()
        assert mount_at(node.target()) == mount
        found = node.record()
        assert found is not None
        assert (found.state, found.model) == (VolumeState.PUBLISHED, record.model)
        await node.unpublish()
        node.assert_nothing_left()

    trio.run(main)


def test_a_mount_of_a_lost_state_stays_though_it_is_not_what_is_asked_for(node: Node) -> None:
    async def main() -> None:
        await node.publish()
        mount = mount_at(node.target())
        node.lose_state()
        node.pulls.tags[f"{MODEL}:other"] = b"two"
        other = Reference.parse(f"{MODEL}@{Digest.of(b'two')}")
        for changes in ({"selection": Selection(exclude_weights=True)}, {"reference": other}):
            with pytest.raises(Conflict, match="its record was lost"):
                await node.publish(**changes)
        # the registry has it no more, and the tag is of another one
        node.pulls.gone.add(ONE)
        node.pulls.tags[f"{MODEL}:v1"] = b"two"
        with pytest.raises(NotFound):
            await node.publish()
        assert node.volumes.list() == []
        assert mount_at(node.target()) == mount
        await node.unpublish()
        await node.publish()
        assert (node.target() / "model.txt").read_bytes() == b"two"

    trio.run(main)


# -- killed at every moment ------------------------------------------------------------------------


def _publish(folder: Path) -> None:
    trio.run(Node(folder).publish)


def _unpublish(folder: Path) -> None:
    trio.run(Node(folder).unpublish)


def _reconcile(folder: Path) -> None:
    trio.run(Node(folder).volumes.reconcile)


def _events(
    kills: Killing, work: Callable[[Path], None], node: Node, step: int = 1
) -> Iterator[int]:
    """Kill ``work`` at one event after the other, until it ends before that."""
    at, more = 0, True
    while more:
        node.database.close()
        more = kills.run(work, node.folder, at)
        node.start()
        yield at
        at += step


def test_a_publish_that_is_killed_anywhere_can_go_on(kills: Killing, node: Node) -> None:
    states: set[VolumeState | None] = set()
    for at in _events(kills, _publish, node):
        if at % 2:
            trio.run(node.volumes.reconcile)
            assert_consistent(node)
            record = node.record()
            states.add(record.state if record else None)
            trio.run(node.publish)
        else:
            # kubelet may be faster, and may have changed its mind
            trio.run(node.unpublish)
            node.assert_nothing_left()
            continue
        assert_consistent(node)
        assert len(mounts_below(node.pods)) == 1
        trio.run(node.unpublish)
        node.assert_nothing_left()
    assert states == {None, VolumeState.PUBLISHING, VolumeState.PUBLISHED}


def test_an_unpublish_that_is_killed_anywhere_can_go_on(kills: Killing, node: Node) -> None:
    trio.run(node.publish)
    for at in _events(kills, _unpublish, node):
        if at % 2:
            trio.run(node.volumes.reconcile)
        else:
            trio.run(node.unpublish)
        assert_consistent(node)
        record = node.record()
        assert record is None or record.state is VolumeState.PUBLISHED
        trio.run(node.publish)
        assert len(mounts_below(node.pods)) == 1


def _publish_the_old_way(folder: Path) -> None:
    lose_the_mount_api()
    assert not binds_in_one_step()
    _publish(folder)


def _reconcile_the_old_way(folder: Path) -> None:
    lose_the_mount_api()
    _reconcile(folder)


def test_a_bind_of_an_old_kernel_is_made_again(kills: Killing, node: Node) -> None:
    """There, a mount that is read-only here may be writable where it propagated to."""
    undone = 0
    for _ in _events(kills, _publish_the_old_way, node, step=2):
        record, mounted = node.record(), mount_at(node.target()) is not None
        half_done = record is not None and record.state is VolumeState.PUBLISHING
        node.database.close()
        assert not kills.run(_reconcile_the_old_way, node.folder, 1_000_000)
        if half_done:
            assert mounts_below(node.pods) == []
            undone += mounted
        assert not kills.run(_publish_the_old_way, node.folder, 1_000_000)
        node.start()
        assert_consistent(node)
        trio.run(node.unpublish)
        node.assert_nothing_left()
    assert undone


@pytest.mark.parametrize("state", [VolumeState.PUBLISHING, VolumeState.UNPUBLISHING])
def test_a_reconciliation_that_is_killed_anywhere_can_go_on(
    state: VolumeState, kills: Killing, node: Node
) -> None:
    def half_done() -> None:
        trio.run(node.publish)
        record = node.record()
        assert record is not None
        node.records.save(replace(record, state=state))

    half_done()
    for _ in _events(kills, _reconcile, node):
        trio.run(node.volumes.reconcile)
        assert_consistent(node)
        record = node.record()
        published = record is not None and record.state is VolumeState.PUBLISHED
        assert published is (state is VolumeState.PUBLISHING)
        half_done()


def test_the_tag_may_move_while_the_driver_is_away(node: Node) -> None:
    """The digest that a killed publish recorded is the volume's."""

    async def main() -> None:
        node.pulls.hold()
        with pytest.raises(InProgress):
            await node.publish(wait=0)
        node.restart()
        node.pulls.tags[f"{MODEL}:moved"] = b"one"
        node.pulls.tags[f"{MODEL}:v1"] = b"two"
        node.pulls.arrived.set()
        await node.volumes.reconcile()
        target = await node.publish()
        assert (target / "model.txt").read_bytes() == b"one"

    trio.run(main)
