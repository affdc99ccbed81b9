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

import copy
import functools
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import trio

from fetcher.download import Source
from fetcher.errors import DigestMismatch, InProgress, ModelError
from fetcher.lazy_model import LazyModel, LazyParts, LazySettings
from fetcher.lazy_plan import LazyPlan, decode_plan, encode_plan, plan_path
from fetcher.quantities import bytes_text
from fetcher.schedule import Prefetch
from fetcher.store.disk import disk_error, sync_folder, write_durably
from fetcher.store.footprint import content_name, tree_name
from fetcher.tasks import for_each

if TYPE_CHECKING:
    from pathlib import Path

    from fetcher.chunk_lists import ChunkLists
    from fetcher.credentials import Keychain
    from fetcher.jobs import Jobs
    from fetcher.layouts import Layouts
    from fetcher.modelpack import Layer, Selection
    from fetcher.oci import Digest, Manifest
    from fetcher.proofs import Proofs
    from fetcher.registry import Registry
    from fetcher.resolution import Resolved
    from fetcher.store import Store

__all__ = ["LazyModel", "LazyModels", "LazySettings"]

logger = logging.getLogger(__name__)

_SHARED_SECONDS: Final = 10.0
"""How long a volume waits for layers that it shares with models of other names."""
_STRENGTHS: Final = (Prefetch.NONE, Prefetch.OPENED, Prefetch.ALL)


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
        lists: ChunkLists | None = None,
    ) -> None:
        """They are filled in ``nursery``; ``keychain`` is the node's own."""
        settings = settings or LazySettings()
        self._parts = LazyParts(store, registry, jobs, layouts, keychain, settings, lists)
        self._store = store
        self._proofs = proofs
        self._nursery = nursery
        self._models: dict[tuple[Digest, str], LazyModel] = {}
        self._writing = trio.Lock()
        """Held while a plan is written."""
        jobs.spoiled = self._spoiled

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
        proven = False
        while True:
            # no checkpoint from here to where it is among the models
            if shared := self._shared(resolved, selection):
                await self._complete(shared, resolved)
                continue
            known = self._models.get(key)
            if known is not None or proven:
                break
            await self._prove(resolved, selection)
            proven = True
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
        await self._write_plan(known)
        await known.renew(source, holder)
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

    async def _prove(self, resolved: Resolved, selection: Selection) -> None:
        """Have the registry say that it has all layers, and what proves single chunks of them.

        Before its first byte comes, as what came unproven stays so. Raises :class:`ModelError`.
        """
        reference, model, keychain = resolved.reference, resolved.model, resolved.keychain

        async def blobs() -> None:
            await self._proofs.prove(reference, selection.layers(model), keychain)

        async def chunks() -> None:
            if self._parts.lists is not None:
                await self._parts.lists.find(reference, model, keychain)

        await for_each((blobs, chunks), lambda ask: ask(), 2)

    def _start(self, plan: LazyPlan, source: Source | None, *, persistent: bool) -> LazyModel:
        known = LazyModel(self._parts, plan, source)
        known.listeners.add(_Remembering(self, known))
        self._models[plan.model, plan.selection.key] = known
        self._bind()
        for digest in known.unverified():
            if self._parts.jobs.current(digest) is None:
                # what is there of it may be what another name sent, and a worker would show it
                self._store.trust_only(digest, known.name)
        run = functools.partial(known.run, persistent=persistent)
        self._nursery.start_soon(run, name=f"lazy {plan.model.short}")
        return known

    def _forget(self, known: LazyModel) -> None:
        key = (known.digest, known.selection.key)
        if self._models.get(key) is known:
            del self._models[key]
            self._bind()

    def _bind(self) -> None:
        """Have trusted bytes be those of the names that may be shown, whoever has them fetched."""
        self._parts.jobs.names = {
            digest: model.name for model in self._models.values() for digest in model.unverified()
        }

    def _shared(self, resolved: Resolved, selection: Selection) -> list[Layer]:
        """The layers of which there are bytes, or may be, that are trusted by another name."""
        name = resolved.reference.name
        others: set[Digest] = set()
        for model in self._models.values():
            if model.name != name:
                others |= model.unverified()
        found = []
        for digest, layer in selection.layers(resolved.model).items():
            job = self._parts.jobs.current(digest)
            if digest in others or (job is not None and job.trusted_name != name):
                found.append(layer)
        return found

    async def _complete(self, shared: list[Layer], resolved: Resolved) -> None:
        """Have layers verified that another name has fetched, if that takes a moment only.

        Raises :class:`InProgress` else: what one name sends must not be shown as another's before.
        """
        with trio.move_on_after(_SHARED_SECONDS):
            if await self._ended(shared):
                return
        size = sum(layer.descriptor.size for layer in shared)
        if size <= self._parts.settings.most_shared:
            with trio.move_on_after(_SHARED_SECONDS) as waiting:
                for layer in shared:
                    await self._verified(layer.descriptor.digest)
            if not waiting.cancelled_caught:
                return
        raise InProgress(
            f"{resolved.reference} shares layers of {bytes_text(size)} with another model that is "
            "being fetched: what one name sends is shown as another's only once it is verified; "
            "the eager mode does not wait for that"
        )

    async def _ended(self, shared: list[Layer]) -> bool:
        """Wait for downloads that were told to stop; whether there was one."""
        jobs = [self._parts.jobs.current(layer.descriptor.digest) for layer in shared]
        ending = [job for job in jobs if job is not None and job.scope.cancel_called]
        for job in ending:
            await job.finished.wait()
        return bool(ending)

    async def _verified(self, digest: Digest) -> None:
        """Wait for a layer that another name has fetched, or for the end of that."""
        for model in list(self._models.values()):
            blob = model.blobs.get(digest)
            if blob is not None and not blob.complete:
                try:
                    await blob.fill(0)
                except ModelError as error:
                    logger.warning("%s", error.message)
                    await trio.sleep_forever()
        job = self._parts.jobs.current(digest)
        if job is not None:
            with job.whole():
                await job.finished.wait()
        await trio.lowlevel.checkpoint()

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

    def _spoiled(self, digest: Digest, error: DigestMismatch) -> None:
        """The bytes of a blob proved wrong, whoever had it fetched."""
        for model in self._models.values():
            blob = model.blobs.get(digest)
            if blob is not None:
                blob.spoil(error)

    def remember(self, model: LazyModel, blob: Digest, reason: str) -> None:
        """Have the next agent know that the bytes of a blob proved wrong."""
        model.plan = replace(model.plan, spoiled={**model.plan.spoiled, str(blob): reason})
        self._nursery.start_soon(self._rewrite, model)

    async def _rewrite(self, model: LazyModel) -> None:
        try:
            if self.get(model.digest, model.selection.key) is model:
                await self._write_plan(model)
        except ModelError as error:
            logger.warning("the plan of %s is not up to date: %s", model.digest, error.message)

    async def _write_plan(self, model: LazyModel) -> None:
        """Put a plan on the disk, unless it is there. Raises :class:`ModelError`."""
        async with self._writing:
            plan = model.plan
            path = plan_path(self._store.root, plan.model, plan.selection.key)
            try:
                await trio.to_thread.run_sync(_replace_file, path, encode_plan(plan))
            except OSError as error:
                raise disk_error(error, path) from error


@dataclass(frozen=True, eq=False)
class _Remembering:
    """Keeps in a model's plan what has to last."""

    models: LazyModels
    model: LazyModel

    def spoiled(self, blob: Digest, reason: str) -> None:
        """The bytes of a blob proved wrong."""
        self.models.remember(self.model, blob, reason)

    def renewed(self, ticket: str) -> None:
        """Secrets are not kept on the disk."""


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
