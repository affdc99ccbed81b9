"""One download per blob of a node, whoever wants it.

A job belongs to the nursery of :class:`Jobs`; callers only wait for it. It has what is wanted of
the blob fetched (:mod:`fetcher.schedule`, :mod:`fetcher.download`) while a thread hashes what has
arrived, and makes the blob complete once the digest is right. Its last waiter gone, it stops and
keeps what it has.

Callers want all of the blob, or some bytes of it that they may read before the rest is there:
:meth:`Job.want`. Whether these may be shown to anybody is another question, as nobody knows yet
whether they are right: :attr:`Job.trusted_name` says by whose word they are.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from fetcher.download import Download, DownloadSettings, Source
from fetcher.errors import DigestMismatch, InProgress, ModelError
from fetcher.ranges import Range
from fetcher.schedule import Schedule, Urgency, Want
from fetcher.store.chunks import Verdict
from fetcher.threads import run_stoppable
from fetcher.transfers import Transfers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from fetcher.modelpack import Layer
    from fetcher.oci import Digest
    from fetcher.peers.client import PeerClient
    from fetcher.registry import Registry
    from fetcher.schedule import Piece
    from fetcher.store.blobs import PartialBlob
    from fetcher.store.store import Store

logger = logging.getLogger(__name__)

_CHECKPOINT_SECONDS: Final = 5.0
"""How much of a download, at most, a power loss takes back."""

_IDLE_SECONDS: Final = 1.0
"""How long a thread waits for the next bytes to hash, before it is left to others."""


@dataclass(eq=False, slots=True)
class _Waiter:
    """Somebody who waits for some bytes."""

    want: Want
    ended: trio.Event = field(default_factory=trio.Event)
    failure: ModelError | None = None


class Job:
    """One blob on its way. Made by :meth:`Jobs.join`."""

    def __init__(
        self, layer: Layer, source: Source, previous: Job | None, trusted_name: str
    ) -> None:
        self.layer = layer
        self.schedule = Schedule()
        self._sources = {source.reference.name: source}
        """Of everybody who asked, by the model's name; those that failed come to the end."""
        self.fresh = False
        """Whether nothing of the blob was there when it began."""
        self._failed: set[str] = set()
        """The names of sources that are of no use, until somebody offers one anew."""
        self.previous = previous
        """A job of the same blob that was told to stop and may not have ended yet."""
        self.waiters = 0
        self.scope = trio.CancelScope()
        self.finished = trio.Event()
        self.complete = False
        self.failure: Exception | None = None
        self.partial: PartialBlob | None = None
        self.moved = time.monotonic()
        """When the last bytes came, or it began, by the monotonic clock."""
        self._download: Download | None = None
        self._waiting: list[_Waiter] = []
        self._change = trio.Event()
        """Of the bytes that are there."""
        self._listening = False
        """Whether anybody wants to know of it."""
        self._token = trio.lowlevel.current_trio_token()
        self.trusted_name = trusted_name
        """The name by which bytes are trusted: a registry and a repository."""
        self.chunks = source.chunks
        """What proves single chunks; of the first who knew it before the blob was begun."""
        self.misread = trio.Event()
        """The blob has to begin anew: see :attr:`PartialBlob.is_misread`."""
        self._indexing = trio.Lock()
        self._indexed = False

    @property
    def done(self) -> int:
        """Bytes of the blob that are there."""
        if self.complete:
            return self.layer.descriptor.size
        return self.partial.done if self.partial else 0

    @property
    def source(self) -> Source:
        """Where it is fetched from at present."""
        usable = (one for name, one in self._sources.items() if name not in self._failed)
        return next(usable, next(iter(self._sources.values())))

    @property
    def trusted_source(self) -> Source | None:
        """The source by whose name trusted bytes come; None while it is not offered."""
        return self._sources.get(self.trusted_name)

    @property
    def only_name(self) -> str | None:
        """The name below which all of the blob was fetched; None where it may have been others."""
        [name, *others] = self._sources
        return name if self.fresh and not others else None

    def offer(self, source: Source) -> None:
        """Fetch from there too: with newer credentials for a name that is known, as they expire,
        and else where all that were offered before fail.
        """
        name = source.reference.name
        self._failed.discard(name)
        self._sources[name] = source
        if self.partial is None and self.chunks is None:
            self.chunks = source.chunks

    def give_up(self, source: Source) -> bool:
        """``source`` refuses, lacks or spoils the blob: whether there is another one to ask."""
        name = source.reference.name
        if self._sources[name] is source:
            self._failed.add(name)
            # to the end, behind those that were not tried
            self._sources[name] = self._sources.pop(name)
        return self.source.reference.name not in self._failed

    def contradicted(self) -> None:
        """What the registry itself sends is not what the chunk digests say: these go."""
        if self.chunks is None:
            return
        self.chunks.contradicted()
        self.chunks = None
        if self.partial is not None:
            self.partial.expect(None)
            self.look_again()

    def failed(self, piece: Piece, error: ModelError) -> bool:
        """A piece cannot be had: whether that is for those who want it alone to know."""
        if piece.demand.urgency > Urgency.AHEAD:
            return False
        for waiter in list(self._waiting):
            wanted = waiter.want.wanted
            if wanted.start < piece.wanted.stop and piece.wanted.start < wanted.stop:
                self._end(waiter, error)
        return True

    # -- what is wanted ----------------------------------------------------------------------------

    async def wait(self) -> None:
        """Wait until the blob is complete. Raises what the job failed with."""
        await self.finished.wait()
        if self.failure is not None:
            # every waiter gets an exception of its own: a traceback belongs to one task
            raise copy.copy(self.failure) from self.failure
        if not self.complete:
            digest = self.layer.descriptor.digest
            raise InProgress(f"the download of blob {digest} was stopped: ask again")

    async def want(self, wanted: Range, *, ahead: bool = False, trusted: bool = False) -> None:
        """Wait until all chunks that ``wanted`` touches are there, or the blob is complete.

        They come before everything that nobody waits for; ``ahead`` of time only behind what
        somebody waits for. What is to be ``trusted`` comes from a trusted source, again if
        necessary. Raises the :class:`ModelError` that keeps them from coming.
        """
        urgency = Urgency.AHEAD if ahead else Urgency.URGENT
        await self._have(Want(wanted, urgency, trusted=trusted))

    async def pass_on(self, wanted: Range) -> None:
        """As :meth:`want`, of bytes that another node waits for: before what nobody waits for."""
        await self._have(Want(wanted, Urgency.WHOLE, -1))

    async def fill(self, wanted: Range, order: int = 0) -> None:
        """As :meth:`want`, of bytes that nobody waits for; the lower ``order`` comes first."""
        await self._have(Want(wanted, Urgency.BACKGROUND, order))

    async def prove(self) -> None:
        """Have all that is not trusted from a trusted source, to be compared or replaced."""
        await self._have(Want(self._everything, Urgency.WHOLE, trusted=True))

    async def _have(self, want: Want) -> None:
        waiter = _Waiter(want)
        # before looking: of what comes from now on it is told
        self._waiting.append(waiter)
        try:
            if self.finished.is_set() or self._is_met(waiter.want):
                await trio.lowlevel.checkpoint()
            else:
                with self._scheduled(waiter.want):
                    await waiter.ended.wait()
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
        if self.finished.is_set():
            await self.wait()
        elif waiter.failure is not None:
            raise copy.copy(waiter.failure) from waiter.failure

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Want all of it inside the block, as somebody waits for that."""
        with self._scheduled(Want(self._everything, Urgency.WHOLE)):
            yield

    @contextlib.contextmanager
    def opened(self, wanted: Range) -> Iterator[None]:
        """Want a file of it whole inside the block, ahead of what nobody waits for."""
        with self._scheduled(Want(wanted, Urgency.WHOLE, 1)):
            yield

    @contextlib.contextmanager
    def _scheduled(self, want: Want) -> Iterator[None]:
        hurried = self.schedule.add(want)
        if self._download is not None:
            self._download.hurry(hurried)
            self._download.wake()
        try:
            yield
        finally:
            self.schedule.remove(want)

    @property
    def _everything(self) -> Range:
        return Range(0, self.layer.descriptor.size)

    # -- what may be shown -------------------------------------------------------------------------

    def check_name(self, name: str) -> None:
        """Raise :class:`InProgress` where trusted bytes are not those that came by ``name``.

        What one registry sends must not be shown to who named another, before the digest has said
        that it is right.
        """
        if self.trusted_name != name:
            raise InProgress(
                f"the blob {self.layer.descriptor.digest} is fetched as a part of "
                f"{self.trusted_name}: it is shown as a part of {name} once it is complete"
            )

    async def index(self) -> None:
        """Wait until readers can know what is in a tar layer, from its headers alone.

        Raises :class:`ModelError`.
        """
        async with self._indexing:
            while not self.complete and not self._indexed:
                await self._index_further()

    async def _index_further(self) -> None:
        """Have the next headers fetched, or write down what all of them say."""
        if self.finished.is_set():
            await self.wait()
        partial = self.partial
        if partial is None:
            # whatever is at its begin: it is open once that is there
            await self.want(Range(0, 1), trusted=True)
            return
        at = partial.awaited()
        if at is not None:
            await self.want(Range(at, at + 1), trusted=True)
            if self.partial is partial and partial.awaited() == at:
                await run_stoppable(partial.read_headers)
            return
        untrusted = partial.untrusted_headers()
        for chunk in untrusted:
            await self.want(chunk, trusted=True)
        if partial.is_misread:
            self.misread.set()
            while self.partial is partial and not self.finished.is_set():
                await self.change()
        elif not untrusted and self.partial is partial:
            self._indexed = await run_stoppable(partial.write_index)
            if not self._indexed:
                # it was just closed: the job ends, or begins anew
                await self.change()

    # -- what comes --------------------------------------------------------------------------------

    def look_again(self) -> None:
        """Some of what was there may be there no more."""
        self.schedule.look_again()
        if self._download is not None:
            self._download.wake()

    def begin(self, partial: PartialBlob, download: Download) -> None:
        """The blob is open, and fetched from now on."""
        self.partial, self._download = partial, download
        self.misread = trio.Event()
        self.schedule.look_again()
        self._look()

    def arrived(self, _: int) -> None:
        """Bytes came, in whichever thread."""
        self.moved = time.monotonic()
        if self._waiting or self._listening:
            self._token.run_sync_soon(self._look, idempotent=True)

    def _look(self) -> None:
        """See who has what he waits for."""
        if self._listening:
            self._listening = False
            self._change.set()
        for waiter in list(self._waiting):
            if self._is_met(waiter.want):
                self._end(waiter, None)

    async def change(self) -> None:
        """Wait until some more bytes have come, or the job has ended; or for nothing.

        Whoever looks, and waits for what is not there yet, looks again after it.
        """
        if self._listening:
            await self._change.wait()
        else:
            # what came between the caller's look and now was not told to anybody
            self._listening, self._change = True, trio.Event()
            await trio.lowlevel.checkpoint()

    def _is_met(self, want: Want) -> bool:
        partial = self.partial
        return self.complete or (partial is not None and self.schedule.is_met(want, partial))

    def _end(self, waiter: _Waiter, failure: ModelError | None) -> None:
        waiter.failure = failure
        self._waiting.remove(waiter)
        waiter.ended.set()

    def end(self) -> None:
        """The job has ended, one way or the other."""
        self.finished.set()
        self._listening = False
        self._change.set()
        for waiter in list(self._waiting):
            self._end(waiter, None)


class Jobs:
    """All downloads of the node. Belongs to the trio thread."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        settings: DownloadSettings,
        nursery: trio.Nursery,
        peers: PeerClient | None = None,
    ) -> None:
        """Jobs run in ``nursery``; they ask ``peers`` too, if there are any."""
        self._store = store
        self._registry = registry
        self._peers = peers
        self._nursery = nursery
        self._settings = settings
        self._transfers = Transfers(settings.connections, settings.transfer, settings.prefetch_rate)
        self._jobs: dict[Digest, Job] = {}
        self.names: dict[Digest, str] = {}
        """By whose name bytes of a blob are trusted, where somebody may show them already; of other
        blobs, by that of who asks first."""
        self.spoiled: Callable[[Digest, DigestMismatch], None] = lambda digest, error: None
        """Told of such a blob whose bytes proved wrong."""

    @contextlib.contextmanager
    def join(self, layer: Layer, source: Source, *, background: bool = True) -> Iterator[Job]:
        """The job that fetches a layer's blob, started if there is none; wait for it inside the
        block.

        All of it is fetched, or, where nobody wants it in the ``background``, only what is wanted
        by :meth:`Job.want` and the like. The caller has reserved room for it.
        """
        digest = layer.descriptor.digest
        job = self._jobs.get(digest)
        if job is None or job.scope.cancel_called or job.finished.is_set():
            name = self.names.get(digest, source.reference.name)
            job = Job(layer, source, job, name)
            self._jobs[digest] = job
            self._nursery.start_soon(self._run, job, name=f"job {digest.short}")
        job.offer(source)
        job.waiters += 1
        try:
            with job.whole() if background else contextlib.nullcontext():
                yield job
        finally:
            job.waiters -= 1
            if job.waiters == 0:
                job.scope.cancel()

    def running(self, digest: Digest) -> Job | None:
        """The job that fetches a blob at the moment, if there is one."""
        job = self._jobs.get(digest)
        return None if job is None or job.scope.cancel_called else job

    def current(self, digest: Digest) -> Job | None:
        """As :meth:`running`, or one that was told to stop and has not ended yet."""
        return self._jobs.get(digest)

    async def _run(self, job: Job) -> None:
        """Run one job to its end; its failures belong to its waiters, never to the nursery."""
        digest = job.layer.descriptor.digest
        try:
            with self._store.held_content(digest), job.scope:
                if job.previous is not None:
                    await job.previous.finished.wait()
                    job.previous = None
                await self._complete(job)
        except Exception as error:
            if not isinstance(error, ModelError):
                logger.exception("fault of this program while fetching blob %s", digest)
            job.failure = error
        finally:
            if self._jobs.get(digest) is job:
                del self._jobs[digest]
            job.end()

    async def _complete(self, job: Job) -> None:
        """Fetch, verify, synchronise, record."""
        store, layer = self._store, job.layer
        digest = layer.descriptor.digest
        download = Download(job, self._registry, self._transfers, self._settings, self._peers)
        while not store.has_bytes(layer):
            # in a thread: it reads the headers of what there is of a tar
            partial = await run_stoppable(lambda _: _opened(store, job))
            size = layer.descriptor.size
            # a begun chunk counts too; of an empty blob nothing can be there
            resumed = size > 0 and partial.missing() != [Range(0, size)]
            job.fresh = not resumed
            try:
                with partial.watch(job.arrived):
                    job.begin(partial, download)
                    right = await self._fetch_and_verify(job, download, partial)
                    if not right and self._is_shown(partial) and not partial.is_all_trusted:
                        # what was shown is right, as far as anybody knows: who else sent some?
                        download.distrust()
                        await self._prove(job, download, partial)
                        right = await self._fetch_and_verify(job, download, partial)
                if right and not partial.is_misread:
                    await run_stoppable(partial.finish)
                    partial.conclude(Verdict.VERIFIED)
                    store.complete_blob(layer)
                    break
                was_shown = self._is_shown(partial) and not partial.is_misread
                if was_shown:
                    partial.conclude(Verdict.SPOILED)
            finally:
                partial.close()
            store.discard_blob(digest)
            if partial.is_misread:
                # nobody has seen what is in it: that takes headers that are trusted
                logger.warning("blob %s: its headers were wrong, fetching anew", digest)
                download.distrust()
                continue
            # what was there before may have been wrong, and another source may be right
            if was_shown or not (download.distrust() or resumed):
                registry = job.source.reference.registry
                error = DigestMismatch(
                    f"what {registry} sent for blob {digest} has another digest: the bytes were "
                    "dropped; if it happens again, the registry's copy or something between it and "
                    "this node is corrupt",
                    reference=job.source.reference,
                    digest=digest,
                )
                if was_shown:
                    self.spoiled(digest, error)
                raise error
            logger.warning("blob %s: the bytes were wrong and were dropped, fetching anew", digest)
        job.complete = True

    def _is_shown(self, partial: PartialBlob) -> bool:
        """Whether readers may have seen some of it: what they have seen stays in their memory."""
        return partial.digest in self.names and partial.is_any_trusted

    async def _prove(self, job: Job, download: Download, partial: PartialBlob) -> None:
        """Replace what a source that is not trusted has sent wrong."""
        digest = job.layer.descriptor.digest
        logger.warning("blob %s: some bytes are wrong, comparing with the registry's", digest)
        failures: list[ModelError] = []

        async def fetch(scope: trio.CancelScope) -> None:
            try:
                await download.fetch(partial)
            except ModelError as error:
                failures.append(error)
                scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, nursery.cancel_scope)
            await job.prove()
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]
        partial.verify_anew()

    async def _fetch_and_verify(self, job: Job, download: Download, partial: PartialBlob) -> bool:
        """Whether the bytes, once all are there, are what the digest says."""
        failures: list[ModelError] = []
        right = False

        async def fetch() -> None:
            await download.fetch(partial)

        async def verify() -> None:
            nonlocal right
            right = await _verified(job, partial)
            nursery.cancel_scope.cancel()

        async def begin_anew() -> None:
            await job.misread.wait()
            nursery.cancel_scope.cancel()

        async def checkpoint() -> None:
            while True:
                await trio.sleep(_CHECKPOINT_SECONDS)
                await run_stoppable(partial.checkpoint)

        async def run(task: Callable[[], Awaitable[None]]) -> None:
            try:
                await task()
            except ModelError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for task in (fetch, verify, checkpoint, begin_anew):
                nursery.start_soon(run, task)
        if failures and not right:
            raise failures[0]
        return right

    def close(self) -> None:
        """Close idle connections, once no job runs any more."""
        self._transfers.close()


def _opened(store: Store, job: Job) -> PartialBlob:
    """What there is of the blob; its chunks are as large as those whose digests are known."""
    digest = job.layer.descriptor.digest
    known = None if job.chunks is None else job.chunks.digests.of(digest)
    size = None if known is None else known.chunk_size
    partial = store.open_partial(job.layer, job.trusted_name, size)
    if job.chunks is not None and known is not None and not partial.expect(known, job.chunks.name):
        logger.info("blob %s was begun in other chunks than those with digests", digest)
    return partial


async def _verified(job: Job, partial: PartialBlob) -> bool:
    """Hash what comes, in order, in a thread only while something comes."""
    while True:
        right = await run_stoppable(lambda stop: partial.verify(stop, _IDLE_SECONDS))
        if right is not None:
            return right
        # what was there before, and proved wrong, is fetched again
        job.look_again()
        while not partial.has(partial.hashing):
            await job.change()
