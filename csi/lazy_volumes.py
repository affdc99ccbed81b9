"""Volumes that show a model while it is still fetched: how they are begun, kept and ended.

Such a volume binds the mount of its model's worker (:mod:`csi.workers`); what the worker asks for
is fetched by the model in the agent (:class:`fetcher.lazy.LazyModels`). Both last as long as a
record, or a mount whose record was lost, shows them. A worker that dies is started again and bound
again at every target, from local state alone.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

import trio

from csi.attributes import Mode
from csi.mount_table import mount_at, mount_table
from csi.revivals import Revivals
from csi.served import TreeKey, key_of_name, mounted_trees, shown_by_workers
from csi.state import Shown, VolumeState
from fetcher.errors import ModelError, Unsupported
from fetcher.lazy_plan import decode_plan, plan_path
from fetcher.oci import Digest
from fetcher.quantities import bytes_text
from fetcher.resolution import Resolved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from csi.attributes import VolumeAttributes
    from csi.placement import Placement
    from csi.served import Folders, MountedTree
    from csi.state import VolumeRecord, VolumeRecords
    from csi.turns import Turns
    from csi.workers import Workers
    from fetcher.credentials import Keychain
    from fetcher.modelpack import Layer, Selection
    from fetcher.pull import Progress
    from fetcher.schedule import Prefetch
    from fetcher.store import ModelTree

logger = logging.getLogger(__name__)

RENEW_TIMEOUT: Final = 5.0
"""Seconds for a published volume to go on with other credentials."""
SWEEP_SECONDS: Final = 60.0
"""How often workers are looked for that nobody needs, as after an unmount by hand."""


class LazyModel(Protocol):
    """What is needed of :class:`fetcher.lazy.LazyModel`."""

    @property
    def problem(self) -> str | None:
        """Why what is missing cannot be had, in the user's words."""

    @property
    def complete(self) -> bool:
        """Whether all of it is here, verified."""

    def progress(self) -> Progress:
        """Bytes that are here, and bytes in all."""


class LazyModels(Protocol):
    """What is needed of :class:`fetcher.lazy.LazyModels`."""

    async def open(
        self, resolved: Resolved, selection: Selection, prefetch: Prefetch, holder: str
    ) -> LazyModel:
        """Have a model fetched for its worker, whose plan is then there; again: go on with these
        credentials.
        """

    async def close(self, digest: Digest, selection_key: str) -> None:
        """Nobody shows it any more."""

    async def restore(self, digest: Digest, selection_key: str) -> LazyModel:
        """Go on with what an earlier process opened, without a word to any network."""

    def get(self, digest: Digest, selection_key: str) -> LazyModel | None:
        """One that is open."""


class Contents(Protocol):
    """What is needed of :class:`fetcher.store.Store`."""

    def tree(self, digest: Digest, selection: Selection) -> ModelTree | None:
        """The tree of a model that is complete."""

    def has_content(self, layer: Layer) -> bool:
        """Whether nothing of a layer has to be fetched."""


@dataclass(frozen=True, slots=True)
class Showing:
    """How a volume is to be shown, and why, where its mode leaves that open."""

    shown: Shown
    reason: str | None = None


class LazyVolumes:
    """The lazily shown volumes of a node. Belongs to the trio thread."""

    def __init__(
        self,
        records: VolumeRecords,
        models: LazyModels,
        workers: Workers,
        contents: Contents,
        folders: Folders,
        obstacle: Callable[[], str | None],
    ) -> None:
        """``obstacle`` says why nothing can be shown lazily here; None where it can."""
        self._records = records
        self._models = models
        self._workers = workers
        self._contents = contents
        self._folders = folders
        self._obstacle = obstacle
        self._locks: weakref.WeakValueDictionary[TreeKey, trio.Lock] = weakref.WeakValueDictionary()

    # -- publish -----------------------------------------------------------------------------------

    def decide(
        self, attributes: VolumeAttributes, resolved: Resolved, found: MountedTree | None
    ) -> Showing:
        """How to show a volume; ``found`` is what its target shows already.

        A model that is all here is bound, whatever was asked: then no process of ours stands
        between a pod and its files. Raises :class:`Unsupported` for ``lazy`` where that cannot be.
        """
        if attributes.mode is Mode.EAGER:
            return Showing(Shown.BIND)
        if found is not None and found.lazy:
            # a pod may read it: it stays
            return Showing(Shown.LAZY, "it was shown already, by a call whose record was lost")
        missing = self._missing(resolved, attributes.selection)
        if missing == 0:
            return Showing(Shown.BIND, "all of the model is in the store")
        obstacle = self._obstacle()
        if obstacle is None:
            return Showing(
                Shown.LAZY, f"{bytes_text(missing)} of the model were not complete in the store"
            )
        if attributes.mode is Mode.AUTO:
            return Showing(Shown.BIND, f"it cannot be lazy here: {obstacle}")
        raise Unsupported(
            f"the volume's mode is lazy, and this node cannot do that: {obstacle}; mode auto takes "
            "eager where lazy is not possible"
        )

    def _missing(self, resolved: Resolved, selection: Selection) -> int:
        """Bytes of the layers of which something has to be fetched."""
        if self._contents.tree(resolved.model.digest, selection) is not None:
            return 0
        return sum(
            # an empty layer that is not there is missing too
            max(layer.descriptor.size, 1)
            for layer in selection.layers(resolved.model).values()
            if not self._contents.has_content(layer)
        )

    async def open(
        self, record: VolumeRecord, resolved: Resolved, attributes: VolumeAttributes, holder: str
    ) -> VolumeRecord:
        """Begin to fetch what the volume shows; the record, with what it is known to hold."""
        key = _key(record)
        selection = attributes.selection
        async with self._lock(key):
            await self._models.open(resolved, selection, attributes.prefetch, holder)
        layers = selection.layers(resolved.model).values()
        size = sum(layer.descriptor.size for layer in layers)
        return replace(record, size=size, files=len(layers))

    async def start(self, record: VolumeRecord) -> Path:
        """Have the worker serve what was opened: where it mounts it.

        Raises :class:`Unavailable` where it cannot be started.
        """
        key = _key(record)
        async with self._lock(key):
            await self._workers.ensure(key)
        return self._folders.mountpoint(key)

    async def renew(
        self, record: VolumeRecord, attributes: VolumeAttributes, keychain: Keychain, holder: str
    ) -> None:
        """Go on with the credentials that a published volume brings now.

        Asks no network where its model is open, and waits for none. What cannot be done is logged:
        the volume is published, and stays.
        """
        key = _key(record)
        try:
            with trio.move_on_after(RENEW_TIMEOUT):
                await self._renew(key, record, attributes, keychain, holder)
        except (ModelError, OSError) as error:
            logger.warning("volume %s goes on as it was: %s", record.volume_id, error)
        if not self._workers.is_serving(key) and not self._workers.find(key):
            self._workers.lost(key)

    async def _renew(
        self,
        key: TreeKey,
        record: VolumeRecord,
        attributes: VolumeAttributes,
        keychain: Keychain,
        holder: str,
    ) -> None:
        async with self._lock(key):
            plan = decode_plan(plan_path(self._folders.root, *_names(key)).read_bytes())
            reference = attributes.reference.with_digest(Digest.parse(record.digest))
            resolved = Resolved(reference, plan.read_model(), keychain)
            selection, prefetch = attributes.selection, attributes.prefetch
            await self._models.open(resolved, selection, prefetch, holder)

    def _lock(self, key: TreeKey) -> trio.Lock:
        """Held while a model is opened, or looked at whether it is still needed."""
        return self._locks.setdefault(key, trio.Lock())

    # -- unpublish ---------------------------------------------------------------------------------

    async def left(self, key: TreeKey) -> None:
        """A volume does not show ``key`` any more: with the last one its worker ends.

        Bounded in time. What cannot be ended now is logged, and tried again by :meth:`tend`.
        """
        if self._is_used(key):
            return
        async with self._lock(key):
            # nobody can have opened it between this look and the end of the worker
            if self._is_used(key):
                return
            try:
                await self._workers.stop(key)
                await self._models.close(*_names(key))
                plan_path(self._folders.root, *_names(key)).unlink(missing_ok=True)
            except (ModelError, OSError) as error:
                logger.warning("model %s is served still: %s", key.model.short, error)

    def _is_used(self, key: TreeKey) -> bool:
        return key in self._used()

    def _used(self) -> set[TreeKey]:
        """What records or mounts show lazily: a mount of which the record was lost counts too."""
        used = {_key(record) for record in self._shown()}
        used |= {key for _, key in shown_by_workers(mount_table(), self._folders.lazy)}
        return used

    # -- what is there -----------------------------------------------------------------------------

    def problem(self, record: VolumeRecord) -> str | None:
        """What is wrong with a lazily shown volume, as far as is known without asking anybody."""
        key = _key(record)
        if not self._workers.is_serving(key):
            return "the process that serves the model ended, and is being started again"
        if not self._is_bound(record, key):
            return "the process that serves the model was started again, and is not bound here yet"
        model = self._models.get(*_names(key))
        if model is None:
            return (
                "what is missing of the model cannot be fetched: how to was lost with the driver's "
                "state; kubelet's next publish, or a restart of the pod, puts it right"
            )
        return model.problem

    def progress(self, record: VolumeRecord) -> Progress | None:
        """How much of what a lazily shown volume shows is here."""
        model = self._models.get(*_names(_key(record)))
        return None if model is None else model.progress()

    async def ask(self, record: VolumeRecord, seconds: float) -> tuple[int, int] | None:
        """Bytes and files that the worker serves; None if it does not answer in time."""
        answer = await self._workers.ask(_key(record), seconds)
        if answer is None:
            return None
        return answer.f_blocks * answer.f_frsize, answer.f_files

    # -- after a start, and from then on -----------------------------------------------------------

    async def restore(self) -> None:
        """Find again what the last process left: models, workers, and what nobody needs any more.

        Asks no network, and waits for no worker: :meth:`tend` starts those that are gone.
        """
        used = self._used()
        for key in used:
            try:
                await self._models.restore(*_names(key))
            except (ModelError, OSError) as error:
                logger.warning("model %s cannot be fetched on: %s", key.model.short, error)
            bound = all(self._is_bound(record, key) for record in self.shown_at(key))
            if not self._workers.find(key) or not bound:
                self._workers.lost(key)
        for key in set(self._on_disk()) - used:
            await self.left(key)

    def _on_disk(self) -> Iterator[TreeKey]:
        """Everything that something lies below the folder of lazy models for, or is mounted."""
        for path in self._folders.lazy.glob("*/*"):
            name = path.name
            for suffix in (".json", ".lock", ".log"):
                name = name.removesuffix(suffix)
            key = key_of_name(path.parent.name, name)
            if key is not None:
                yield key

    async def tend(self, placement: Placement, turns: Turns) -> None:
        """Start workers that died and bind them again, and end those that nobody needs.

        Until cancelled.
        """
        revivals = Revivals(self, placement, turns)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._workers.forward_logs)
            nursery.start_soon(self._sweep)
            nursery.start_soon(self._workers.spare.keep, self._obstacle)
            while True:
                key = await self._workers.death()
                nursery.start_soon(revivals.revive, key, name=f"revival of {key.model.short}")

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_SECONDS)
            try:
                for key in self._workers.keys() - self._used():
                    await self.left(key)
            except ModelError as error:
                logger.warning("workers that nobody needs stay: %s", error.message)

    async def revive(self, key: TreeKey) -> bool:
        """Start the worker of ``key`` if it is needed: whether it is."""
        async with self._lock(key):
            if not self._is_used(key):
                return False
            await self._workers.ensure(key)
        return True

    def shown_at(self, key: TreeKey) -> list[VolumeRecord]:
        """The volumes that are published with ``key``."""
        return [
            record
            for record in self._shown()
            if record.state is VolumeState.PUBLISHED and _key(record) == key
        ]

    def unrecorded_at(self, key: TreeKey) -> list[Path]:
        """Where ``key`` is mounted though no record says so, as after a lost ``state.db``."""
        known = {record.target for record in self._records.all()}
        table = mount_table()
        found = {
            tree.target
            for tree in mounted_trees(table, self._folders)
            if tree.lazy and tree.whole and tree.key == key and tree.target not in known
        }
        return sorted(found)

    def _shown(self) -> list[VolumeRecord]:
        return [record for record in self._records.all() if record.shown is Shown.LAZY]

    def _is_bound(self, record: VolumeRecord, key: TreeKey) -> bool:
        """Whether the target shows what the worker serves at present."""
        here, serving = mount_at(record.target), mount_at(self._folders.mountpoint(key))
        return here is not None and serving is not None and here.device == serving.device

    def current(self, record: VolumeRecord) -> VolumeRecord | None:
        """What is recorded now at the place of ``record``."""
        return self._records.get(record.volume_id, record.target)

    def mountpoint(self, key: TreeKey) -> Path:
        """Where the worker of ``key`` mounts."""
        return self._folders.mountpoint(key)


def _key(record: VolumeRecord) -> TreeKey:
    return TreeKey(Digest.parse(record.model), record.selection)


def _names(key: TreeKey) -> tuple[Digest, str]:
    return key.model, key.selection
