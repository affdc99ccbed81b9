"""Volumes after a kill, after a restart, and cancelled at every step. Needs root."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from csi.mount_table import mount_at
from csi.mounts import bind_read_only
from csi.state import VolumeState
from fetcher.errors import (
    InProgress,
)
from fetcher.oci import Digest
from tests.support.mounts import (
    detach_below,
    mount_bind,
    mount_tmpfs,
    mounts_below,
    umount,
)
from tests.support.node import Node, assert_consistent, running_node
from tests.support.steps import cancelled_at

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path) as running:
        yield running


def test_a_publish_may_be_cancelled_at_each_of_its_steps(node: Node) -> None:
    async def main() -> None:
        step = 0
        while await cancelled_at(step, node.publish):
            assert_consistent(node)
            assert node.pulls.waiting == 0
            # the volume can be published
            await node.publish()
            assert_consistent(node)
            await node.unpublish()
            # or taken away
            await cancelled_at(step, node.publish)
            await node.unpublish()
            node.assert_nothing_left()
            step += 1
        assert step > 5

    trio.run(main)


def test_an_unpublish_may_be_cancelled_at_each_of_its_steps(node: Node) -> None:
    async def main() -> None:
        step, more = 0, True
        while more:
            await node.publish()
            more = await cancelled_at(step, node.unpublish)
            assert_consistent(node)
            await node.unpublish()
            node.assert_nothing_left()
            # one that was half unpublished can be published again
            await node.publish()
            await cancelled_at(step, node.unpublish)
            await node.publish()
            assert_consistent(node)
            step += 1
        assert step > 5

    trio.run(main)


def test_stats_and_reconcile_may_be_cancelled_at_each_of_their_steps(node: Node) -> None:
    async def main() -> None:
        target = await node.publish()
        step = 0
        while await cancelled_at(step, lambda: node.volumes.stats("csi-one", target)):
            step += 1
        node.pulls.hold()
        with pytest.raises(InProgress):
            await node.publish("two", wait=0)
        record = node.record("two")
        assert record is not None
        tree = node.models / "sha256" / Digest.of(b"one").hex
        step, more = 0, True
        while more:
            node.target("two").mkdir(exist_ok=True)
            await bind_read_only(tree, node.target("two"))
            node.records.save(replace(record, state=VolumeState.UNPUBLISHING))
            more = await cancelled_at(step, node.volumes.reconcile)
            await node.volumes.reconcile()
            assert node.record("two") is None
            assert mounts_below(node.pods) == [str(target)]
            step += 1
        assert step > 3

    trio.run(main)


def half_done(node: Node, state: VolumeState, *, mounted: bool) -> None:
    """What a kill leaves: a record in ``state``, and perhaps a mount."""

    async def main() -> None:
        await node.publish()
        record = node.record()
        assert record is not None
        origin = record.origin if state is not VolumeState.PUBLISHING else None
        node.records.save(replace(record, state=state, origin=origin))
        if not mounted:
            umount(node.target())

    trio.run(main)
    node.restart()


@pytest.mark.parametrize("mounted", [True, False])
@pytest.mark.parametrize("state", VolumeState)
@pytest.mark.parametrize("reconciled", [True, False])
def test_what_a_kill_leaves_can_be_used(
    state: VolumeState, mounted: bool, reconciled: bool, node: Node
) -> None:
    half_done(node, state, mounted=mounted)

    async def main() -> None:
        if reconciled:
            await node.volumes.reconcile()
        await node.publish()
        assert_consistent(node)
        assert len(mounts_below(node.pods)) == 1
        await node.unpublish()
        node.assert_nothing_left()

    trio.run(main)


@pytest.mark.parametrize(
    ("state", "mounted", "left"),
    [
        (VolumeState.PUBLISHING, True, VolumeState.PUBLISHED),
        (VolumeState.PUBLISHING, False, VolumeState.PUBLISHING),
        (VolumeState.PUBLISHED, True, VolumeState.PUBLISHED),
        (VolumeState.PUBLISHED, False, None),
        (VolumeState.UNPUBLISHING, True, None),
        (VolumeState.UNPUBLISHING, False, None),
    ],
)
def test_reconcile(state: VolumeState, mounted: bool, left: VolumeState | None, node: Node) -> None:
    half_done(node, state, mounted=mounted)
    node.pulls.asked.clear()
    trio.run(node.volumes.reconcile)
    record = node.record()
    assert (record.state if record else None) is left
    assert (mount_at(node.target()) is not None) is (left is VolumeState.PUBLISHED)
    assert node.pulls.asked == []
    if left is None:
        node.assert_nothing_left()


def test_reconcile_forgets_what_a_deleted_pod_was_waiting_for(node: Node) -> None:
    async def main() -> None:
        node.pulls.hold()
        with pytest.raises(InProgress):
            await node.publish(wait=0)
        node.restart()
        (node.pods / "one").rmdir()
        await node.volumes.reconcile()
        assert node.volumes.list() == []

    trio.run(main)


def test_one_record_that_resists_does_not_keep_the_others(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        for pod in ("one", "two", "three"):
            await node.publish(pod)
            umount(node.target(pod))
        record = node.record("two")
        assert record is not None
        node.records.save(replace(record, state=VolumeState.UNPUBLISHING))
        mount_tmpfs(node.target("two"))
        await node.volumes.reconcile()
        assert [left.volume_id for left in node.volumes.list()] == ["csi-two"]
        assert mount_at(node.target("two")) is not None
        assert "csi-two is left as it is" in caplog.text

    trio.run(main)


def test_a_mount_that_was_half_made_the_old_way_is_made_again(node: Node) -> None:
    async def main() -> None:
        node.pulls.hold()
        with pytest.raises(InProgress):
            await node.publish(wait=0)
        node.pulls.arrived.set()
        tree = node.models / "sha256" / Digest.of(b"one").hex
        tree.mkdir(parents=True)
        (tree / "model.txt").write_bytes(b"one")
        node.target().mkdir()
        mount_bind(tree, node.target())
        await node.publish()
        assert_consistent(node)
        assert len(mounts_below(node.pods)) == 1

    trio.run(main)


def test_no_secret_is_shown_by_a_request(node: Node) -> None:
    assert "keychain" not in repr(node.request())


async def publish_and_unpublish(folder: Path) -> None:
    """What the process does that the next test kills."""
    node = Node(folder)
    await node.volumes.reconcile()
    (folder / "running").touch()
    while True:
        await node.publish()
        await node.unpublish()


def test_a_process_that_is_killed_leaves_what_the_next_one_can_use(tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    program = (
        "import sys, trio; from pathlib import Path; "
        "from tests.integration.test_volumes_crashes import publish_and_unpublish; "
        "trio.run(publish_and_unpublish, Path(sys.argv[1]))"
    )
    try:
        for delay in (0.02, 0.05, 0.09, 0.14, 0.2):
            (folder / "running").unlink(missing_ok=True)
            process = subprocess.Popen(
                [sys.executable, "-c", program, folder],
                cwd=Path(__file__).parents[2],
            )
            _wait_for(folder / "running")
            time.sleep(delay)
            process.kill()
            process.wait()
            node = Node(folder)
            trio.run(node.volumes.reconcile)
            trio.run(node.publish)
            assert_consistent(node)
            assert len(mounts_below(node.pods)) == 1
            trio.run(node.unpublish)
            node.assert_nothing_left()
            node.database.close()
    finally:
        detach_below(folder)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
