"""What pods of lazy volumes notice: how soon they start, and whose credentials hold. Needs root."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

from csi.mount_table import mount_at
from csi.served import FUSE_TYPE
from tests.bench.zeros import ZeroModel, serve_zeros
from tests.integration.test_lazy_volumes import (
    Model,
    assert_nothing_left,
    kubelet_of,
    settled,
)
from tests.integration.test_secrets import leaks, private_registry
from tests.support.commands import wait_until
from tests.support.driver import Driver
from tests.support.mounts import detach_below, mounts_below
from tests.support.proxy import Faults, serve_proxy
from tests.support.workers import worker_pids

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.csi_client import CsiClient
    from tests.support.registry import RegistryServer

MIB = 1024 * 1024
GIB = 1024 * MIB
PREFIX = "model.csi.example.org/"
BOUND, TRIES = 1.0, 10


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(tmp_path / "node", "--chunk-size", "128KiB", "--stall-timeout", "2s")
    try:
        yield driver
    finally:
        driver.clear()


# -- how soon --------------------------------------------------------------------------------------


def test_a_pod_starts_as_soon_whatever_the_models_size(tmp_path: Path) -> None:
    """1 GiB and 100 GiB of which nothing is fetched: each below a second."""
    small = ZeroModel("small", (GIB,))
    large = ZeroModel("large", tuple(4 * GIB + number * MIB for number in range(25)))
    driver = Driver(tmp_path / "node")
    # a disk on which there is room, and of which nothing is taken
    root = tmp_path / "node" / "root"
    root.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200G", "tmpfs", root], check=True)
    try:
        with serve_zeros((small, large), hashed=False) as address:
            running = driver.start()
            with kubelet_of(running) as kubelet:
                seconds = {
                    model.name: _best(kubelet, address, model, running.target(model.name))
                    for model in (small, large)
                }
            assert worker_pids(running.root) == []
    finally:
        driver.clear()
        detach_below(root)
    assert max(seconds.values()) < BOUND, seconds


def _best(kubelet: CsiClient, address: str, model: ZeroModel, target: Path) -> float:
    """The least of some tries: what else the machine does is not the driver's."""
    best = BOUND
    for _ in range(TRIES):
        best = min(best, _publish_seconds(kubelet, address, model, target))
        if best < BOUND:
            break
    return best


def _publish_seconds(kubelet: CsiClient, address: str, model: ZeroModel, target: Path) -> float:
    """How long a publish takes that has to start the model's worker."""
    attributes = {
        f"{PREFIX}reference": f"{address}/{model.name}:v1",
        f"{PREFIX}mode": "lazy",
        f"{PREFIX}prefetch": "none",
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    kubelet.publish_inline("csi-one", target, attributes)
    seconds = time.monotonic() - begun
    mount = mount_at(target)
    assert mount is not None
    assert mount.type == FUSE_TYPE
    assert sum(entry.stat().st_size for entry in os.scandir(target)) == model.size
    kubelet.unpublish("csi-one", target)
    return seconds


# -- whose credentials -----------------------------------------------------------------------------

OLD, NEW = "s3cr3t-of-yesterday", "s3cr3t-of-today"


def _only(registry_folder: Path, password: str) -> None:
    """Let ``team`` in with this password, and with no other."""
    done = subprocess.run(
        ["htpasswd", "-Bbn", "team", password], capture_output=True, check=True, text=True
    )
    file = registry_folder / "htpasswd"
    file.write_text(done.stdout)
    # the registry looks at the file again when its time has changed
    os.utime(file, ns=(0, time.time_ns()))


def test_rotated_secrets_reach_a_volume_in_use(driver: Driver, tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    with private_registry(folder, team=OLD) as registry, serve_proxy(registry.address) as proxy:
        model = Model(registry, proxy, "rotated", 32 * MIB)
        running = driver.start()
        target = running.target("one")
        attributes = model.attributes(prefetch="none")
        with kubelet_of(running) as kubelet:

            def publish(password: str) -> None:
                secret = {"username": "team", "password": password}
                kubelet.publish_inline("csi-one", target, attributes, secrets=secret)

            publish(OLD)
            assert _bytes_at(target, 0) == model.data[:1000]
            _only(folder, NEW)
            # what is there stays readable, what is not is refused, and the volume says so
            with pytest.raises(OSError, match="Input/output error"):
                _bytes_at(target, 24 * MIB)
            assert _bytes_at(target, 0) == model.data[:1000]
            usage = kubelet.stats("csi-one", target)
            assert usage.abnormal
            publish(NEW)
            assert _bytes_at(target, 24 * MIB) == model.data[24 * MIB :][:1000]
            settled(kubelet, "csi-one", target)
            # this reads all files below the node's folder, those of the volume too
            assert leaks(running, OLD, NEW) == []
            kubelet.unpublish("csi-one", target)
    assert_nothing_left(running)


def _bytes_at(target: Path, offset: int) -> bytes:
    descriptor = os.open(target / "model.safetensors", os.O_RDONLY)
    try:
        # past what the kernel reads ahead
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(descriptor, 1000, offset)
    finally:
        os.close(descriptor)


# -- a registry that is not there ------------------------------------------------------------------


def test_a_registry_that_says_nothing_holds_up_nobody_else(
    driver: Driver, registry: RegistryServer
) -> None:
    """The volume says why, it can be taken down while somebody reads, and others go on."""
    with serve_proxy(registry.address) as silent, serve_proxy(registry.address) as well:
        model, other = (
            Model(registry, silent, "silent", 4 * MIB),
            Model(registry, well, "well", MIB),
        )
        running = driver.start()
        target, fine = running.target("silent"), running.target("well")
        with kubelet_of(running) as kubelet:
            attributes = model.attributes(prefetch="none")
            kubelet.publish_inline("csi-silent", target, attributes)
            kubelet.publish_inline("csi-well", fine, other.attributes())
            silent.faults = Faults(stall=threading.Event())
            with _blocked_reader(target) as reader:
                begun = time.monotonic()
                kubelet.stats("csi-silent", target)
                assert time.monotonic() - begun < 5
                assert other.is_right(fine)
                wait_until(lambda: kubelet.stats("csi-silent", target).abnormal, "abnormal", 30)
                assert "nothing has come" in kubelet.stats("csi-silent", target).message
                kubelet.unpublish("csi-silent", target, timeout=60)
                assert reader.wait(20) == 1
            assert not target.exists()
            assert other.is_right(fine)
            assert len(worker_pids(running.root)) == 1
            kubelet.unpublish("csi-well", fine)
            silent.faults.stall.set()  # type: ignore[union-attr]
    assert mounts_below(running.kubelet_dir) == []
    assert_nothing_left(running)


def _blocked_reader(target: Path) -> subprocess.Popen[bytes]:
    """A process that reads what is not there; it ends with status 1 once that fails."""
    return subprocess.Popen(
        ["dd", f"if={target}/model.safetensors", "of=/dev/null", "bs=4096", "count=1", "skip=700"],
        stderr=subprocess.DEVNULL,
    )
