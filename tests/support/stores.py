"""Models put into a real store without a registry, and stores that pull from one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from fetcher.chunk_lists import ChunkLists
from fetcher.credentials import Anonymous
from fetcher.download import DownloadSettings
from fetcher.jobs import Jobs
from fetcher.modelpack import Model, Selection, read_model
from fetcher.oci import Reference
from fetcher.policy import PullPolicy
from fetcher.pull import Pulls, PullSettings
from fetcher.ranges import Range
from fetcher.registry import Registry, RegistrySettings
from fetcher.store import Limits, Store
from fetcher.transport import TransferSettings
from tests.support.models import ModelBuilder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from fetcher.modelpack import Layer
    from fetcher.peers.client import PeerClient
    from fetcher.store import ModelTree

    Tell = Callable[[object], None]

CHUNK = 64 * 1024
MIB = 1024 * 1024
EVERYTHING = Selection()
NO_FLOOR = Limits(min_free=0)
NOBODY = Anonymous()
STILL = threading.Event()
"""Never set."""

_NAME_EVENTS = frozenset(
    {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}
)
"""What Python tells before it changes a name on the disk."""

REGISTRIES = RegistrySettings(attempts=2, retry_seconds=5)

QUICK = DownloadSettings(
    first_backoff=0.01, longest_backoff=0.05, transfer=TransferSettings(stall_timeout=5)
)


def in_store(
    root: Path, work: Callable[[Store], Awaitable[None]], limits: Limits = NO_FLOOR
) -> None:
    """Run ``work`` with an open store, as a process that starts and ends."""

    async def main() -> None:
        with trio.fail_after(60):
            store = Store.open(root, CHUNK, limits)
            try:
                await work(store)
            finally:
                store.close()

    trio.run(main)


def weights(*sizes: int) -> ModelBuilder:
    """A model of raw layers; no two chunks of it are alike."""
    builder = ModelBuilder()
    for number, size in enumerate(sizes):
        builder.add_raw(f"model-{number}.safetensors", os.urandom(size))
    return builder


def put_content(store: Store, layer: Layer, data: bytes, name: str | None = None) -> None:
    """Fill and complete a layer's blob, as a job does that has had it all by ``name``."""
    partial = store.open_partial(layer)
    if data:
        partial.sink(Range(0, len(data)))(data)
    assert partial.verify(STILL)
    partial.finish(STILL)
    partial.close()
    store.complete_blob(layer, name)


async def put_model(
    store: Store, builder: ModelBuilder, selection: Selection = EVERYTHING, name: str = "r/m:v1"
) -> ModelTree:
    """Reserve, fill and build a model, as a pull does."""
    model = read_model(builder.manifest())
    with store.held(model, selection):
        await store.reserve(name, model, selection)
        for layer in model.layers:
            if not store.has_content(layer):
                put_content(store, layer, builder.blobs[layer.descriptor.digest])
        tree = build(store, model, selection)
    await store.rooms.settle()
    return tree


def build(store: Store, model: Model, selection: Selection = EVERYTHING) -> ModelTree:
    """Build and record a model's tree; its contents are complete."""
    tree = store.build(model, selection, store.plan(model, selection), STILL)
    store.add_tree(tree, model, selection)
    return tree


def set_used(store: Store, tree: ModelTree, used: float) -> None:
    """Let a tree have been used last at ``used``."""
    with store.database.transaction() as connection:
        connection.execute("UPDATE models SET used = ? WHERE digest = ?", (used, str(tree.digest)))


@dataclass(frozen=True)
class NodeParts:
    """What every node has; its downloads end with the block that gave it."""

    store: Store
    registry: Registry
    jobs: Jobs
    nursery: trio.Nursery


@contextlib.asynccontextmanager
async def node_parts(
    root: Path,
    limits: Limits,
    *,
    chunk_size: int = CHUNK,
    registries: RegistrySettings = REGISTRIES,
    downloads: DownloadSettings = QUICK,
    peers: PeerClient | None = None,
) -> AsyncIterator[NodeParts]:
    """The parts of a node, as the driver composes them; they are closed whatever happens."""
    store = Store.open(root, chunk_size, limits)
    registry, closing = Registry(registries), contextlib.ExitStack()
    try:
        async with trio.open_nursery() as nursery:
            jobs = Jobs(store, registry, downloads, nursery, peers)
            closing.callback(jobs.close)
            yield NodeParts(store, registry, jobs, nursery)
            nursery.cancel_scope.cancel()
    finally:
        closing.close()
        with trio.CancelScope(shield=True):
            await registry.aclose()
        store.close()


@contextlib.asynccontextmanager
async def pulling(
    root: Path,
    limits: Limits,
    settings: PullSettings | None = None,
    chunk_size: int = CHUNK,
    registries: RegistrySettings = REGISTRIES,
) -> AsyncIterator[tuple[Pulls, Store]]:
    """The parts of a node that pull."""
    async with node_parts(root, limits, chunk_size=chunk_size, registries=registries) as node:
        lists = ChunkLists(node.store, node.registry, chunk_size)
        used = settings or PullSettings()
        pulls = Pulls(node.store, node.registry, node.jobs, used, node.nursery, lists)
        yield pulls, node.store


async def pull(pulls: Pulls, reference: str, selection: Selection = EVERYTHING) -> ModelTree:
    """Pull a model to its end."""
    resolved = await pulls.resolve(Reference.parse(reference), NOBODY, PullPolicy.IF_NOT_PRESENT)
    with pulls.join(resolved, selection) as joined:
        return await joined.wait()


def disk_bytes(folder: Path) -> int:
    """What ``du`` says that a folder takes."""
    # what vanishes under it makes du complain, and its figure is right all the same
    done = subprocess.run(
        ["du", "-s", "--block-size=1", str(folder)], capture_output=True, text=True, check=False
    )
    return int(done.stdout.split()[0])


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """An ext4 of its own of ``size`` bytes, mounted at ``folder``, gone afterwards."""
    image = _image(folder)
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    with _mounted(folder):
        yield folder


@contextlib.contextmanager
def after_power_loss(disk: Path, folder: Path) -> Iterator[Path]:
    """What would be left of a small disk if the power were lost now, mounted at ``folder``.

    What the kernel has in its memory alone, and would have written at some time, is not.
    """
    shutil.copyfile(_image(disk), _image(folder))
    with _mounted(folder):
        yield folder


def _image(folder: Path) -> Path:
    return folder.with_name(folder.name + ".img")


@contextlib.contextmanager
def _mounted(folder: Path) -> Iterator[None]:
    folder.mkdir()
    # the kernel writes nothing on its own account for as long as a test takes
    options = "loop,commit=600"
    subprocess.run(["mount", "-o", options, str(_image(folder)), str(folder)], check=True)
    try:
        yield
    finally:
        _unmount(folder)
        folder.rmdir()
        _image(folder).unlink()


def _unmount(folder: Path) -> None:
    if subprocess.run(["umount", str(folder)], check=False).returncode:
        # a test that fails may leave files open: what it says is to be seen, and the disk goes with
        # the last of them
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def flushes(disk: Path) -> int:
    """How often somebody has waited until a small disk had everything."""
    device = disk.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    return int(stat.read_text().split()[15])


def fill(filler: Path) -> None:
    """Take what is left of a small disk, as somebody else."""
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(MIB))
        except OSError:
            os.fsync(file.fileno())


def killed_at(step: int, work: Callable[[Tell], None]) -> bool:
    """Run ``work`` in a process of its own that is killed at its ``step``-th step.

    Steps are what it does to names on the disk, and what it tells ``work``'s argument. Returns
    whether it came so far; else it has ended by itself.
    """
    child = os.fork()
    if child == 0:
        try:
            work(_killing(step))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "the process failed by itself"
        return False
    assert os.WTERMSIG(status) == signal.SIGKILL
    return True


def _killing(step: int) -> Tell:
    left = [step]

    def one(_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event in _NAME_EVENTS:
            one(event)

    sys.addaudithook(audit)
    return one
