"""One model that is shown while it is fetched: what is known of it, and its life."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

import trio

from fetcher.download import Source
from fetcher.errors import DigestMismatch, ModelError, NotFound
from fetcher.lazy_blobs import LazyBlob
from fetcher.lazy_filling import Filling
from fetcher.lazy_plan import LazyPlan, mountpoint
from fetcher.lazy_start import Start
from fetcher.lazy_tickets import read_ticket, write_ticket
from fetcher.modelpack import Packing
from fetcher.oci import Digest, Reference
from fetcher.pull import Progress
from fetcher.schedule import Prefetch
from fetcher.store.footprint import content_name, tree_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fetcher.chunk_lists import ChunkLists, KnownList
    from fetcher.credentials import Keychain
    from fetcher.jobs import Jobs
    from fetcher.layouts import Layouts
    from fetcher.modelpack import Layer
    from fetcher.registry import Registry
    from fetcher.store import Store

logger = logging.getLogger(__name__)

_SILENCE_SECONDS: Final = 10.0
"""How long readers wait for a byte before that is worth a word."""

_MOST_KNOWN: Final = 16
"""Volumes of one model whose credentials are remembered."""

_AGAIN_SECONDS: Final = 60.0
"""After so long, what failed is tried again."""


@dataclass(frozen=True, slots=True)
class LazySettings:
    """How models are filled."""

    blobs: int = 8
    """Blobs of one model that are filled at one time."""
    head_bytes: int = 4 * 1024 * 1024
    """Of a file of weights: what is fetched before the rest of any of them."""
    start: float = 0.0
    """Seconds for which filling waits for the worker, so that the first read comes first."""
    most_shared: int = 64 * 1024 * 1024
    """Bytes of layers shared with models of other names that a volume waits for to begin."""


class Listener(Protocol):
    """Who serves a model to its worker: a session of :mod:`fetcher.lazy_sessions`."""

    def spoiled(self, blob: Digest, reason: str) -> None:
        """The bytes of a blob proved wrong."""

    def renewed(self, ticket: str) -> None:
        """There is another ticket."""


@dataclass(frozen=True, slots=True)
class LazyParts:
    """What every lazy model needs."""

    store: Store
    registry: Registry
    jobs: Jobs
    layouts: Layouts
    keychain: Keychain
    settings: LazySettings
    lists: ChunkLists | None

    def known_chunks(self, plan: LazyPlan) -> KnownList | None:
        """What proves single chunks of a model, as far as it was looked for."""
        if self.lists is None or not plan.reference:
            return None
        return self.lists.known(Reference.parse(plan.reference), plan.read_model())

    def guess(self, plan: LazyPlan) -> Source | None:
        """Where a model may be fetched from while nobody says as whom: as the node itself."""
        if not plan.reference:
            return None
        return Source(Reference.parse(plan.reference), self.keychain)


class LazyModel:
    """A model that is shown while it is fetched. Made by :meth:`LazyModels.open`."""

    def __init__(self, parts: LazyParts, plan: LazyPlan, source: Source | None) -> None:
        self._parts = parts
        self._store = parts.store
        self.plan = plan
        self.model = plan.read_model()
        self.selection = plan.selection
        self._chunks = parts.known_chunks(plan)
        self.source = self._with_chunks(source or parts.guess(plan))
        """Where it is fetched from, as whom; None until somebody says so."""
        self.ticket = ""
        """What the worker is to show to the next agent; secret."""
        self.blobs: dict[Digest, LazyBlob] = {}
        self.start = Start(parts.settings.start)
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
        self._known: dict[str, Source] = {}
        """What its volumes brought, by each of them, the newest last."""
        self._refused: list[Keychain] = []
        """Credentials that the registry does not take at present."""
        self._recalled = source is None
        """The source is a guess: nobody named it since the agent began."""
        self._spoiled = {Digest.parse(one): why for one, why in plan.spoiled.items()}

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
            if failure is not None and (blob.is_refused or blob.is_waited_for):
                return failure.message
            if blob.silence > _SILENCE_SECONDS:
                where = self.name.partition("/")[0] or "the registry"
                return (
                    f"reads wait, and nothing has come from {where} for {blob.silence:.0f} s: they "
                    "end with an error when their time is over"
                )
        return None

    def blob(self, digest: str) -> LazyBlob:
        """One of its layers. Raises :class:`NotFound`."""
        for known, blob in self.blobs.items():
            if str(known) == digest:
                return blob
        raise NotFound(f"the lazy model {self.digest} has no blob {digest[:100]}")

    def unverified(self) -> set[Digest]:
        """The layers of which bytes may be shown by its name alone."""
        early = {
            digest: layer
            for digest, layer in self.selection.layers(self.model).items()
            if layer.packing in (Packing.RAW, Packing.TAR)
        }
        if not self.ready.is_set():
            return {one for one, layer in early.items() if not self._store.has_content(layer)}
        return {one for one in early.keys() & self.blobs.keys() if not self.blobs[one].complete}

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

    def reads(self) -> None:
        """A reader begins to wait for something."""
        self.start.reads()

    def was_read(self) -> None:
        """A reader got what it waited for."""
        self.start.was_read()

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

    async def renew(self, source: Source, holder: str = "") -> None:
        """Go on with these credentials of a volume, and let the worker remember them.

        Not with those for another name, once all is there that needs them.
        """
        if source.reference.name != self.name:
            return
        self._recalled = False
        self._known.pop(holder, None)
        self._known[holder] = source
        for oldest in list(self._known)[:-_MOST_KNOWN]:
            del self._known[oldest]
        keychains = [one.keychain for one in self._known.values()]
        self._refused = [one for one in self._refused if _is_in(one, keychains)]
        self._go_on_with(source)
        self.tell()
        ticket = await write_ticket(source, self._parts.registry, self._parts.keychain)
        if ticket != self.ticket:
            self.ticket = ticket
            for listener in list(self.listeners):
                listener.renewed(ticket)

    def give_up(self, source: Source) -> bool:
        """The registry does not take these credentials: whether there are others to ask with.

        Each volume has its own, and one of them may have been revoked.
        """
        if self.source is None or source.reference.name != self.name:
            return False
        if source.keychain is self.source.keychain:
            self._refused.append(source.keychain)
            others = [
                one
                for one in reversed(self._known.values())
                if not _is_in(one.keychain, self._refused)
            ]
            if not others:
                # all of them are tried again, later
                self._refused.clear()
                return False
            logger.info(
                "%s is fetched with the credentials of another one of its volumes", self.name
            )
            self._go_on_with(others[0])
        else:
            self._go_on_with(self.source)
        return True

    def _go_on_with(self, source: Source) -> None:
        self.source = self._with_chunks(source)
        for digest in self.selection.layers(self.model):
            job = self._parts.jobs.running(digest)
            if job is not None and job.trusted_name == source.reference.name:
                job.offer(source)

    def _with_chunks(self, source: Source | None) -> Source | None:
        """The source with what proves single chunks, if it is of the name whose list that is."""
        known = self._chunks
        if source is None or known is None or known.name != source.reference.name:
            return source
        return replace(source, chunks=known)

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
                        for layer in layers.values():
                            self._add(layer, nursery)
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

    def _add(self, layer: Layer, nursery: trio.Nursery) -> None:
        parts, digest = self._parts, layer.descriptor.digest
        blob = LazyBlob(layer, self, parts.store, parts.jobs, parts.layouts, nursery)
        if digest in self._spoiled:
            blob.ruined = DigestMismatch(self._spoiled[digest])
        self.blobs[digest] = blob

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

    async def _fill(self) -> None:
        settings = self._parts.settings
        await self.start.over()
        await Filling(self, self._store, settings.blobs, settings.head_bytes).run()

    async def _build(self) -> None:
        await self._parts.layouts.build(self.model, self.selection)
        self.complete = True
        logger.info("the lazy model %s is complete", self.digest.short)


def _is_in(keychain: Keychain, keychains: Sequence[Keychain]) -> bool:
    """Whether it is one of them: not one that is equal."""
    return any(keychain is one for one in keychains)


def _first(group: BaseExceptionGroup[ModelError]) -> ModelError:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
