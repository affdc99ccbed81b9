"""Nodes that pull one model together, each on the real members, owners, standings and choices.

What is not real is the network (:mod:`tests.simulate.network`), and the server's side, which is as
:mod:`fetcher.peers.blobs` says: a member sends what it has or what arrives, fills in what it is
dealt, takes so many uploads, and says who else was handed a chunk.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from fetcher.peers.choice import Appetite, BlobChoice, Flow, Pick
from fetcher.peers.members import Members
from fetcher.peers.owners import Deal, Member
from fetcher.peers.protocol import Have
from fetcher.peers.standings import Standings
from tests.simulate.network import Network

MBIT: Final = 1e6 / 8
MIB: Final = 1024 * 1024
_UPLOADS: Final = 32
_HANDED: Final = 8
_RETRY_AFTER: Final = 1.0
_LOOK_SECONDS: Final = 0.2
_MOST_TRIES: Final = 8
"""Requests of one node at one moment that are refused."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What happens. Rates are Mbit/s, sizes bytes, times seconds."""

    nodes: int = 8
    blobs: tuple[int, ...] = (256 * MIB,)
    chunk: int = 4 * MIB
    link: float = 100.0
    registry: float = 200.0
    zones: int = 1
    peers: bool = True
    killed: tuple[tuple[int, float], ...] = ()
    """Nodes, and when they are gone."""
    blobs_at_once: int = 32
    unfairness: float = 0.4
    """How much connections differ in what they get of a link."""
    step: float = 0.02
    seed: int = 1
    longest: float = 600.0
    appetite: Appetite = field(default_factory=Appetite)


@dataclass(eq=False)
class _Arrival:
    """A chunk at one node: there, or on its way."""

    place: int
    is_complete: bool = False
    requests: list[_Request] = field(default_factory=list)
    """In the order of what they bring."""


@dataclass(eq=False, kw_only=True)
class _Request(Flow):
    """One transfer under way."""

    node: Node
    blob: int
    number: int
    place: int
    start: int
    """In the chunk, of what it brings."""
    stop: int
    before: float
    """Bytes that were there when it began, or that another one wrote."""
    ended: bool = False

    @property
    def base(self) -> int:
        """Where its place begins in the chunk."""
        return 0 if self.place == self.node.chunks[self.blob, self.pick.chunk].place else self.start

    def look(self) -> None:
        there = float(self.node.cluster.network.there[self.place])
        self.got = int(there - self.before)
        self.left = int(self.stop - self.base - there)


class Node:
    """One node: what it has, what it asks for, and what it sends."""

    def __init__(self, cluster: Cluster, index: int, member: Member, members: Members) -> None:
        self.cluster, self.index, self.member = cluster, index, member
        # what does not differ between nodes is there once: real ones have it each
        self.members = copy.copy(members)
        self.members.myself, self.members.serves = member, bool(members.nearby)
        self.standings = Standings()
        self.chunks: dict[tuple[int, int], _Arrival] = {}
        self.uploads = self.most_uploads = self.most_downloads = 0
        self.finished: float | None = None
        self.is_dead = False
        self.under_way: set[_Request] = set()
        self._broken: list[tuple[int, int]] = []
        """Chunks of which a part has come, and the rest is not asked for yet."""
        self._handed: dict[tuple[int, int], deque[str]] = {}
        scenario = cluster.scenario
        self._choices = [
            BlobChoice(
                digest,
                scenario.chunk,
                size,
                self.members,
                self.standings,
                scenario.appetite,
                deal,
            )
            for digest, size, deal in zip(
                cluster.digests, scenario.blobs, cluster.deals, strict=True
            )
        ]
        self._todo = {
            blob: list(range(-(-size // scenario.chunk)))
            for blob, size in enumerate(scenario.blobs)
        }

    # -- asking ------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Ask for whatever may be asked for now."""
        if self.is_dead or self.finished is not None:
            return
        for broken in list(self._broken):
            pick = self._choices[broken[0]].again(broken[1], self.cluster.now)
            if pick is not None and self._ask(broken[0], pick):
                self._broken.remove(broken)
        tries = 0
        for blob in self._open_blobs():
            while tries < _MOST_TRIES and (chunks := self._lacking(blob)):
                pick = self._choices[blob].next(chunks, self.cluster.now)
                if pick is None:
                    break
                tries += not self._ask(blob, pick)
        if not any(self._lacking(blob) for blob in self._todo):
            self._have_help()

    def _open_blobs(self) -> list[int]:
        begun = {request.blob for request in self.under_way}
        others = (blob for blob in self._todo if blob not in begun and self._lacking(blob))
        fresh = [blob for blob, _ in zip(others, range(self._room(begun)), strict=False)]
        return [*begun, *fresh]

    def _room(self, begun: set[int]) -> int:
        return max(self.cluster.scenario.blobs_at_once - len(begun), 0)

    def _lacking(self, blob: int) -> list[int]:
        left = [one for one in self._todo[blob] if (blob, one) not in self.chunks]
        self._todo[blob] = left
        return left

    def _have_help(self) -> None:
        flows: dict[int, list[Flow]] = {}
        for request in self.under_way:
            before = request.got
            request.look()
            if request.got != before:
                request.moved_at = self.cluster.now
            flows.setdefault(request.blob, []).append(request)
        for blob, some in flows.items():
            found = self._choices[blob].help(some, self.cluster.now)
            if found is None or not isinstance(found.flow, _Request):
                continue
            request = found.flow
            pick = Pick(request.pick.chunk, found.member)
            if self._ask(blob, pick, (request.stop - found.bytes, request.stop, request)):
                request.stop -= found.bytes
                self.cluster.network.shorten(request.number, request.stop - request.base)

    def _ask(self, blob: int, pick: Pick, behind: tuple[int, int, _Request] | None = None) -> bool:
        """Send a request; ``behind`` another one, for the bytes that it is not to bring."""
        cluster, choice = self.cluster, self._choices[blob]
        origin, source = -1, cluster.registry
        arrival = self.chunks.get((blob, pick.chunk))
        is_first = arrival is None or (behind is None and not cluster.network.there[arrival.place])
        if pick.member is not None:
            other = cluster.by_name[pick.member.name]
            may_arrive = is_first and bool(choice.line(pick.chunk))
            found = other.serve(self, blob, pick.chunk, is_first=may_arrive)
            if pick.is_guess:
                self.standings.guessed(found=found is not None)
            if found is None:
                cluster.refused += 1
                return False
            origin, source = -1 if found.is_complete else found.place, other.index
        start, stop = (0, len(choice.range(pick.chunk))) if behind is None else behind[:2]
        arrival = arrival or self._arrival(blob, pick.chunk)
        place = arrival.place if behind is None else cluster.network.place()
        before = float(cluster.network.there[place])
        number = cluster.network.start(source, self.index, origin, place, stop - start, start)
        request = _Request(
            pick=pick,
            since=cluster.now,
            node=self,
            blob=blob,
            number=number,
            place=place,
            start=start,
            stop=stop,
            before=before,
        )
        at = 0 if behind is None else arrival.requests.index(behind[2]) + 1
        arrival.requests.insert(at, request)
        cluster.requests[number] = request
        self.under_way.add(request)
        self.most_downloads = max(self.most_downloads, len(self.under_way))
        choice.began(pick)
        return True

    def _arrival(self, blob: int, chunk: int) -> _Arrival:
        found = self.chunks.get((blob, chunk))
        if found is None:
            found = self.chunks[blob, chunk] = _Arrival(self.cluster.network.place())
        return found

    # -- being asked -------------------------------------------------------------------------------

    def serve(self, asker: Node, blob: int, chunk: int, *, is_first: bool) -> _Arrival | None:
        """What is sent to another node, or nothing; it is told what real nodes tell."""
        now, choice, name = self.cluster.now, asker._choices[blob], self.member.name
        if self.is_dead:
            asker.standings.failed(name, now, now)
            return None
        in_line = self.member in choice.line(chunk)
        if in_line:
            self.standings.beginnings.asked(str(self.cluster.digests[blob]), now)
        asker.standings.told(name, self.uploads)
        choice.told(self.member, self._have(blob))
        found = self._found(blob, chunk, passed_on=is_first or in_line)
        if found is None:
            choice.lacks(self.member, chunk, now)
            return None
        if self._is_busy(asker, blob, chunk, is_first=is_first):
            return None
        self._handed.setdefault((blob, chunk), deque(maxlen=_HANDED)).append(asker.member.name)
        self.uploads += 1
        self.most_uploads = max(self.most_uploads, self.uploads)
        asker.standings.answered(name, 0.0)
        asker.standings.served_at = now
        return found

    def _is_busy(self, asker: Node, blob: int, chunk: int, *, is_first: bool) -> bool:
        now, choice, name = self.cluster.now, asker._choices[blob], self.member.name
        handed = self._handed.get((blob, chunk), deque())
        handed.rotate()
        other = next((one for one in handed if one != asker.member.name), None)
        spare = asker.standings.spare(one.name for one in asker.members.nearby[:64])
        if other and is_first and spare is not None and self.uploads > spare:
            choice.named(self.member, chunk, other, now)
            return True
        if self.uploads < _UPLOADS:
            return False
        if other is not None:
            choice.named(self.member, chunk, other, now)
        asker.standings.busy(name, now, _RETRY_AFTER)
        return True

    def _found(self, blob: int, chunk: int, *, passed_on: bool) -> _Arrival | None:
        found = self.chunks.get((blob, chunk))
        if found is not None and found.is_complete:
            return found
        deal = self.cluster.deals[blob]
        is_ours = self.members.owners(deal.order).fills(self.member, deal.first + chunk)
        if found is not None and passed_on:
            has_begun = self.cluster.network.there[found.place] > 0
            return found if has_begun or is_ours else None
        if found is None and is_ours and passed_on:
            pick = self._choices[blob].at_once(chunk, self.cluster.now)
            return self.chunks.get((blob, chunk)) if pick and self._ask(blob, pick) else None
        return None

    def _have(self, blob: int) -> Have:
        scenario = self.cluster.scenario
        count = -(-scenario.blobs[blob] // scenario.chunk)
        there = (
            chunk
            for chunk in range(count)
            if (one := self.chunks.get((blob, chunk))) is not None and one.is_complete
        )
        return Have.of(scenario.chunk, count, there)

    # -- what happens ------------------------------------------------------------------------------

    def ended(self, request: _Request) -> None:
        """A transfer has brought what it was to bring."""
        cluster, choice, chunk = self.cluster, self._choices[request.blob], request.pick.chunk
        self._stopped(request)
        arrival = self.chunks[request.blob, chunk]
        while arrival.requests and arrival.requests[0].ended:
            del arrival.requests[0]
            if arrival.requests:
                self._continue(arrival, arrival.requests[0])
        if not arrival.requests:
            arrival.is_complete = True
            choice.came(chunk)
            if not (self.under_way or self._broken) and not any(map(self._lacking, self._todo)):
                self.finished = cluster.now

    def _continue(self, arrival: _Arrival, after: _Request) -> None:
        """What waited behind an earlier part is written where it belongs."""
        network = self.cluster.network
        network.there[arrival.place] = after.start + network.there[after.place]
        after.before += after.start
        after.place = arrival.place
        if not after.ended:
            network.continue_at(after.number, arrival.place)

    def _stopped(self, request: _Request) -> None:
        member = request.pick.member
        self.under_way.discard(request)
        self._choices[request.blob].ended(request.pick)
        request.look()
        request.ended = True
        name = None if member is None else member.name
        self.standings.measured(
            name, request.got, self.cluster.now - request.since, self.cluster.now
        )
        if member is not None:
            self.cluster.by_name[member.name].uploads -= 1

    def lost(self, request: _Request) -> None:
        """A transfer broke off: its part of the chunk, and all of it here, is asked for again."""
        now, member = self.cluster.now, request.pick.member
        if member is not None:
            self.standings.failed(member.name, now, request.since)
        arrival = self.chunks[request.blob, request.pick.chunk]
        for one in arrival.requests:
            if not one.ended:
                self.cluster.network.end(one.number)
                self.cluster.requests.pop(one.number, None)
                self._stopped(one)
        # what is there stays, and is passed on still; the rest comes from somebody else
        arrival.requests.clear()
        self._broken.append((request.blob, request.pick.chunk))


class Cluster:
    """All nodes and the registry."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.now = 0.0
        self.refused = 0
        self._random = random.Random(scenario.seed)  # noqa: S311 - the same run for the same seed
        count = self.registry = scenario.nodes
        links = np.full(count + 1, scenario.link * MBIT)
        links[count] = scenario.registry * MBIT
        self.network = Network(links, links.copy(), scenario.unfairness, scenario.seed)
        self.digests = [f"sha256:{scenario.seed:032x}{n:032x}" for n in range(len(scenario.blobs))]
        self.deals = [Deal(f"sha256:{scenario.seed:064x}", n) for n in range(len(scenario.blobs))]
        found = [
            Member(f"node-{n}", f"10.0.0.{n}:1", f"zone-{n % scenario.zones}") for n in range(count)
        ]
        self.requests: dict[int, _Request] = {}
        zones = {one.zone: Members("nobody", one.zone) for one in found}
        for members in zones.values():
            members.replace(found if scenario.peers else [])
        self.nodes = [Node(self, n, one, zones[one.zone]) for n, one in enumerate(found)]
        self.by_name = {node.member.name: node for node in self.nodes}
        self._killed = sorted(scenario.killed, key=lambda one: one[1])

    def run(self) -> None:
        """Until every node that lives has the model."""
        scenario, order = self.scenario, list(self.nodes)
        self._random.shuffle(order)
        for node in order:
            node.dispatch()
        looks = -(-_LOOK_SECONDS // scenario.step)
        steps = 0
        while self.now < scenario.longest and self._is_going_on():
            ended = self.network.step(scenario.step)
            self.now += scenario.step
            steps += 1
            changed: dict[Node, None] = dict.fromkeys(self._kill())
            for number in ended:
                request = self.requests.pop(number, None)
                if request is not None:
                    self.network.end(number)
                    request.node.ended(request)
                    changed[request.node] = None
            # each node looks from time to time, in turn
            changed.update(dict.fromkeys(order[int(steps % looks) :: int(looks)]))
            for node in changed:
                node.dispatch()

    def _is_going_on(self) -> bool:
        return any(node.finished is None and not node.is_dead for node in self.nodes)

    def _kill(self) -> list[Node]:
        """Nodes whose transfers broke off."""
        changed = []
        while self._killed and self._killed[0][1] <= self.now:
            dead = self.nodes[self._killed.pop(0)[0]]
            dead.is_dead = True
            for request in list(self.requests.values()):
                if request.number in self.requests and dead in (
                    request.node,
                    self.nodes[source] if (source := self._source(request)) is not None else None,
                ):
                    request.node.lost(request)
                    changed.append(request.node)
        return changed

    def _source(self, request: _Request) -> int | None:
        member = request.pick.member
        return None if member is None else self.by_name[member.name].index

    # -- what came of it ---------------------------------------------------------------------------

    @property
    def slowest(self) -> float:
        """Seconds until the last node that lives had the model."""
        times = [node.finished for node in self.nodes if not node.is_dead]
        return max(self.scenario.longest if one is None else one for one in times)

    @property
    def alone(self) -> float:
        """Seconds that one node needs at the full rate of its link."""
        return sum(self.scenario.blobs) / (self.scenario.link * MBIT)

    @property
    def egress(self) -> float:
        """Bytes that the registry sent, in times of the model."""
        return float(self.network.sent[-1]) / sum(self.scenario.blobs)
