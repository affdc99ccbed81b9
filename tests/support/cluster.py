"""Drivers on nodes of a network of their own, before one registry that counts what it sends."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc

from tests.support.commands import ModelCsi, wait_until
from tests.support.csi_client import CsiClient
from tests.support.driver import Driver
from tests.support.networks import MBIT, network
from tests.support.proxy import Proxy, running
from tests.support.workers import end_workers, spare_worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tests.support.driver import DriverProcess
    from tests.support.networks import Host, Network
    from tests.support.registry import RegistryServer

ATTRIBUTES: Final = "model.csi.example.org/"
PEER_PORT: Final = 8401
PUBLISH_SECONDS: Final = 115.0
_RACE_SECONDS: Final = 600.0


@dataclass(frozen=True)
class Model:
    """A model in the registry: by name what a pod has to see of it."""

    repository: str
    digests: Mapping[str, str]
    """Of files, SHA-256 in hex."""
    size: int

    @classmethod
    def of(cls, repository: str, files: Mapping[str, bytes]) -> Model:
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        return cls(repository, digests, sum(map(len, files.values())))


class Node:
    """A driver on a host of the network."""

    def __init__(self, host: Host, folder: Path, *flags: str) -> None:
        self.host = host
        self.name = host.name
        self.driver = Driver(folder / host.name, "--node-id", host.name, *flags)
        self.running: DriverProcess | None = None

    def start(self) -> None:
        self.driver.folder.mkdir(exist_ok=True)
        self.running = self.driver.start(*self.host.within)

    @property
    def peer(self) -> str:
        """Where its peer server listens, if it does."""
        return f"{self.host.address}:{PEER_PORT}"

    @property
    def root(self) -> Path:
        return self.driver.folder / "root"

    def target(self, pod: str = "one") -> Path:
        return self.driver.folder / "kubelet/pods" / pod / "volumes/kubernetes.io~csi/model/mount"

    @property
    def log(self) -> str:
        return (self.driver.folder / "driver.log").read_text(errors="replace")

    def has_spare_worker(self) -> bool:
        """Whether a process waits there to serve the next lazy volume."""
        return self.running is not None and spare_worker(self.running.pid) is not None

    def publish(
        self,
        reference: str,
        pod: str = "one",
        attributes: Mapping[str, str] = {},
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        """As kubelet does: again and again while the driver says that it goes on."""
        given = {"reference": reference, **attributes}
        context = {ATTRIBUTES + key: value for key, value in given.items()}
        with CsiClient(self.driver.folder / "csi.sock") as kubelet:
            while True:
                try:
                    kubelet.publish_inline(
                        f"csi-{pod}",
                        self.target(pod),
                        context,
                        secrets=secrets,
                        timeout=PUBLISH_SECONDS,
                    )
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.ABORTED:
                        raise
                else:
                    return

    def read_byte(self, pod: str = "one") -> None:
        """Read one byte anywhere in the largest file that a pod sees."""
        path = max(self.target(pod).iterdir(), key=lambda path: path.stat().st_size)
        with path.open("rb", buffering=0) as file:
            file.seek(random.randrange(path.stat().st_size))  # noqa: S311 -- no secret
            assert len(file.read(1)) == 1

    def unpublish(self, pod: str = "one") -> None:
        with CsiClient(self.driver.folder / "csi.sock") as kubelet:
            kubelet.unpublish(f"csi-{pod}", self.target(pod))

    def shows(self, pod: str = "one") -> dict[str, str]:
        """The digests of the files that a pod sees."""
        shown = {}
        for path in sorted(self.target(pod).rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    shown[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return shown

    def stored(self) -> int:
        """Bytes of blobs below its root, as the disk counts them."""
        total = 0
        for folder, _, names in os.walk(self.root / "blobs"):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(folder, name)).st_blocks * 512
        return total

    def rot(self) -> None:
        """Change a byte of every 64 KiB of all blobs that it has, as a broken disk would."""
        for path in self.root.glob("blobs/*/*"):
            if path.suffix or not path.is_file():
                continue
            path.chmod(0o600)
            with path.open("r+b") as file:
                for offset in range(0, path.stat().st_size, 64 * 1024):
                    file.seek(offset)
                    (byte,) = file.read(1)
                    file.seek(offset)
                    file.write(bytes([byte ^ 1]))


@dataclass(frozen=True)
class Cluster:
    """The network, the registry in it, and nodes as they are added."""

    network: Network
    registry_host: Host
    registry: Proxy
    """Counts what the registry sends, and misbehaves as it is told."""
    folder: Path
    nodes: list[Node]
    started: list[Node]

    def reference(self, model: Model, tag: str = "v1") -> str:
        return f"{self.registry.address}/{model.repository}:{tag}"

    def add(self, count: int, *flags: str, zone: str | None = None) -> list[Node]:
        """Nodes that are not started yet."""
        added = []
        for _ in range(count):
            host = self.network.add(f"node-{len(self.nodes)}", zone)
            added.append(Node(host, self.folder, "--plain-http", self.registry.address, *flags))
            self.nodes.append(added[-1])
        return added

    def befriend(self, nodes: Sequence[Node], members: Sequence[Node] | None = None) -> None:
        """Let nodes that are not started yet be peers of ``members``: of each other."""
        token = self.folder / "token"
        token.write_text("the-token-of-this-cluster\n")
        peers = [f"{one.name}={one.peer}@{one.host.zone}" for one in members or nodes]
        for node in nodes:
            node.driver.flags += (
                *("--peer-listen", node.peer, "--peer-token-file", str(token)),
                *("--peer-name", node.name),
                *(flag for peer in peers for flag in ("--peers", peer)),
            )

    def start(self, nodes: Sequence[Node]) -> None:
        """Start drivers side by side, and wait until all of them listen."""
        self.started.extend(nodes)
        with ThreadPoolExecutor(len(nodes)) as threads:
            for started in [threads.submit(node.start) for node in nodes]:
                started.result()

    @property
    def egress(self) -> int:
        """Bytes that the registry has sent."""
        return self.registry.counts.total + self.registry.counts.others


def publish_chunk_digests(upstream: RegistryServer, model: Model, *options: str) -> None:
    """``model-csi index``, so that nodes know the bytes of each chunk."""
    with tempfile.TemporaryDirectory(prefix="index-") as folder:
        cli = ModelCsi(Path(folder) / "root", Path(folder))
        done = cli.run("index", *options, upstream.reference(model.repository, "v1"))
    assert done.status == 0, done.errors


@contextlib.contextmanager
def cluster(upstream: RegistryServer, *zones: str, mbit: float = MBIT) -> Iterator[Cluster]:
    """A cluster without nodes; nothing of it is left after the block.

    ``upstream`` is a registry of the machine, which the registry in the network stands for.
    """
    with (
        # not below pytest's own folder: the paths of sockets have to be short
        tempfile.TemporaryDirectory(prefix="peers-", ignore_cleanup_errors=True) as folder,
        network(*zones, mbit=mbit) as (made, host),
        running(host.inside(lambda: Proxy(upstream.address, host=host.address))) as registry,
    ):
        built = Cluster(made, host, registry, Path(folder), [], [])
        try:
            yield built
        finally:
            for node in built.started:
                node.driver.clear()
                end_workers(node.root)


@dataclass(frozen=True)
class Sample:
    """How much every node had at one moment."""

    seconds: float
    stored: dict[str, int]


class Race:
    """All of some nodes do the same at one moment; how long each takes, and how it goes."""

    def __init__(self, nodes: Sequence[Node], work: Callable[[Node], None]) -> None:
        self.seconds: dict[str, float] = {}
        """Of every node that has finished."""
        self.errors: dict[str, BaseException] = {}
        self.samples: list[Sample] = []
        self._nodes = nodes
        self._work = work
        self._began = 0.0

    def run(self, meanwhile: Callable[[Race], None] = lambda race: None) -> None:
        """Until all have finished or failed; ``meanwhile`` is called when all have begun."""
        barrier = threading.Barrier(len(self._nodes) + 1)
        over = threading.Event()

        def take_part(node: Node) -> None:
            barrier.wait()
            try:
                self._work(node)
            except Exception as error:
                self.errors[node.name] = error
            else:
                self.seconds[node.name] = time.monotonic() - self._began

        with ThreadPoolExecutor(len(self._nodes) + 1) as threads:
            runs = [threads.submit(take_part, node) for node in self._nodes]
            self._began = time.monotonic()
            barrier.wait()
            watcher = threads.submit(self._watch, over)
            try:
                meanwhile(self)
            finally:
                for run in runs:
                    run.result()
                over.set()
                watcher.result()

    def wait_for(self, stored: int) -> None:
        """Until its nodes together have so many bytes."""
        wait_until(
            lambda: sum(node.stored() for node in self._nodes) >= stored, "progress", _RACE_SECONDS
        )

    def wait_until_over(self, nodes: Sequence[Node]) -> None:
        """Until these have finished or failed."""
        names = {node.name for node in nodes}
        wait_until(
            lambda: names <= self.seconds.keys() | self.errors.keys(), "the end", _RACE_SECONDS
        )

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(0.25):
            stored = {node.name: node.stored() for node in self._nodes}
            self.samples.append(Sample(time.monotonic() - self._began, stored))
