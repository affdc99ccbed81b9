"""What a node fetches for others: the chunks that it owns and lacks, with the asker's own rights.

A blob that is filled in is held for a while after the last request, so that the requests for its
other chunks find it open. Room is reserved for the chunks that are wanted and for nothing else, and
no model of this node is evicted for them. What has arrived stays in the store as long as there is
room.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from fetcher.credentials import Anonymous, PassedOn
from fetcher.download import Source
from fetcher.errors import InProgress, ModelError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from fetcher.jobs import Job, Jobs
    from fetcher.modelpack import Layer
    from fetcher.oci import Digest
    from fetcher.peers.access import Asker
    from fetcher.ranges import Range
    from fetcher.store.store import Store

logger = logging.getLogger(__name__)

_LINGER_SECONDS: Final = 30.0


@dataclass(eq=False, slots=True)
class _Fill:
    """One blob that is kept open for those who ask for parts of it."""

    layer: Layer
    source: Source
    """Where it is fetched from, as its first asker."""
    users: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ready: trio.Event = field(default_factory=trio.Event)
    job: Job | None = None
    failure: ModelError | None = None
    size: int = 0
    """Bytes of the blob that room is reserved for."""
    chunks: set[Range] = field(default_factory=set)
    """Those that are among them, beside what was there before."""
    reserving: trio.Lock = field(default_factory=trio.Lock)


@dataclass(eq=False, slots=True)
class Wanting:
    """A part that is being fetched for somebody."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    failure: ModelError | None = None
    ended: bool = False


class Fills:
    """The fills of a node. Belongs to the trio thread."""

    def __init__(
        self, store: Store, jobs: Jobs, nursery: trio.Nursery, linger: float = _LINGER_SECONDS
    ) -> None:
        """They run in ``nursery``, and each for ``linger`` seconds after its last use."""
        self._store = store
        self._jobs = jobs
        self._nursery = nursery
        self._linger = linger
        self._fills: dict[Digest, _Fill] = {}

    @contextlib.asynccontextmanager
    async def filling(self, asker: Asker, layer: Layer) -> AsyncIterator[Job]:
        """The job of the asker's blob; started if there is none.

        Raises :class:`ModelError`, such as ``NoSpace``.
        """
        digest = layer.descriptor.digest
        source = Source(asker.reference, asker.keychain, hops=asker.hops + 1)
        fill = self._fills.get(digest)
        if fill is None or fill.scope.cancel_called:
            # one that was told to stop holds its job no longer than it takes to stop
            fill = self._fills[digest] = _Fill(layer, source)
            self._nursery.start_soon(self._keep, fill, name=f"fill {digest.short}")
        fill.users += 1
        fill.scope.deadline = math.inf
        try:
            await fill.ready.wait()
            yield self._renewed(fill, source)
        finally:
            fill.users -= 1
            if not fill.users:
                fill.scope.deadline = trio.current_time() + self._linger

    def _renewed(self, fill: _Fill, source: Source) -> Job:
        """The job, which goes on with the newest of what askers showed, but not of our own."""
        if fill.failure is not None:
            raise copy.copy(fill.failure) from fill.failure
        if fill.job is None:
            raise InProgress("a download that was just stopped: ask again")
        if isinstance(fill.job.source.keychain, PassedOn | Anonymous):
            fill.job.offer(source)
        return fill.job

    async def _keep(self, fill: _Fill) -> None:
        """Hold one blob open until nobody has wanted it for a while, or it is complete."""
        digest, store = fill.layer.descriptor.digest, self._store
        try:
            with store.held_content(digest), fill.scope:
                running = self._jobs.running(digest)
                # one that runs goes on as it does, with rights that can be renewed
                source = fill.source if running is None else running.source
                layer = fill.layer if running is None else running.layer
                fill.size = await store.begun_bytes(layer)
                await store.reserve_part(_said(source), layer, fill.size)
                with self._jobs.join(layer, source, background=False) as job:
                    fill.job = job
                    fill.ready.set()
                    await job.finished.wait()
        except ModelError as error:
            logger.warning("blob %s is not fetched for others: %s", digest, error.message)
            fill.failure = error
        finally:
            if self._fills.get(digest) is fill:
                del self._fills[digest]
            fill.ready.set()
            store.garbage.ask()

    @contextlib.contextmanager
    def wanting(
        self,
        job: Job,
        part: Range,
        ended: Callable[[], None],
        *,
        urgent: bool = False,
        adopts: bool = False,
    ) -> Iterator[Wanting]:
        """Have ``part`` fetched inside the block, before what nobody waits for; ``urgent`` as what
        a pod of this node waits for; ``adopts`` says that it is this node's
        to fetch, whatever its own count of owners is.

        ``ended`` is called when it is there, or has failed.
        """
        wanting = Wanting()
        self._nursery.start_soon(self._want, job, part, wanting, ended, urgent, adopts)
        try:
            yield wanting
        finally:
            wanting.scope.cancel()

    async def _want(
        self,
        job: Job,
        part: Range,
        wanting: Wanting,
        ended: Callable[[], None],
        urgent: bool,
        adopts: bool,
    ) -> None:
        try:
            with wanting.scope:
                await self._reserve(job, part)
                if adopts:
                    job.adopt(part)
                await (job.want(part) if urgent else job.pass_on(part))
        except ModelError as error:
            wanting.failure = error
        finally:
            wanting.ended = True
            ended()

    async def _reserve(self, job: Job, part: Range) -> None:
        """Have room for the chunks of ``part``. Raises :class:`ModelError`, such as ``NoSpace``."""
        fill = self._fills.get(job.layer.descriptor.digest)
        while job.partial is None and not job.finished.is_set():
            # its chunks are known once it is open
            await job.change()
        if fill is None or fill.job is not job or job.partial is None:
            return
        partial = job.partial
        async with fill.reserving:
            fresh = set(map(partial.chunk, partial.chunks(part))) - fill.chunks
            more = sum(map(len, fresh))
            if more:
                await self._store.reserve_part(_said(fill.source), fill.layer, fill.size + more)
                fill.size += more
                fill.chunks |= fresh


def _said(source: Source) -> str:
    return f"a part of {source.reference} for other nodes"
