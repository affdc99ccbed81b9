"""Volumes that appear before their model is there: the shipped driver, real workers. Needs root."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import pytest

from csi.mount_table import mount_at, mount_table
from csi.served import FUSE_TYPE
from fetcher.modelpack import Packing
from tests.support.commands import ModelCsi, wait_until
from tests.support.csi_client import CsiClient, Usage
from tests.support.driver import Driver, DriverProcess
from tests.support.models import ModelBuilder
from tests.support.mounts import mount_tmpfs, mounts_below
from tests.support.proxy import Faults, Proxy, serve_proxy
from tests.support.workers import worker_pids

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.registry import RegistryServer

MIB = 1024 * 1024
PREFIX = "model.csi.example.org/"
OFFLINE = ("unshare", "--net")
"""A network without any interface that is up."""
SLOW = 256 * 1024
"""Bytes a second: nothing but what is read is there by the time that a test looks."""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    flags = ("--chunk-size", "128KiB", "--read-timeout", "20s", "--stall-timeout", "5s")
    driver = Driver(tmp_path / "node", *flags)
    try:
        yield driver
    finally:
        driver.clear()


@pytest.fixture
def proxy(registry: RegistryServer) -> Iterator[Proxy]:
    """What the driver takes for the registry: as slow, or as far away, as a test wants."""
    with serve_proxy(registry.address) as running:
        running.faults = Faults(bytes_per_second=SLOW)
        yield running


class Model:
    """A model of one big file and a small one, in a registry behind a proxy."""

    def __init__(self, registry: RegistryServer, proxy: Proxy, name: str, size: int) -> None:
        self.data = os.urandom(size)
        self.built = ModelBuilder().add_raw("model.safetensors", self.data)
        self.config = f'{{"model_type": "{name}"}}'
        self.built.add_raw("config.json", self.config.encode())
        reference = self.built.push(registry, f"lazy/{name}", "v1")
        self.reference = reference.replace(registry.address, proxy.address)

    def attributes(self, mode: str = "lazy", **others: str) -> dict[str, str]:
        values = {"reference": self.reference, "mode": mode, **others}
        return {PREFIX + name: value for name, value in values.items()}

    def is_right(self, target: Path) -> bool:
        return (target / "model.safetensors").read_bytes() == self.data


@contextmanager
def kubelet_of(running: DriverProcess) -> Iterator[CsiClient]:
    with CsiClient(running.socket) as client:
        client.wait_until_ready(20)
        yield client


def status(running: DriverProcess) -> dict[str, dict[str, object]]:
    """What ``model-csi status`` says of each volume."""
    done = ModelCsi(running.root, running.root).run("status", "--json")
    assert done.status == 0, done.errors
    return {volume["id"]: volume for volume in done.json["volumes"]}


def assert_nothing_left(running: DriverProcess) -> None:
    assert mounts_below(running.kubelet_dir) == []
    assert mounts_below(running.root) == []
    assert worker_pids(running.root) == []
    assert list((running.root / "lazy").glob("*/*")) == []


def kill_worker(running: DriverProcess) -> int:
    [pid] = worker_pids(running.root)
    os.kill(pid, signal.SIGKILL)
    return pid


def is_readable(target: Path) -> bool:
    """Whether the file system that is mounted there answers."""
    try:
        os.statvfs(target)
    except OSError:
        return False
    return True


def wait_until_served_again(running: DriverProcess, *targets: Path, but: int) -> None:
    """Wait until another worker than process ``but`` serves what is mounted at the targets."""

    def is_served() -> bool:
        pids = worker_pids(running.root)
        return pids != [] and but not in pids and all(is_readable(target) for target in targets)

    wait_until(is_served, "served again by another process", 10)


def settled(kubelet: CsiClient, volume: str, target: Path) -> Usage:
    """What the volume's condition is once it is not abnormal any more."""
    wait_until(lambda: not kubelet.stats(volume, target).abnormal, "a normal condition")
    return kubelet.stats(volume, target)


def test_a_volume_is_there_before_its_model(
    driver: Driver, registry: RegistryServer, proxy: Proxy
) -> None:
    model = Model(registry, proxy, "before", 8 * MIB)
    running = driver.start()
    one, two, three = (running.target(pod) for pod in ("one", "two", "three"))
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-one", one, model.attributes())
        assert proxy.counts.total < 4 * MIB
        mount = mount_at(one)
        assert mount is not None
        assert mount.type == FUSE_TYPE
        assert mount.locked
        assert sorted(os.listdir(one)) == ["config.json", "model.safetensors"]
        assert (one / "model.safetensors").stat().st_size == len(model.data)
        with (one / "model.safetensors").open("rb") as file:
            file.seek(7 * MIB + 123)
            assert file.read(100) == model.data[7 * MIB + 123 :][:100]
        assert proxy.counts.total < 4 * MIB
        usage = kubelet.stats("csi-one", one)
        assert not usage.abnormal
        assert "fetched while it is read" in usage.message
        assert usage.bytes_used >= len(model.data)
        # one process for all volumes of a model
        kubelet.publish_inline("csi-two", two, model.attributes("auto"))
        assert len(worker_pids(running.root)) == 1
        told = status(running)
        assert told["csi-one"]["shown"] == told["csi-two"]["shown"] == "lazy"
        assert "were not complete in the store" in str(told["csi-two"]["reason"])
        assert told["csi-one"]["problem"] is None
        proxy.faults = Faults()
        assert model.is_right(one)
        assert model.is_right(two)
        wait_until(
            lambda: status(running)["csi-one"]["done"] == status(running)["csi-one"]["total"],
            "all of it is there",
        )
        # what is complete is plainly bound, also where lazy is asked for
        kubelet.publish_inline("csi-three", three, model.attributes())
        plain = mount_at(three)
        assert plain is not None
        assert plain.type != FUSE_TYPE
        assert status(running)["csi-three"]["shown"] == "bind"
        assert model.is_right(three)
        kubelet.unpublish("csi-one", one)
        assert model.is_right(two)
        kubelet.unpublish("csi-two", two)
        assert worker_pids(running.root) == []
        kubelet.unpublish("csi-three", three)
    assert_nothing_left(running)
    assert proxy.counts.total <= 1.02 * len(model.data)


def test_a_worker_that_is_killed_is_started_and_bound_again(
    driver: Driver, registry: RegistryServer, proxy: Proxy
) -> None:
    model = Model(registry, proxy, "killed", 4 * MIB)
    running = driver.start()
    mount_tmpfs(running.kubelet_dir / "pods")
    subprocess.run(["mount", "--make-shared", running.kubelet_dir / "pods"], check=True)
    one, two = running.target("one"), running.target("two")
    with kubelet_of(running) as kubelet:
        for volume, target in (("csi-one", one), ("csi-two", two)):
            kubelet.publish_inline(volume, target, model.attributes())
        with container_of(one, driver.folder / "container") as container:
            assert container.config() == model.config
            for _ in range(2):
                # nobody is asked
                proxy.faults = Faults(statuses=[503] * 100)
                killed = kill_worker(running)
                wait_until_served_again(running, one, two, but=killed)
                assert settled(kubelet, "csi-two", two).bytes_used >= len(model.data)
                assert settled(kubelet, "csi-one", one).bytes_used >= len(model.data)
                assert (two / "config.json").read_text() == model.config
                assert container.config() == model.config
        proxy.faults = Faults()
        assert model.is_right(one)
        assert model.is_right(two)
        for volume, target in (("csi-one", one), ("csi-two", two)):
            kubelet.unpublish(volume, target)
            assert not target.exists()
    assert mounts_below(running.root) == []
    assert worker_pids(running.root) == []


class Container:
    """A process with a mount namespace of its own that shows a volume as a container does."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def config(self) -> str:
        """What it reads now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


@contextmanager
def container_of(target: Path, folder: Path) -> Iterator[Container]:
    """A container with ``mountPropagation: HostToContainer``."""
    folder.mkdir()
    script = (
        f"mount --bind '{target}' '{folder}' && mount --make-rslave '{folder}' && "
        f"while read _; do cat '{folder}/config.json' 2>&1; echo; done"
    )
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield Container(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda one: one.name)
def test_the_driver_may_end_while_pods_read(
    driver: Driver, registry: RegistryServer, proxy: Proxy, number: signal.Signals
) -> None:
    model = Model(registry, proxy, f"driver-{number.name.lower()}", 4 * MIB)
    running = driver.start()
    target = running.target("one")
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-one", target, model.attributes())
        pids = worker_pids(running.root)
        (target / "config.json").read_bytes()
        with (target / "model.safetensors").open("rb") as file:
            first = file.read(1000)
    mount = mount_at(target)
    driver.end(number)
    assert mount_at(target) == mount
    assert worker_pids(running.root) == pids
    # what was fetched stays readable; what was not is waited for
    with (target / "model.safetensors").open("rb") as file:
        assert file.read(1000) == first == model.data[:1000]
    with reading_all(target) as reader:
        proxy.faults = Faults()
        running = driver.start()
        assert reader.digest() == hashlib.sha256(model.data).hexdigest()
    assert worker_pids(running.root) == pids
    with kubelet_of(running) as kubelet:
        assert not settled(kubelet, "csi-one", target).abnormal
        kubelet.unpublish("csi-one", target)
    assert_nothing_left(running)


class AllReader:
    """A process that reads a whole file."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def digest(self) -> str:
        output, _ = self._process.communicate(timeout=60)
        return output.split()[0]


@contextmanager
def reading_all(target: Path) -> Iterator[AllReader]:
    process = subprocess.Popen(
        ["sha256sum", target / "model.safetensors"], stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield AllReader(process)
        finally:
            process.kill()


def test_driver_and_worker_may_be_killed_together(
    driver: Driver, registry: RegistryServer, proxy: Proxy
) -> None:
    model = Model(registry, proxy, "both", 4 * MIB)
    running = driver.start()
    target = running.target("one")
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-one", target, model.attributes())
    driver.end(signal.SIGKILL)
    killed = kill_worker(running)
    running = driver.start()
    wait_until_served_again(running, target, but=killed)
    with kubelet_of(running) as kubelet:
        settled(kubelet, "csi-one", target)
        # what it brings when kubelet publishes it again is what the rest is fetched with
        kubelet.publish_inline("csi-one", target, model.attributes())
        proxy.faults = Faults()
        assert model.is_right(target)
        kubelet.unpublish("csi-one", target)
    assert_nothing_left(running)


def test_a_worker_that_hangs_is_told_and_taken_down(
    driver: Driver, registry: RegistryServer, proxy: Proxy
) -> None:
    model, other = Model(registry, proxy, "hung", MIB), Model(registry, proxy, "well", MIB)
    proxy.faults = Faults()
    running = driver.start()
    target, well = running.target("hung"), running.target("well")
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-hung", target, model.attributes())
        [pid] = worker_pids(running.root)
        kubelet.publish_inline("csi-well", well, other.attributes())
        os.kill(pid, signal.SIGSTOP)
        begun = time.monotonic()
        usage = kubelet.stats("csi-hung", target)
        assert usage.abnormal
        assert "does not answer" in usage.message
        assert time.monotonic() - begun < 5
        assert other.is_right(well)
        # one more that shows what nobody serves is no trouble either
        beside = running.target("beside")
        kubelet.publish_inline("csi-beside", beside, model.attributes(), timeout=10)
        kubelet.unpublish("csi-beside", beside, timeout=60)
        kubelet.unpublish("csi-hung", target, timeout=60)
        assert not target.exists()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert other.is_right(well)
        kubelet.unpublish("csi-well", well)
    assert_nothing_left(running)


def test_archives_keep_no_volume_waiting(
    driver: Driver, registry: RegistryServer, proxy: Proxy
) -> None:
    """What is in an archive is known late, and that is for those who list it to wait for."""
    data = os.urandom(2 * MIB)
    built = ModelBuilder().add_raw("config.json", b"{}").add_tar({"a/b": data}, Packing.TAR_GZIP)
    reference = built.push(registry, "lazy/archive", "v1")
    attributes = {
        PREFIX + "reference": reference.replace(registry.address, proxy.address),
        PREFIX + "mode": "lazy",
    }
    running = driver.start()
    target = running.target("one")
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-one", target, attributes)
        assert proxy.counts.total < MIB
        assert (target / "config.json").read_bytes() == b"{}"
        proxy.faults = Faults()
        assert (target / "a/b").read_bytes() == data
        kubelet.unpublish("csi-one", target)
    assert_nothing_left(running)


def test_a_lazy_volume_is_published_again_without_a_network(
    driver: Driver, registry: RegistryServer
) -> None:
    running = driver.start()
    target = running.target("one")
    with serve_proxy(registry.address) as proxy:
        proxy.faults = Faults(bytes_per_second=SLOW)
        model = Model(registry, proxy, "again", 4 * MIB)
        with kubelet_of(running) as kubelet:
            kubelet.publish_inline("csi-one", target, model.attributes())
    mount = mount_at(target)
    assert mount is not None
    with kubelet_of(running) as kubelet:
        for _ in range(2):
            kubelet.publish_inline("csi-one", target, model.attributes(), timeout=10)
        assert mount_at(target) == mount
        assert [one.mountpoint for one in mount_table()].count(str(target)) == 1
        kubelet.unpublish("csi-one", target)
    assert_nothing_left(running)


def test_without_a_network_what_was_fetched_is_served_again(
    driver: Driver, registry: RegistryServer, proxy: Proxy
) -> None:
    model = Model(registry, proxy, "offline", MIB)
    running = driver.start()
    targets = [running.target(pod) for pod in ("one", "two")]
    attributes = model.attributes(prefetch="none")
    with kubelet_of(running) as kubelet:
        for number, target in enumerate(targets):
            kubelet.publish_inline(f"csi-{number}", target, attributes)
        with (targets[0] / "model.safetensors").open("rb") as file:
            assert file.read(1000) == model.data[:1000]
    driver.end(signal.SIGKILL)
    killed = kill_worker(running)
    running = driver.start(*OFFLINE)
    wait_until_served_again(running, *targets, but=killed)
    with kubelet_of(running) as kubelet:
        for number, target in enumerate(targets):
            with (target / "model.safetensors").open("rb") as file:
                assert file.read(1000) == model.data[:1000]
            settled(kubelet, f"csi-{number}", target)
            kubelet.publish_inline(f"csi-{number}", target, attributes, timeout=10)
        for number, target in enumerate(targets):
            kubelet.unpublish(f"csi-{number}", target, timeout=20)
    assert_nothing_left(running)


def test_mounts_whose_records_were_lost_stay_and_can_be_taken_away(
    driver: Driver, registry: RegistryServer, proxy: Proxy
) -> None:
    model = Model(registry, proxy, "lost", 4 * MIB)
    running = driver.start()
    target = running.target("one")
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-one", target, model.attributes())
    driver.end(signal.SIGKILL)
    for file in running.root.glob("state.db*"):
        file.unlink()
    running = driver.start()
    done = ModelCsi(running.root, running.root).run("status", "--json")
    assert [row["target"] for row in done.json["unknown_mounts"]] == [str(target)]
    assert is_readable(target)
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-one", target, model.attributes())
        assert len(worker_pids(running.root)) == 1
        proxy.faults = Faults()
        assert model.is_right(target)
        kubelet.unpublish("csi-one", target)
    assert_nothing_left(running)


def test_what_a_lazy_volume_shows_is_no_garbage(
    driver: Driver, registry: RegistryServer, proxy: Proxy
) -> None:
    model = Model(registry, proxy, "pinned", MIB)
    proxy.faults = Faults()
    running = driver.start()
    target = running.target("one")
    command = ModelCsi(running.root, running.root)
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-one", target, model.attributes())
        assert model.is_right(target)
        assert command.run("gc", "--all").status == 0
        before = proxy.counts.total
        assert model.is_right(target)
        assert command.run("rm", model.reference).status == 1
        assert proxy.counts.total == before
        kubelet.unpublish("csi-one", target)


def test_where_fuse_is_off(tmp_path: Path, registry: RegistryServer, proxy: Proxy) -> None:
    model = Model(registry, proxy, "off", MIB)
    proxy.faults = Faults()
    driver = Driver(tmp_path / "node", "--fuse", "off")
    try:
        running = driver.start()
        with kubelet_of(running) as kubelet:
            with pytest.raises(grpc.RpcError) as caught:
                kubelet.publish_inline("csi-lazy", running.target("lazy"), model.attributes())
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "fuse is off" in (caught.value.details() or "")
            assert status(running) == {}
            target = running.target("auto")
            kubelet.publish_inline("csi-auto", target, model.attributes("auto"))
            told = status(running)["csi-auto"]
            assert told["shown"] == "bind"
            assert "fuse is off" in str(told["reason"])
            assert "fuse is off" in running.log.read_text()
            assert model.is_right(target)
            # what is complete needs no FUSE
            kubelet.publish_inline("csi-lazy", running.target("lazy"), model.attributes())
            kubelet.unpublish("csi-lazy", running.target("lazy"))
            kubelet.unpublish("csi-auto", target)
    finally:
        driver.clear()


def test_commands_mount_lazily_where_somebody_fetches(
    driver: Driver, registry: RegistryServer, proxy: Proxy, tmp_path: Path
) -> None:
    model = Model(registry, proxy, "command", 2 * MIB)
    command = ModelCsi(driver.folder / "root", tmp_path)
    target = tmp_path / "mnt"
    done = command.run("mount", "--json", "--mode", "lazy", model.reference, str(target))
    assert done.status == 1
    assert done.error["code"] == "Unsupported"
    assert "model-csi serve" in done.error["message"]
    assert not target.exists()
    running = driver.start()
    done = command.run("mount", "--json", "--mode", "lazy", model.reference, str(target))
    assert done.status == 0, done.errors
    assert done.json["shown"] == "lazy"
    with (target / "config.json").open() as file:
        assert file.read() == model.config
    driver.end()
    # what serves it is there without an agent, and is taken down without one
    assert (target / "config.json").read_text() == model.config
    assert len(worker_pids(running.root)) == 1
    assert command.run("unmount", str(target)).status == 0
    assert not target.exists()
    assert_nothing_left(running)
    proxy.faults = Faults()
    done = command.run("mount", "--json", "--mode", "auto", model.reference, str(target))
    assert done.status == 0, done.errors
    assert done.json["shown"] == "bind"
    assert "model-csi serve" in done.json["reason"]
    assert model.is_right(target)
    assert command.run("unmount", str(target)).status == 0
