"""One download per blob of a node, whoever wants it.

A job belongs to the nursery of :class:`Jobs`; callers only wait for it. It fetches the blob's
missing ranges over several connections while a thread hashes what has arrived, and makes the blob
complete once the digest is right. Its last waiter gone, it stops and keeps what it has.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import logging
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from fetcher.errors import (
    AccessDenied,
    DigestMismatch,
    InProgress,
    ModelError,
    Unauthenticated,
    Unavailable,
)
from fetcher.ranges import Range
from fetcher.threads import run_stoppable
from fetcher.transport import Connection, RangeIgnored, TransferSettings

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator

    from fetcher.credentials import Keychain
    from fetcher.oci import Descriptor, Digest, Reference
    from fetcher.registry import Registry
    from fetcher.store.blobs import ChunkSink, PartialBlob
    from fetcher.store.store import Store

logger = logging.getLogger(__name__)

_RANGE_CHUNKS: Final = 8
"""Chunks that one request asks for: enough to hide a round trip, few enough to deal out."""


@dataclass(frozen=True, slots=True)
class JobSettings:
    """How blobs are fetched. Times are seconds."""

    connections: int = 8
    """Transfers of the whole node at one time."""
    attempts: int = 6
    """Failures in a row, without a byte between them, after which a job gives up."""
    first_backoff: float = 0.5
    longest_backoff: float = 20.0
    longest_retry_after: float = 120.0
    transfer: TransferSettings = field(default_factory=TransferSettings)


@dataclass(frozen=True, slots=True)
class Source:
    """Where to ask for a blob, and as whom."""

    reference: Reference
    keychain: Keychain = field(repr=False)


class Job:
    """One blob on its way. Made by :meth:`Jobs.join`."""

    def __init__(self, blob: Descriptor, previous: Job | None) -> None:
        self.blob = blob
        self.previous = previous
        """A job of the same blob that was told to stop and may not have ended yet."""
        self.waiters = 0
        self.scope = trio.CancelScope()
        self.finished = trio.Event()
        self.complete = False
        self.failure: Exception | None = None
        self.partial: PartialBlob | None = None

    @property
    def done(self) -> int:
        """Bytes of the blob that are there."""
        if self.complete:
            return self.blob.size
        return self.partial.done if self.partial else 0

    async def wait(self) -> None:
        """Wait until the blob is complete. Raises what the job failed with."""
        await self.finished.wait()
        if self.failure is not None:
            # every waiter gets an exception of its own: a traceback belongs to one task
            raise copy.copy(self.failure) from self.failure
        if not self.complete:
            raise InProgress(f"the download of blob {self.blob.digest} was stopped: ask again")


class Jobs:
    """All downloads of the node. Belongs to the trio thread."""

    def __init__(
        self, store: Store, registry: Registry, settings: JobSettings, nursery: trio.Nursery
    ) -> None:
        """Jobs run in ``nursery``."""
        self.store = store
        self.registry = registry
        self.settings = settings
        self._nursery = nursery
        self._slots = trio.CapacityLimiter(settings.connections)
        self._idle: list[Connection] = []
        self._jobs: dict[Digest, Job] = {}

    @contextlib.contextmanager
    def join(self, blob: Descriptor, source: Source) -> Iterator[Job]:
        """The job that fetches ``blob``, started if there is none; wait for it inside the block.

        The source of whoever starts a job serves all who join it.
        """
        job = self._jobs.get(blob.digest)
        if job is None or job.scope.cancel_called or job.finished.is_set():
            job = Job(blob, previous=job)
            self._jobs[blob.digest] = job
            self._nursery.start_soon(self._run, job, source, name=f"job {blob.digest.short}")
        job.waiters += 1
        try:
            yield job
        finally:
            job.waiters -= 1
            if job.waiters == 0:
                job.scope.cancel()

    async def _run(self, job: Job, source: Source) -> None:
        """Run one job to its end; its failures belong to its waiters, never to the nursery."""
        try:
            with job.scope:
                if job.previous is not None:
                    await job.previous.finished.wait()
                    job.previous = None
                await _Download(self, job, source).run()
        except Exception as error:
            if not isinstance(error, ModelError):
                logger.exception("fault of this program while fetching blob %s", job.blob.digest)
            job.failure = error
        finally:
            if self._jobs.get(job.blob.digest) is job:
                del self._jobs[job.blob.digest]
            job.finished.set()

    async def transfer(self, work: Callable[[Connection, threading.Event], None]) -> None:
        """Run ``work`` in a thread with one of the node's connections, once one is free."""
        async with self._slots:
            connection = self._idle.pop() if self._idle else Connection(self.settings.transfer)
            try:
                await run_stoppable(lambda stop: work(connection, stop))
            finally:
                self._idle.append(connection)

    def close(self) -> None:
        """Close idle connections, once no job runs any more."""
        while self._idle:
            self._idle.pop().close()


class _Download:
    """The fetching of one blob."""

    def __init__(self, jobs: Jobs, job: Job, source: Source) -> None:
        self._jobs = jobs
        self._job = job
        self._blob = job.blob
        self._source = source
        self._failure: ModelError | None = None
        self._ranges_ignored = False
        self._answered = trio.Event()
        """The first request was answered with a range: others may be made beside it."""

    async def run(self) -> None:
        """Fetch, verify, synchronise, record."""
        store = self._jobs.store
        while not store.has_blob(self._blob):
            partial = store.open_partial(self._blob)
            resumed = partial.done > 0
            self._job.partial = partial
            try:
                right = await self._fetch_and_verify(partial)
                if right:
                    await run_stoppable(partial.sync)
                    store.complete_blob(self._blob)
                    break
            finally:
                partial.close()
            store.discard_blob(self._blob.digest)
            if not resumed:
                raise DigestMismatch(
                    f"what {self._source.reference.registry} sent for blob {self._blob.digest} has "
                    "another digest: the bytes were dropped; if it happens again, the registry's "
                    "copy or something between it and this node is corrupt",
                    reference=self._source.reference,
                    digest=self._blob.digest,
                )
            # what an earlier process left may have been wrong: once more, from nothing
            logger.warning("blob %s: resumed bytes were wrong, fetching anew", self._blob.digest)
        self._job.complete = True

    async def _fetch_and_verify(self, partial: PartialBlob) -> bool:
        right = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fetch_all, partial, nursery.cancel_scope)
            right = await run_stoppable(partial.verify)
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure
        return right

    async def _fetch_all(self, partial: PartialBlob, whole: trio.CancelScope) -> None:
        """Fetch what is missing; a failure ends ``whole``, verification too."""
        pieces = collections.deque(
            piece
            for missing in partial.missing()
            for piece in missing.split(_RANGE_CHUNKS * partial.chunk_size)
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fetch_first, partial, pieces, nursery.cancel_scope)
            await self._answered.wait()
            for _ in range(min(len(pieces), self._jobs.settings.connections - 1)):
                nursery.start_soon(self._fetch_pieces, partial, pieces, nursery.cancel_scope)
        if self._ranges_ignored and self._failure is None:
            await self._fetch_whole(partial)
        if self._failure is not None:
            whole.cancel()

    async def _fetch_first(
        self, partial: PartialBlob, pieces: collections.deque[Range], all_pieces: trio.CancelScope
    ) -> None:
        """Fetch alone until a range was answered: a server without ranges sends all at once."""
        await self._fetch_pieces(partial, pieces, all_pieces)
        self._answered.set()

    async def _fetch_pieces(
        self, partial: PartialBlob, pieces: collections.deque[Range], all_pieces: trio.CancelScope
    ) -> None:
        try:
            while pieces:
                piece = pieces.popleft()
                # a whole answer to the first piece has brought the others along
                if not partial.covers(piece):
                    await self._fetch(partial.sink(piece))
        except RangeIgnored:
            self._ranges_ignored = True
            all_pieces.cancel()
        except ModelError as error:
            self._failure = self._failure or error
            all_pieces.cancel()

    async def _fetch_whole(self, partial: PartialBlob) -> None:
        """Take the whole blob in one answer, from a server that knows no ranges."""
        logger.info(
            "%s ignores ranges: blob %s comes over one connection",
            self._source.reference.registry,
            self._blob.digest,
        )
        failures = 0
        while partial.missing():
            before = partial.done
            try:
                # after a cut such a server starts at byte 0, and so does the sink
                await self._ask(partial.sink(Range(0, self._blob.size)), renew=False)
            except Unavailable as error:
                failures = 1 if partial.done > before else failures + 1
                if not await self._back_off(error, failures):
                    self._failure = error
                    return
            except ModelError as error:
                self._failure = error
                return

    async def _fetch(self, sink: ChunkSink) -> None:
        """Fetch what ``sink`` still wants, again and again from where it stopped."""
        failures = 0
        renew = False
        while sink.remaining:
            before = sink.remaining
            try:
                await self._ask(sink, renew=renew)
            except (Unauthenticated, AccessDenied):
                if renew and sink.remaining == before:
                    raise
                # tokens and signed addresses expire in mid-pull: ask for new ones, once
                renew = True
            except RangeIgnored:
                raise
            except Unavailable as error:
                failures = 1 if sink.remaining != before else failures + 1
                renew = False
                if not await self._back_off(error, failures):
                    raise

    async def _ask(self, sink: ChunkSink, *, renew: bool) -> None:
        access = await self._jobs.registry.blob_access(
            self._source.reference, self._blob.digest, self._source.keychain, renew=renew
        )
        blob = self._blob
        watched = sink if self._answered.is_set() else _Watched(sink, self._answered)
        await self._jobs.transfer(
            lambda connection, stop: connection.fetch(
                access, blob.digest, blob.size, sink.remaining, watched, stop
            )
        )

    async def _back_off(self, error: Unavailable, failures: int) -> bool:
        """Wait before another try; false when there have been enough."""
        settings = self._jobs.settings
        if failures >= settings.attempts:
            return False
        pause = min(settings.first_backoff * 2 ** (failures - 1), settings.longest_backoff)
        pause *= random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
        if error.retry_after is not None:
            pause = max(pause, min(error.retry_after, settings.longest_retry_after))
        logger.info("%s; trying again in %.1f s", error.message, pause)
        await trio.sleep(pause)
        return True


class _Watched:
    """A sink that tells the trio thread when the first bytes of a range arrive."""

    def __init__(self, sink: ChunkSink, answered: trio.Event) -> None:
        self._sink = sink
        self._answered = answered
        self._token = trio.lowlevel.current_trio_token()
        self._telling = True

    def whole(self) -> bool:
        # no range: what follows comes over this connection alone
        self._telling = False
        return self._sink.whole()

    def __call__(self, data: bytes) -> bool:
        if self._telling:
            self._telling = False
            self._token.run_sync_soon(self._answered.set)
        return self._sink(data)
