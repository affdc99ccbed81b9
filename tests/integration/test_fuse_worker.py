"""The worker of a lazy model: a real process, a real mount, and an agent that fails as told."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fetcher.archives import UnpackLimits
from fetcher.errors import AccessDenied, Unavailable
from fetcher.lazy_plan import lock_path
from fetcher.lazy_protocol import Forget, Opened, Want
from fetcher.modelpack import Kind, Packing, Selection, read_model
from fetcher.oci import Digest
from fetcher.ranges import Range
from tests.support.commands import wait_until
from tests.support.lazy_agent import CHUNK, SmallAgent
from tests.support.lazy_worker import start, worker
from tests.support.memory_limits import memory_limit
from tests.support.models import Member, ModelBuilder, hard_link, symlink
from tests.support.stores import STILL, build, in_store, put_content

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fetcher.store import ModelTree, Store

MIB = 1024 * 1024
_NOTED_TIMES = (1_700_000_000, 1_704_067_200)
"""When files were written that say it; others have no time that anybody relies on."""
QUICK = 2.0
"""Read timeout of tests that wait for it."""


def _agent(root: Path, builder: ModelBuilder, chunk: int = CHUNK) -> SmallAgent:
    blobs = {str(digest): data for digest, data in builder.blobs.items()}
    return SmallAgent(
        root, builder.body, lambda name, part: blobs[name][part.start : part.stop], chunk
    )


def _name(data: bytes) -> str:
    return str(Digest.of(data))


def _look(folder: Path) -> dict[str, tuple[object, ...]]:
    """All that programs see of a tree."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        kind = stat.S_IFMT(state.st_mode)
        about: tuple[object, ...] = (oct(state.st_mode), state.st_uid, state.st_gid)
        if kind == stat.S_IFREG:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            about += (state.st_size, state.st_blocks, content)
            if state.st_mtime in _NOTED_TIMES:
                about += (state.st_mtime_ns,)
        elif kind == stat.S_IFLNK:
            about += (os.readlink(path), state.st_size)
        found[str(path.relative_to(folder))] = about
    return found


def _everything() -> ModelBuilder:
    builder = ModelBuilder()
    noted = {"mode": 0o755, "mtime": "2024-01-01T00:00:00Z"}
    builder.add_raw("model.safetensors", os.urandom(5 * CHUNK + 7), metadata=noted)
    builder.add_raw("empty", b"", Kind.DOC, metadata={"mtime": "2024-01-01T00:00:00Z"})
    builder.add_raw("a/b/c/config.json", b"{}", Kind.WEIGHT_CONFIG)
    for packing, name in (
        (Packing.TAR, "plain"),
        (Packing.TAR_GZIP, "gzip"),
        (Packing.TAR_ZSTD, "zstd"),
    ):
        builder.add_tar(
            [
                Member(f"{name}/one", data=os.urandom(3 * CHUNK + 5)),
                Member(f"{name}/two", data=os.urandom(CHUNK), mode=0o755),
                Member(f"{name}/nothing", data=b""),
                hard_link(f"{name}/again", f"{name}/one"),
                symlink(f"{name}/link", "one"),
                symlink(f"{name}/nowhere", "missing"),
            ],
            packing,
        )
    return builder


# ------------------------------------------------------------------------------- what it looks like


def _eager(
    root: Path, builder: ModelBuilder, selection: Selection
) -> dict[str, tuple[object, ...]]:
    found: list[dict[str, tuple[object, ...]]] = []

    async def main(store: Store) -> None:
        model = read_model(builder.manifest())
        for layer in model.layers:
            put_content(store, layer, builder.blobs[layer.descriptor.digest])
            if layer.packing in (Packing.TAR_GZIP, Packing.TAR_ZSTD):
                store.lay_out(layer, UnpackLimits(max_bytes=64 * MIB), STILL)
                store.laid_out(layer)
        tree: ModelTree = build(store, model, selection)
        found.append(_look(tree.path))

    in_store(root, main)
    return found[0]


@pytest.mark.parametrize(
    "selection",
    [Selection(), Selection(exclude_patterns=("one", "b/")), Selection(exclude_weights=True)],
    ids=["everything", "some", "no weights"],
)
def test_a_lazy_tree_looks_like_an_eager_one(tmp_path: Path, selection: Selection) -> None:
    builder = _everything()
    lazy = tmp_path / "lazy"
    agent = _agent(lazy, builder)
    with agent.running(), worker(lazy, builder.body, selection=selection) as one:
        seen = _look(one.mount)
    assert seen == _eager(tmp_path / "eager", builder, selection)
    assert seen


def test_a_name_keeps_its_inode_in_another_worker(tmp_path: Path) -> None:
    builder = _everything()
    inodes = []
    with _agent(tmp_path, builder).running():
        for _ in range(2):
            with worker(tmp_path, builder.body) as one:
                paths = [*one.mount.rglob("*")]
                random.shuffle(paths)
                inodes.append({str(path): path.lstat().st_ino for path in paths})
    assert inodes[0] == inodes[1]


def test_nothing_can_be_changed(tmp_path: Path) -> None:
    builder = ModelBuilder().add_raw("x", b"data")
    with _agent(tmp_path, builder).running(), worker(tmp_path, builder.body) as one:
        file = one.mount / "x"

        def refused(number: int, work: Callable[[], object]) -> None:
            with pytest.raises(OSError, match=os.strerror(number)) as failure:
                work()
            assert failure.value.errno == number

        refused(errno.EROFS, lambda: file.write_bytes(b"other"))
        refused(errno.EROFS, lambda: file.chmod(0o777))
        refused(errno.EROFS, lambda: file.unlink())
        refused(errno.EROFS, lambda: (one.mount / "new").mkdir())
        refused(errno.EROFS, lambda: os.setxattr(file, "user.x", b"y"))
        refused(errno.ENODATA, lambda: os.getxattr(file, "user.x"))
        refused(errno.ENOENT, lambda: (one.mount / "none").stat())
        refused(errno.ENOENT, lambda: (one.mount / os.fsdecode(b"\xff")).stat())
        refused(errno.ENOTDIR, lambda: (file / "below").stat())
        refused(errno.EINVAL, lambda: os.readlink(file))
        assert os.listxattr(file) == []
        assert file.read_bytes() == b"data"


def test_the_file_system_tells_its_size(tmp_path: Path) -> None:
    builder = ModelBuilder().add_raw("x", b"data").add_raw("y", bytes(3 * MIB))
    with _agent(tmp_path, builder).running(), worker(tmp_path, builder.body) as one:
        space = os.statvfs(one.mount)
    assert space.f_blocks * space.f_frsize == 3 * MIB + 4096
    assert (space.f_bfree, space.f_bavail, space.f_namemax) == (0, 0, 255)
    assert space.f_flag & os.ST_RDONLY


def test_a_folder_of_many_names_is_listed_whole(tmp_path: Path) -> None:
    names = [f"file-{number:05d}-{'x' * 40}" for number in range(3000)]
    builder = ModelBuilder().add_tar({f"d/{name}": b"1" for name in names})
    with _agent(tmp_path, builder).running(), worker(tmp_path, builder.body) as one:
        assert sorted(os.listdir(one.mount / "d")) == names
        assert sorted(entry.name for entry in os.scandir(one.mount / "d")) == names


def test_it_is_mounted_as_it_should_be(tmp_path: Path) -> None:
    builder = ModelBuilder().add_raw("x", b"data")
    with _agent(tmp_path, builder).running(), worker(tmp_path, builder.body) as one:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        line = next(line for line in lines if str(one.mount) in line)
        head, _, tail = line.partition(" - ")
        kind, source, options = tail.split(" ")
        assert (kind, source) == ("fuse.model-csi", str(one.mount))
        assert {"ro", "nosuid", "nodev"} <= set(head.split(" ")[5].split(","))
        assert {"allow_other", "default_permissions"} <= set(options.split(","))
        device = head.split(" ")[2]
        read_ahead = Path(f"/sys/class/bdi/{device}/read_ahead_kb").read_text()
        assert int(read_ahead) == 4096
        assert "reads 4096 KiB ahead" in one.log.read_text()
        # any user reads it
        file = os.open(one.mount / "x", os.O_PATH)
        script = f"import os; os.setuid(65534); print(open('/proc/self/fd/{file}').read())"
        done = subprocess.run(
            [sys.executable, "-c", script], pass_fds=[file], capture_output=True, check=True
        )
        os.close(file)
        assert done.stdout == b"data\n"


# -------------------------------------------------------------------------------- what is not there


def test_only_what_is_read_is_asked_for(tmp_path: Path) -> None:
    data = os.urandom(100 * CHUNK)
    builder = ModelBuilder().add_raw("x", data)
    agent = _agent(tmp_path, builder)
    with agent.running(), worker(tmp_path, builder.body) as one:
        with open(one.mount / "x", "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for at in (70 * CHUNK + 5, 3 * CHUNK, 50 * CHUNK - 3):
                assert os.pread(file.fileno(), 10, at) == data[at : at + 10]
        assert agent.fetched[_name(data)] == 4 * CHUNK
        assert [one for one in agent.asked if isinstance(one, Opened)] == [
            Opened(_name(data), 0, len(data))
        ]


def test_who_reads_on_is_fetched_ahead_of(tmp_path: Path) -> None:
    data = os.urandom(24 * MIB)
    builder = ModelBuilder().add_raw("x", data)
    agent = _agent(tmp_path, builder)
    with agent.running(), worker(tmp_path, builder.body) as one:
        with open(one.mount / "x", "rb", buffering=0) as file:
            for at in range(0, 12 * MIB, MIB):
                assert file.read(MIB) == data[at : at + MIB]
        ahead = [one for one in agent.asked if isinstance(one, Want) and one.ahead]
    assert ahead
    assert max(one.stop for one in ahead) >= 16 * MIB


def test_a_read_ends_in_an_error_when_its_time_is_over(tmp_path: Path) -> None:
    here, away = os.urandom(3 * CHUNK), os.urandom(3 * CHUNK)
    builder = ModelBuilder().add_raw("here", here).add_raw("away", away)
    agent = _agent(tmp_path, builder)
    agent.complete(_name(here))
    agent.orders.answering.clear()
    with agent.running(), worker(tmp_path, builder.body, timeout=QUICK) as one:
        begun = time.monotonic()
        with pytest.raises(OSError, match="Input/output") as failure:
            (one.mount / "away").read_bytes()
        took = time.monotonic() - begun
        assert failure.value.errno == errno.EIO
        assert QUICK - 0.1 <= took < QUICK + 10
        assert (one.mount / "here").read_bytes() == here
        assert any(isinstance(asked, Forget) for asked in agent.asked)
        # what could not be had is asked for again
        agent.orders.answering.set()
        assert (one.mount / "away").read_bytes() == away
        assert "not there within 2 s" in one.log.read_text()


def test_what_is_there_is_read_while_many_wait_for_what_is_not(tmp_path: Path) -> None:
    here, away = os.urandom(40 * MIB), os.urandom(40 * MIB)
    builder = ModelBuilder().add_raw("here", here).add_raw("away", away)
    agent = _agent(tmp_path, builder)
    agent.complete(_name(here))
    agent.orders.answering.clear()
    with agent.running(), worker(tmp_path, builder.body) as one, ThreadPoolExecutor(64) as pool:

        def read(at: int) -> bytes:
            with open(one.mount / "away", "rb", buffering=0) as file:
                return os.pread(file.fileno(), 1000, at)

        places = [number * 40 * MIB // 64 for number in range(64)]
        waiting = [pool.submit(read, at) for at in places]
        wait_until(lambda: len(agent.wants()) >= 40, "many readers wait")
        assert (one.mount / "here").read_bytes() == here
        agent.orders.answering.set()
        for at, future in zip(places, waiting, strict=True):
            assert future.result(30) == away[at : at + 1000]


def test_what_is_refused_ends_at_once(tmp_path: Path) -> None:
    data = os.urandom(CHUNK)
    builder = ModelBuilder().add_raw("x", data)
    agent = _agent(tmp_path, builder)
    agent.orders.refusal = AccessDenied("the registry refuses")
    with agent.running(), worker(tmp_path, builder.body) as one:
        with pytest.raises(OSError, match="Input/output"):
            (one.mount / "x").read_bytes()
        assert "the registry refuses" in one.log.read_text()
        agent.orders.refusal = None
        assert (one.mount / "x").read_bytes() == data


def test_what_passes_is_waited_for(tmp_path: Path) -> None:
    data = os.urandom(CHUNK)
    builder = ModelBuilder().add_raw("x", data)
    agent = _agent(tmp_path, builder)
    agent.orders.refusal = Unavailable("the registry is away")
    with agent.running(), worker(tmp_path, builder.body) as one, ThreadPoolExecutor(1) as pool:
        reading = pool.submit((one.mount / "x").read_bytes)
        wait_until(lambda: len(agent.asked) > 2, "it is asked again")
        agent.orders.refusal = None
        assert reading.result(30) == data


def test_untrusted_bytes_are_not_shown(tmp_path: Path) -> None:
    data = os.urandom(4 * CHUNK)
    builder = ModelBuilder().add_raw("x", data)
    agent = _agent(tmp_path, builder)
    agent.orders.trusted = False
    agent.fill(_name(data), Range(0, len(data)))
    with agent.running(), worker(tmp_path, builder.body, timeout=QUICK) as one:
        with pytest.raises(OSError, match="Input/output"):
            (one.mount / "x").read_bytes()
        agent.orders.trusted = True
        assert (one.mount / "x").read_bytes() == data


# ---------------------------------------------------------------------------------- lives of agents


def test_the_agent_may_come_and_go(tmp_path: Path) -> None:
    data = os.urandom(40 * CHUNK)
    builder = ModelBuilder().add_raw("x", data)
    agent = _agent(tmp_path, builder)
    with worker(tmp_path, builder.body) as one, ThreadPoolExecutor(8) as pool:
        # there has never been one
        first = pool.submit(_pread, one.mount / "x", 0, 100)
        agent.start()
        assert first.result(30) == data[:100]
        for number in range(1, 6):
            agent.stop()
            assert _pread(one.mount / "x", 0, 100) == data[:100]
            at = 6 * number * CHUNK
            waiting = pool.submit(_pread, one.mount / "x", at, 100)
            agent.start()
            assert waiting.result(30) == data[at : at + 100]
        agent.stop()
        assert "first ticket" not in one.log.read_text()
        assert "first ticket" not in Path(f"/proc/{one.process.pid}/cmdline").read_text()


def _pread(path: Path, at: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(file.fileno(), size, at)


def test_a_complete_model_needs_no_agent(tmp_path: Path) -> None:
    builder = _everything()
    agent = _agent(tmp_path, builder)
    for layer in read_model(builder.manifest()).layers:
        if layer.descriptor.size:
            agent.complete(str(layer.descriptor.digest))
    with worker(tmp_path, builder.body) as one:
        look = _look(one.mount)
    assert look == _eager(tmp_path / "eager", builder, Selection())


# ----------------------------------------------------------------------------- blobs that are wrong


def test_bytes_that_proved_wrong_are_not_read_any_more(tmp_path: Path) -> None:
    bad, good = os.urandom(40 * CHUNK), os.urandom(CHUNK)
    builder = ModelBuilder().add_raw("bad", bad).add_raw("good", good)
    agent = _agent(tmp_path, builder)
    with (
        agent.running(),
        worker(tmp_path, builder.body) as one,
        open(one.mount / "bad", "rb", buffering=0) as file,
    ):
        # its pages are in the page cache from here on
        assert file.read() == bad
        agent.spoil(_name(bad), "the registry sent other bytes")
        wait_until(lambda: not _readable(file.fileno()), "it cannot be read")
        with pytest.raises(OSError, match="Input/output"):
            (one.mount / "bad").read_bytes()
        assert (one.mount / "good").read_bytes() == good
        assert "proved wrong" in one.log.read_text()


def test_a_verdict_that_no_agent_lived_to_tell_is_found(tmp_path: Path) -> None:
    bad = os.urandom(40 * CHUNK)
    builder = ModelBuilder().add_raw("bad", bad)
    agent = _agent(tmp_path, builder)
    with (
        agent.running(),
        worker(tmp_path, builder.body) as one,
        open(one.mount / "bad", "rb", buffering=0) as file,
    ):
        assert file.read() == bad
        agent.stop()
        agent.spoil(_name(bad), "the registry sent other bytes", tell=False)
        agent.start()
        wait_until(lambda: not _readable(file.fileno()), "it cannot be read")


def _readable(file: int) -> bool:
    try:
        os.pread(file, 10, 0)
    except OSError:
        return False
    return True


# ----------------------------------------------------------------------------------------- archives


def test_a_tar_is_read_while_it_arrives_in_any_order(tmp_path: Path) -> None:
    files = {f"d/{number}": os.urandom(3 * CHUNK + 100 * number) for number in range(8)}
    builder = ModelBuilder().add_tar(files)
    archive = next(data for data in builder.blobs.values() if len(data) > CHUNK)
    agent, name = _agent(tmp_path, builder), _name(archive)
    ended = threading.Event()

    def fill() -> None:
        chunks = list(range(-(-len(archive) // CHUNK)))
        random.shuffle(chunks)
        for number in chunks:
            stop = min((number + 1) * CHUNK, len(archive))
            agent.fill(name, Range(number * CHUNK, stop))
        agent.complete(name)
        ended.set()

    with agent.running(), worker(tmp_path, builder.body) as one, ThreadPoolExecutor(8) as pool:

        def read(seed: int) -> int:
            chance = random.Random(seed)  # noqa: S311 - the same every time
            reads = 0
            while not ended.is_set() or reads < 50:
                path, data = chance.choice([*files.items()])
                at = chance.randrange(len(data))
                size = chance.randrange(1, 2 * CHUNK)
                with open(one.mount / path, "rb", buffering=0) as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    found = os.pread(file.fileno(), size, at)
                assert found == data[at : at + size]
                reads += 1
            return reads

        readers = [pool.submit(read, seed) for seed in range(6)]
        pool.submit(fill).result(60)
        assert all(reader.result(60) >= 50 for reader in readers)
        for path, data in files.items():
            assert (one.mount / path).read_bytes() == data
    assert agent.fetched[name] == len(archive)


def test_the_names_of_a_tar_are_known_before_its_contents(tmp_path: Path) -> None:
    files = {f"d/{number}": os.urandom(20 * CHUNK) for number in range(4)}
    builder = ModelBuilder().add_tar(files)
    archive = next(data for data in builder.blobs.values() if len(data) > CHUNK)
    agent = _agent(tmp_path, builder)
    with agent.running(), worker(tmp_path, builder.body) as one:
        assert sorted(os.listdir(one.mount / "d")) == ["0", "1", "2", "3"]
        assert agent.fetched[_name(archive)] <= 6 * CHUNK
        assert _pread(one.mount / "d/2", 7, 100) == files["d/2"][7:107]
        assert agent.fetched[_name(archive)] <= 8 * CHUNK


def test_a_compressed_layer_delays_nobody_else(tmp_path: Path) -> None:
    builder = ModelBuilder().add_raw("x", b"data").add_tar({"z": b"packed"}, Packing.TAR_GZIP)
    agent = _agent(tmp_path, builder)
    raw = _name(b"data")
    agent.complete(raw)
    agent.orders.answering.clear()
    with agent.running(), worker(tmp_path, builder.body) as one, ThreadPoolExecutor(2) as pool:
        reading = pool.submit((one.mount / "z").read_bytes)
        listing = pool.submit(lambda: sorted(os.listdir(one.mount)))
        wait_until(lambda: len(agent.asked) >= 1, "the layer is wanted")
        assert (one.mount / "x").read_bytes() == b"data"
        agent.orders.answering.set()
        assert reading.result(30) == b"packed"
        assert listing.result(30) == ["x", "z"]
        # a name that there is not is known by now, for ever
        with pytest.raises(FileNotFoundError):
            (one.mount / "none").stat()


def test_layers_that_contradict_each_other_hide_only_each_other(tmp_path: Path) -> None:
    builder = ModelBuilder().add_raw("x", b"data").add_tar({"x": b"other"}).add_tar({"y": b"1"})
    agent = _agent(tmp_path, builder)
    with agent.running(), worker(tmp_path, builder.body) as one:
        with pytest.raises(OSError, match="Input/output"):
            os.listdir(one.mount)
        assert (one.mount / "x").read_bytes() == b"data"
        assert "there already" in one.log.read_text()


# --------------------------------------------------------------------------------- lives of workers


def test_a_worker_ends_with_its_mount_and_with_nothing_else(tmp_path: Path) -> None:
    builder = ModelBuilder().add_raw("x", b"data")
    with _agent(tmp_path, builder).running(), worker(tmp_path, builder.body) as one:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            one.process.send_signal(number)
        assert (one.mount / "x").read_bytes() == b"data"
        target = tmp_path / "target"
        target.mkdir()
        subprocess.run(["mount", "--bind", one.mount, target], check=True)
        subprocess.run(["umount", one.mount], check=True)
        # it is mounted elsewhere still
        assert (target / "x").read_bytes() == b"data"
        assert one.process.poll() is None
        subprocess.run(["umount", target], check=True)
        assert one.process.wait(30) == 0


def test_there_is_one_worker_of_a_model(tmp_path: Path) -> None:
    builder = ModelBuilder().add_raw("x", b"data")
    with _agent(tmp_path, builder).running(), worker(tmp_path, builder.body) as one:
        with pytest.raises(AssertionError, match="another worker"):
            start(tmp_path, builder.body)
        assert (one.mount / "x").read_bytes() == b"data"
        lock = lock_path(tmp_path, Digest.of(builder.body), "")
        said = json.loads(lock.read_text())
        assert said["pid"] == one.process.pid
        fields = Path(f"/proc/{one.process.pid}/stat").read_text().rpartition(")")[2].split()
        assert said["started"] == int(fields[19])
        with open(lock) as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_killed_worker_is_followed_by_another_one(tmp_path: Path) -> None:
    data = os.urandom(20 * CHUNK)
    builder = ModelBuilder().add_raw("x", data)
    agent = _agent(tmp_path, builder)
    with agent.running(), worker(tmp_path, builder.body) as one:
        assert _pread(one.mount / "x", 0, 100) == data[:100]
        one.process.kill()
        one.process.wait()
        with pytest.raises(OSError, match=r"not connected|abort"):
            (one.mount / "x").read_bytes()
        agent.stop()
        # nobody's network is needed
        again = start(tmp_path, builder.body)
        try:
            assert _pread(one.mount / "x", 0, 100) == data[:100]
            agent.start()
            assert (one.mount / "x").read_bytes() == data
        finally:
            subprocess.run(["umount", "--lazy", one.mount], check=True)
            assert again.wait(30) == 0


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_a_worker_without_a_plan_says_so(tmp_path: Path, content: bytes | None) -> None:
    body = ModelBuilder().add_raw("x", b"data").body
    plan = tmp_path / "lazy" / "sha256" / f"{Digest.of(body).hex}.json"
    plan.parent.mkdir(parents=True)
    if content is not None:
        plan.write_bytes(content)
    with pytest.raises(AssertionError, match="plan"):
        start(tmp_path, body)


def test_killed_readers_leave_nothing_behind(tmp_path: Path) -> None:
    data = os.urandom(64 * CHUNK)
    builder = ModelBuilder().add_raw("x", data)
    agent = _agent(tmp_path, builder)
    agent.orders.answering.clear()
    with agent.running(), worker(tmp_path, builder.body, timeout=QUICK) as one:
        before = one.descriptors()
        for _ in range(20):
            reader = subprocess.Popen(["cat", one.mount / "x"], stdout=subprocess.DEVNULL)
            time.sleep(0.02)
            reader.kill()
            assert reader.wait(QUICK + 20) == -signal.SIGKILL
        agent.orders.answering.set()
        assert (one.mount / "x").read_bytes() == data
        wait_until(lambda: one.descriptors() <= before + 4, "files are closed")


# ------------------------------------------------------------------------------- many, and how much


READERS = """
import hashlib, mmap, os, sys, threading
path, size, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
found = [b""] * threads
def read(number):
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    part = size // threads
    found[number] = hashlib.sha256(mapped[number * part : (number + 1) * part]).digest()
everybody = [threading.Thread(target=read, args=[number]) for number in range(threads)]
[one.start() for one in everybody]
[one.join() for one in everybody]
print(hashlib.sha256(b"".join(found)).hexdigest())
"""


def test_many_processes_of_many_threads_fetch_everything_once(tmp_path: Path) -> None:
    size, threads = 48 * MIB, 16
    data = os.urandom(size)
    builder = ModelBuilder().add_raw("x", data)
    agent = _agent(tmp_path, builder, MIB)
    with agent.running(), worker(tmp_path, builder.body) as one:
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", READERS, one.mount / "x", str(size), str(threads)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(8)
        ]
        found = {reader.communicate(timeout=60)[0].strip() for reader in readers}
        part = size // threads
        parts = [hashlib.sha256(data[at : at + part]).digest() for at in range(0, size, part)]
        assert found == {hashlib.sha256(b"".join(parts)).hexdigest()}
        assert agent.fetched[_name(data)] == size


@pytest.fixture
def sparse(tmp_path: Path) -> ModelBuilder:
    """A complete model of 8 GiB that takes no room: nothing but zeros."""
    builder = ModelBuilder()
    size = 8 << 30
    name = Digest.of(b"8 GiB")
    builder.layers.append(
        {
            "mediaType": "application/vnd.cncf.model.weight.v1.raw",
            "digest": str(name),
            "size": size,
            "annotations": {"org.cncf.model.filepath": "x"},
        }
    )
    blobs = tmp_path / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    with open(blobs / name.hex, "wb") as file:
        file.truncate(size)
    return builder


SEQUENTIAL = """
import os, sys
path, start, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open(path, "rb", buffering=0) as file:
    file.seek(start)
    left = size
    while left:
        left -= len(file.read(min(left, 1 << 20)))
"""


def test_many_readers_and_the_worker_have_room_in_half_a_gigabyte(
    tmp_path: Path, sparse: ModelBuilder
) -> None:
    step = (8 << 30) // 64
    with memory_limit(512 * MIB) as limit, worker(tmp_path, sparse.body) as one:
        limit.take(one.process.pid)
        readers = [
            subprocess.Popen(
                limit.inside(
                    *(sys.executable, "-S", "-c", SEQUENTIAL),
                    *(str(one.mount / "x"), str(number * step), str(16 * MIB)),
                )
            )
            for number in range(64)
        ]
        assert {reader.wait(60) for reader in readers} == {0}
        assert limit.killed() == 0
        assert one.resident() < 100 * MIB


def test_what_was_read_is_in_the_page_cache_once(tmp_path: Path) -> None:
    size = 96 * MIB
    data = os.urandom(size)
    builder = ModelBuilder().add_raw("x", data)
    agent = _agent(tmp_path, builder, 4 * MIB)
    with agent.running(), worker(tmp_path, builder.body) as one:
        # what is fetched for the reader, and not on the disk when it is read
        with open(one.mount / "x", "rb", buffering=0) as file:
            while file.read(MIB):
                pass
        blob = tmp_path / "blobs" / "sha256" / _name(data).removeprefix("sha256:")
        with open(blob, "rb") as stored:
            os.fsync(stored.fileno())
        wait_until(lambda: _cached(blob) < size // 10, "the store's pages are gone")


def _cached(path: Path) -> int:
    """Bytes of a file that are in the page cache."""
    done = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", path],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_open_files_are_closed(tmp_path: Path) -> None:
    files = {f"d/{number}": os.urandom(100) for number in range(300)}
    builder = ModelBuilder().add_tar(files)
    agent = _agent(tmp_path, builder)
    agent.complete(next(name for name in agent.names()))
    with agent.running(), worker(tmp_path, builder.body) as one:
        before = one.descriptors()
        with contextlib.ExitStack() as stack:
            for path, data in files.items():
                assert stack.enter_context(open(one.mount / path, "rb")).read() == data
            assert one.descriptors() > before + 300
        wait_until(lambda: one.descriptors() < before + 10, "files are closed")


RECORDER = """
import statistics, sys
from fuse import __main__, filesystem
sizes = []
read = filesystem.FileSystem.read
async def recorded(self, inode, offset, size):
    sizes.append(size)
    return await read(self, inode, offset, size)
filesystem.FileSystem.read = recorded
status = __main__.main(sys.argv[2:])
open(sys.argv[1], "w").write(str(statistics.median(sizes)))
sys.exit(status)
"""


def test_a_walk_through_mapped_memory_is_read_in_large_pieces(
    tmp_path: Path, sparse: ModelBuilder
) -> None:
    sizes = tmp_path / "sizes"
    with worker(tmp_path, sparse.body, program=["-c", RECORDER, str(sizes)]) as one:
        with open(one.mount / "x", "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        with mapped:
            for at in range(0, 64 * MIB, mmap.PAGESIZE):
                assert mapped[at] == 0
    assert float(sizes.read_text()) >= 512 * 1024


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
