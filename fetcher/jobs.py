"""One download per blob of a node, whoever wants it.

A job belongs to the nursery of :class:`Jobs`; callers only wait for it. It has the blob's missing
ranges fetched (:mod:`fetcher.download`) while a thread hashes what has arrived, and makes the blob
complete once the digest is right. Its last waiter gone, it stops and keeps what it has.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from typing import TYPE_CHECKING, Final

import trio

from fetcher.download import Download, DownloadSettings, Source
from fetcher.errors import DigestMismatch, InProgress, ModelError
from fetcher.ranges import Range
from fetcher.threads import run_stoppable
from fetcher.transfers import Transfers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fetcher.modelpack import Layer
    from fetcher.oci import Digest
    from fetcher.registry import Registry
    from fetcher.store.blobs import PartialBlob
    from fetcher.store.store import Store

logger = logging.getLogger(__name__)

_CHECKPOINT_SECONDS: Final = 5.0
"""How much of a download, at most, a power loss takes back."""


class Job:
    """One blob on its way. Made by :meth:`Jobs.join`."""

    def __init__(self, layer: Layer, source: Source, previous: Job | None) -> None:
        self.layer = layer
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

    def give_up(self, source: Source) -> bool:
        """``source`` refuses, lacks or spoils the blob: whether there is another one to ask."""
        name = source.reference.name
        if self._sources[name] is source:
            self._failed.add(name)
            # to the end, behind those that were not tried
            self._sources[name] = self._sources.pop(name)
        return self.source.reference.name not in self._failed

    async def wait(self) -> None:
        """Wait until the blob is complete. Raises what the job failed with."""
        await self.finished.wait()
        if self.failure is not None:
            # every waiter gets an exception of its own: a traceback belongs to one task
            raise copy.copy(self.failure) from self.failure
        if not self.complete:
            digest = self.layer.descriptor.digest
            raise InProgress(f"the download of blob {digest} was stopped: ask again")


class Jobs:
    """All downloads of the node. Belongs to the trio thread."""

    def __init__(
        self, store: Store, registry: Registry, settings: DownloadSettings, nursery: trio.Nursery
    ) -> None:
        """Jobs run in ``nursery``."""
        self._store = store
        self._registry = registry
        self._nursery = nursery
        self._settings = settings
        self._transfers = Transfers(settings.connections, settings.transfer)
        self._jobs: dict[Digest, Job] = {}

    @contextlib.contextmanager
    def join(self, layer: Layer, source: Source) -> Iterator[Job]:
        """The job that fetches a layer's blob, started if there is none; wait for it inside the
        block.
        """
        digest = layer.descriptor.digest
        job = self._jobs.get(digest)
        if job is None or job.scope.cancel_called or job.finished.is_set():
            job = Job(layer, source, previous=job)
            self._jobs[digest] = job
            self._nursery.start_soon(self._run, job, name=f"job {digest.short}")
        job.offer(source)
        job.waiters += 1
        try:
            yield job
        finally:
            job.waiters -= 1
            if job.waiters == 0:
                job.scope.cancel()

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
            job.finished.set()

    async def _complete(self, job: Job) -> None:
        """Fetch, verify, synchronise, record."""
        store, layer = self._store, job.layer
        digest = layer.descriptor.digest
        download = Download(job, self._registry, self._transfers, self._settings)
        while not store.has_bytes(layer):
            # in a thread: it reads the headers of what there is of a tar
            partial = await run_stoppable(lambda _: store.open_partial(layer))
            size = layer.descriptor.size
            # a begun chunk counts too; of an empty blob nothing can be there
            resumed = size > 0 and partial.missing() != [Range(0, size)]
            job.fresh = not resumed
            job.partial = partial
            try:
                right = await self._fetch_and_verify(download, partial)
                if right:
                    await run_stoppable(partial.finish)
                    store.complete_blob(layer)
                    break
            finally:
                partial.close()
            store.discard_blob(digest)
            # what was there before may have been wrong, and another source may be right
            if not download.distrust() and not resumed:
                registry = job.source.reference.registry
                raise DigestMismatch(
                    f"what {registry} sent for blob {digest} has another digest: the bytes were "
                    "dropped; if it happens again, the registry's copy or something between it and "
                    "this node is corrupt",
                    reference=job.source.reference,
                    digest=digest,
                )
            logger.warning("blob %s: the bytes were wrong and were dropped, fetching anew", digest)
        job.complete = True

    async def _fetch_and_verify(self, download: Download, partial: PartialBlob) -> bool:
        """Whether the bytes, once all are there, are what the digest says."""
        failures: list[ModelError] = []
        right = False

        async def fetch(scope: trio.CancelScope) -> None:
            try:
                await download.fetch(partial)
            except ModelError as error:
                failures.append(error)
                scope.cancel()

        async def verify(scope: trio.CancelScope) -> None:
            nonlocal right
            try:
                right = await run_stoppable(partial.verify)
            except ModelError as error:
                failures.append(error)
            scope.cancel()

        async def checkpoint(scope: trio.CancelScope) -> None:
            try:
                while True:
                    await trio.sleep(_CHECKPOINT_SECONDS)
                    await run_stoppable(partial.checkpoint)
            except ModelError as error:
                failures.append(error)
                scope.cancel()

        async with trio.open_nursery() as nursery:
            for task in (fetch, verify, checkpoint):
                nursery.start_soon(task, nursery.cancel_scope)
        if failures and not right:
            raise failures[0]
        return right

    def close(self) -> None:
        """Close idle connections, once no job runs any more."""
        self._transfers.close()
