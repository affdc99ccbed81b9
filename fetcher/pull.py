"""Pulling a model into the store: the page to read first.

*Resolve* the reference to a manifest, with the caller's own credentials
(:mod:`fetcher.resolution`); *join* the pull of that model; the pull checks that there is room, has
every blob fetched once (:mod:`fetcher.jobs`), unpacks what is packed, and builds the tree that
volumes bind (:mod:`fetcher.store`). Each caller gets that tree once its own name is known to have
all of it (:mod:`fetcher.proofs`).

A pull belongs to the model, not to whoever asked first: callers wait for it and may leave. With
nobody waiting it stops after a grace period, and keeps what it has.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import trio

from fetcher.download import Source
from fetcher.errors import InProgress, InvalidArtifact, ModelError, NoSpace
from fetcher.layouts import Layouts
from fetcher.modelpack import Selection
from fetcher.oci import Digest
from fetcher.policy import PullPolicy, ReferencePolicy
from fetcher.proofs import Proofs
from fetcher.resolution import Resolved, Resolver
from fetcher.store.footprint import content_name, tree_name
from fetcher.tasks import for_each

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fetcher.chunk_digests import BlobChunks
    from fetcher.chunk_lists import ChunkLists, KnownList
    from fetcher.credentials import Keychain
    from fetcher.jobs import Job, Jobs
    from fetcher.modelpack import Layer, Model
    from fetcher.oci import Reference
    from fetcher.registry import Registry
    from fetcher.store import ModelTree, Store

__all__ = ["JoinedPull", "Progress", "Pull", "PullSettings", "Pulls", "Resolved"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PullSettings:
    """How models are pulled."""

    grace: float = 60.0
    """Seconds that a pull goes on with nobody waiting for it and nobody holding it."""
    hold: float = 300.0
    """Seconds for which whoever left a pull to come again holds it. More than twice kubelet's
    longest pause between two tries of a volume (122 s): a pod that is still there finds its pull
    still going, and one whose deletion nobody tells of does not hold it for ever."""
    blobs: int = 8
    """Blobs of one model that are fetched at one time."""
    unpacked_ratio: int = 100
    """How many times its own size a compressed layer may unpack to."""
    proof: float = 10.0
    """Seconds in which a registry that could be done without has to give its word."""
    references: ReferencePolicy = field(default_factory=ReferencePolicy)
    """What may be pulled at all."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull is, in bytes."""

    done: int
    total: int


class Pull:
    """One model on its way into the store. Made by :meth:`Pulls.join`."""

    def __init__(self, resolved: Resolved, selection: Selection, previous: Pull | None) -> None:
        self.resolved = resolved
        """As whoever asked first for it has it."""
        self._sources = {resolved.reference.name: _source(resolved)}
        self.selection = selection
        self.previous = previous
        """A pull of the same tree that was told to stop and may not have ended yet."""
        self.waiters = 0
        self.holders: dict[str, float] = {}
        """Who is to come again, each with the time until which it is believed."""
        self.left = 0.0
        """When the last waiter left."""
        self.scope = trio.CancelScope()
        self.finished = trio.Event()
        self.tree: ModelTree | None = None
        self.failure: Exception | None = None
        self.chunks: KnownList | None = None
        """What proves single chunks, once it was looked for."""
        self.made: dict[Digest, BlobChunks] = {}
        """The chunk digests of blobs that were hashed."""
        self.jobs: dict[Digest, Job] = {}
        self.complete: set[Digest] = set()
        self.sizes = {
            digest: layer.descriptor.size
            for digest, layer in selection.layers(resolved.model).items()
        }
        self.places = {digest: place for place, digest in enumerate(self.sizes)}
        """In the manifest; the same on each node."""

    def progress(self) -> Progress:
        """Bytes of the wanted blobs that are here, and bytes in all."""
        total = sum(self.sizes.values())
        if self.tree is not None:
            return Progress(total, total)
        done = sum(self.sizes[digest] for digest in self.complete)
        done += sum(job.done for digest, job in self.jobs.items() if digest not in self.complete)
        return Progress(done, total)

    def renew(self, resolved: Resolved) -> None:
        """Go on as whoever asked last: a pod's credentials expire, and its next try has new ones.

        A reference with another name is one more place to fetch from, and takes none away: what
        one caller can read must not fail for what another one names.
        """
        source = _source(resolved)
        self._sources[source.reference.name] = source
        for job in self.jobs.values():
            job.offer(source)

    def heard(self, chunks: KnownList) -> None:
        """Go on with the chunk digests that somebody has sent."""
        self.chunks = chunks
        for source in self.sources:
            for job in self.jobs.values():
                job.offer(source)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where its blobs are fetched from, one for each name, in the order of asking."""
        known = self.chunks
        return tuple(
            replace(source, chunks=known) if known and known.reference.name == name else source
            for name, source in self._sources.items()
        )

    async def wait(self) -> ModelTree:
        """Wait for the tree. Raises what the pull failed with; leaving does not stop the pull."""
        await self.finished.wait()
        return _outcome(self.tree, self.failure, self.resolved)


class JoinedPull:
    """A pull as one of its callers has it, from :meth:`Pulls.join`.

    The pull is everybody's; whether its tree may be shown is decided for each caller.
    """

    def __init__(self, pull: Pull, resolved: Resolved) -> None:
        self.pull = pull
        self.resolved = resolved
        """The model as this caller named it."""
        self.scope = trio.CancelScope()
        self.finished = trio.Event()
        self.tree: ModelTree | None = None
        self.failure: Exception | None = None

    def progress(self) -> Progress:
        """Bytes of the wanted blobs that are here, and bytes in all."""
        return self.pull.progress()

    async def wait(self) -> ModelTree:
        """Wait for the tree, and for the proof that this caller may have it.

        Raises what the pull failed with, or what the registry of the caller's own reference says of
        a layer. May be called again after it was cancelled.
        """
        await self.finished.wait()
        return _outcome(self.tree, self.failure, self.resolved)


def _source(resolved: Resolved) -> Source:
    return Source(resolved.reference, resolved.keychain)


def _outcome(tree: ModelTree | None, failure: Exception | None, resolved: Resolved) -> ModelTree:
    if failure is not None:
        # every waiter gets an exception of its own: a traceback belongs to one task
        raise copy.copy(failure) from failure
    if tree is None:
        raise InProgress(f"the pull of {resolved.reference} was stopped: ask again")
    return tree


class Pulls:
    """Resolves references and pulls models, each once. Belongs to the trio thread."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        jobs: Jobs,
        settings: PullSettings,
        nursery: trio.Nursery,
        lists: ChunkLists | None = None,
    ) -> None:
        """Pulls run in ``nursery``; chunks are proven when they come where ``lists`` has a list."""
        self._lists = lists
        self._store = store
        self._jobs = jobs
        self._settings = settings
        self._nursery = nursery
        self._pulls: dict[tuple[Digest, str], Pull] = {}
        self.layouts = Layouts(store, settings.unpacked_ratio)
        self.proofs = Proofs(store.catalog, registry)
        self._resolver = Resolver(store, registry, settings.references, settings.proof)

    # -- resolve -----------------------------------------------------------------------------------

    def check(self, reference: Reference) -> None:
        """Raise :class:`AccessDenied` for a reference that the node's policy does not allow."""
        self._resolver.check(reference)

    async def resolve(
        self, reference: Reference, keychain: Keychain, policy: PullPolicy
    ) -> Resolved:
        """The model, proven to be readable with ``keychain``; see :class:`Resolver`."""
        return await self._resolver.resolve(reference, keychain, policy)

    # -- pull --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def join(
        self, resolved: Resolved, selection: Selection, holder: str | None = None
    ) -> Iterator[JoinedPull]:
        """The pull of a model, started if none is under way; wait for it inside the block.

        With nobody in such a block the pull stops after its grace period. A ``holder`` that leaves
        is taken to come again, as kubelet does, and holds the pull meanwhile; see :meth:`release`.
        """
        key = (resolved.model.digest, selection.key)
        pull = self._pulls.get(key)
        if pull is None or pull.scope.cancel_called or pull.finished.is_set():
            pull = Pull(resolved, selection, previous=pull)
            self._pulls[key] = pull
            name = f"pull {resolved.model.digest.short}"
            self._nursery.start_soon(self._run, pull, key, name=name)
        pull.renew(resolved)
        pull.waiters += 1
        self._set_deadline(pull)
        joined = JoinedPull(pull, resolved)
        name = f"proof of {resolved.model.digest.short}"
        self._nursery.start_soon(self._hand_over, joined, selection, name=name)
        try:
            yield joined
        finally:
            joined.scope.cancel()
            pull.waiters -= 1
            pull.left = trio.current_time()
            if holder is not None:
                pull.holders[holder] = pull.left + self._settings.hold
            self._set_deadline(pull)

    async def _hand_over(self, joined: JoinedPull, selection: Selection) -> None:
        """Give one caller the tree, once its own name is known to have all that the tree shows.

        A task of its own, as callers wait in short turns; it ends when the caller has left.
        """
        resolved = joined.resolved
        layers = selection.layers(resolved.model)
        try:
            with joined.scope:
                tree = await joined.pull.wait()
                await self.proofs.prove(resolved.reference, layers, resolved.keychain)
                joined.tree = tree
        except Exception as error:
            if not isinstance(error, ModelError) and joined.pull.failure is None:
                logger.exception("fault of this program while handing %s over", resolved.reference)
            joined.failure = error
        finally:
            joined.finished.set()

    def release(self, holder: str) -> None:
        """``holder`` does not come again: pulls that nobody else wants end with their grace."""
        for pull in self._pulls.values():
            if pull.holders.pop(holder, None) is not None:
                self._set_deadline(pull)

    def left(self, model: str, selection: str) -> None:
        """A volume does not show this tree any more: it was used until now, and may go."""
        with contextlib.suppress(InvalidArtifact, NoSpace):
            # only decides what is evicted first: no reason for an unpublish to fail
            self._store.catalog.touch_model(Digest.parse(model), selection)
        self._store.garbage.ask()

    def is_damaged(self, model: str, selection: str) -> bool:
        """Whether a tree was found to be damaged, and has not been put right since."""
        try:
            digest = Digest.parse(model)
        except InvalidArtifact:
            return False
        return self._store.is_damaged(digest, selection)

    def _set_deadline(self, pull: Pull) -> None:
        """Let the pull run as long as somebody waits, else as long as anybody may come again."""
        if pull.waiters:
            pull.scope.deadline = math.inf
        else:
            pull.scope.deadline = max(pull.left + self._settings.grace, *pull.holders.values(), 0.0)

    def running(self) -> list[Pull]:
        """The pulls that are under way."""
        return list(self._pulls.values())

    async def _run(self, pull: Pull, key: tuple[Digest, str]) -> None:
        """Run one pull to its end; its failures belong to its waiters, never to the nursery."""
        reference = pull.resolved.reference
        started = trio.current_time()
        try:
            with pull.scope:
                if pull.previous is not None:
                    await pull.previous.finished.wait()
                    pull.previous = None
                pull.tree = await self._pull(pull)
                seconds = trio.current_time() - started
                logger.info("%s is complete, after %.1f s", reference, seconds)
            if pull.scope.cancelled_caught:
                logger.info("the pull of %s was stopped: nobody waited for it", reference)
        except Exception as error:
            if isinstance(error, ModelError):
                logger.warning("the pull of %s failed: %s", reference, error.message)
            else:
                logger.exception("fault of this program while pulling %s", reference)
            pull.failure = error
        finally:
            if self._pulls.get(key) is pull:
                del self._pulls[key]
            pull.finished.set()

    async def _pull(self, pull: Pull) -> ModelTree:
        try:
            with self._store.held(pull.resolved.model, pull.selection):
                tree = await self._build(pull)
        finally:
            self._store.garbage.ask()
        await self._settle(pull)
        return tree

    async def _build(self, pull: Pull) -> ModelTree:
        """Reserve, fetch, build, record; what is there already is used."""
        model, selection, store = pull.resolved.model, pull.selection, self._store
        tree = store.tree(model.digest, selection)
        if tree is not None:
            store.catalog.touch_model(model.digest, selection.key)
            return tree
        await store.reserve(str(pull.resolved.reference), model, selection)
        layers = selection.layers(model)
        missing = [layer for layer in layers.values() if not store.has_content(layer)]
        pull.complete.update(layers.keys() - {layer.descriptor.digest for layer in missing})
        await self._fetch_layers(pull, missing)
        tree = await self.layouts.build(model, selection)
        if self._lists is not None:
            await self._lists.keep(pull.resolved.reference, model, pull.made)
        return tree

    async def fetch(self, resolved: Resolved, layers: list[Layer]) -> None:
        """Have some layers of a model in the store, and build nothing. Raises :class:`ModelError`.

        What is here must be held by the caller, what is fetched is held until this returns.
        """
        part = replace(resolved.model, layers=tuple(layers))
        everything = Selection()
        pull = Pull(resolved, everything, previous=None)
        with self._store.held(part, everything):
            await self._store.reserve(str(resolved.reference), part, everything)
            await self._fetch_layers(pull, layers)
        await self._settle(pull)

    async def _settle(self, pull: Pull) -> None:
        """What a pull reserved and did not take is there for others as soon as it has ended."""
        tree = tree_name(pull.resolved.model.digest, pull.selection.key)
        await self._store.rooms.settle_only([tree, *map(content_name, pull.sizes)])

    async def _fetch_layers(self, pull: Pull, missing: list[Layer]) -> None:
        """Fetch and unpack layers, several at a time. The first failure stops the others."""

        async def fetch(layer: Layer) -> None:
            await self._fetch_layer(pull, layer)

        with self._looking_for_chunks(pull, missing):
            await for_each(missing, fetch, self._settings.blobs)

    @contextlib.contextmanager
    def _looking_for_chunks(self, pull: Pull, missing: list[Layer]) -> Iterator[None]:
        """Inside the block, use the chunk digests that the registry has, else those of peers.

        They are asked for beside the download, which takes them up when they come.
        """
        scope = trio.CancelScope()
        if missing and self._lists is not None:
            first, model = pull.sources[0], replace(pull.resolved.model, layers=tuple(missing))
            pull.chunks = self._lists.known(first.reference, model)
            if pull.chunks is None:
                name = f"lists of {model.digest.short}"
                self._nursery.start_soon(self._look, pull, model, self._lists, scope, name=name)
        try:
            yield
        finally:
            scope.cancel()

    async def _look(
        self, pull: Pull, missing: Model, lists: ChunkLists, scope: trio.CancelScope
    ) -> None:
        first, model = pull.sources[0], pull.resolved.model
        try:
            with scope:
                found = await lists.find(first.reference, missing, first.keychain)
                if found is not None:
                    pull.heard(found)
                else:
                    await lists.follow(first.reference, model, first.keychain, pull.heard)
        except Exception:
            # it only makes a pull surer: no reason for one to fail
            logger.exception("fault of this program while asking for chunk digests")

    async def _fetch_layer(self, pull: Pull, layer: Layer) -> None:
        async with self.layouts.turn(layer):
            # somebody else may have had it fetched since it was found missing
            if not self._store.has_content(layer):
                await self._fetch_missing(pull, layer)
        pull.complete.add(layer.descriptor.digest)

    async def _fetch_missing(self, pull: Pull, layer: Layer) -> None:
        digest = layer.descriptor.digest
        first, *others = pull.sources
        with self._jobs.join(layer, first, place=pull.places[digest]) as job:
            for source in others:
                job.offer(source)
            pull.jobs[digest] = job
            job.is_pulled = True
            await job.wait()
            if job.partial is not None and job.partial.made is not None:
                pull.made[digest] = job.partial.made
            await self.layouts.lay_out(layer)
