"""Lazy volumes while processes are killed and volumes come and go: nothing wrong, nothing left."""

from __future__ import annotations

import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.integration.test_lazy_volumes import (
    PREFIX,
    Model,
    assert_nothing_left,
    kill_worker,
    kubelet_of,
    settled,
    wait_until_served_again,
)
from tests.support.commands import wait_until
from tests.support.driver import Driver
from tests.support.models import ModelBuilder
from tests.support.proxy import Faults, Proxy, serve_proxy
from tests.support.random_reader import random_reader
from tests.support.workers import worker_pids

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.csi_client import CsiClient
    from tests.support.driver import DriverProcess
    from tests.support.registry import RegistryServer

MIB = 1024 * 1024
DEAD = {"ENOTCONN", "ECONNABORTED"}
"""What a read ends with while its worker is not there."""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(tmp_path / "node", "--chunk-size", "128KiB", "--stall-timeout", "5s")
    try:
        yield driver
    finally:
        driver.clear()


@pytest.fixture
def proxy(registry: RegistryServer) -> Iterator[Proxy]:
    with serve_proxy(registry.address) as running:
        running.faults = Faults(bytes_per_second=2 * MIB)
        yield running


def kill(driver: Driver, running: DriverProcess, whom: str, target: Path) -> DriverProcess:
    """Kill one or both; what runs again when this returns."""
    if whom in ("driver", "both"):
        driver.end(signal.SIGKILL)
    killed = kill_worker(running) if whom in ("worker", "both") else 0
    if whom in ("driver", "both"):
        running = driver.start()
    wait_until_served_again(running, target, but=killed)
    return running


@pytest.mark.parametrize("whom", ["driver", "worker", "both"])
def test_kills_in_the_middle_of_reads(
    driver: Driver, registry: RegistryServer, proxy: Proxy, tmp_path: Path, whom: str
) -> None:
    model = Model(registry, proxy, f"kills-{whom}", 16 * MIB)
    right = tmp_path / "right"
    right.write_bytes(model.data)
    running = driver.start()
    target = running.target("one")
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-one", target, model.attributes(prefetch="none"))
    with random_reader(target / "model.safetensors", right) as reader:
        for _ in range(3):
            running = kill(driver, running, whom, target)
            if whom == "both":
                # nobody keeps credentials on the disk: kubelet brings them again
                with kubelet_of(running) as kubelet:
                    kubelet.publish_inline("csi-one", target, model.attributes(prefetch="none"))
            reader.goes_on()
        errors = reader.errors
    assert set(errors) <= (set() if whom == "driver" else DEAD), errors
    proxy.faults = Faults()
    assert model.is_right(target)
    with kubelet_of(running) as kubelet:
        settled(kubelet, "csi-one", target)
        kubelet.unpublish("csi-one", target)
    assert_nothing_left(running)


def test_kills_in_the_middle_of_reads_of_an_archive(
    driver: Driver, registry: RegistryServer, proxy: Proxy, tmp_path: Path
) -> None:
    """Its bytes wait in the frame, and move to their files, while they are read."""
    data, name = os.urandom(16 * MIB), "model.safetensors"
    members = {"a": os.urandom(300_000), name: data, "z/b": os.urandom(700_001)}
    reference = ModelBuilder().add_tar(members).push(registry, "lazy/kills-archive", "v1")
    attributes = {
        PREFIX + "reference": reference.replace(registry.address, proxy.address),
        PREFIX + "mode": "lazy",
    }
    right = tmp_path / "right"
    right.write_bytes(data)
    running = driver.start()
    target = running.target("one")
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-one", target, attributes)
    with random_reader(target / name, right) as reader:
        for whom in ("driver", "both"):
            running = kill(driver, running, whom, target)
            reader.goes_on()
        errors = reader.errors
    assert set(errors) <= DEAD, errors
    proxy.faults = Faults()
    assert (target / name).read_bytes() == data
    with kubelet_of(running) as kubelet:
        kubelet.unpublish("csi-one", target)
    assert_nothing_left(running)


def test_wrong_bytes_are_never_shown_and_the_volume_says_why(
    driver: Driver, registry: RegistryServer, proxy: Proxy
) -> None:
    """What one connection sent wrong is found when all is there; the volume is of no use then."""
    model = Model(registry, proxy, "wrong", 4 * MIB)
    proxy.faults = Faults(corrupt_at=3 * MIB)
    running = driver.start()
    target = running.target("one")
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-one", target, model.attributes())
        wait_until(lambda: kubelet.stats("csi-one", target).abnormal, "abnormal", 30)
        assert "digest" in kubelet.stats("csi-one", target).message
        with pytest.raises(OSError, match="Input/output error"):
            model.is_right(target)
        assert (target / "config.json").read_text() == model.config
        kubelet.unpublish("csi-one", target)
        proxy.faults = Faults()
        kubelet.publish_inline("csi-one", target, model.attributes())
        assert model.is_right(target)
        kubelet.unpublish("csi-one", target)
    assert_nothing_left(running)


def test_reads_wait_for_a_registry_that_comes_back(
    driver: Driver, registry: RegistryServer, proxy: Proxy, tmp_path: Path
) -> None:
    model = Model(registry, proxy, "gone", 16 * MIB)
    right = tmp_path / "right"
    right.write_bytes(model.data)
    running = driver.start()
    target = running.target("one")
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-one", target, model.attributes(prefetch="none"))
        with random_reader(target / "model.safetensors", right) as reader:
            proxy.faults = Faults(statuses=[503] * 1000)
            wait_until(lambda: kubelet.stats("csi-one", target).abnormal, "abnormal", 40)
            proxy.faults = Faults()
            reader.goes_on()
            assert reader.errors == {}
        settled(kubelet, "csi-one", target)
        kubelet.unpublish("csi-one", target)
    assert_nothing_left(running)


class Cycles:
    """Volumes that are published, read and unpublished, by many at once."""

    def __init__(self, kubelet: CsiClient, running: DriverProcess) -> None:
        self._kubelet = kubelet
        self._running = running
        self.wrong = 0
        self.done = 0
        self._lock = threading.Lock()

    def run(self, name: str, model: Model, count: int) -> None:
        """One volume after the other, each at a target of its own."""
        chance = random.Random(name)  # noqa: S311 (no secret)
        for number in range(count):
            volume, target = f"csi-{name}-{number}", self._running.target(f"{name}-{number}")
            attributes = model.attributes(chance.choice(MODES), prefetch="none")
            self._kubelet.publish_inline(volume, target, attributes)
            offset = chance.randrange(len(model.data))
            with (target / "model.safetensors").open("rb") as file:
                file.seek(offset)
                found = file.read(5000)
            self._kubelet.unpublish(volume, target)
            with self._lock:
                self.done += 1
                self.wrong += found != model.data[offset : offset + 5000] or target.exists()


MODES = ("lazy", "auto")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_volumes_that_come_and_go_leave_nothing(
    driver: Driver, registry: RegistryServer, proxy: Proxy, tmp_path: Path
) -> None:
    """200 cycles: most share a worker that others use, the rest start and end one each."""
    kept = Model(registry, proxy, "kept", 24 * MIB)
    proxy.faults = Faults()
    others = [Model(registry, proxy, f"comes-{number}", 24 * MIB) for number in range(2)]
    right = tmp_path / "right"
    # a quarter: what is complete would be bound plainly
    right.write_bytes(kept.data[: len(kept.data) // 4])
    running = driver.start()
    target = running.target("kept")
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-kept", target, kept.attributes(prefetch="none"))
        # what is made once, as connections and threads, is there before anything is counted
        cycles = Cycles(kubelet, running)
        cycles.run("first", others[0], 1)
        before = descriptors(running.pid)
        with (
            random_reader(target / "model.safetensors", right) as reader,
            ThreadPoolExecutor(5) as pool,
        ):
            runs = [pool.submit(cycles.run, f"shared-{n}", kept, 56) for n in range(3)]
            runs += [pool.submit(cycles.run, f"own-{n}", others[n], 16) for n in range(2)]
            for run in runs:
                run.result()
            reader.goes_on(1)
            assert reader.errors == {}
        assert (cycles.done, cycles.wrong) == (201, 0)
        assert len(worker_pids(running.root)) == 1
        kubelet.unpublish("csi-kept", target)
        wait_until(lambda: descriptors(running.pid) <= before + 8, "descriptors are closed")
    assert_nothing_left(running)
