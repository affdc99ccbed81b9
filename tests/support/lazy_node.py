"""A node's driver for tests of lazy volumes: real workers, with models that nobody fetches."""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import trio

from csi.attributes import Mode
from csi.lazy_volumes import LazyVolumes
from csi.served import FUSE_TYPE, Folders, TreeKey
from csi.volumes import Volumes
from csi.worker_logs import WorkerLogs
from csi.workers import Workers, WorkerSettings
from fetcher.errors import ModelError
from fetcher.lazy_plan import LazyPlan, encode_plan, plan_path
from fetcher.modelpack import read_model
from fetcher.pull import Progress
from tests.support.models import ModelBuilder
from tests.support.mounts import detach_below, mounts_below
from tests.support.node import MODEL, Node
from tests.support.workers import end_workers, worker_pids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from csi.mount_table import Mount
    from fetcher.modelpack import Layer, Selection
    from fetcher.oci import Digest
    from fetcher.pull import Resolved
    from fetcher.schedule import Prefetch
    from fetcher.store import ModelTree

BUILT = ModelBuilder().add_raw("model.safetensors", bytes(1000)).add_raw("config.json", b"{}")
KEY = TreeKey(BUILT.digest, "")


class HandMadeModel:
    """A model of which nothing arrives."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self.complete = False

    def progress(self) -> Progress:
        return Progress(42, 1002)


class HandMadeModels:
    """A second, small implementation of the lazy models that volumes need: plans, and no bytes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open_models: dict[tuple[Digest, str], HandMadeModel] = {}
        self.opened: list[Prefetch] = []
        self.failure: ModelError | None = None

    async def open(
        self, resolved: Resolved, selection: Selection, prefetch: Prefetch, holder: str
    ) -> HandMadeModel:
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        model = resolved.model.digest
        plan = LazyPlan(
            model,
            BUILT.body,
            BUILT.document["mediaType"],
            selection.exclude_weights,
            selection.exclude_patterns,
            prefetch.value,
        )
        path = plan_path(self.root, model, selection.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_plan(plan))
        self.opened.append(prefetch)
        return self.open_models.setdefault((model, selection.key), HandMadeModel())

    async def close(self, digest: Digest, selection_key: str) -> None:
        await trio.lowlevel.checkpoint()
        self.open_models.pop((digest, selection_key), None)
        plan_path(self.root, digest, selection_key).unlink(missing_ok=True)

    async def restore(self, digest: Digest, selection_key: str) -> HandMadeModel:
        await trio.lowlevel.checkpoint()
        if not plan_path(self.root, digest, selection_key).exists():
            raise ModelError("its plan is gone")
        return self.open_models.setdefault((digest, selection_key), HandMadeModel())

    def get(self, digest: Digest, selection_key: str) -> HandMadeModel | None:
        return self.open_models.get((digest, selection_key))


class NoContents:
    """A store that has nothing, or everything."""

    def __init__(self) -> None:
        self.has_all = False

    def tree(self, digest: Digest, selection: Selection) -> ModelTree | None:
        return None

    def has_content(self, layer: Layer) -> bool:
        return self.has_all


class LazyNode(Node):
    """A node whose volumes are lazy, unless a test says otherwise."""

    def __init__(self, folder: Path) -> None:
        self.contents = NoContents()
        self.obstacle: str | None = None
        self.settings = WorkerSettings()
        super().__init__(folder)
        self.pulls.tags[f"{MODEL}:v1"] = BUILT.body
        self.pulls.models[BUILT.body] = read_model(BUILT.manifest())

    @asynccontextmanager
    async def running(self, *, tended: bool = True) -> AsyncIterator[None]:
        """The driver, from its start to its end: what it knows is what the last one left."""
        self.restart()
        folders = Folders.of(self.folder)
        async with trio.open_nursery() as nursery:
            self.workers = Workers(folders, self.settings, nursery, WorkerLogs(lambda _: None))
            self.lazy_models = HandMadeModels(self.folder)
            self.lazy = LazyVolumes(
                self.records,
                self.lazy_models,
                self.workers,
                self.contents,
                folders,
                lambda: self.obstacle,
            )
            self.volumes = Volumes(self.records, self.pulls, self.folder, self.pods, self.lazy)
            await self.volumes.reconcile()
            if tended:
                nursery.start_soon(self.volumes.tend)
            yield
            nursery.cancel_scope.cancel()

    async def publish_lazily(self, pod: str = "one", mode: Mode = Mode.LAZY) -> Path:
        return await self.publish(pod, mode=mode)

    def is_lazy(self, mount: Mount) -> bool:
        """Whether a mount is a lazy volume's of this node."""
        return mount.type == FUSE_TYPE and mount.mountpoint.startswith(f"{self.pods}/")

    def assert_no_worker(self) -> None:
        assert worker_pids(self.folder) == []
        assert mounts_below(self.folder) == []
        assert list((self.folder / "lazy").glob("*/*")) == []


@contextmanager
def lazy_node(folder: Path) -> Iterator[LazyNode]:
    """A node on ``folder``; nothing runs or is mounted there afterwards, whatever happened."""
    node = LazyNode(folder.resolve())
    try:
        yield node
    finally:
        node.database.close()
        detach_below(node.pods)
        end_workers(node.folder)
        detach_below(node.folder)
