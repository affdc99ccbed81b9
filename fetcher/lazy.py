"""Models that are shown while they are fetched: the agent's side of lazy volumes.

A model is *opened* by the first volume that shows it: there is room for all of it from then on,
its plan is on the disk, and it is filled in the background as its volumes want. Its worker reads
what is there from the store's own files and asks for what is not (:mod:`fetcher.lazy_sessions`).
When everything is there the plain tree is built, which later volumes bind; those that are published
stay with the worker. The last volume gone, it is *closed*.

Bytes are shown before the whole of their blob was verified only as what the model's own name, its
registry and repository, sent; so while it is incomplete a model is open by one name.
"""

from __future__ import annotations

import collections
import copy
import functools
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

import trio

from fetcher.download import Source
from fetcher.errors import InProgress, ModelError, NotFound
from fetcher.lazy_blobs import LazyBlob
from fetcher.lazy_order import Step, fill_order, read_shards, shard_index
from fetcher.lazy_plan import LazyPlan, decode_plan, encode_plan, mountpoint, plan_path
from fetcher.lazy_tickets import read_ticket, write_ticket
from fetcher.oci import Reference
from fetcher.pull import Progress
from fetcher.ranges import Range
from fetcher.schedule import Prefetch
from fetcher.store.disk import disk_error, sync_folder, write_durably
from fetcher.store.footprint import content_name, tree_name
from fetcher.threads import run_stoppable

if TYPE_CHECKING:
    from pathlib import Path

    from fetcher.credentials import Keychain
    from fetcher.jobs import Jobs
    from fetcher.layouts import Layouts
    from fetcher.modelpack import Layer, Selection
    from fetcher.oci import Digest, Manifest
    from fetcher.proofs import Proofs
    from fetcher.registry import Registry
    from fetcher.resolution import Resolved
    from fetcher.store import Store

logger = logging.getLogger(__name__)

_AGAIN_SECONDS: Final = 60.0
"""After so long, what failed in the background is tried again."""
_STRENGTHS: Final = (Prefetch.NONE, Prefetch.OPENED, Prefetch.ALL)


@dataclass(frozen=True, slots=True)
class LazySettings:
    """How models are filled."""

    blobs: int = 8
    """Blobs of one model that are filled at one time."""
    head_bytes: int = 4 * 1024 * 1024
    """Of a file of weights: what is fetched before the rest of any of them."""


class Listener(Protocol):
    """Who serves a model to its worker: a session of :mod:`fetcher.lazy_sessions`."""

    def spoiled(self, blob: Digest, reason: str) -> None:
        """The bytes of a blob proved wrong."""

    def renewed(self, ticket: str) -> None:
        """There is another ticket."""


class LazyModel:
    """A model that is shown while it is fetched. Made by :meth:`LazyModels.open`."""

    def __init__(self, parts: _Parts, plan: LazyPlan, source: Source | None) -> None:
        self._parts = parts
        self._store = parts.store
        self.plan = plan
        self.model = plan.read_model()
        self.selection = plan.selection
        self.source = source or parts.guess(plan)
        """Where it is fetched from, as whom; None until somebody says so."""
        self.ticket = ""
        """What the worker is to show to the next agent; secret."""
        self.blobs: dict[Digest, LazyBlob] = {}
        self.ready = trio.Event()
        """Set once there is room for it, or it failed for good."""
        self.failure: ModelError | None = None
        """Why it could not be opened, or not be built."""
        self.complete = False
        self.scope = trio.CancelScope()
        self.finished = trio.Event()
        self.listeners: set[Listener] = set()
        self._changed = trio.Event()
        self._progressed = trio.Event()
        """Set when one more layer is complete."""
        self._recalled = source is None
        """The source is a guess: nobody named it since the agent began."""
        self._spoiled: dict[Digest, str] = {}

    @property
    def digest(self) -> Digest:
        """Of the manifest."""
        return self.plan.model

    @property
    def name(self) -> str:
        """The registry and repository that it is open by; empty if it is not known."""
        return Reference.parse(self.plan.reference).name if self.plan.reference else ""

    @property
    def mountpoint(self) -> Path:
        """Where its worker mounts it."""
        return mountpoint(self._store.root, self.digest, self.selection.key)

    @property
    def prefetch(self) -> Prefetch:
        """How much of it is fetched unasked."""
        return Prefetch(self.plan.prefetch)

    def progress(self) -> Progress:
        """Bytes that are here, and bytes in all."""
        layers = self.selection.layers(self.model)
        total = sum(layer.descriptor.size for layer in layers.values())
        return Progress(sum(blob.done for blob in self.blobs.values()), total)

    @property
    def problem(self) -> str | None:
        """Why its volumes are not as they should be, in the user's words.

        A registry that is away is a problem only while somebody waits for it.
        """
        for reason in self._spoiled.values():
            return reason
        if self.failure is not None:
            return self.failure.message
        for blob in self.blobs.values():
            if blob.ruined is not None:
                return blob.ruined.message
            failure = blob.failure
            if failure is not None and (blob.is_refused or blob.waiting):
                return failure.message
        return None

    def blob(self, digest: str) -> LazyBlob:
        """One of its layers. Raises :class:`NotFound`."""
        for known, blob in self.blobs.items():
            if str(known) == digest:
                return blob
        raise NotFound(f"the lazy model {self.digest} has no blob {digest[:100]}")

    def ruins(self) -> list[tuple[Digest, str]]:
        """The layers whose bytes proved wrong, and why."""
        return list(self._spoiled.items())

    # -- as its layers see it ----------------------------------------------------------------------

    def changed(self) -> trio.Event:
        """Set once there are other credentials, or room."""
        return self._changed

    def spoiled(self, layer: Layer, reason: str) -> None:
        """The bytes of a layer proved wrong, and may have been shown."""
        logger.error("the lazy model %s is spoiled: %s", self.digest.short, reason)
        self._spoiled[layer.descriptor.digest] = reason
        for listener in list(self.listeners):
            listener.spoiled(layer.descriptor.digest, reason)

    def progressed(self) -> None:
        """One more layer is complete."""
        self._progressed.set()

    # -- what others tell it -----------------------------------------------------------------------

    def tell(self) -> None:
        """Something changed that may let it be fetched."""
        self._changed.set()
        self._changed = trio.Event()
        for blob in self.blobs.values():
            blob.tell()

    async def renew(self, source: Source) -> None:
        """Go on with these credentials, and let the worker remember them."""
        self.source, self._recalled = source, False
        for layer in self.selection.layers(self.model).values():
            job = self._parts.jobs.running(layer.descriptor.digest)
            if job is not None and job.trusted_name == source.reference.name:
                job.offer(source)
        self.tell()
        ticket = await write_ticket(source, self._parts.registry, self._parts.keychain)
        if ticket != self.ticket:
            self.ticket = ticket
            for listener in list(self.listeners):
                listener.renewed(ticket)

    async def recall(self, ticket: str) -> None:
        """Go on with what the worker remembers, unless something newer is known."""
        if ticket and self._recalled:
            source = read_ticket(ticket, self._parts.keychain)
            if source.reference.name == self.name:
                await self.renew(source)

    # -- its life ----------------------------------------------------------------------------------

    async def run(self, *, persistent: bool) -> None:
        """Hold it and fill it, until cancelled. ``persistent``: wait for room that is not there."""
        store, layers = self._store, self.selection.layers(self.model)
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    with store.held(self.model, self.selection):
                        await self._reserve(persistent=persistent)
                        for digest, layer in layers.items():
                            parts = self._parts
                            self.blobs[digest] = LazyBlob(
                                layer, self, store, parts.jobs, parts.layouts, nursery
                            )
                        self.ready.set()
                        await self._complete()
                    await self._settle()
                    await trio.sleep_forever()
        except* ModelError as group:
            self.failure = _first(group)
        except* Exception:
            logger.exception("fault of this program in the lazy model %s", self.digest)
            self.failure = ModelError("internal error of the agent; its log says more")
        finally:
            self.ready.set()
            self.finished.set()
            store.garbage.ask()

    async def _reserve(self, *, persistent: bool) -> None:
        name = self.plan.reference or str(self.digest)
        while True:
            try:
                await self._store.reserve(name, self.model, self.selection)
            except ModelError as error:
                if not persistent:
                    raise
                self.failure = error
                logger.warning("%s; trying again in %.0f s", error.message, _AGAIN_SECONDS)
                with trio.move_on_after(_AGAIN_SECONDS):
                    await self._changed.wait()
            else:
                self.failure = None
                return

    async def _settle(self) -> None:
        """What it reserved and did not take is there for others."""
        tree = tree_name(self.digest, self.selection.key)
        await self._store.rooms.settle_only([tree, *map(content_name, self.blobs)])

    async def _complete(self) -> None:
        """Fill it as its volumes want, and build the plain tree once all is there."""
        async with trio.open_nursery() as filling:
            filling.start_soon(self._fill)
            while not all(blob.complete for blob in self.blobs.values()):
                self._progressed = trio.Event()
                await self._progressed.wait()
            filling.cancel_scope.cancel()
        while not self.complete:
            try:
                await self._build()
            except ModelError as error:
                self.failure = error
                logger.warning("the tree of %s cannot be built: %s", self.digest, error.message)
                with trio.move_on_after(_AGAIN_SECONDS):
                    await self._changed.wait()
        self.failure = None

    async def _build(self) -> None:
        store, model, selection = self._store, self.model, self.selection
        if store.tree(model.digest, selection) is None:
            planned = await run_stoppable(lambda _: store.plan(model, selection))
            tree = await run_stoppable(lambda stop: store.build(model, selection, planned, stop))
            store.add_tree(tree, model, selection)
        self.complete = True
        logger.info("the lazy model %s is complete", self.digest.short)

    # -- filling -----------------------------------------------------------------------------------

    async def _fill(self) -> None:
        """Fetch what nobody asked for, as far as the volumes want that, again and again."""
        while True:
            while self.prefetch is not Prefetch.ALL or self.source is None:
                await self._changed.wait()
            await self._fill_once()
            with trio.move_on_after(_AGAIN_SECONDS):
                await self._changed.wait()

    async def _fill_once(self) -> None:
        layers = [blob.layer for blob in self.blobs.values() if not blob.complete]
        steps = collections.deque(enumerate(fill_order(layers, await self._shards())))
        async with trio.open_nursery() as nursery:
            for _ in range(min(self._parts.settings.blobs, len(steps))):
                nursery.start_soon(self._work, steps)

    async def _work(self, steps: collections.deque[tuple[int, Step]]) -> None:
        while steps and self.prefetch is Prefetch.ALL:
            order, step = steps.popleft()
            blob = self.blobs[step.layer.descriptor.digest]
            size = step.layer.descriptor.size
            wanted = Range(0, min(self._parts.settings.head_bytes, size)) if step.head else None
            try:
                await blob.fill(order, wanted)
            except ModelError as error:
                logger.debug("filling a lazy model stopped at a layer: %s", error.message)
                continue
            if shard_index(step.layer):
                # only now it is known in which order the rest is read
                rest = [one for _, one in steps if not one.head]
                heads = [one for one in steps if one[1].head]
                ordered = fill_order([one.layer for one in rest], await self._shards())
                whole = [one for one in ordered if not one.head]
                steps.clear()
                steps.extend([*heads, *enumerate(whole, order + 1 + len(heads))])

    async def _shards(self) -> list[str]:
        """The shards in the order in which they are read, as far as that is known."""
        for blob in self.blobs.values():
            if blob.complete and shard_index(blob.layer):
                path = self._store.blob_path(blob.layer.descriptor.digest)
                try:
                    content = await trio.to_thread.run_sync(path.read_bytes)
                except OSError as error:
                    logger.debug("an index of shards cannot be read: %s", error)
                    continue
                return read_shards(blob.layer.path or "", content)
        return []


@dataclass(frozen=True, slots=True)
class _Parts:
    """What every lazy model needs."""

    store: Store
    registry: Registry
    jobs: Jobs
    layouts: Layouts
    keychain: Keychain
    settings: LazySettings

    def guess(self, plan: LazyPlan) -> Source | None:
        """Where a model may be fetched from while nobody says as whom: as the node itself."""
        if not plan.reference:
            return None
        return Source(Reference.parse(plan.reference), self.keychain)


class LazyModels:
    """The models of a node that are shown while they are fetched. Belongs to the trio thread."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        jobs: Jobs,
        layouts: Layouts,
        proofs: Proofs,
        keychain: Keychain,
        nursery: trio.Nursery,
        settings: LazySettings | None = None,
    ) -> None:
        """They are filled in ``nursery``; ``keychain`` is the node's own."""
        settings = settings or LazySettings()
        self._parts = _Parts(store, registry, jobs, layouts, keychain, settings)
        self._store = store
        self._proofs = proofs
        self._nursery = nursery
        self._models: dict[tuple[Digest, str], LazyModel] = {}

    def get(self, digest: Digest, selection_key: str) -> LazyModel | None:
        """One that is open."""
        return self._models.get((digest, selection_key))

    async def open(
        self, resolved: Resolved, selection: Selection, prefetch: Prefetch, holder: str
    ) -> LazyModel:
        """Have a model be shown while it is fetched, or go on with these credentials.

        Returns once there is room for all of it and its plan is on the disk; not a byte of it needs
        to be there. Of several volumes the one that wants most decides what is fetched unasked.
        Raises :class:`fetcher.errors.NoSpace`; :class:`InProgress` while the model, or a layer of
        it, is open by another name; what the registry says of a layer that is here already and was
        not fetched by this name; other :class:`ModelError`.
        """
        source = Source(resolved.reference, resolved.keychain)
        key = (resolved.model.digest, selection.key)
        known = self._models.get(key)
        if known is None or not known.complete:
            self._check_names(resolved, selection, known)
        if known is None:
            layers = selection.layers(resolved.model)
            await self._proofs.prove(resolved.reference, layers, resolved.keychain)
            known = self._models.get(key)
        if known is None:
            plan = self._plan(resolved, selection, prefetch)
            known = self._start(plan, source, persistent=False)
        logger.debug("the lazy model %s is open for %s", known.digest.short, holder)
        await known.ready.wait()
        if known.finished.is_set():
            self._forget(known)
            raise _copied(known.failure) or InProgress(
                f"{resolved.reference} was just closed: ask again"
            )
        if known.complete:
            return known
        stronger = max(prefetch, known.prefetch, key=_STRENGTHS.index)
        known.plan = replace(known.plan, prefetch=stronger.value)
        await self._write_plan(known.plan)
        await known.renew(source)
        return known

    async def restore(self, digest: Digest, selection_key: str) -> LazyModel:
        """Go on with what an earlier process opened, from its plan; asks no network.

        Credentials come back with the worker's ticket or the next :meth:`open`; until then there
        are the node's own. Raises :class:`ModelError`.
        """
        known = self._models.get((digest, selection_key))
        if known is not None:
            return known
        path = plan_path(self._store.root, digest, selection_key)
        try:
            plan = decode_plan(await trio.to_thread.run_sync(path.read_bytes))
        except OSError as error:
            raise disk_error(error, path) from error
        if (plan.model, plan.selection.key) != (digest, selection_key):
            raise ModelError(f"{path} is the plan of another model")
        known = self._models.get((digest, selection_key))
        return known or self._start(plan, None, persistent=True)

    async def close(self, digest: Digest, selection_key: str) -> None:
        """Nobody shows it any more: what is there of it stays until it is evicted."""
        known = self._models.get((digest, selection_key))
        if known is not None:
            known.scope.cancel()
            await known.finished.wait()
            self._forget(known)
            await self._parts.store.rooms.settle_only(
                [tree_name(digest, selection_key), *map(content_name, known.blobs)]
            )
        path = plan_path(self._store.root, digest, selection_key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, path) from error

    # -- within ------------------------------------------------------------------------------------

    def _start(self, plan: LazyPlan, source: Source | None, *, persistent: bool) -> LazyModel:
        known = LazyModel(self._parts, plan, source)
        self._models[plan.model, plan.selection.key] = known
        run = functools.partial(known.run, persistent=persistent)
        self._nursery.start_soon(run, name=f"lazy {plan.model.short}")
        return known

    def _forget(self, known: LazyModel) -> None:
        key = (known.digest, known.selection.key)
        if self._models.get(key) is known:
            del self._models[key]

    def _check_names(
        self, resolved: Resolved, selection: Selection, known: LazyModel | None
    ) -> None:
        """Raise :class:`InProgress` where what another name sends would be shown as this one's."""
        name = resolved.reference.name
        wanted = selection.layers(resolved.model)
        for model in self._models.values():
            if model.name == name or model.complete:
                continue
            shared = [
                digest
                for digest, blob in model.blobs.items()
                if digest in wanted and not blob.complete
            ]
            if shared or model is known:
                raise InProgress(
                    f"{resolved.reference} shares layers with {model.name}, which is shown while "
                    "it is fetched: what one name sends is shown as another's only once it is "
                    "verified; the eager mode does not wait for that"
                )

    def _plan(self, resolved: Resolved, selection: Selection, prefetch: Prefetch) -> LazyPlan:
        manifest = self._manifest(resolved)
        return LazyPlan(
            resolved.model.digest,
            manifest.body,
            manifest.media_type,
            selection.exclude_weights,
            selection.exclude_patterns,
            prefetch.value,
            str(resolved.reference),
        )

    def _manifest(self, resolved: Resolved) -> Manifest:
        manifest = self._store.catalog.manifest_of(resolved.model.digest)
        if manifest is None:
            raise InProgress(f"the manifest of {resolved.reference} is not here: ask again")
        return manifest

    async def _write_plan(self, plan: LazyPlan) -> None:
        """Put a plan on the disk, unless it is there. Raises :class:`ModelError`."""
        path = plan_path(self._store.root, plan.model, plan.selection.key)
        content = encode_plan(plan)
        try:
            await trio.to_thread.run_sync(_replace_file, path, content)
        except OSError as error:
            raise disk_error(error, path) from error


def _replace_file(path: Path, content: bytes) -> None:
    try:
        if path.read_bytes() == content:
            return
    except FileNotFoundError:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".new")
    scratch.unlink(missing_ok=True)
    write_durably(scratch, content)
    scratch.rename(path)
    sync_folder(path.parent)


def _copied(error: ModelError | None) -> ModelError | None:
    return None if error is None else copy.copy(error)


def _first(group: BaseExceptionGroup[ModelError]) -> ModelError:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
