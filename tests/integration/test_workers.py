"""The lives of the processes that serve lazy volumes: real ones, without an agent. Needs root."""

from __future__ import annotations

import errno
import functools
import os
import signal
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from csi import fuse_connections
from csi.mount_table import mount_at
from csi.served import FUSE_TYPE, Folders, TreeKey
from csi.worker_locks import holder, is_held, started
from csi.worker_logs import WorkerLogs
from csi.worker_processes import launch
from csi.workers import Workers, WorkerSettings
from fetcher.errors import Unavailable
from fetcher.lazy_plan import lock_path
from tests.support.commands import wait_until
from tests.support.models import ModelBuilder
from tests.support.mounts import mounts_below, umount
from tests.support.workers import called, end_workers, spare_worker, worker_pids, write_plan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

MODEL = ModelBuilder().add_raw("model.safetensors", bytes(1000)).add_raw("config.json", b"{}")
KEY = TreeKey(MODEL.digest, "")


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Folders]:
    root = tmp_path / "root"
    root.mkdir()
    (root / "blobs/sha256").mkdir(parents=True)
    write_plan(root, MODEL)
    try:
        yield Folders.of(root)
    finally:
        end_workers(root)


def in_trio(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that runs in a loop of its own."""

    @functools.wraps(test)
    def run(**fixtures: object) -> None:
        trio.run(functools.partial(test, **fixtures))

    return run


@asynccontextmanager
async def driver(
    folders: Folders, settings: WorkerSettings | None = None, log: list[bytes] | None = None
) -> AsyncIterator[Workers]:
    """The workers as one run of the driver has them."""
    logs = WorkerLogs((log if log is not None else []).append)
    async with trio.open_nursery() as nursery:
        yield Workers(folders, settings or WorkerSettings(), nursery, logs)
        nursery.cancel_scope.cancel()


def left(folders: Folders) -> list[str]:
    """What is there of workers, but for the plans."""
    names = [path.name for path in folders.lazy.glob("*/*") if path.suffix != ".json"]
    return names + mounts_below(folders.root)


def pid_of(folders: Folders) -> int:
    [pid] = worker_pids(folders.root)
    return pid


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


async def stat(path: Path) -> os.stat_result:
    return await trio.to_thread.run_sync(path.stat)


@in_trio
async def test_one_serves_until_it_is_stopped(folders: Folders) -> None:
    async with driver(folders) as workers:
        descriptors = os.listdir("/proc/self/fd")
        for _ in range(3):
            await workers.ensure(KEY)
        pid = pid_of(folders)
        place = folders.mountpoint(KEY)
        mount = mount_at(place)
        assert mount is not None
        assert (mount.type, mount.source) == (FUSE_TYPE, str(place))
        assert (await stat(place / "model.safetensors")).st_size == 1000
        assert os.getsid(pid) == pid
        await workers.stop(KEY)
        assert left(folders) == []
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        # again, and of one that is not there
        await workers.stop(KEY)
        await trio.testing.wait_all_tasks_blocked()
        assert len(os.listdir("/proc/self/fd")) == len(descriptors)


@in_trio
async def test_a_death_is_told_and_the_next_one_serves(folders: Folders) -> None:
    async with driver(folders) as workers:
        for _ in range(2):
            await workers.ensure(KEY)
            os.kill(pid_of(folders), signal.SIGKILL)
            with trio.fail_after(5):
                assert await workers.death() == KEY
            assert not workers.is_serving(KEY)
            assert await workers.ask(KEY, 5) is None
        await workers.ensure(KEY)
        assert (await stat(folders.mountpoint(KEY) / "config.json")).st_size == 2
        await workers.stop(KEY)
    assert left(folders) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@in_trio
async def test_no_signal_that_ends_programs_in_order_ends_one(
    folders: Folders, number: signal.Signals
) -> None:
    async with driver(folders) as workers:
        await workers.ensure(KEY)
        os.kill(pid_of(folders), number)
        assert await workers.ask(KEY, 5) is not None
        assert workers.is_serving(KEY)


@in_trio
async def test_the_next_driver_finds_it(folders: Folders) -> None:
    async with driver(folders) as workers:
        await workers.ensure(KEY)
        pid = pid_of(folders)
    async with driver(folders) as workers:
        assert workers.find(KEY)
        await workers.ensure(KEY)
        assert pid_of(folders) == pid
        os.kill(pid, signal.SIGKILL)
        with trio.fail_after(5):
            assert await workers.death() == KEY
        assert not workers.find(KEY)
        await workers.ensure(KEY)
    # a driver that did not look for it ends it all the same
    async with driver(folders) as workers:
        await workers.stop(KEY)
    assert left(folders) == []


@in_trio
async def test_two_drivers_start_one_worker(folders: Folders) -> None:
    """As when a driver was killed just after it had started one."""
    async with driver(folders) as first, driver(folders) as second, trio.open_nursery() as both:
        both.start_soon(first.ensure, KEY)
        await trio.sleep(0.01)
        both.start_soon(second.ensure, KEY)
    assert len(worker_pids(folders.root)) == 1
    assert len([one for one in mounts_below(folders.root) if "/lazy/" in one]) == 1


@in_trio
async def test_one_that_hangs_is_told_and_ended(folders: Folders) -> None:
    async with driver(folders) as workers:
        await workers.ensure(KEY)
        pid = pid_of(folders)
        os.kill(pid, signal.SIGSTOP)
        threads = len(os.listdir("/proc/self/task"))
        for _ in range(4):
            with trio.fail_after(2):
                assert await workers.ask(KEY, 0.1) is None
        # however often it is asked, one thread waits
        assert len(os.listdir("/proc/self/task")) <= threads + 1
        with trio.fail_after(30):
            await workers.stop(KEY)
        assert left(folders) == []
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@in_trio
async def test_one_whose_mount_was_taken_away_ends_and_another_one_begins(folders: Folders) -> None:
    async with driver(folders) as workers:
        await workers.ensure(KEY)
        first = pid_of(folders)
        await trio.to_thread.run_sync(umount, folders.mountpoint(KEY))
        await workers.ensure(KEY)
        assert pid_of(folders) != first
        assert (await stat(folders.mountpoint(KEY) / "config.json")).st_size == 2


@asynccontextmanager
async def spare_kept(
    folders: Folders, log: list[bytes] | None = None, **others: Any
) -> AsyncIterator[tuple[Workers, int]]:
    """The workers of a driver that has a spare one, and the spare's pid."""
    settings = WorkerSettings(spare=0.0, **others)
    async with driver(folders, settings, log) as workers, trio.open_nursery() as nursery:
        nursery.start_soon(workers.spare.keep, lambda: None)
        yield workers, await spare_of(os.getpid())
        nursery.cancel_scope.cancel()


async def spare_of(pid: int, other_than: int = 0) -> int:
    def found() -> bool:
        return spare_worker(pid) not in (None, other_than)

    await trio.to_thread.run_sync(wait_until, found, "a worker that waits for a model")
    spare = spare_worker(pid)
    assert spare is not None
    return spare


@in_trio
async def test_one_that_waits_serves_the_next_model(folders: Folders) -> None:
    log: list[bytes] = []
    async with spare_kept(folders, log) as (workers, spare):
        assert workers.keys() == set()
        await workers.ensure(KEY)
        assert pid_of(folders) == spare
        assert (await stat(folders.mountpoint(KEY) / "config.json")).st_size == 2
        # what it writes from then on is its own log, and who it is can be seen
        assert called(spare) == f"model {KEY.model.hex[:9]}"
        following = await spare_of(os.getpid(), other_than=spare)
        await workers.stop(KEY)
        assert b"serving" in b"".join(log)
        with pytest.raises(ProcessLookupError):
            os.kill(spare, 0)
    # the driver has ended: what serves nobody ends with it
    await trio.to_thread.run_sync(wait_until, lambda: called(following) is None, "its end")
    assert left(folders) == []


def test_one_that_waits_ends_with_a_driver_that_was_killed(folders: Folders) -> None:
    """Whose end of the line is closed then, and nothing else is done."""
    launched = launch(WorkerSettings(), folders.root)
    pid = launched.process.pid
    wait_until(lambda: spare_worker(os.getpid()) == pid, "a worker that waits for a model")
    launched.line.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(launched.process.descriptor)


@in_trio
async def test_a_spare_one_that_died_keeps_nobody_waiting(folders: Folders) -> None:
    async with spare_kept(folders) as (workers, spare):
        os.kill(spare, signal.SIGKILL)
        # not in a thread: here nobody has noticed it yet
        wait_until(lambda: called(spare) is None, "its end")
        await workers.ensure(KEY)
        assert pid_of(folders) != spare
        await workers.stop(KEY)
    assert left(folders) == []


@in_trio
async def test_no_spare_one_where_fuse_does_not_work_or_nobody_wants_it(folders: Folders) -> None:
    async with driver(folders, WorkerSettings(spare=None)) as workers:
        with trio.fail_after(5):
            await workers.spare.keep(lambda: None)
    async with driver(folders, WorkerSettings(spare=0.0)) as workers:
        with trio.move_on_after(0.5):
            await workers.spare.keep(lambda: "there is no /dev/fuse")
        assert workers.spare.take() is None
    assert spare_worker(os.getpid()) is None


@in_trio
async def test_one_that_cannot_start_says_why(folders: Folders) -> None:
    other = TreeKey(ModelBuilder().add_raw("a", b"a").digest, "")
    log: list[bytes] = []
    async with driver(folders, log=log) as workers:
        with pytest.raises(Unavailable, match=r"could not be started: there is no plan"):
            await workers.ensure(other)
        assert b"there is no plan" in b"".join(log)
        missing = WorkerSettings(command=("/no/such/program",))
    async with driver(folders, missing) as workers:
        with pytest.raises(Unavailable, match="No such file"):
            await workers.ensure(KEY)
    silent = WorkerSettings(command=("/bin/true",))
    async with driver(folders, silent) as workers:
        with pytest.raises(Unavailable, match="ended before it was ready"):
            await workers.ensure(KEY)
    assert worker_pids(folders.root) == []
    assert mounts_below(folders.root) == []


@in_trio
async def test_a_start_goes_on_without_who_asked_for_it(folders: Folders) -> None:
    async with driver(folders) as workers:
        with trio.move_on_after(0.01):
            await workers.ensure(KEY)
        await workers.ensure(KEY)
        assert len(worker_pids(folders.root)) == 1
        with trio.move_on_after(0.01):
            await workers.stop(KEY)
        await workers.stop(KEY)
    assert left(folders) == []


@in_trio
async def test_what_it_writes_is_passed_on(folders: Folders) -> None:
    log: list[bytes] = []
    async with driver(folders, log=log) as workers:
        await workers.ensure(KEY)
        await workers.stop(KEY)
    lines = b"".join(log)
    assert f"serving {folders.mountpoint(KEY)}".encode() in lines
    assert lines.endswith(b"\n")


@in_trio
async def test_it_takes_nothing_of_the_drivers_environment(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy.example")
    async with driver(folders) as workers:
        await workers.ensure(KEY)
        environment = environment_of(pid_of(folders))
        assert b"PATH=" in environment
        assert b"secret" not in environment


@pytest.fixture
def cgroup() -> Iterator[Path]:
    for hierarchy in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (hierarchy / "cgroup.procs").exists():
            folder = hierarchy / f"model-csi-test-{os.getpid()}"
            yield folder
            if folder.exists():
                folder.rmdir()
            return
    pytest.skip("no cgroup file system of version 2 is mounted here")


@in_trio
async def test_it_may_have_a_cgroup_of_its_own(folders: Folders, cgroup: Path) -> None:
    async with driver(folders, WorkerSettings(cgroup=cgroup)) as workers:
        await workers.ensure(KEY)
        assert (cgroup / "cgroup.procs").read_text().split() == [str(pid_of(folders))]
        await workers.stop(KEY)


@in_trio
async def test_a_connection_can_be_aborted(folders: Folders) -> None:
    async with driver(folders) as workers:
        await workers.ensure(KEY)
        os.kill(pid_of(folders), signal.SIGSTOP)
        mount = mount_at(folders.mountpoint(KEY))
        assert mount is not None
        async with trio.open_nursery() as nursery:
            seen: list[int | None] = []

            async def wait() -> None:
                try:
                    await trio.to_thread.run_sync(os.statvfs, folders.mountpoint(KEY))
                except OSError as error:
                    seen.append(error.errno)

            nursery.start_soon(wait)
            await trio.sleep(0.1)
            assert fuse_connections.abort(mount)
        assert seen in ([errno.ENOTCONN], [errno.ECONNABORTED])
        assert not fuse_connections.abort(replace(mount, device="0:1"))


def test_a_lock_means_one_process_only(folders: Folders, tmp_path: Path) -> None:
    lock = lock_path(folders.root, KEY.model, KEY.selection)
    assert holder(lock) is None
    assert not is_held(lock)
    for content in (b"", b"{", b'{"pid": 1, "started": "0"}', b'{"pid": -1, "started": 5}'):
        lock.write_bytes(content)
        assert holder(lock) is None
    assert started(os.getpid()) == started(os.getpid())
    assert started(0) is None
