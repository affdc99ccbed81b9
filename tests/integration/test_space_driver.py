"""The store's bounds with the driver as it is shipped: volumes at once, kills. Needs root."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc

from csi.mount_table import mount_at
from fetcher.modelpack import Packing
from tests.support.commands import ModelCsi, wait_until
from tests.support.csi_client import CsiClient
from tests.support.driver import serve_driver
from tests.support.models import Member, ModelBuilder
from tests.support.proxy import serve_proxy
from tests.support.stores import MIB, disk_bytes, weights

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.driver import DriverProcess
    from tests.support.proxy import Proxy
    from tests.support.registry import RegistryServer

VOLUMES = 16
SIZE = 3 * MIB
CAP = VOLUMES * SIZE * 6 // 10


@contextmanager
def watched(root: Path, pods: Pods, digests: dict[int, str]) -> Iterator[list[int]]:
    """While the block runs: what ``du`` says, and that what the pods are shown reads right."""
    samples: list[int] = []
    wrong: list[str] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.is_set():
            samples.append(disk_bytes(root))

    def read() -> None:
        while not ended.wait(0.01):
            for number in range(VOLUMES):
                with pods.reading:
                    target = pods.shown.get(number)
                    if target is not None and _digest(target) != digests[number]:
                        wrong.append(f"volume {number} reads otherwise")

    threads = [threading.Thread(target=work) for work in (sample, read)]
    for thread in threads:
        thread.start()
    try:
        yield samples
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def _digest(target: Path) -> str:
    try:
        data = (target / "model-0.safetensors").read_bytes()
    except OSError as error:
        return str(error)
    return hashlib.sha256(data).hexdigest()


class Pods:
    """The volumes of sixteen pods, published as kubelet does."""

    def __init__(self, driver: DriverProcess, kubelet: CsiClient, prefix: str) -> None:
        self._driver = driver
        self._kubelet = kubelet
        self._prefix = prefix
        self.reading = threading.Lock()
        """Held while something is read: pods that read are not deleted."""
        self.shown: dict[int, Path] = {}
        self.refused: dict[int, str] = {}

    def publish(self, numbers: list[int]) -> None:
        """All of them at once, each again and again while its download goes on."""
        self.refused.clear()
        with ThreadPoolExecutor(len(numbers)) as calls:
            list(calls.map(self._publish, numbers))

    def _publish(self, number: int) -> None:
        target = self._driver.kubelet_dir / f"pods/{number}/volumes/kubernetes.io~csi/model/mount"
        attributes = {"model.csi.example.org/reference": f"{self._prefix}/{number}:v1"}
        while True:
            try:
                self._kubelet.publish_inline(f"csi-{number}", target, attributes, timeout=10)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.ABORTED:
                    continue
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                self.refused[number] = str(error.details())
            else:
                self.shown[number] = target
            assert (mount_at(target) is not None) == (number in self.shown)
            return

    def unpublish_all(self) -> None:
        with self.reading:
            targets = dict(self.shown)
            self.shown.clear()
        for number, target in targets.items():
            self._kubelet.unpublish(f"csi-{number}", target)


def test_sixteen_volumes_below_a_cap_of_three_fifths(
    tmp_path: Path, registry: RegistryServer
) -> None:
    builders = [weights(SIZE) for _ in range(VOLUMES)]
    digests = {number: one.manifest().layers[0].digest.hex for number, one in enumerate(builders)}
    for number, builder in enumerate(builders):
        builder.push(registry, f"pods/{number}", "v1")
    limits = ("--max-size", str(CAP), "--min-free", "0", "--deadline-margin", "500ms")
    with serve_proxy(registry.address) as proxy, serve_driver(tmp_path, *limits) as driver:
        proxy.faults.bytes_per_second = 60 * MIB
        with CsiClient(driver.socket) as kubelet:
            pods = Pods(driver, kubelet, f"{proxy.address}/pods")
            with watched(driver.root, pods, digests) as samples:
                pods.publish(list(range(VOLUMES)))
                assert len(pods.shown) + len(pods.refused) == VOLUMES
                assert 6 <= len(pods.shown) < VOLUMES
                for message in pods.refused.values():
                    assert "does not fit: it needs 3." in message
                    assert "28.8 MiB that max-size allows" in message
                # asked again, nothing has changed, and nothing suffers
                pods.publish(sorted(pods.refused))
                assert len(pods.shown) + len(pods.refused) == VOLUMES
                rounds = 0
                while pods.refused:
                    waiting = sorted(pods.refused)
                    pods.unpublish_all()
                    pods.publish(waiting)
                    assert len(pods.refused) < len(waiting)
                    rounds += 1
                assert rounds <= 3
                pods.unpublish_all()
    assert max(samples) <= CAP
    assert proxy.counts.total == VOLUMES * SIZE


def kill_when(proxy: Proxy, count: int, process: subprocess.Popen[str]) -> None:
    """Kill a process when so many more bytes of blobs have come."""
    moment = proxy.counts.total + count
    wait_until(
        lambda: proxy.counts.total >= moment or process.poll() is not None, "so much of it came"
    )
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_twenty_kills_leave_no_orphans(tmp_path: Path, registry: RegistryServer) -> None:
    seed = random.randrange(1 << 32)  # noqa: S311 (a test's dice)
    print(f"seed {seed}")
    dice = random.Random(seed)  # noqa: S311 (a test's dice)
    builder = ModelBuilder().add_raw("model.safetensors", os.urandom(12 * MIB))
    builder.add_tar([Member(f"code/{n}.bin", os.urandom(200_000)) for n in range(30)])
    builder.add_tar([Member("packed.bin", os.urandom(2 * MIB))], Packing.TAR_ZSTD)
    builder.push(registry, "killed/space", "v1")
    size = sum(len(data) for data in builder.blobs.values())
    cli = ModelCsi(tmp_path / "root", tmp_path, {"MODEL_CSI_MIN_FREE": "0"})
    with serve_proxy(registry.address) as proxy:
        reference = f"{proxy.address}/killed/space:v1"
        proxy.faults.bytes_per_second = 40 * MIB
        for _ in range(20):
            kill_when(proxy, dice.randrange(size // 15), cli.start("pull", "--json", reference))
        proxy.faults.bytes_per_second = None
        done = cli.run("pull", "--json", reference)
        assert done.status == 0, done.errors
        assert cli.run("gc", "--json").status == 0
        disk = cli.run("status", "--json").json["disk"]
        assert disk["orphan_bytes"] == disk["reserved"] == disk["trash"] == 0
        assert disk["contents"] == 3
        names = sorted(path.name[64:] for path in (cli.root / "blobs/sha256").iterdir())
        assert names == ["", ".files", ".files"]
        # the process that asked has closed the database since, which takes less then
        assert disk_bytes(cli.root) <= disk["used"] < disk_bytes(cli.root) + MIB
