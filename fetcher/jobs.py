"""One download per blob of a node, whoever wants it.

A job belongs to the nursery of :class:`Jobs`; callers only wait for it. It has what is wanted of
the blob fetched (:mod:`fetcher.schedule`, :mod:`fetcher.download`) while a thread hashes what has
arrived, and makes the blob complete once the digest is right. Its last waiter gone, it stops and
keeps what it has.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Final

import trio

from fetcher.download import Download, DownloadSettings, Source
from fetcher.endings import Ending, Outcome
from fetcher.errors import DigestMismatch, ModelError
from fetcher.excerpts import differing
from fetcher.job import NO_PLACE, Job
from fetcher.ranges import Range
from fetcher.store.chunks import Verdict
from fetcher.threads import run_stoppable
from fetcher.transfers import Transfers

if TYPE_CHECKING:
    import threading
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from fetcher.chunk_lists import KnownList
    from fetcher.modelpack import Layer
    from fetcher.oci import Digest
    from fetcher.peers.client import PeerClient
    from fetcher.registry import Registry
    from fetcher.store.blobs import PartialBlob
    from fetcher.store.store import Store

__all__ = ["Job", "Jobs"]

logger = logging.getLogger(__name__)

_CHECKPOINT_SECONDS: Final = 5.0
"""How much of a download, at most, a power loss takes back."""

_MOST_SAMPLINGS: Final = 3
"""Of a blob whose bytes are wrong, before all that others sent is compared."""

_IDLE_SECONDS: Final = 1.0
"""How long a thread waits for the next bytes to hash, before it is left to others."""


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
    def join(
        self, layer: Layer, source: Source, *, background: bool = True, place: int = NO_PLACE
    ) -> Iterator[Job]:
        """The job that fetches a layer's blob, started if there is none; wait for it inside the
        block.

        All of it is fetched, or, where nobody wants it in the ``background``, only what is wanted
        by :meth:`Job.want` and the like. ``place`` is the layer's in its manifest, if that is
        known. The caller has reserved room for it.
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
        job.place = min(job.place, place)
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
        """Fetch, verify, synchronise, record; again as long as other bytes may be right."""
        download = Download(job, self._registry, self._transfers, self._settings, self._peers)
        with download.attending():
            while not self._store.has_bytes(job.layer):
                outcome = await self._attempt(job, download)
                if outcome.ending is Ending.COMPLETE:
                    break
                self._clear_away(job, download, outcome)
        job.complete = True

    async def _attempt(self, job: Job, download: Download) -> Outcome:
        """Fetch what is not there, and verify the whole."""
        # in a thread: it reads the headers of what there is of a tar
        known = job.chunks
        partial = await run_stoppable(lambda _: _opened(self._store, job, known))
        size = job.layer.descriptor.size
        # a begun chunk counts too; of an empty blob nothing can be there
        job.fresh = not size or partial.missing() == [Range(0, size)]
        try:
            with partial.watch(job.arrived):
                job.begin(partial, download, known)
                right = await self._fetch_and_verify(job, download, partial)
                if not right and job.is_recut and not partial.is_misread:
                    return Outcome(Ending.RECUT)
                outcome = Outcome(Ending.COMPLETE)
                if not right and partial.is_misread:
                    download.leave_peers()
                elif not right:
                    outcome = await self._repair(job, download, partial)
            if partial.is_misread:
                return Outcome(Ending.MISREAD)
            if outcome.ending is Ending.COMPLETE:
                await run_stoppable(partial.finish)
                partial.conclude(Verdict.VERIFIED)
                download.judge_peers(hearsay_is_right=True)
                self._store.complete_blob(job.layer, job.proven_name)
                job.complete = True
                await run_stoppable(lambda _: _close(job, partial))
            elif outcome.ending is Ending.WRONG and self._is_shown(partial):
                partial.conclude(Verdict.SPOILED)
                return Outcome(Ending.SPOILED)
            return outcome
        finally:
            partial.close()

    async def _repair(self, job: Job, download: Download, partial: PartialBlob) -> Outcome:
        """The bytes are wrong: have those replaced that are, where somebody can say which."""
        if job.trusted_source is not None and (
            await self._replace_differing(job, download, partial)
            or await self._sample(job, download, partial)
        ):
            return Outcome(Ending.COMPLETE)
        among_peers = download.leave_peers()
        if partial.is_all_trusted or not (among_peers or self._is_shown(partial)):
            return Outcome(Ending.WRONG, among_peers)
        # what was shown is right, as far as anybody knows: who else sent some?
        others = among_peers or download.distrust()
        if job.trusted_source is None:
            await run_stoppable(partial.drop_untrusted)
            return Outcome(Ending.DOUBTED, others)
        await self._compare(job, download, partial, [Range(0, partial.size)])
        partial.verify_anew()
        download.blame_peers(partial.replaced)
        right = await self._fetch_and_verify(job, download, partial)
        return Outcome(Ending.COMPLETE if right else Ending.WRONG, among_peers)

    async def _replace_differing(self, job: Job, download: Download, partial: PartialBlob) -> bool:
        """Have those chunks replaced of which a small part is another one than the registry's;
        whether the whole is right then.
        """
        wrong = await differing(partial, download.of_peers(partial), download.excerpt)
        if not wrong:
            return False
        await self._compare(job, download, partial, map(partial.chunk, wrong))
        download.blame_peers(partial.replaced & wrong)
        return await self._fetch_and_verify(job, download, partial)

    async def _sample(self, job: Job, download: Download, partial: PartialBlob) -> bool:
        """Compare a chunk of each peer that sent some, and have all fetched again that came from
        those who sent a wrong one; whether the whole is right then.
        """
        for _ in range(_MOST_SAMPLINGS):
            samples = download.peer_samples(partial)
            if not samples:
                return False
            await self._compare(job, download, partial, map(partial.chunk, samples))
            wrong = partial.replaced & samples
            if not wrong:
                return False
            found = [one for one in download.sent_by_liars(wrong) if not partial.is_trusted(one)]
            await run_stoppable(functools.partial(_drop, partial, found))
            job.look_again()
            if await self._fetch_and_verify(job, download, partial):
                return True
        return False

    def _clear_away(self, job: Job, download: Download, outcome: Outcome) -> None:
        """Drop what is wrong, so that it comes again from others. Raises what everybody is to be
        told where nobody is left who may have the right bytes.
        """
        digest, ending = job.layer.descriptor.digest, outcome.ending
        if ending is Ending.DOUBTED:
            if not outcome.others:
                raise _wrong_bytes(job)
            return
        if ending is Ending.RECUT and digest in self.names:
            # readers may have begun with it as it is
            return
        self._store.discard_blob(digest)
        if ending is Ending.RECUT:
            logger.info("blob %s: fetching anew in chunks whose digests came", digest)
            return
        if ending is Ending.SPOILED:
            error = _wrong_bytes(job)
            self.spoiled(digest, error)
            raise error
        others = download.distrust() or outcome.others
        if ending is Ending.MISREAD:
            logger.warning("blob %s: its headers were wrong, fetching anew", digest)
            return
        # what was there before may have been wrong, and another source may be right
        if job.fresh and not others:
            raise _wrong_bytes(job)
        logger.warning("blob %s: the bytes were wrong and were dropped, fetching anew", digest)

    def _is_shown(self, partial: PartialBlob) -> bool:
        """Whether readers may have seen some of it: what they have seen stays in their memory."""
        return partial.digest in self.names and partial.is_any_trusted

    async def _compare(
        self, job: Job, download: Download, partial: PartialBlob, parts: Iterable[Range]
    ) -> None:
        """Replace what a source that is not trusted has sent wrong of some parts."""
        digest, wanted = job.layer.descriptor.digest, list(parts)
        size = sum(map(len, wanted))
        logger.warning(
            "blob %s: some bytes are wrong, comparing %d of them with the registry's", digest, size
        )
        failures: list[ModelError] = []

        async def fetch(scope: trio.CancelScope) -> None:
            try:
                await download.fetch(partial)
            except ModelError as error:
                failures.append(error)
                scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch, nursery.cancel_scope)
            async with trio.open_nursery() as proving:
                for part in wanted:
                    proving.start_soon(job.prove, part)
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]

    async def _fetch_and_verify(self, job: Job, download: Download, partial: PartialBlob) -> bool:
        """Whether the bytes, once all are there, are what the digest says."""
        failures: list[ModelError] = []
        right = False

        async def fetch() -> None:
            await download.fetch(partial)

        async def verify() -> None:
            nonlocal right
            right = await _verified(job, download, partial)
            nursery.cancel_scope.cancel()

        async def begin_anew() -> None:
            await job.anew.wait()
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


def _wrong_bytes(job: Job) -> DigestMismatch:
    registry, digest = job.source.reference.registry, job.layer.descriptor.digest
    return DigestMismatch(
        f"what {registry} sent for blob {digest} has another digest: the bytes were dropped; if it "
        "happens again, the registry's copy or something between it and this node is corrupt",
        reference=job.source.reference,
        digest=digest,
    )


def _opened(store: Store, job: Job, known: KnownList | None) -> PartialBlob:
    """What there is of the blob; its chunks are as large as those whose digests are known."""
    digest = job.layer.descriptor.digest
    digests = None if known is None else known.digests.of(digest)
    size = None if digests is None else digests.chunk_size
    partial = store.open_partial(job.layer, job.trusted_name, size)
    if known is not None and digests is not None and not partial.expect(digests, known.name):
        logger.info("blob %s was begun in other chunks than those with digests", digest)
    return partial


def _close(job: Job, partial: PartialBlob) -> None:
    """Close what is complete, in a thread: with the last descriptor of the map its blocks go, and
    the disk may be busy.
    """
    try:
        partial.close()
    except OSError as error:
        # all of it is on the disk and recorded
        logger.warning("blob %s: closing its files: %s", job.layer.descriptor.digest, error)


def _drop(partial: PartialBlob, chunks: Iterable[int], _: threading.Event) -> None:
    """What liars have sent is not believed."""
    for one in chunks:
        partial.drop(one)


async def _verified(job: Job, download: Download, partial: PartialBlob) -> bool:
    """Hash what comes, in order, in a thread only while something comes."""
    while True:
        if partial.is_awaiting:
            await job.chunk(partial.hashing)
        right = await run_stoppable(lambda stop: partial.verify(stop, _IDLE_SECONDS))
        if partial.is_contradicted:
            job.contradicted()
        else:
            download.blame_peers(partial.disproved)
            download.suspect_peers(partial.doubted)
            partial.disproved, partial.doubted = set(), set()
        if right is not None:
            return right
        # what was there before, and proved wrong, is fetched again
        job.look_again()
