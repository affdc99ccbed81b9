"""One blob on its way, as those who want it have it.

Callers want all of the blob, or some bytes of it that they may read before the rest is there:
:meth:`Job.want`. Whether these may be shown to anybody is another question, as nobody knows yet
whether they are right: :attr:`Job.trusted_name` says by whose word they are. What is done for them
is in :mod:`fetcher.jobs`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from fetcher.errors import InProgress, ModelError
from fetcher.peers.owners import Deal
from fetcher.ranges import Range
from fetcher.schedule import Schedule, Urgency, Want
from fetcher.threads import run_stoppable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fetcher.chunk_lists import KnownList
    from fetcher.download import Download, Source
    from fetcher.modelpack import Layer
    from fetcher.schedule import Piece
    from fetcher.store.blobs import PartialBlob

logger = logging.getLogger(__name__)

_BEGUN: Final = 0.02
"""The part of a blob from which on it is not worth to begin anew for a list of other chunks."""
NO_PLACE: Final = 2**31
"""Behind all that have one."""


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
        self.is_pulled = False
        """Whether a pull waits for it, whose model's name has to have all blobs of that."""
        self._failed: set[str] = set()
        """The names of sources that are of no use, until somebody offers one anew."""
        self.previous = previous
        """A job of the same blob that was told to stop and may not have ended yet."""
        self.waiters = 0
        self.deal = Deal.of(layer.descriptor.digest, layer.position)
        """How its chunks are dealt out among peers."""
        self.adopted: set[int] = set()
        """Chunks that this node fetches itself, whoever owns them."""
        self.place = NO_PLACE
        """Of the blob in the manifest that it is fetched for; peers are asked in this order."""
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
        self._awaited = -1
        """The chunk that is waited for as a whole."""
        self._came = trio.Event()
        """It has come."""
        self._token = trio.lowlevel.current_trio_token()
        self.trusted_name = trusted_name
        """The name by which bytes are trusted: a registry and a repository."""
        self.chunks = source.chunks
        """What proves single chunks; of the first who knew it, but not hearsay where there is
        better."""
        self._contradicted = False
        """What proved single chunks was wrong: no other one is believed."""
        self.anew = trio.Event()
        """The blob has to begin anew: see :attr:`PartialBlob.is_misread` and :attr:`is_recut`."""
        self.is_recut = False
        """Whether it begins anew in the chunks whose digests came, as next to nothing is there."""
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
    def proven_name(self) -> str | None:
        """The name below which all of the blob was had, where a pull wants that recorded; None
        where bytes may have come by several names.
        """
        [name, *others] = self._sources
        return name if self.is_pulled and self.fresh and not others else None

    def offer(self, source: Source) -> None:
        """Fetch from there too: with newer credentials for a name that is known, as they expire,
        and else where all that were offered before fail.
        """
        name = source.reference.name
        self._failed.discard(name)
        self._sources[name] = source
        known = source.chunks
        if known is None or self._contradicted or self.complete:
            return
        if self.chunks is None or (self.chunks.is_hearsay and not known.is_hearsay):
            self._take_chunks(known)

    def _take_chunks(self, known: KnownList) -> None:
        """Have chunks proven by these digests, also those that came before."""
        if self.partial is None or self._expect(known, self.partial):
            self.chunks = known

    def _expect(self, known: KnownList, partial: PartialBlob) -> bool:
        """Whether these digests are of use: of other chunks they are where the blob can begin anew,
        as next to nothing of it is there.
        """
        digests = known.digests.of(self.layer.descriptor.digest)
        if digests is None:
            return False
        if not partial.fits(digests):
            self.is_recut |= not known.is_hearsay and self.done <= partial.size * _BEGUN
            if self.is_recut:
                self.anew.set()
            return self.is_recut
        partial.expect(digests, known.name)
        self._acquit()
        self.look_again()
        return True

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
        # after hearsay the registry may yet have a list
        self._contradicted = not self.chunks.is_hearsay
        self.chunks.contradicted()
        self.chunks = None
        if self.partial is not None:
            self.partial.expect(None)
            self._acquit()
            self.look_again()

    def _acquit(self) -> None:
        """Whoever was suspected by hearsay is so no more: that is not gone by any more."""
        if self._download is not None:
            self._download.judge_peers(hearsay_is_right=False)

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

    async def prove(self, wanted: Range) -> None:
        """Have what is not trusted of it from a trusted source, to be compared or replaced."""
        await self._have(Want(wanted, Urgency.WHOLE, trusted=True))

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
    def filled(self, order: int) -> Iterator[None]:
        """Want all of it inside the block, as :meth:`fill` does."""
        with self._scheduled(Want(self._everything, Urgency.BACKGROUND, order)):
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
            self.anew.set()
            while self.partial is partial and not self.finished.is_set():
                await self.change()
        elif not untrusted and self.partial is partial:
            self._indexed = await run_stoppable(partial.write_index)
            if not self._indexed:
                # it was just closed: the job ends, or begins anew
                await self.change()

    def adopt(self, part: Range) -> None:
        """Fetch the chunks of ``part`` from mirrors and the registry, whoever owns them by this
        node's count. The blob is open.
        """
        if self.partial is None or self._download is None:
            return
        chunks = set(self.partial.chunks(part)) - self.adopted
        self.adopted |= chunks
        if chunks:
            self._download.adopt(chunks)

    # -- what comes --------------------------------------------------------------------------------

    def look_again(self) -> None:
        """Some of what was there may be there no more."""
        self.schedule.look_again()
        if self._download is not None:
            self._download.wake()

    def begin(
        self, partial: PartialBlob, download: Download, expected: KnownList | None = None
    ) -> None:
        """The blob is open, and fetched from now on; by what is ``expected`` its chunks are proven
        already.
        """
        self.partial, self._download = partial, download
        self.anew, self.is_recut = trio.Event(), False
        if self.chunks is not None and self.chunks is not expected:
            # they came while it was opened
            self._expect(self.chunks, partial)
        self.schedule.look_again()
        self._look()

    def _has_awaited(self) -> bool:
        return self._awaited >= 0 and self.partial is not None and self.partial.has(self._awaited)

    def arrived(self, number: int) -> None:
        """Bytes of a chunk came, in whichever thread."""
        self.moved = time.monotonic()
        partial = self.partial
        # who waits for a range waits for whole chunks: a piece of one need not wake the loop
        is_whole = partial is not None and partial.has(number)
        if self._listening or (is_whole and self._waiting) or self._has_awaited():
            self._token.run_sync_soon(self._look, idempotent=True)

    def _look(self) -> None:
        """See who has what he waits for."""
        if self._listening:
            self._listening = False
            self._change.set()
        if self._has_awaited():
            self._awaited = -1
            self._came.set()
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

    async def chunk(self, number: int) -> None:
        """Wait until a whole chunk is there, or the job has ended; for one task at a time.

        What comes of the others wakes nobody.
        """
        self._awaited, self._came = number, trio.Event()
        # in this order: what comes from now on is told
        if self._has_awaited() or self.finished.is_set():
            self._awaited = -1
            await trio.lowlevel.checkpoint()
        else:
            await self._came.wait()

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
        self._came.set()
        for waiter in list(self._waiting):
            self._end(waiter, None)
