"""Which chunk of a blob is asked for next, and of whom: pure policy, time is passed in.

Every owner is kept busy with as many requests as every other one: then all links of a cluster are
full. Of those chunks that may be fetched, the next is the first whose source has fewest of our
requests; a member that has the chunk, or may have it by now, is asked where the owner has enough to
do. What this node owns it fetches first, as others wait for it. The chunks of one owner are asked
for in one order by all, as what arrives there is passed on to everybody meanwhile; the owners are
asked by each node in an order of its own. Without a member that can be asked, a chunk comes from
the mirrors and the registry, as it would without peers.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Final

from fetcher.peers.owners import Deal
from fetcher.ranges import Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fetcher.peers.members import Members
    from fetcher.peers.owners import Member, Owners
    from fetcher.peers.protocol import Have
    from fetcher.peers.standings import Standings

_WINDOW: Final = 256
"""Chunks among which one is chosen, the most urgent first."""
_PATIENCE: Final = 30.0
"""Seconds for which all who have a chunk may be busy, before the registry is asked."""
_LITTLE_PATIENCE: Final = 3.0
"""The same, where no peer has sent anything lately: nobody may ever."""
_CROWD: Final = 50
"""Members of a zone for which one is a second more patient."""
_LATELY: Final = 10.0
_MOST_HOLDERS: Final = 8
"""Members that are remembered to have one chunk."""
_GUESSES: Final = 2
_LACKING_SECONDS: Final = 2.0
"""How long a member that lacks a chunk is taken not to have got it."""
_SILENT_SECONDS: Final = 30.0
"""How long a member is not asked for a chunk of which it sent nothing."""
_MOST_KEPT: Final = 4096
_ELSEWHERE_SECONDS: Final = 0.5
"""How long a member that named another one for a chunk is not asked for it."""
_UNKNOWN: Final = 0.5
"""What it costs, in requests, that a member may not have the chunk."""

_LEAST_HELP: Final = 512 * 1024
"""Bytes that are worth another request, and what the first one has sent in vain by then."""
_LEAST_SECONDS: Final = 0.5
_STILL_SECONDS: Final = 1.0
"""Without a byte: somebody else brings all of the rest, however little that is."""
_GIVEN_UP_SECONDS: Final = 2.5
"""The same, where no peer can: mirrors and the registry do."""
_MOST_GIVEN_UP_SECONDS: Final = 5.0
"""The same, however large the zone is."""
_MOST_PARTS: Final = 4
"""Requests that bring one chunk."""


@dataclass(frozen=True, slots=True)
class Appetite:
    """How many requests of the node may be under way."""

    of_one_peer: int = 2
    of_peers: int = 10
    """To all of them together. More would fill a link no better, and share its queue."""
    of_registry: int = 8
    """For chunks that the members of a zone own, by all of them together, but one by each.

    A node that has more of its own than of the others' makes them wait for each other in the end.
    """
    of_registry_alone: int = 8
    """For all chunks, while those who own them cannot be asked."""

    def of_registry_each(self, members: int) -> int:
        """For chunks that a node owns, by each of so many members of its zone."""
        return max(round(self.of_registry / members), 1)


@dataclass(frozen=True, slots=True)
class Pick:
    """One chunk, and whom to ask: a member, or mirrors and registry where there is none."""

    chunk: int
    member: Member | None
    is_guess: bool = False
    """Whether nobody knows that the member has it."""


@dataclass(eq=False)
class Flow:
    """A request for a chunk, or for a part of it, that is under way."""

    pick: Pick
    since: float
    got: int = 0
    """Bytes that it has brought."""
    left: int = 0
    """Bytes that it is still to bring."""

    looked_at: float = 0.0
    """When it was judged last, and what it had brought by then."""
    got_then: int = 0
    doubts: int = 0
    """How often in a row it was found to be much too slow."""
    moved_at: float = 0.0
    """When the last byte was seen to have come."""

    def look(self) -> None:
        """Bring the figures up to date."""


@dataclass(frozen=True, slots=True)
class Help:
    """The last ``bytes`` of what a request is to bring are to come from somebody else instead."""

    flow: Flow
    member: Member | None
    """Nobody but mirrors and the registry where it is None."""
    bytes: int


@dataclass(slots=True)
class BlobChoice:
    """The choices for one blob. Belongs to the trio thread."""

    blob: str
    chunk_size: int
    size: int
    members: Members
    standings: Standings
    appetite: Appetite = field(default_factory=Appetite)
    deal: Deal | None = None
    """None where the blob is known by itself."""
    contributors: dict[int, dict[str, bool]] = field(default_factory=dict)
    """By chunk, the members that sent some of it, and whether they had all of the blob."""
    _version: int = -1
    _owners: Owners | None = None
    _lines: dict[int, tuple[Member, ...]] = field(default_factory=dict)
    _had: dict[str, int] = field(default_factory=dict)
    """By member, the chunks that it is known to have, as bits."""
    _holders: dict[int, list[str]] = field(default_factory=dict)
    """By chunk, some members that have it, as they or others said."""
    _has_asked: bool = False
    """Whether somebody was asked for a chunk of this node's own."""
    _questioned: int | None = None
    """That chunk, while he is."""
    _lacking: dict[tuple[str, int], float] = field(default_factory=dict)
    """Until when members are not asked for chunks that they lack."""
    _elsewhere: dict[tuple[str, int], float] = field(default_factory=dict)
    """Until when members are not asked for chunks for which they named somebody else."""
    _marked: set[int] = field(default_factory=set)
    """Chunks that some are not asked for."""
    _waiting_since: dict[int, float] = field(default_factory=dict)
    _distrusted: set[str] = field(default_factory=set)
    """Members that passed on wrong bytes of this blob."""
    _adopted: set[int] = field(default_factory=set)
    """Chunks that this node fetches itself, as it owns them by somebody else's count."""

    # -- the next one ------------------------------------------------------------------------------

    def next(self, chunks: Iterable[int], now: float) -> Pick | None:
        """The next of ``chunks``, best first, and whom to ask; None while all have to wait."""
        self._refresh()
        best: Pick | None = None
        least = float("inf")
        window = list(islice(chunks, _WINDOW))
        looked: dict[str, bool] = {}
        for chunk in window:
            line = self.line(chunk)
            if line and self._is_as_another(chunk, line[0], looked, now):
                continue
            if not line and self._may_ask_registry():
                if self._is_questioning(now):
                    # whoever is asked for one of them says in a moment if he has the others
                    continue
                return self._question(window, now) or Pick(chunk, self._holder(chunk, now))
            found = self._source(chunk, line, now)
            if found is None:
                continue
            cost = self._cost(found.member, line) if found.member else _WINDOW
            if cost < least:
                best, least = found, cost
        return best

    def _is_as_another(
        self, chunk: int, owner: Member, looked: dict[str, bool], now: float
    ) -> bool:
        """Whether a chunk of that owner was looked at just now, and this one differs in nothing.

        So a look takes as long as there are owners, and not chunks.
        """
        if chunk in self._holders or chunk in self._marked:
            return False
        known = looked.get(owner.name)
        if known is None:
            # where he is not to be asked, each chunk has somebody else, or waits since it was seen
            is_busy = self.standings.is_busy(owner.name, now)
            looked[owner.name] = self._may_ask(owner, chunk, now) and not is_busy
            return False
        return known

    def _holder(self, chunk: int, now: float) -> Member | None:
        """Somebody who has a chunk of this node's own, as where it joined the others later."""
        able = [one for one in self._able(chunk, (), now) if self._is_ready(one, chunk, now)]
        return min(able, key=lambda one: self._cost(one, ()), default=None)

    def _question(self, window: Sequence[int], now: float) -> Pick | None:
        """Where nobody told yet what he has of the blob, somebody is asked for a chunk of this
        node's own, once; but not if all have just begun, as it seems.

        For the last one: the others need not wait for the answer if it seems so meanwhile.
        """
        nearby = self.members.nearby
        is_early = self.standings.beginnings.is_early(self.blob, now)
        if self._had or self._has_asked or is_early or not nearby:
            return None
        self._has_asked = True
        chunk = next(one for one in reversed(window) if not self.line(one))
        member = random.choice(nearby)  # noqa: S311 - no secret
        usable = self._may_ask(member, chunk, now) and self._is_ready(member, chunk, now)
        if not usable or member == self.members.myself:
            return None
        self._questioned = chunk
        return Pick(chunk, member)

    def _is_questioning(self, now: float) -> bool:
        is_early = self.standings.beginnings.is_early(self.blob, now)
        return self._questioned is not None and not is_early

    def at_once(self, chunk: int, now: float) -> Pick | None:
        """Whom to ask for a chunk that waits for nothing; None while all who have it are busy."""
        self._refresh()
        line = self.line(chunk)
        able = self._able(chunk, line, now)
        ready = [one for one in able if self._is_ready(one, chunk, now)]
        if not able:
            return Pick(chunk, None)
        if not ready:
            return Pick(chunk, None) if self._has_waited(chunk, now) else None
        return Pick(chunk, min(ready, key=lambda one: self._cost(one, line)))

    def is_for_hosts(self, now: float) -> bool:
        """Whether mirrors and the registry may be asked for some of it before peers are; not known
        of several chunks.
        """
        self._refresh()
        return self.size > self.chunk_size or self._first(0, self.line(0), now) is None

    def again(self, chunk: int, now: float, excepted: Iterable[str] = ()) -> Pick | None:
        """Whom to ask for the rest of a chunk after somebody failed; None while it has to wait."""
        self._refresh()
        return self._source(chunk, self.line(chunk), now, excepted)

    def _others(self, chunk: int, now: float, excepted: Iterable[str]) -> list[Member]:
        able = self._able(chunk, self.line(chunk), now)
        return [one for one in able if one.name not in excepted]

    def _source(
        self, chunk: int, line: tuple[Member, ...], now: float, excepted: Iterable[str] = ()
    ) -> Pick | None:
        """Whom to ask for one chunk, if anybody can be asked now."""
        is_full = self.standings.under_way >= self.appetite.of_peers
        if is_full and self._first(chunk, line, now) is not None:
            return None
        able = self._others(chunk, now, excepted)
        if not able:
            # as if there were no peers
            most = self.appetite.of_registry_alone if line else self._of_registry
            return Pick(chunk, None) if self.standings.of_registry < most else None
        if is_full:
            return None
        ready = [one for one in able if self._is_ready(one, chunk, now) and self._is_free(one)]
        is_guess = not ready and not excepted
        if is_guess:
            ready = self._guesses(chunk, line, now)
        if ready:
            return Pick(chunk, min(ready, key=lambda one: self._cost(one, line)), is_guess)
        if not any(self._is_ready(one, chunk, now) for one in able):
            return Pick(chunk, None) if self._has_waited(chunk, now) else None
        return None

    def _able(self, chunk: int, line: tuple[Member, ...], now: float) -> list[Member]:
        """Who is to be asked: the first of the line that is there, and who has it as it seems."""
        first = self._first(chunk, line, now)
        mine = self.members.myself.zone
        holders = [
            one
            for name in self._holders.get(chunk, ())
            if (one := self.members.find(name)) is not None
            and one.zone == mine
            and one != first
            and self._may_ask(one, chunk, now)
        ]
        return holders if first is None else [first, *holders]

    def _first(self, chunk: int, line: tuple[Member, ...], now: float) -> Member | None:
        return next((one for one in line if self._may_ask(one, chunk, now)), None)

    def _guesses(self, chunk: int, line: tuple[Member, ...], now: float) -> list[Member]:
        """Members that may have got the chunk meanwhile: they say quickly if they have not."""
        nearby = self.members.nearby
        if now - self.standings.guessed_at < self.standings.guess_pause:
            return []
        tried = [random.choice(nearby) for _ in range(_GUESSES)] if nearby else []  # noqa: S311
        found = [
            one
            for one in tried
            if one not in line
            and one != self.members.myself
            and self._may_ask(one, chunk, now)
            and self._is_ready(one, chunk, now)
            and self._is_free(one)
        ]
        if found:
            self.standings.guessed_at = now
        return found

    def _may_ask(self, member: Member, chunk: int, now: float) -> bool:
        standings, name = self.standings, member.name
        lacks = self._lacking.get((name, chunk), now) > now or name in self._distrusted
        able = standings.is_usable(name, now) and not standings.is_tried(name)
        is_slow = standings.is_slow(name, now) or standings.harvest.is_resting(now)
        return able and not lacks and not is_slow

    def why_not(self, member: Member, chunk: int, now: float) -> str:
        """What keeps a member from being asked, for the log."""
        if self._lacking.get((member.name, chunk), now) > now:
            return "it does not have it"
        if not self.standings.is_usable(member.name, now):
            return "it rests, or is banned"
        if self.standings.is_slow(member.name, now):
            return "it is slow"
        if self.standings.harvest.is_resting(now):
            return "all of them are slow"
        return "it is busy" if not self._is_ready(member, chunk, now) else "nothing"

    def _is_ready(self, member: Member, chunk: int, now: float) -> bool:
        sent_away = self._elsewhere.get((member.name, chunk), now) > now
        return not sent_away and not self.standings.is_busy(member.name, now)

    def _is_free(self, member: Member) -> bool:
        one = self.standings.of(member.name)
        # who has never answered may be gone, or has to begin itself: another one would wait, too
        return one.under_way < (self.appetite.of_one_peer if one.has_answered else 1)

    def _may_ask_registry(self) -> bool:
        return self.standings.of_registry < self._of_registry

    @property
    def _of_registry(self) -> int:
        """This node's part of the requests for what each owns."""
        return self.appetite.of_registry_each(len(self.members.nearby) + 1)

    def _has_waited(self, chunk: int, now: float) -> bool:
        # among thousands that begin together the first chunks take a while to come to everybody
        little = min(_LITTLE_PATIENCE + len(self.members.nearby) / _CROWD, _PATIENCE)
        patience = _PATIENCE if now - self.standings.served_at < _LATELY else little
        return now - self._waiting_since.setdefault(chunk, now) >= patience

    def _cost(self, member: Member, line: Sequence[Member]) -> float:
        """The less we ask of it, and the less it has to do at all, the better."""
        one = self.standings.of(member.name)
        sure = member in line or member.name in self._had
        turn = zlib.crc32(f"{self.members.myself.name} {member.name}".encode()) / 2**32
        return one.under_way + one.load / 64 + (0.0 if sure else _UNKNOWN) + turn / 256

    # -- help with what takes long -----------------------------------------------------------------

    def help(self, flows: Sequence[Flow], now: float) -> Help | None:
        """With nothing left to be asked for: who helps with what would take longest.

        The helper brings the end of what a request was to bring, so that no byte comes twice.
        """
        self._refresh()
        if self.standings.under_way >= self.appetite.of_peers:
            return None
        still = (flow for flow in flows if now - max(flow.moved_at, flow.since) >= _STILL_SECONDS)
        for flow in still:
            found = self._help_still(flow, flows, now)
            if found is not None:
                return found
        paces = {flow: flow.got / max(now - flow.since, _LEAST_SECONDS) for flow in flows}
        typical = sum(paces.values()) / len(paces) if paces else 0.0
        waits = {
            flow: flow.left / max(pace, 1.0)
            for flow, pace in paces.items()
            if flow.left >= _LEAST_HELP and now - flow.since >= _LEAST_SECONDS
        }
        for flow, seconds in sorted(waits.items(), key=lambda item: -item[1]):
            if seconds < _LEAST_SECONDS:
                break
            member = self._helper(flow, flows, now)
            if member is not None:
                pace = paces[flow]
                share = typical / (typical + pace) if pace else 1.0
                return Help(flow, member, int(flow.left * share))
        return None

    def _help_still(self, flow: Flow, flows: Sequence[Flow], now: float) -> Help | None:
        """Who brings what a peer that has stopped sending was to bring."""
        if flow.pick.member is None or not flow.left:
            return None
        member = self._helper(flow, flows, now)
        seconds = now - max(flow.moved_at, flow.since)
        # before the first byte it may wait for the registry itself, as would this node
        is_over = flow.got > 0 and seconds >= self._given_up_after
        return Help(flow, member, flow.left) if member or is_over else None

    @property
    def _given_up_after(self) -> float:
        # in a crowd what is passed on from hand to hand comes in fits and starts
        crowd = len(self.members.nearby) / _CROWD
        return min(_GIVEN_UP_SECONDS + crowd, _MOST_GIVEN_UP_SECONDS)

    def _helper(self, flow: Flow, flows: Sequence[Flow], now: float) -> Member | None:
        chunk = flow.pick.chunk
        line = self.line(chunk)
        asked = [one.pick.member for one in flows if one.pick.chunk == chunk]
        if not line or len(asked) >= _MOST_PARTS:
            return None
        able = self._able(chunk, line, now)
        if flow.got:
            able += self._guesses(chunk, line, now)
        else:
            # who has sent nothing may be waited for in vain, but not for somebody who has it not
            able = [one for one in able if one.name in self._holders.get(chunk, ())]
        able = [
            one
            for one in able
            if one not in asked and self._is_ready(one, chunk, now) and self._is_free(one)
        ]
        return min(able, key=lambda one: self._cost(one, line), default=None)

    # -- what happened -----------------------------------------------------------------------------

    def began(self, pick: Pick) -> None:
        """A request goes out."""
        if pick.member is None:
            self.standings.of_registry += 1
        else:
            self.standings.began(pick.member.name)

    def ended(self, pick: Pick) -> None:
        """It ended, however."""
        if pick.chunk == self._questioned:
            self._questioned = None
        if pick.member is None:
            self.standings.of_registry -= 1
        else:
            self.standings.ended(pick.member.name)

    def brought(self, chunk: int, member: Member, *, has_all: bool) -> None:
        """Some bytes of the chunk came from there."""
        if not self.line(chunk):
            self.standings.beginnings.had()
        self.contributors.setdefault(chunk, {})[member.name] = has_all

    def distrust(self, name: str) -> None:
        """The member passed on wrong bytes: it is not asked for this blob any more."""
        self._distrusted.add(name)

    def acquit(self, name: str) -> None:
        """It did not."""
        self._distrusted.discard(name)

    def came(self, chunk: int) -> None:
        """The chunk is there."""
        self._holders.pop(chunk, None)
        self._marked.discard(chunk)
        self._waiting_since.pop(chunk, None)

    def told(self, member: Member, have: Have) -> None:
        """The member has these chunks."""
        count = -(-self.size // self.chunk_size)
        if not have.chunk_size:
            had = (1 << count) - 1
        elif have.chunk_size == self.chunk_size:
            had = have.bits & ((1 << count) - 1)
        else:
            return
        new = had & ~self._had.get(member.name, 0)
        self._had[member.name] = had
        while new:
            chunk = new.bit_length() - 1
            new ^= 1 << chunk
            self._note(chunk, member.name)

    def _note(self, chunk: int, name: str) -> None:
        names = self._holders.setdefault(chunk, [])
        if name not in names:
            names.insert(0, name)
            del names[_MOST_HOLDERS:]

    def named(self, member: Member, chunk: int, other: str, now: float) -> None:
        """The member has much to do, and says who else has the chunk."""
        self._marked.add(chunk)
        _forget_past(self._elsewhere, now)
        self._elsewhere[member.name, chunk] = now + _ELSEWHERE_SECONDS
        self._note(chunk, other)

    def refused(self, member: Member, chunk: int, now: float) -> None:
        """The member cannot send the chunk at the moment."""
        self._marked.add(chunk)
        _forget_past(self._elsewhere, now)
        self._elsewhere[member.name, chunk] = now + _ELSEWHERE_SECONDS

    def silent(self, member: Member, chunk: int, now: float) -> None:
        """The member is to fetch the chunk, and has let wait for it: somebody else stands in."""
        self.lacks(member, chunk, now, _SILENT_SECONDS)

    def lacks(
        self, member: Member, chunk: int, now: float, seconds: float = _LACKING_SECONDS
    ) -> None:
        """The member does not have the chunk, and does not fetch it; not for so many seconds."""
        if chunk == self._questioned:
            self.standings.beginnings.lacked(now)
        self._marked.add(chunk)
        _forget_past(self._lacking, now)
        self._lacking[member.name, chunk] = now + seconds
        if member.name in self._holders.get(chunk, ()):
            self._holders[chunk].remove(member.name)

    # -- chunks ------------------------------------------------------------------------------------

    def range(self, chunk: int) -> Range:
        """The bytes of a chunk."""
        start = chunk * self.chunk_size
        return Range(start, min(start + self.chunk_size, self.size))

    def line(self, chunk: int) -> tuple[Member, ...]:
        """Whom this node is to ask for a chunk, in turn; nobody where it is the chunk's home."""
        found = self._lines.get(chunk)
        if found is None or self._version != self.members.version:
            self._refresh()
            deal = self._deal
            owners = self._owners or self.members.owners(deal.order)
            adopted = chunk in self._adopted
            found = () if adopted else owners.asked_by(self.members.myself, deal.first + chunk)
            self._lines[chunk] = found
        return found

    def adopt(self, chunks: Iterable[int]) -> None:
        """Fetch these chunks for others from mirrors and the registry, whoever owns them otherwise.

        Two models may have the blob, and deal it out differently: two nodes, each of which owns
        the chunk by the other one's count, would wait for each other.
        """
        for chunk in chunks:
            self._adopted.add(chunk)
            self._lines.pop(chunk, None)

    @property
    def _deal(self) -> Deal:
        return self.deal or Deal(self.blob)

    def _refresh(self) -> None:
        if self._version != self.members.version:
            self._version = self.members.version
            self._owners = self.members.owners(self._deal.order)
            self._lines.clear()


def _forget_past(until: dict[tuple[str, int], float], now: float) -> None:
    """Keep what is to be remembered from growing with the chunks of a blob, and the members."""
    if len(until) >= _MOST_KEPT:
        kept = {key: time for key, time in until.items() if time > now}
        until.clear()
        until.update(kept)
