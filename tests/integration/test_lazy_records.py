"""Lazy volumes, records and workers: decided, kept together, cancelled everywhere. Needs root."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from csi.attributes import Mode
from csi.mount_table import mount_at, mount_table
from csi.pins import pinned_trees
from csi.served import Folders, MountedTree
from csi.state import Shown, VolumeState
from csi.workers import WorkerSettings
from fetcher.errors import InProgress, NoSpace, Unavailable, Unsupported
from tests.support.lazy_node import KEY, LazyNode, lazy_node
from tests.support.mounts import mounts_below, umount
from tests.support.steps import cancelled_at
from tests.support.workers import worker_pids

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from csi.stats import VolumeStats


@pytest.fixture
def node(tmp_path: Path) -> Iterator[LazyNode]:
    with lazy_node(tmp_path) as running:
        yield running


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what other tasks and processes bring about."""
    with trio.fail_after(10):
        while not await condition():  # noqa: ASYNC110 (volumes have no event for it)
            await trio.sleep(0.01)


async def until_right(node: LazyNode, *pods: str) -> None:
    """Wait until the volumes are as they should be."""

    async def is_right() -> bool:
        for pod in pods:
            if (await node.volumes.stats(f"csi-{pod}", node.target(pod))).abnormal:
                return False
        return True

    await until(is_right)


def kill(node: LazyNode) -> int:
    [pid] = worker_pids(node.folder)
    os.kill(pid, signal.SIGKILL)
    return pid


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("obstacle", [None, "there is no FUSE"])
def test_how_a_volume_is_shown(
    node: LazyNode, mode: Mode, complete: bool, obstacle: str | None
) -> None:
    """What mode, store and node make of a volume."""
    lazy = mode is not Mode.EAGER and not complete and obstacle is None

    async def main() -> None:
        async with node.running():
            node.contents.has_all = complete
            node.obstacle = obstacle
            if mode is Mode.LAZY and not complete and obstacle is not None:
                with pytest.raises(Unsupported, match="there is no FUSE"):
                    await node.publish_lazily(mode=mode)
                node.assert_nothing_left()
                return
            await node.publish_lazily(mode=mode)
            record = node.record()
            assert record is not None
            assert record.shown is (Shown.LAZY if lazy else Shown.BIND)
            assert (record.reason is None) is (mode is Mode.EAGER)
            mount = mount_at(node.target())
            assert mount is not None
            assert (mount.type == "fuse.model-csi") is lazy
            await node.unpublish()
            node.assert_nothing_left()
            node.assert_no_worker()

    trio.run(main)


def test_auto_is_eager_where_no_worker_starts(node: LazyNode) -> None:
    node.settings = WorkerSettings(command=("/bin/false",))

    async def main() -> None:
        async with node.running():
            with pytest.raises(Unavailable, match="could not be started"):
                await node.publish_lazily()
            node.assert_nothing_left()
            await node.publish_lazily(mode=Mode.AUTO)
            record = node.record()
            assert record is not None
            assert record.shown is Shown.BIND
            assert "could not be started" in (record.reason or "")
            assert node.lazy_models.open_models == {}
            await node.unpublish()

    trio.run(main)


def test_what_keeps_a_model_from_being_opened_is_what_the_volume_says(node: LazyNode) -> None:
    async def main() -> None:
        async with node.running():
            node.lazy_models.failure = NoSpace("no room")
            for mode in (Mode.LAZY, Mode.AUTO):
                with pytest.raises(NoSpace, match="no room"):
                    await node.publish_lazily(mode=mode)
                node.assert_nothing_left()
            # what another name shows, and is not verified, is waited for
            node.lazy_models.failure = InProgress("another name shows it still")
            for mode in (Mode.LAZY, Mode.AUTO):
                await node.publish_lazily(mode=mode)
                record = node.record()
                assert record is not None
                assert record.shown is Shown.BIND
                assert record.reason == "another name shows it still"
                await node.unpublish()
            node.assert_nothing_left()
            node.assert_no_worker()

    trio.run(main)


def test_a_publish_may_be_cancelled_at_each_of_its_steps(node: LazyNode) -> None:
    async def main() -> None:
        async with node.running():
            step = 0
            while await cancelled_at(step, node.publish_lazily):
                record, mount = node.record(), mount_at(node.target())
                assert (mount is not None) is (
                    record is not None and record.state is VolumeState.PUBLISHED
                )
                if step % 2:
                    await node.publish_lazily()
                    await until_right(node, "one")
                await node.unpublish()
                node.assert_nothing_left()
                node.assert_no_worker()
                step += 1
            assert step > 5

    trio.run(main)


def test_an_unpublish_may_be_cancelled_at_each_of_its_steps(node: LazyNode) -> None:
    async def main() -> None:
        async with node.running():
            step, more = 0, True
            while more:
                await node.publish_lazily()
                more = await cancelled_at(step, node.unpublish)
                if step % 2:
                    await node.publish_lazily()
                    await until_right(node, "one")
                await node.unpublish()
                node.assert_nothing_left()
                # one that was cancelled after the record had gone left its worker to the sweep
                await node.lazy.left(KEY)
                node.assert_no_worker()
                step += 1
            assert step > 5

    trio.run(main)


def test_what_a_kill_leaves_is_found_by_the_next_start(node: LazyNode) -> None:
    async def main() -> None:
        async with node.running():
            await node.publish_lazily()
            pids = worker_pids(node.folder)
        record = node.record()
        assert record is not None
        # between the bind and its record
        node.records.save(replace(record, state=VolumeState.PUBLISHING, origin=None))
        async with node.running():
            again = node.record()
            assert again is not None
            assert again.state is VolumeState.PUBLISHED
            assert worker_pids(node.folder) == pids
            await until_right(node, "one")
        # before the bind: the worker waits for the next publish
        node.records.save(replace(record, state=VolumeState.PUBLISHING, origin=None))
        umount(node.target())
        async with node.running():
            assert worker_pids(node.folder) == pids
            await node.publish_lazily()
            assert worker_pids(node.folder) == pids
            await until_right(node, "one")
        # in the middle of an unpublish
        node.records.save(replace(record, state=VolumeState.UNPUBLISHING))
        async with node.running():
            node.assert_nothing_left()
            node.assert_no_worker()

    trio.run(main)


def test_workers_that_nobody_needs_end(node: LazyNode) -> None:
    async def main() -> None:
        async with node.running():
            await node.publish_lazily()
        # the node was restarted, but for this process
        umount(node.target())
        async with node.running():
            assert node.record() is None
            node.assert_no_worker()

    trio.run(main)


def test_mounts_without_a_record_keep_their_worker(node: LazyNode) -> None:
    async def main() -> None:
        async with node.running():
            target = await node.publish_lazily()
        node.lose_state()
        async with node.running():
            assert node.volumes.unknown_mounts() == [
                MountedTree(KEY.model, "", target, whole=True, lazy=True)
            ]
            pins = pinned_trees(node.records, Folders.of(node.folder))
            assert pins == {(KEY.model, "")}
            assert node.workers.is_serving(KEY)
            # a pod may read it: it is bound again too
            before = mount_at(target)
            assert before is not None
            kill(node)

            async def is_bound_again() -> bool:
                now = mount_at(target)
                return now is not None and now.device != before.device

            await until(is_bound_again)
            await node.unpublish()
            node.assert_nothing_left()
            node.assert_no_worker()
            assert pinned_trees(node.records, Folders.of(node.folder)) == set()

    trio.run(main)


def test_one_that_dies_while_no_driver_runs_is_bound_again(node: LazyNode) -> None:
    async def main() -> None:
        async with node.running():
            await node.publish_lazily()
            await node.publish_lazily("two")
        await trio.to_thread.run_sync(os.waitpid, kill(node), 0)
        async with node.running():
            await until_right(node, "one", "two")
            devices = {mount.device for mount in mount_table() if node.is_lazy(mount)}
            assert len(devices) == 2
            # the driver is killed between the start of a worker and its bind
            async with node.lazy._lock(KEY):
                pid = kill(node)
                await until(is_dead)
                await node.workers.ensure(KEY)
        assert worker_pids(node.folder) != [pid]
        async with node.running():
            await until_right(node, "one", "two")
            await node.unpublish()
            await node.unpublish("two")
            node.assert_nothing_left()
            node.assert_no_worker()

    async def is_dead() -> bool:
        return not node.workers.is_serving(KEY)

    trio.run(main)


@contextmanager
def pod_process(folder: Path, uid: str) -> Iterator[None]:
    """A process in a cgroup as a pod's, with mounts of its own that nothing propagates to."""
    group = (
        next(
            found
            for found in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
            if (found / "cgroup.procs").exists()
        )
        / f"kubepods-pod{uid.replace('-', '_')}.slice-{os.getpid()}"
    )
    group.mkdir()
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo; read _"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=folder,
    )
    try:
        with process:
            (group / "cgroup.procs").write_text(str(process.pid))
            assert process.stdout is not None
            process.stdout.readline()
            yield
            process.communicate(b"\n")
    finally:
        process.kill()
        process.wait()
        group.rmdir()


def test_containers_that_kept_a_dead_mount_are_told(node: LazyNode) -> None:
    uid = "6e8ad0ad-8e1c-4f0d-8f5e-2f4f9b1f9a3e"
    target = node.folder / "pods" / uid / "volumes/kubernetes.io~csi/model/mount"
    target.parent.mkdir(parents=True)

    async def main() -> None:
        async with node.running():
            request = replace(node.request(mode=Mode.LAZY), target=target)
            await node.volumes.publish(request, 10)
            with pod_process(node.folder, uid):
                kill(node)
                await until(is_told)
                assert (await stats(target)).abnormal
            assert not (await stats(target)).abnormal
            await node.volumes.unpublish("csi-one", target)
            assert mounts_below(node.pods) == []

    async def is_told() -> bool:
        return "restart the pod" in (await stats(target)).message

    async def stats(target: Path) -> VolumeStats:
        return await node.volumes.stats("csi-one", target)

    trio.run(main)
