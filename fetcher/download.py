"""Fetching what is wanted of a blob: from where, and what to do when it fails.

Pieces are taken from the blob's schedule (:mod:`fetcher.schedule`) and fetched over several
connections, each from the byte where it stopped, from whichever host :mod:`fetcher.sources`
chooses. What is wanted by somebody who may see it before the whole was verified comes from the
registry itself, or from whom else the settings trust. The first request of a blob to a host is
alone until a range was answered: a server that ignores ranges sends the whole blob, once.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import trio

from fetcher.answers import Piece, RangeIgnored, WrongAnswer
from fetcher.errors import (
    AccessDenied,
    ChunkMismatch,
    InvalidRequest,
    ModelError,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from fetcher.excerpts import excerpt
from fetcher.peers.choice import Pick
from fetcher.peers.fetching import PeerFetching
from fetcher.peers.showing import shown_for
from fetcher.peers.strands import Strand
from fetcher.probe import Probe
from fetcher.ranges import Range
from fetcher.schedule import Piece as ScheduledPiece
from fetcher.schedule import Urgency
from fetcher.sources import BlobSources, Choice
from fetcher.transfers import MOST_URGENT, group_of
from fetcher.transport import LEAST_SPEED, TransferSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fetcher.chunk_digests import BlobChunks
    from fetcher.chunk_lists import KnownList
    from fetcher.credentials import Keychain
    from fetcher.hosts import Host
    from fetcher.modelpack import Layer, Position
    from fetcher.oci import Reference
    from fetcher.peers.client import PeerClient
    from fetcher.peers.turns import Turns
    from fetcher.registry import Registry
    from fetcher.schedule import Demand, Schedule, Want
    from fetcher.store.blobs import PartialBlob
    from fetcher.store.sinks import ChunkSink
    from fetcher.transfers import Slot, Transfers

logger = logging.getLogger(__name__)

_RANGE_CHUNKS: Final = 8
"""Chunks that one request asks for: enough to hide a round trip, few enough to deal out."""

_LONG_RANGE_CHUNKS: Final = 16
"""The same where they come quickly: each request costs a registry some milliseconds."""

_PIECE_SECONDS: Final = 0.4
"""How long a request may take, at the pace of those before it, where others may come in between."""


_CONTRADICTIONS: Final = 2
"""Wrong chunks of the registry itself after which it is its list that is wrong."""


class LazySources(enum.Enum):
    """Whose bytes may be shown before the whole blob is verified; each includes those before it."""

    REGISTRY = "registry"
    MIRRORS = "mirrors"
    PEERS = "peers"


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
    lazy_sources: LazySources = LazySources.REGISTRY
    prefetch_rate: float | None = None
    """Bytes per second of all transfers together that nobody waits for; None: no limit."""
    transfer: TransferSettings = field(default_factory=TransferSettings)


@dataclass(frozen=True, slots=True)
class Source:
    """Where to ask for a blob, and as whom."""

    reference: Reference
    keychain: Keychain = field(repr=False)
    chunks: KnownList | None = field(default=None, repr=False)
    """What proves single chunks, as far as that is known."""
    hops: int = 0
    """How many members the wish for it came through, before it came here."""


class Wanted(Protocol):
    """What is fetched, and from where; :class:`fetcher.jobs.Job` is one."""

    layer: Layer
    schedule: Schedule
    place: int
    """Of the blob in its manifest; those with a lower one come first."""
    chunks: KnownList | None
    """What proves single chunks, if anything does."""
    adopted: set[int]
    """Chunks that this node fetches itself, whoever owns them."""

    @property
    def source(self) -> Source:
        """Changes while the blob is fetched: who asks later may have newer credentials."""

    @property
    def trusted_source(self) -> Source | None:
        """The source whose own bytes may be shown before the whole is verified, if one may."""

    def give_up(self, source: Source) -> bool:
        """``source`` refuses, lacks or spoils the blob: whether there is another one to ask."""

    def contradicted(self) -> None:
        """What the registry itself sends is not what the chunk digests say."""

    def failed(self, piece: ScheduledPiece, error: ModelError) -> bool:
        """A piece cannot be had: whether that is for those who want it alone to know."""


class Download:
    """The fetching of one blob."""

    def __init__(
        self,
        wanted: Wanted,
        registry: Registry,
        transfers: Transfers,
        settings: DownloadSettings,
        peers: PeerClient | None = None,
    ) -> None:
        self._wanted = wanted
        self._schedule = wanted.schedule
        self._blob = wanted.layer.descriptor
        self._registry = registry
        self._transfers = transfers
        self._settings = settings
        self._sources = BlobSources(registry.health, settings.attempts)
        self._ranging: set[str] = set()
        """Hosts that answered a range of this blob with that range."""
        self._probe: trio.Event | None = None
        """The end of the one question for a first range, while it is asked."""
        self._void = False
        """A whole answer came: what is missing has to be looked up again."""
        self._server = ""
        """The host that stands for the registry, once it was looked up."""
        self._failure: ModelError | None = None
        self._changed = trio.Event()
        """Of what is wanted, or of what is being fetched."""
        self._whole_trusted = False
        """What is missing has to come whole from a trusted source, as that one ignores ranges."""
        self._contradictions = 0
        """Chunks of the registry itself that were others than their digests say."""
        self._pace: float | None = None
        """Bytes per second of one request, lately."""
        self._client = peers
        self._peers = None if peers is None else self._fetching(peers)
        self._without_peers = False
        self._chooses = False
        self._partial: PartialBlob | None = None
        self._all_pieces = trio.CancelScope()

    def _fetching(self, peers: PeerClient) -> PeerFetching:
        trusted = self._settings.lazy_sources is LazySources.PEERS and peers.authenticates
        return PeerFetching(peers, self, self._blob, self._transfers.pacing, trusted=trusted)

    async def fetch(self, partial: PartialBlob) -> None:
        """Fetch what is wanted, and wait for more to be wanted, until cancelled.

        Raises the :class:`ModelError` that ended it early.
        """
        self._failure, self._partial = None, partial
        whole = _Tries()
        await self._fetch(partial, whole)

    async def _fetch(self, partial: PartialBlob, whole: _Tries) -> None:
        while True:
            while not self._schedule.has_work(partial):
                await self._change()
            turn = await self._turn(partial, whole)
            self._whole_trusted = False
            if turn.whole:
                await self._fetch_whole(partial, turn, whole)
            else:
                await self._fetch_ranges(partial)
            self._check_failure()

    def wake(self) -> None:
        """Something else is wanted, or is wanted more."""
        self._changed.set()
        self._changed = trio.Event()

    def adopt(self, chunks: Iterable[int]) -> None:
        """These chunks are to be fetched by this node itself, whoever owns them."""
        if self._peers is not None:
            self._peers.adopt(chunks)
            self.wake()

    def hurry(self, demands: Iterable[Demand]) -> None:
        """What is under way has become more urgent."""
        for demand in demands:
            self._transfers.hurry(demand)

    async def _change(self) -> None:
        # the event of now: who sets it puts a new one in its place
        await self._changed.wait()

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def distrust(self) -> bool:
        """The bytes of this download were wrong: whether other sources may send the right ones."""
        liars = self._sources.distrust(self._server, trio.current_time())
        if liars:
            logger.warning(
                "wrong bytes came for blob %s: %s are not asked for it any more, and for nothing "
                "for some minutes",
                self._blob.digest,
                ", ".join(liars),
            )
        return bool(liars) or self._move_on(self._wanted.source)

    def leave_peers(self) -> bool:
        """The bytes of this download were wrong: whether some came from peers, which are asked for
        the blob no more, as any of them may have sent them.
        """
        if not self._asks_peers or self._peers is None or not self._peers.has_brought:
            return False
        self._without_peers = True
        return True

    def of_peers(self, partial: PartialBlob) -> list[int]:
        """Chunks of which nobody knows if they are right, where some came from peers."""
        if not self._asks_peers or self._peers is None or not self._peers.has_brought:
            return []
        return list(filter(partial.is_doubtful, range(partial.count)))

    def peer_samples(self, partial: PartialBlob) -> set[int]:
        """Chunks by which peers are found out that sent wrong bytes."""
        if not self._asks_peers or self._peers is None:
            return set()
        return self._peers.samples(partial.is_doubtful)

    def sent_by_liars(self, wrong: Iterable[int]) -> list[int]:
        """These samples were wrong: all chunks that came from who sent them."""
        return [] if self._peers is None else self._peers.found_out(wrong)

    def blame_peers(self, chunks: Iterable[int]) -> None:
        """These chunks were others than the registry's."""
        if self._peers is not None:
            self._peers.blame(chunks)

    def suspect_peers(self, chunks: Iterable[int]) -> None:
        """These chunks were others than what hearsay says of them."""
        if self._peers is not None:
            self._peers.suspect(chunks)

    def judge_peers(self, *, hearsay_is_right: bool) -> None:
        """It is known now whether hearsay was right, by which peers were suspected."""
        if self._peers is not None:
            self._peers.judge(hearsay_is_right=hearsay_is_right)

    def _move_on(self, source: Source) -> bool:
        """Whether somebody else who asked for the blob named another source of it."""
        moved = self._wanted.give_up(source)
        if moved:
            logger.info(
                "blob %s is asked for at %s instead of %s",
                self._blob.digest,
                self._wanted.source.reference.name,
                source.reference.name,
            )
            self._sources.moved()
        return moved

    async def _fetch_ranges(self, partial: PartialBlob) -> None:
        """Fetch what is wanted in ranges, several at a time, until ranges are of no use."""
        self._void = False
        async with trio.open_nursery() as nursery:
            self._all_pieces = nursery.cancel_scope
            try:
                while True:
                    await self._fetch_next(partial, nursery)
            finally:
                self._chooses = False

    async def _fetch_next(self, partial: PartialBlob, nursery: trio.Nursery) -> None:
        """Begin with one more piece; where there is none for now, wait until there may be."""
        peers = self._peers if self._asks_peers else None
        if peers is not None and not self._chooses:
            self._chooses = True
            self._turns.begin()
        piece, pick = self._next(partial) if peers is None or self._may_look() else (None, None)
        if piece is not None:
            nursery.start_soon(self._fetch_piece, partial, piece, pick)
        elif peers is not None:
            self._turns.pass_on(self)
            peers.review()
            is_eager = self._schedule.is_hurried or self._turns.is_first(self)
            await peers.pause(self._change, is_eager=is_eager)
        else:
            self._chooses = False
            await self._change()

    # -- the turn to ask peers; see fetcher.peers.turns --------------------------------------------

    @contextlib.contextmanager
    def attending(self) -> Iterator[None]:
        """Have its turns inside the block."""
        if self._client is None:
            yield
            return
        self._turns.attend(self)
        try:
            yield
        finally:
            self._turns.leave(self)

    @property
    def order(self) -> tuple[int, str]:
        """Its place among the downloads of the node."""
        return self._wanted.place, self._blob.digest.hex

    def has_work(self) -> bool:
        """Whether anything is wanted that is not there and not on its way."""
        return self._partial is not None and self._schedule.has_work(self._partial)

    def is_choosing(self) -> bool:
        """Whether it looks what to ask for when it is woken."""
        return self._chooses

    def is_opening(self) -> bool:
        """Whether it is about to look for the first time."""
        return self._partial is None

    def is_asked(self) -> bool:
        """Whether other nodes wait for some of it."""
        return self._schedule.is_asked

    def is_waiting(self) -> bool:
        """Whether peers, or the registry in their place, are bringing something."""
        return self._peers is not None and self._peers.is_waiting

    def may_ask(self) -> bool:
        """Whether it might ask for something: a peer, or the registry for what is its own."""
        if self._client is None or self._peers is None:
            return True
        return self._client.has_room or self._peers.may_ask()

    @property
    def _turns(self) -> Turns:
        if self._client is None:
            raise AssertionError("without peers there are no turns")
        return self._client.turns

    def _may_look(self) -> bool:
        return self._schedule.is_hurried or self._turns.may_look(self)

    def _next(self, partial: PartialBlob) -> tuple[ScheduledPiece | None, Pick | None]:
        """What to fetch next; with peers a single chunk, and from whom."""
        peers = self._peers
        if peers is None or not self._asks_peers:
            return self._schedule.next(partial, self._most(partial), self._may_start), None
        peers.begin(partial)
        picked: Pick | None = None

        def pick(want: Want, chunks: Iterator[int]) -> int | None:
            nonlocal picked
            if want.trusted and not self._may_show_peers(partial):
                first = next(chunks, None) if self._may_start(want.urgency) else None
                picked = None if first is None else Pick(first, None)
            elif want.urgency <= Urgency.AHEAD:
                first = next(chunks, None) if self._may_start(want.urgency) else None
                picked = None if first is None else peers.at_once(first)
            else:
                picked = peers.next(chunks)
            return None if picked is None else picked.chunk

        piece = self._schedule.next(partial, 1, pick=pick)
        if piece is not None and picked is not None:
            # counted at once: the next choice is made before the request has begun
            peers.chosen(picked)
        return piece, picked

    @property
    def _asks_peers(self) -> bool:
        return self._peers is not None and self._peers.is_on and not self._without_peers

    def _may_show_peers(self, partial: PartialBlob) -> bool:
        """Whether what peers send may be shown to readers at once."""
        if partial.is_proving:
            return True
        by_word = self._settings.lazy_sources is LazySources.PEERS
        return by_word and self._client is not None and self._client.authenticates

    def _may_start(self, urgency: Urgency) -> bool:
        under_way = self._schedule.under_way(urgency)
        if urgency is Urgency.URGENT:
            return under_way < MOST_URGENT
        if not self._ranging:
            # the first request is to be for the first piece, and alone
            return under_way < 1
        if urgency is Urgency.AHEAD:
            return under_way < self._settings.connections
        return under_way < self._transfers.share(self)

    def _most(self, partial: PartialBlob) -> int:
        """Chunks of the next piece: few enough for others to have their turn soon."""
        quick = int((self._pace or 0.0) * _PIECE_SECONDS / partial.chunk_size)
        if self._schedule.is_watched:
            return max(1, min(quick, _RANGE_CHUNKS))
        # shorter ones towards the end, which connections then reach at about the same time
        half = (partial.size - partial.done) // (2 * partial.chunk_size)
        return max(_RANGE_CHUNKS, min(quick, half, _LONG_RANGE_CHUNKS))

    async def _fetch_piece(
        self, partial: PartialBlob, piece: ScheduledPiece, pick: Pick | None
    ) -> None:
        """Fetch a piece, again and again from where it stopped, from whoever has it."""
        sink = partial.sink(piece.wanted)
        started = trio.current_time()
        try:
            if pick is None or self._peers is None:
                await self.from_hosts(sink, piece)
            else:
                await self._peers.fetch(piece, sink, pick)
            self._measure(len(piece.wanted), trio.current_time() - started)
        except ModelError as error:
            if not self._wanted.failed(piece, error):
                self._failure = self._failure or error
                self._all_pieces.cancel()
        finally:
            self._schedule.release(piece)
            self.wake()

    async def from_hosts(self, sink: ChunkSink | Strand, piece: ScheduledPiece) -> None:
        """Fetch what a sink still lacks from mirrors and the registry.

        Where ranges are of no use there, everything that is being fetched is cancelled.
        """
        tries = _Tries()
        try:
            while sink.remaining:
                turn = await self._turn(self._opened, tries, piece)
                if turn.whole or self._void:
                    self._whole_trusted = turn.whole and turn.trusted
                    self._all_pieces.cancel()
                    await trio.lowlevel.checkpoint()
                await self._try(sink, turn, tries, functools.partial(_moved, sink, sink.remaining))
        finally:
            self._end_probe(tries)

    @property
    def _opened(self) -> PartialBlob:
        if self._partial is None:
            raise AssertionError("fetch() comes first")
        return self._partial

    async def authorization(self, *, renew: bool) -> tuple[Reference, str | None]:
        """Whose blob it is, and what its registry would be shown, but for what the administrator
        gave this node for it. Raises :class:`ModelError`.
        """
        source = self._wanted.source
        reference, keychain = source.reference, source.keychain

        async def look() -> str | None:
            blob = self._blob.digest
            return await shown_for(self._registry, reference, blob, keychain, renew=renew)

        if self._client is None:
            return reference, await look()
        return reference, await self._client.passes.get(reference, keychain, look, renew=renew)

    @property
    def hearsay(self) -> BlobChunks | None:
        """What speaks of single chunks, where that is no more than some peer's word."""
        known = self._wanted.chunks
        if known is None or not known.is_hearsay:
            return None
        return known.digests.of(self._blob.digest)

    async def excerpt(self, wanted: Range) -> bytes | None:
        """What the registry has there; None where it does not say soon."""
        source = self._wanted.source
        return await excerpt(self._registry, self._transfers, source, self._blob, wanted)

    @property
    def position(self) -> Position | None:
        """Which layer of which model it is, where that is known."""
        return self._wanted.layer.position

    @property
    def adopted(self) -> set[int]:
        """Chunks that this node fetches itself, whoever owns them."""
        return self._wanted.adopted

    @property
    def hops(self) -> int:
        """How many members the wish for the blob came through."""
        return self._wanted.source.hops

    def _measure(self, count: int, seconds: float) -> None:
        pace = count / max(seconds, 1e-3)
        self._pace = pace if self._pace is None else 0.7 * self._pace + 0.3 * pace

    async def _fetch_whole(self, partial: PartialBlob, turn: _Turn, tries: _Tries) -> None:
        """Take what is missing in one answer, from a server that did not know ranges.

        It may know them by now, as a cache does that has the whole blob: the rest is asked for.
        """
        logger.info(
            "%s ignores ranges: blob %s comes over one connection",
            turn.host.netloc,
            self._blob.digest,
        )

        def progress() -> bool:
            # an answer that starts at byte 0 each time may end before what is there
            left = sum(len(one) for one in partial.missing())
            least, tries.least = tries.least, min(left, tries.least)
            return left < least

        progress()
        try:
            missing = partial.first_missing(0) < partial.count
            sink = partial.rest() if missing else partial.sink(Range(0, partial.size))
            await self._try(sink, turn, tries, progress)
            self.wake()
        except ModelError as error:
            self._failure = error

    async def _turn(
        self, partial: PartialBlob, tries: _Tries, piece: ScheduledPiece | None = None
    ) -> _Turn:
        """Whom to ask next for ``piece``, or for all that is missing.

        While somebody else asks for a first range, only who has given one.
        """
        trusted = self._whole_trusted if piece is None else piece.trusted
        while True:
            source = self._source(trusted=trusted)
            if source.reference.name != tries.name:
                tries.name, tries.failures, tries.renew = source.reference.name, 0, None
            try:
                hosts = await self._registry.hosts(source.reference)
            except ModelError:
                if trusted or not self._move_on(source):
                    raise
                continue
            mirrors = hosts.able("pull")
            by_word = trusted and not partial.is_proving
            if by_word and self._settings.lazy_sources is LazySources.REGISTRY:
                mirrors = ()
            by_base = {one.base: one for one in (*mirrors, hosts.server)}
            self._server = hosts.server.base
            begun = partial.done / max(self._blob.size, 1)
            choice = self._choose(by_base, begun)
            if choice.wait:
                await trio.sleep(choice.wait)
                continue
            probe = self._probe
            if not (probe in (None, tries.probe) or choice.whole or self._is_ranging(choice)):
                choice = self._choose([one for one in by_base if one in self._ranging], begun)
                if not self._is_ranging(choice):
                    await probe.wait()
                    continue
            # no checkpoint from here to where a probe begins: one is enough
            demand = None if piece is None else piece.demand
            return _Turn(by_base[choice.host], source, choice.whole, trusted, demand)

    def _source(self, *, trusted: bool) -> Source:
        if not trusted:
            return self._wanted.source
        source = self._wanted.trusted_source
        if source is None:
            raise Unavailable(
                f"nobody asks for blob {self._blob.digest} now by the name of the model that shows "
                "it",
                digest=self._blob.digest,
            )
        return source

    def _is_trusted(self, turn: _Turn) -> bool:
        """Whether what comes may be shown before the whole blob is verified."""
        by = self._wanted.trusted_source
        right_name = by is not None and by.reference.name == turn.source.reference.name
        mirrors = self._settings.lazy_sources is not LazySources.REGISTRY
        return right_name and (mirrors or not turn.host.mirror)

    def _choose(self, bases: Iterable[str], begun: float) -> Choice:
        mirrors = [base for base in bases if base != self._server]
        return self._sources.choose(mirrors, self._server, trio.current_time(), begun)

    def _is_ranging(self, choice: Choice) -> bool:
        """Whether a range may be asked for at once, as one was answered before."""
        return choice.host in self._ranging and not choice.whole and not choice.wait

    async def _try(
        self, sink: ChunkSink | Strand, turn: _Turn, tries: _Tries, progress: Callable[[], bool]
    ) -> None:
        """One request to the host whose turn it is. Raises what ends the download.

        A mirror's failure is none: the next turn is another's. The registry's own is waited out as
        often as the settings say, and then the next source is asked. ``progress`` tells whether
        the request has brought anything.
        """
        host, before, started = turn.host, sink.remaining, trio.current_time()
        renew, tries.renew = tries.renew == host.base, None
        try:
            await self._ask(sink, turn, tries, renew=renew)
            self._registry.health.succeeded(host.base)
        except RangeIgnored:
            if host.base in self._ranging and tries.ignored != host.base:
                # it has answered ranges of this blob: one stray answer is not worth all the bytes
                tries.ignored = host.base
            else:
                self._registry.health.ignored_range(host.base, trio.current_time())
        except (Unauthenticated, AccessDenied, NotFound, WrongAnswer, InvalidRequest) as error:
            refused = isinstance(error, Unauthenticated | AccessDenied)
            if refused and not (renew and sink.remaining == before):
                # tokens expire in mid-pull: ask for a new one, once
                tries.renew = host.base
            elif host.mirror:
                logger.info("%s; asking another host", error.message)
                self._sources.lacks(host.base)
            else:
                await self._endure(error, turn, tries, progress=progress())
        except ChunkMismatch as error:
            self._blame(host, error)
            if isinstance(sink, Strand):
                # the chunk begins anew, and with it whatever brings its parts
                raise
        except Unavailable as error:
            if host.mirror:
                self._rest(host, error, started)
            else:
                await self._endure(error, turn, tries, progress=progress())

    def _blame(self, host: Host, error: ChunkMismatch) -> None:
        """A chunk was wrong, and is asked for again: of somebody else, where one host sent all of
        it. The registry itself is asked once more, and then believed.
        """
        logger.warning("%s; it came from %s", error.message, host.netloc)
        if not error.sole or error.hearsay is not self.hearsay:
            # by what is not gone by any more, nobody is judged
            return
        if host.mirror:
            if error.hearsay is not None:
                # the registry is asked instead, and says who is right
                self._sources.lacks(host.base)
            else:
                self._sources.lied(host.base, trio.current_time())
            return
        self._contradictions += 1
        if error.hearsay is not None or self._contradictions >= _CONTRADICTIONS:
            logger.warning(
                "the chunk digests of blob %s contradict %s itself, and are not used any more",
                self._blob.digest,
                host.netloc,
            )
            self._wanted.contradicted()

    def _rest(self, host: Host, error: Unavailable, started: float) -> None:
        """Let a mirror that failed be for a while."""
        now = trio.current_time()
        seconds = self._sources.failed(host.base, now, started, error.retry_after)
        logger.info("%s; not asked again for %.0f s", error.message, seconds)

    async def _ask(
        self, sink: ChunkSink | Strand, turn: _Turn, tries: _Tries, *, renew: bool
    ) -> None:
        source, blob, host, before = turn.source, self._blob, turn.host, sink.remaining
        sink.trusted, sink.sender = self._is_trusted(turn), host.base
        probe = self._probe_for(sink, turn, tries)
        try:
            access = await self._registry.blob_access(
                source.reference, blob.digest, source.keychain, host=host, renew=renew
            )

            async def transfer(slot: Slot) -> None:
                fresh = access
                if slot.queued:
                    # a token may have expired meanwhile; one that has not is kept
                    fresh = await self._registry.blob_access(
                        source.reference, blob.digest, source.keychain, host=host
                    )
                if probe is not None:
                    slot.keep = lambda: probe.is_whole
                piece = Piece(blob.digest, blob.size, sink.remaining)
                await slot.fetch(fresh, piece, probe or sink)

            group = group_of(source.reference, host)
            stopped = await self._transfers.run(group, transfer, turn.demand, self)
            if stopped is None:
                tries.silent = 0.0
            else:
                self._judge_pace(host, abs(sink.remaining.start - before.start), stopped, tries)
        finally:
            if sink.remaining != before:
                self._sources.brought(host.base)
            if probe is not None and probe.took_whole:
                self._void = True
                self._registry.health.ignored_range(host.base, trio.current_time())

    def _probe_for(self, sink: ChunkSink | Strand, turn: _Turn, tries: _Tries) -> Probe | None:
        """What goes before the sink while it is not known how the host answers ranges."""
        base = turn.host.base
        answered = functools.partial(self._answered, base, tries)
        restart = None if isinstance(sink, Strand) else sink.restart
        if turn.whole:
            return Probe(sink, answered, restart)
        if base in self._ranging:
            return None
        if tries.probe is None:
            tries.probe = self._probe = trio.Event()
        # with nothing there and no other request under way, all is as good as the first range
        alone = not self._ranging and not sink.remaining.start and not self._asks_peers
        return Probe(sink, answered, restart if alone else None)

    def _judge_pace(self, host: Host, got: int, seconds: float, tries: _Tries) -> None:
        """Of a request that was stopped to make room for others: no failure, unless the host was
        as silent as one that is given up. Raises :class:`Unavailable` then.
        """
        tries.silent = 0.0 if got else tries.silent + seconds
        patience = self._settings.transfer.stall_timeout
        dull = host.mirror and got < LEAST_SPEED * seconds
        if dull or tries.silent >= patience:
            tries.silent = 0.0
            raise Unavailable(
                f"fetching blob {self._blob.digest}: {host.netloc} sent {got} bytes in "
                f"{seconds:.0f} s",
                registry=host.netloc,
            )

    def _answered(self, host: str, tries: _Tries) -> None:
        """A range has arrived: more of them may be asked for at the same time."""
        self._ranging.add(host)
        self.wake()
        self._registry.health.answered_range(host)
        self._end_probe(tries)

    def _end_probe(self, tries: _Tries) -> None:
        if tries.probe is not None:
            tries.probe.set()
            self._probe = tries.probe = None

    async def _endure(
        self, error: ModelError, turn: _Turn, tries: _Tries, *, progress: bool
    ) -> None:
        """Wait before the registry is asked again; where it has been enough, go on with the next
        source, or raise ``error``.
        """
        settings = self._settings
        tries.failures = 1 if progress else tries.failures + 1
        if not isinstance(error, Unavailable) or tries.failures >= settings.attempts:
            if not turn.trusted and self._move_on(turn.source):
                tries.failures = 0
                return
            raise error
        pause = min(settings.first_backoff * 2 ** (tries.failures - 1), settings.longest_backoff)
        pause *= random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
        if error.retry_after is not None:
            pause = max(pause, min(error.retry_after, settings.longest_retry_after))
        logger.info("%s; trying again in %.1f s", error.message, pause)
        await trio.sleep(pause)


def _moved(sink: ChunkSink | Strand, since: Range) -> bool:
    return sink.remaining != since


@dataclass(frozen=True, slots=True)
class _Turn:
    """Who is asked, for whom, and whether for all that is missing."""

    host: Host
    source: Source
    whole: bool = False
    trusted: bool = False
    """Nobody else will do."""
    demand: Demand | None = None


@dataclass(slots=True)
class _Tries:
    """What went before, on the way to one piece."""

    failures: int = 0
    """Of the registry, in a row, without a byte between them."""
    name: str = ""
    """Of the source that failed so often."""
    least: float = math.inf
    """The fewest bytes that were missing so far."""
    silent: float = 0.0
    """Seconds without a byte, in requests that were stopped to make room for others."""
    ignored: str | None = None
    """A host that answered a range with the whole, though it knows ranges."""
    renew: str | None = None
    """The host that refused us, and is to be asked whether it still does."""
    probe: trio.Event | None = None
    """Set once others may ask too, while this is the only one to ask for a range."""
