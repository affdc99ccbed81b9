"""One blob from peers: single chunks, each from whom :mod:`fetcher.peers.choice` says.

Where a peer fails, lacks the chunk or is too slow, its part goes on with somebody else at the very
byte; the mirrors and the registry, which :mod:`fetcher.download` asks, come last.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import trio

from fetcher.errors import (
    AccessDenied,
    ChunkMismatch,
    InvalidRequest,
    ModelError,
    NotFound,
    Unauthenticated,
    Unavailable,
    Unreachable,
)
from fetcher.network_errors import retry_after
from fetcher.peers import protocol
from fetcher.peers.choice import BlobChoice, Flow, Help, Pick
from fetcher.peers.client import PeerRequest
from fetcher.peers.owners import Deal
from fetcher.peers.protocol import Have
from fetcher.peers.samples import samples, sent_by
from fetcher.peers.strands import Cut, Rope
from fetcher.peers.trials import Trials
from fetcher.schedule import Urgency

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from fetcher.chunk_digests import BlobChunks
    from fetcher.modelpack import Position
    from fetcher.oci import Descriptor, Reference
    from fetcher.pacing import Pacing
    from fetcher.peers.client import PeerClient
    from fetcher.peers.owners import Member
    from fetcher.peers.strands import Strand
    from fetcher.ranges import Range
    from fetcher.schedule import Piece
    from fetcher.store.blobs import PartialBlob
    from fetcher.store.sinks import ChunkSink
    from fetcher.wire import Head

logger = logging.getLogger(__name__)

_MOMENT: Final = 0.2
"""Seconds after which is looked again who may be asked, and who is slow."""
_LONG_MOMENT: Final = 1.0
"""The same of a blob of which nothing is on its way: its turn comes all the same."""
_JUDGED_SECONDS: Final = 1.0
_MOST_DOUBTS: Final = 2
_LONGEST_PAUSE: Final = 0.5
"""Between two looks for somebody who is not busy."""
_RENEWED_SECONDS: Final = 10.0
"""How often an authorization that peers refused is renewed."""


class AskingHosts(Protocol):
    """How :class:`fetcher.download.Download` asks others than peers."""

    @property
    def hops(self) -> int:
        """How many members the wish for the blob came through."""

    @property
    def position(self) -> Position | None:
        """Which layer of which model the blob is, where that is known."""

    @property
    def adopted(self) -> set[int]:
        """Chunks that this node fetches itself, whoever owns them."""

    @property
    def hearsay(self) -> BlobChunks | None:
        """What speaks of single chunks, where that is no more than some peer's word."""

    async def authorization(self, *, renew: bool) -> tuple[Reference, str | None]:
        """Whose blob it is, and what its registry would be shown. Raises ``ModelError``."""

    async def from_hosts(self, strand: Strand, piece: Piece) -> None:
        """Fetch from mirrors and the registry, to the end."""

    async def excerpt(self, wanted: Range) -> bytes | None:
        """What the registry has there; None where it does not say."""


@dataclass(eq=False)
class _StrandFlow(Flow):
    """A request for what a strand is to bring."""

    strand: Strand = field(kw_only=True)
    start: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    status: int = 0
    """Of the answer, once there is one."""
    is_answered: bool = False
    """Whether bytes are on their way."""
    counted: int = 0
    """Bytes that are counted in the node's harvest."""
    other: str = ""
    """The member that a busy one named."""
    pause: float | None = None

    def look(self) -> None:
        remaining = self.strand.remaining
        self.got, self.left = remaining.start - self.start, len(remaining)


@dataclass(eq=False)
class _Work:
    """A chunk that is being fetched."""

    piece: Piece
    rope: Rope
    nursery: trio.Nursery
    failure: ModelError | None = None
    asked: dict[str, bool] = field(default_factory=dict)
    """The members that were asked, and whether they said that they have all of the blob."""
    wrong: set[str] = field(default_factory=set)
    """Who may have sent the wrong bytes that came of it before."""
    is_left: bool = False
    """Nobody could be asked for what is left of it."""


class PeerFetching:
    """The fetching of one blob from peers. Belongs to the trio thread."""

    def __init__(
        self,
        client: PeerClient,
        hosts: AskingHosts,
        blob: Descriptor,
        pacing: Pacing,
        *,
        trusted: bool,
    ) -> None:
        """``trusted`` says that what peers send may be shown before the whole was verified."""
        self._client = client
        self._hosts = hosts
        self._blob = blob
        self._pacing = pacing
        self._trusted = trusted
        self._shows = trusted
        """Whether what peers send will do for who wants trusted bytes."""
        self._proves = False
        """Whether each chunk is proven when it has come."""
        self._trials = Trials(self, blob.size, client.settings.tried_from)
        self._choice: BlobChoice | None = None
        self._works: dict[_StrandFlow, _Work] = {}
        self._suspects: dict[str, bool] = {}
        """Members that hearsay speaks against, and whether they said that they have all."""
        self._ended = trio.Event()
        """Of the next request that ends."""
        self._renew_at = float("-inf")
        self._renew = False

    @property
    def is_on(self) -> bool:
        """Whether there are peers to ask."""
        return self._client.members.any

    def begin(self, partial: PartialBlob) -> None:
        """The blob's chunks are known now."""
        self._proves = partial.is_proving
        self._shows = self._trusted or self._proves
        if self._choice is None or self._choice.chunk_size != partial.chunk_size:
            self._choice = BlobChoice(
                str(self._blob.digest),
                partial.chunk_size,
                self._blob.size,
                self._client.members,
                self._client.standings,
                self._client.settings.appetite,
                Deal.of(self._blob.digest, self._hosts.position),
            )
            self._choice.adopt(self._hosts.adopted)

    def adopt(self, chunks: Iterable[int]) -> None:
        """Fetch these chunks from mirrors and the registry. Who was asked for one and has not
        answered may wait for this node.
        """
        if self._choice is None:
            return
        adopted = set(chunks)
        self._choice.adopt(adopted)
        for flow in self._works:
            if flow.pick.chunk in adopted and flow.pick.member is not None and not flow.status:
                flow.scope.cancel()

    @property
    def _chosen(self) -> BlobChoice:
        if self._choice is None:
            raise AssertionError("begin() comes first")
        return self._choice

    def next(self, chunks: Iterable[int]) -> Pick | None:
        """Which of these to fetch, and from whom; None while all have to wait."""
        return self._chosen.next(chunks, trio.current_time())

    def at_once(self, chunk: int) -> Pick | None:
        """From whom to fetch a chunk that waits for nothing."""
        return self._chosen.at_once(chunk, trio.current_time())

    def chosen(self, pick: Pick) -> None:
        """It is going to be fetched; :meth:`fetch` is certain to follow."""
        self._chosen.began(pick)

    # -- one chunk ---------------------------------------------------------------------------------

    async def fetch(self, piece: Piece, sink: ChunkSink, pick: Pick) -> None:
        """Fetch a chunk that was :meth:`chosen`; what is left of it where all that could be asked
        have to be waited for is to be chosen again.

        Raises :class:`ModelError` where nobody has it.
        """
        wrong: set[str] = set()
        first: Pick | None = pick
        while sink.remaining:
            async with trio.open_nursery() as nursery:
                work = _Work(piece, Rope(sink), nursery, wrong=wrong)
                nursery.start_soon(self._bring, work, work.rope.first, first)
            if work.failure is not None:
                raise work.failure
            if work.is_left:
                return
            first = None
        self._chosen.came(pick.chunk)

    async def _bring(self, work: _Work, strand: Strand, pick: Pick | None) -> None:
        """Have a strand brought to its end, by one source after the other."""
        try:
            pause = _MOMENT
            while strand.remaining:
                if pick is None:
                    pick = self._again(work)
                    if pick is None and not (work.wrong or work.rope.is_split):
                        # others are better off with the room for a request than one that waits
                        work.is_left = True
                        return
                    if pick is None:
                        with trio.move_on_after(pause):
                            # who sends something else may have room for it then
                            await self._ended.wait()
                        pause = min(pause * 1.5, _LONGEST_PAUSE)
                        continue
                    self._chosen.began(pick)
                await self._ask(work, strand, pick)
                pick = None
        except ChunkMismatch as error:
            # it came to its end, and all of it comes again
            self._blame(work, error)
        except ModelError as error:
            work.failure = work.failure or error
            work.nursery.cancel_scope.cancel()

    def _again(self, work: _Work) -> Pick | None:
        chunk, now = work.piece.chunks.start, trio.current_time()
        if work.wrong and self._hosts.hearsay is not None:
            # the registry says who is right, the sender of the chunk or that of its digest
            return Pick(chunk, None)
        if work.piece.demand.urgency <= Urgency.AHEAD and not work.wrong:
            return self._chosen.at_once(chunk, now)
        return self._chosen.again(chunk, now, work.wrong)

    async def _ask(self, work: _Work, strand: Strand, pick: Pick) -> None:
        """One request, which has been counted, to one source."""
        choice, started = self._chosen, trio.current_time()
        flow = _StrandFlow(pick, started, strand=strand, start=strand.remaining.start)
        self._works[flow] = work
        try:
            # a cut comes when others have been asked for the rest
            with contextlib.suppress(Cut), flow.scope:
                if pick.member is None:
                    self._tell_why(pick.chunk)
                    await self._hosts.from_hosts(strand, work.piece)
                else:
                    await self._ask_member(flow, work, pick.member)
        finally:
            del self._works[flow]
            choice.ended(pick)
            self._ended.set()
            self._ended = trio.Event()
            flow.look()
            if pick.is_guess:
                self._client.standings.guessed(found=flow.got > 0)
            now = trio.current_time()
            name = None if pick.member is None else pick.member.name
            self._client.standings.measured(name, flow.got, now - flow.since, now)
            self._harvested(flow)
            if flow.is_answered:
                self._client.standings.harvest.answering -= 1
            if name is not None and self._client.standings.is_sluggish(name):
                self._pass_over(name)
            if pick.member is not None and flow.got and name in work.asked:
                choice.brought(pick.chunk, pick.member, has_all=work.asked[name])
            self._client.turns.begin()

    def _tell_why(self, chunk: int) -> None:
        """Of a chunk that is not this node's own, and that the registry is asked for."""
        for one in self._chosen.line(chunk):
            why = self._chosen.why_not(one, chunk, trio.current_time())
            logger.debug("peer %s is not asked for chunk %d: %s", one.name, chunk, why)

    async def _ask_member(self, flow: _StrandFlow, work: _Work, member: Member) -> None:
        strand, choice, started = flow.strand, self._chosen, trio.current_time()
        chunk = flow.pick.chunk
        try:
            reference, authorization = await self._authorization()
        except ModelError:
            # nothing can be shown to peers: mirrors and the registry have the last word
            choice.lacks(member, chunk, trio.current_time())
            await self._hosts.from_hosts(strand, work.piece)
            return
        wanted = strand.remaining
        is_first = work.rope.is_front(strand) and wanted.start == chunk * choice.chunk_size
        in_line = member in choice.line(chunk)
        nearby = (one.name for one in self._client.members.nearby)
        request = PeerRequest(
            reference,
            self._blob,
            wanted,
            choice.chunk_size,
            self._hosts.position,
            authorization,
            hops=self._hosts.hops,
            # nobody who waits for us may be waited for: see protocol.READY
            ready=not (in_line or (is_first and choice.line(chunk))),
            urgent=work.piece.demand.urgency <= Urgency.AHEAD,
            spare=self._client.standings.spare(nearby) if is_first else None,
        )
        strand.trusted, strand.sender = self._trusted, member.name
        work.asked.setdefault(member.name, False)
        held = self._trials.held(member.name, strand)

        def answered(head: Head) -> None:
            have = self._answered(flow, member, head)
            work.asked[member.name] = have is not None and have.is_all
            if held is not None:
                held.hear(is_whole=work.asked[member.name])

        async def fetch() -> None:
            await self._client.fetch(
                member, request, held or strand, work.piece.demand, self._pacing, answered
            )

        try:
            if held is None:
                await fetch()
            else:
                await self._trials.judged(held, member.name, wanted, fetch)
            if strand.remaining:
                raise Unavailable(f"peer {member.name} sent less than it was asked for")
            self._client.standings.succeeded(member.name)
        except (Unauthenticated, AccessDenied) as error:
            logger.info("%s; asking somebody else", error.message)
            self._renew = True
            choice.lacks(member, chunk, trio.current_time())
        except NotFound as error:
            logger.debug("%s", error.message)
            choice.lacks(member, chunk, trio.current_time())
        except (Unavailable, InvalidRequest) as error:
            self._failed(flow, member, error, started)

    def _answered(self, flow: _StrandFlow, member: Member, head: Head) -> Have | None:
        """A member's answer begins; what it says that it has."""
        flow.status, headers = head.status, head.headers
        standings, now = self._client.standings, trio.current_time()
        if head.status < 400:
            standings.answered(member.name, now - flow.since)
            standings.served_at = now
            if flow in self._works and not flow.is_answered:
                flow.is_answered = True
                standings.harvest.answering += 1
        load = headers.get(protocol.LOAD.lower(), "")
        if load.isascii() and load.isdigit() and len(load) < 6:
            standings.told(member.name, int(load))
        have = Have.parse(headers.get(protocol.HAVE.lower(), ""))
        if have is not None:
            self._chosen.told(member, have)
            if have.is_all:
                self._client.wholes.note(self._blob.digest, member.name)
        flow.other = headers.get(protocol.TRY.lower(), "")[:253]
        flow.pause = retry_after(headers.get("retry-after", ""))
        return have

    def _failed(self, flow: _StrandFlow, member: Member, error: ModelError, started: float) -> None:
        choice, standings, now = self._chosen, self._client.standings, trio.current_time()
        chunk = flow.pick.chunk
        if flow.status == 429:
            if flow.other:
                choice.named(member, chunk, flow.other, now)
            if flow.pause is not None or not flow.other:
                standings.busy(member.name, now, flow.pause)
        elif flow.status == 503:
            # its own word: what keeps it is not that it is broken
            logger.debug("%s", error.message)
            choice.refused(member, chunk, now)
        elif not (flow.status or isinstance(error, Unreachable)) and standings.is_excused(
            member.name
        ):
            logger.debug("%s", error.message)
            choice.silent(member, chunk, now)
        else:
            seconds = standings.failed(member.name, now, started)
            logger.info("%s; not asked again for %.0f s", error.message, seconds)

    def _blame(self, work: _Work, error: ChunkMismatch) -> None:
        self._chosen.contributors.pop(work.piece.chunks.start, None)
        senders = error.senders & work.asked.keys()
        logger.warning("%s; it came from %s", error.message, ", ".join(sorted(error.senders)))
        work.wrong |= senders
        for name in senders if error.sole else ():
            if error.hearsay is None:
                self._accuse(name, has_all=work.asked[name])
            elif error.hearsay is self._hosts.hearsay:
                self._suspect(name, has_all=work.asked[name])

    @property
    def has_brought(self) -> bool:
        """Whether some bytes came from peers."""
        return self._choice is not None and bool(self._choice.contributors)

    def blame(self, chunks: Iterable[int]) -> None:
        """These chunks were wrong; who sent all of one is known to have sent wrong bytes."""
        for name, has_all in self._sole_senders(chunks).items():
            self._accuse(name, has_all=has_all)

    def samples(self, is_open: Callable[[int], bool]) -> set[int]:
        """See :func:`fetcher.peers.samples.samples`."""
        return set() if self._choice is None else samples(self._choice.contributors, is_open)

    def found_out(self, wrong: Iterable[int]) -> list[int]:
        """These samples were wrong: all chunks that came from who sent them.

        Who only passed them on finds that out as well, and may be asked again.
        """
        contributors = self._chosen.contributors
        senders = {name: all_ for one in wrong for name, all_ in contributors[one].items()}
        chunks = sent_by(contributors, senders)
        for one in chunks:
            del contributors[one]
        for name, has_all in senders.items():
            if has_all:
                self.ban(name)
            else:
                self._client.standings.counts["wrong"] += 1
                logger.warning("peer %s passed on wrong bytes: they are fetched again", name)
        return chunks

    def suspect(self, chunks: Iterable[int]) -> None:
        """As :meth:`blame`, of chunks that are wrong by hearsay."""
        for name, has_all in self._sole_senders(chunks).items():
            self._suspect(name, has_all=has_all)

    def _sole_senders(self, chunks: Iterable[int]) -> dict[str, bool]:
        """Who sent all of a chunk, and whether they had all of the blob. Others send it now."""
        if self._choice is None:
            return {}
        senders = [self._choice.contributors.pop(one, {}) for one in chunks]
        return {name: all_ for some in senders if len(some) == 1 for name, all_ in some.items()}

    def _suspect(self, name: str, *, has_all: bool) -> None:
        """The bytes of a member are wrong by hearsay, which may be wrong itself."""
        self._suspects[name] = has_all
        self._chosen.distrust(name)

    def judge(self, *, hearsay_is_right: bool) -> None:
        """It is known now whether hearsay was right, and so who of the suspects is to blame."""
        suspects, self._suspects = self._suspects, {}
        self._trials.acquit()
        for name, has_all in suspects.items():
            self._chosen.acquit(name)
            if hearsay_is_right:
                self._accuse(name, has_all=has_all)

    def _accuse(self, name: str, *, has_all: bool) -> None:
        """The bytes of a member proved wrong.

        Who has all of a blob has verified it, and lies. Who only passes on what arrives there may
        be as deceived as we were.
        """
        if has_all:
            self.ban(name)
            return
        self._client.standings.counts["wrong"] += 1
        self._chosen.distrust(name)
        logger.warning("peer %s passed on wrong bytes: it is not asked for this blob", name)

    def ban(self, name: str) -> None:
        """The bytes of a member proved wrong."""
        seconds = self._client.standings.lied(name, trio.current_time())
        logger.warning("peer %s sent wrong bytes: it is not asked for %.0f s", name, seconds)

    # -- what trials ask; see fetcher.peers.trials -------------------------------------------------

    def is_proven(self) -> bool:
        """Whether each chunk is proven by itself when it has come, be it by hearsay."""
        return self._proves or self._hosts.hearsay is not None

    def awaits_list(self, name: str) -> bool:
        """Whether a member may be about to send a list of chunk digests."""
        return self._client.wholes.is_sought(self._blob.digest, name)

    async def excerpt(self, wanted: Range) -> bytes | None:
        """What the registry has there; None where it does not say."""
        return await self._hosts.excerpt(wanted)

    async def _authorization(self) -> tuple[Reference, str | None]:
        """What the registry would be shown; looked up again after a while, and once refused."""
        now = trio.current_time()
        renew = self._renew and now >= self._renew_at
        if renew:
            self._renew, self._renew_at = False, now + _RENEWED_SECONDS
        return await self._hosts.authorization(renew=renew)

    # -- all that is under way ---------------------------------------------------------------------

    @property
    def is_waiting(self) -> bool:
        """Whether requests are under way."""
        return bool(self._works)

    async def pause(self, change: Callable[[], Awaitable[None]], *, is_eager: bool) -> None:
        """Wait for ``change``, or for a moment, after which another request may go out.

        There may be hundreds of blobs of which nothing is on its way: one that ``is_eager`` looks
        for all of them.
        """
        with trio.move_on_after(_MOMENT if self._works or is_eager else _LONG_MOMENT):
            await change()

    def may_ask(self) -> bool:
        """Whether a request may go out for the blob though there is no room for more to peers."""
        return self._choice is None or self._choice.is_for_hosts(trio.current_time())

    def review(self) -> None:
        """Leave peers that are much too slow; with nothing else to ask for, have others help."""
        if not self._works:
            return
        now, standings = trio.current_time(), self._client.standings
        flows = list(self._works)
        for flow in flows:
            flow.look()
            if flow.got != flow.counted:
                flow.moved_at = now
            self._harvested(flow)
            member = flow.pick.member
            if member is not None and self._is_too_slow(flow, member, now):
                self._pass_over(member.name)
                flow.scope.cancel()
        if standings.harvest.is_poor(now):
            self._leave_all(flows, now)
        elif standings.harvest.wants_trial:
            self._try_registry(flows)
        elif self._client.turns.is_idle:
            self._have_help([one for one in flows if self._may_help(one)], now)

    def _harvested(self, flow: _StrandFlow) -> None:
        if flow.pick.member is not None:
            self._client.standings.harvest.brought(flow.got - flow.counted)
        flow.counted = flow.got

    def _pass_over(self, name: str) -> None:
        logger.info("peer %s is much slower than others: it is asked for less", name)
        self._client.standings.slow(name, trio.current_time())

    def _leave_all(self, flows: list[_StrandFlow], now: float) -> None:
        """All peers are slow: what they were to send comes from mirrors and the registry."""
        standings = self._client.standings
        seconds = standings.harvest.rest(now)
        standings.counts["slow"] += 1
        logger.info(
            "peers bring much less together than the registry over one connection: none of them is "
            "asked for %.0f s",
            seconds,
        )
        for flow in flows:
            if flow.pick.member is not None:
                flow.scope.cancel()

    def _is_too_slow(self, flow: _StrandFlow, member: Member, now: float) -> bool:
        """Whether it has been so for some time; before its first byte it waits itself."""
        since = max(flow.looked_at, flow.since)
        if now - since < _JUDGED_SECONDS or not flow.status:
            return False
        got, seconds = flow.got - flow.got_then, now - since
        dull = self._client.standings.is_dull(member.name, got, flow.left, seconds)
        flow.doubts = flow.doubts + 1 if dull else 0
        flow.looked_at, flow.got_then = now, flow.got
        return flow.doubts >= _MOST_DOUBTS

    def _may_help(self, flow: _StrandFlow) -> bool:
        is_left = not flow.scope.cancel_called
        return is_left and (self._shows or not self._works[flow].piece.trusted)

    def _try_registry(self, flows: list[_StrandFlow]) -> None:
        """Peers bring little, and nobody knows if the registry has more: it brings some of it."""
        flow = max(flows, key=lambda one: one.left, default=None)
        if flow is not None and flow.left and self._may_help(flow):
            self._client.standings.harvest.wants_trial = False
            self._split(flow, Help(flow, None, flow.left))

    def _have_help(self, flows: list[_StrandFlow], now: float) -> None:
        found = self._chosen.help(flows, now)
        if found is not None and isinstance(found.flow, _StrandFlow):
            self._split(found.flow, found)

    def _split(self, flow: _StrandFlow, found: Help) -> None:
        work = self._works[flow]
        behind = work.rope.split(flow.strand, found.bytes)
        if behind is None:
            return
        if not flow.strand.remaining:
            flow.scope.cancel()
        pick = Pick(flow.pick.chunk, found.member)
        self._chosen.began(pick)
        work.nursery.start_soon(self._bring, work, behind, pick)
