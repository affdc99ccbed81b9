"""Fetching what a blob lacks: which range next, how many at once, and what to do when it fails.

Ranges are fetched over several connections, each from the byte where it stopped. The first request
of a blob is alone until a range was answered: a server that ignores ranges sends the whole blob,
once.
"""

from __future__ import annotations

import collections
import logging
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import trio

from fetcher.errors import AccessDenied, ModelError, Unauthenticated, Unavailable
from fetcher.ranges import Range
from fetcher.threads import run_stoppable
from fetcher.transport import Connection, RangeIgnored, TransferSettings

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from fetcher.credentials import Keychain
    from fetcher.modelpack import Layer
    from fetcher.oci import Reference
    from fetcher.registry import Registry
    from fetcher.store.blobs import ChunkSink, PartialBlob

logger = logging.getLogger(__name__)

_RANGE_CHUNKS: Final = 8
"""Chunks that one request asks for: enough to hide a round trip, few enough to deal out."""


@dataclass(frozen=True, slots=True)
class DownloadSettings:
    """How blobs are fetched. Times are seconds."""

    connections: int = 8
    """Transfers of the whole node at one time."""
    attempts: int = 6
    """Failures in a row, without a byte between them, after which a blob is given up."""
    first_backoff: float = 0.5
    longest_backoff: float = 20.0
    longest_retry_after: float = 120.0
    transfer: TransferSettings = field(default_factory=TransferSettings)


@dataclass(frozen=True, slots=True)
class Source:
    """Where to ask for a blob, and as whom."""

    reference: Reference
    keychain: Keychain = field(repr=False)


class Transfers:
    """The node's connections, of which so many are used at one time. Of the trio thread."""

    def __init__(self, settings: DownloadSettings) -> None:
        self.settings = settings
        self._slots = trio.CapacityLimiter(settings.connections)
        self._idle: list[Connection] = []

    async def run(self, work: Callable[[Connection, threading.Event], None]) -> None:
        """Run ``work`` in a thread with one of the connections, once one is free."""
        async with self._slots:
            connection = self._idle.pop() if self._idle else Connection(self.settings.transfer)
            try:
                await run_stoppable(lambda stop: work(connection, stop))
            finally:
                self._idle.append(connection)

    def close(self) -> None:
        """Close idle connections, once nothing is fetched any more."""
        while self._idle:
            self._idle.pop().close()


class Wanted(Protocol):
    """What is fetched, and from where; :class:`fetcher.jobs.Job` is one."""

    layer: Layer
    source: Source
    """May change while the blob is fetched: who asks later may have newer credentials."""


class Download:
    """The fetching of one blob."""

    def __init__(self, wanted: Wanted, registry: Registry, transfers: Transfers) -> None:
        self._wanted = wanted
        self._blob = wanted.layer.descriptor
        self._registry = registry
        self._transfers = transfers
        self._settings = transfers.settings
        self._failure: ModelError | None = None
        self._ranges_ignored = False
        self._answered = trio.Event()
        """The first request was answered with a range: others may be made beside it."""

    async def fetch(self, partial: PartialBlob) -> None:
        """Fetch what is missing. Raises the :class:`ModelError` that ended it early."""
        self._failure = None
        pieces = collections.deque(
            piece
            for missing in partial.missing()
            for piece in missing.split(_RANGE_CHUNKS * partial.chunk_size)
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fetch_first, partial, pieces, nursery.cancel_scope)
            await self._answered.wait()
            for _ in range(min(len(pieces), self._settings.connections - 1)):
                nursery.start_soon(self._fetch_pieces, partial, pieces, nursery.cancel_scope)
        if self._ranges_ignored and self._failure is None:
            await self._fetch_whole(partial)
        if self._failure is not None:
            raise self._failure

    def distrust(self) -> bool:
        """The bytes of this download were wrong: whether other sources may send the right ones."""
        return False

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
            self._wanted.source.reference.registry,
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
        source, blob = self._wanted.source, self._blob
        access = await self._registry.blob_access(
            source.reference, blob.digest, source.keychain, renew=renew
        )
        watched = sink if self._answered.is_set() else _Watched(sink, self._answered)
        await self._transfers.run(
            lambda connection, stop: connection.fetch(
                access, blob.digest, blob.size, sink.remaining, watched, stop
            )
        )

    async def _back_off(self, error: Unavailable, failures: int) -> bool:
        """Wait before another try; false when there have been enough."""
        settings = self._settings
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
