"""Asking other members for bytes: what is shown to them, and the connections to them.

A peer is a mirror that is trusted with nothing: what it sends is unverified, it is not followed
anywhere, and it is given little time. It is shown what the registry would be, as it fetches and
hands out in our name.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import trio

from fetcher.answers import Piece
from fetcher.pacing import PacedSink
from fetcher.peers import protocol
from fetcher.peers.choice import Appetite
from fetcher.peers.passes import Passes
from fetcher.peers.standings import Standings
from fetcher.peers.trials import TRIED_FROM
from fetcher.peers.turns import Turns
from fetcher.peers.wholes import Wholes
from fetcher.registry import BlobAccess
from fetcher.routes import Hop, Route
from fetcher.threads import run_stoppable
from fetcher.transport import Connection, TransferSettings
from fetcher.trust import Contexts, Trust

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping

    from fetcher.answers import Sink
    from fetcher.modelpack import Position
    from fetcher.oci import Descriptor, Digest, Reference
    from fetcher.pacing import Pacing
    from fetcher.peers.members import Members
    from fetcher.peers.owners import Deal, Member
    from fetcher.peers.trust import PeerToken
    from fetcher.ranges import Range
    from fetcher.schedule import Demand
    from fetcher.wire import Head

_MOST_IDLE: Final = 32
"""Connections that are kept for the next request, of all peers together."""


@dataclass(frozen=True, slots=True)
class PeerClientSettings:
    """How peers are asked. Times are seconds."""

    connect_timeout: float = 1.0
    stall_timeout: float = 5.0
    trust: Trust | None = None
    """For TLS with peers; None where they are spoken to in plain HTTP."""
    appetite: Appetite = field(default_factory=Appetite)
    tried_from: int = TRIED_FROM
    """Bytes of a blob from which on it is looked whether who says that he has it tells the truth,
    before anything that he sends is used.
    """


@dataclass(frozen=True, slots=True)
class PeerRequest:
    """A part of a chunk that is asked for."""

    reference: Reference
    blob: Descriptor
    wanted: Range
    chunk_size: int
    position: Position | None
    """As which layer of which model the blob is known."""
    authorization: str | None = field(repr=False)
    """What the registry would be shown."""
    hops: int = 0
    ready: bool = False
    """Only where the chunk is there as a whole; see :data:`fetcher.peers.protocol.READY`."""
    urgent: bool = False
    """A pod waits for it; see :data:`fetcher.peers.protocol.URGENT`."""
    spare: int | None = None


class PeerClient:
    """The node's talk with its peers, for all downloads. Belongs to the trio thread."""

    def __init__(
        self,
        members: Members,
        token: PeerToken | None,
        settings: PeerClientSettings,
        transfer: TransferSettings,
    ) -> None:
        self.members = members
        self.standings = Standings()
        self.wholes = Wholes()
        self.passes = Passes()
        self.settings = settings
        self._token = token
        self._transfer = transfer
        self._contexts = Contexts()
        self._idle: collections.OrderedDict[Connection, str] = collections.OrderedDict()
        self.turns = Turns(self._has_any_room, trio.current_time)

    @property
    def authenticates(self) -> bool:
        """Whether peers prove who they are: a token only says who asks, and not who answers."""
        return self.settings.trust is not None and self.settings.trust.verify

    def _has_any_room(self) -> bool:
        """Whether another request may go out, to a peer or for what this node owns."""
        own = self.settings.appetite.of_registry_each(len(self.members.nearby) + 1)
        return self.has_room or self.standings.of_registry < own

    @property
    def has_room(self) -> bool:
        """Whether another request may go out to a peer."""
        return self.standings.under_way < self.settings.appetite.of_peers

    # -- what others ask of this node --------------------------------------------------------------

    def owns(self, deal: Deal, wanted: Range, chunk_size: int) -> bool:
        """See :meth:`fetcher.peers.members.Members.owns`."""
        return self.members.owns(deal, wanted, chunk_size)

    def asked(self, blob: Digest) -> None:
        """A member wants some of a blob that this node is to fetch: it may be worth a look."""
        if self.standings.beginnings.asked(str(blob), trio.current_time()):
            self.turns.begin()

    # -- one request -------------------------------------------------------------------------------

    async def fetch(
        self,
        member: Member,
        request: PeerRequest,
        sink: Sink,
        demand: Demand,
        pacing: Pacing,
        answered: Callable[[Head], None],
    ) -> None:
        """Fetch a part from a member, as :meth:`fetcher.transport.Connection.fetch` does.

        ``answered`` is told how its answer begins, in the trio thread.
        """
        token = trio.lowlevel.current_trio_token()

        def tell(head: Head) -> None:
            token.run_sync_soon(answered, head)

        access = self._access(member, request, tell)
        piece = Piece(request.blob.digest, request.blob.size, request.wanted)
        connection = self._take(member)

        def work(stop: threading.Event) -> None:
            connection.fetch(access, piece, PacedSink(sink, demand, pacing, stop), stop)

        pacing.begin(demand)
        try:
            await run_stoppable(work)
        finally:
            pacing.end(demand)
            self._give_back(connection, member)

    def _access(
        self,
        member: Member,
        request: PeerRequest,
        tell: Callable[[Head], None],
    ) -> BlobAccess:
        settings, reference, blob = self.settings, request.reference, request.blob
        registry = quote(reference.registry, safe=":")
        path = f"/v2/{reference.repository}/blobs/{blob.digest}?ns={registry}"
        hop, route = self.way(member, path, self._headers(request))
        return BlobAccess(
            hop,
            route,
            connect_timeout=settings.connect_timeout,
            stall_timeout=settings.stall_timeout,
            redirects=0,
            on_answer=tell,
        )

    def way(self, member: Member, path: str, headers: Mapping[str, str]) -> tuple[Hop, Route]:
        """How a request of ours travels to a member."""
        trust = self.settings.trust
        scheme = "http" if trust is None else "https"
        url = f"{scheme}://{member.address}{path}"
        route = Route(member.address, f"peer {member.name}", plain_http=(member.address,))
        return Hop(url, tuple(headers.items()), trust or Trust()), route

    def shown(self, authorization: str | None) -> dict[str, str]:
        """The headers by which a member knows who asks, and what the registry would be shown."""
        headers = {protocol.FROM: self.members.myself.name}
        if self._token is not None:
            headers[protocol.TOKEN] = self._token.shown
        if authorization is not None:
            headers["Authorization"] = authorization
        return headers

    def _headers(self, request: PeerRequest) -> dict[str, str]:
        headers = {
            **self.shown(request.authorization),
            protocol.HOPS: str(request.hops),
            protocol.CHUNK: str(request.chunk_size),
            protocol.LAYER: request.blob.media_type,
        }
        if request.position is not None:
            headers[protocol.MODEL] = f"{request.position.model} {request.position.index}"
        if request.ready:
            headers[protocol.READY] = "1"
        if request.urgent:
            headers[protocol.URGENT] = "1"
        if request.spare is not None:
            headers[protocol.SPARE] = str(request.spare)
        return headers

    # -- connections -------------------------------------------------------------------------------

    def _take(self, member: Member) -> Connection:
        """A connection that was used with this member before, if there is one."""
        known = next((one for one, to in self._idle.items() if to == member.address), None)
        if known is None:
            return Connection(self._transfer, self._contexts)
        del self._idle[known]
        return known

    def _give_back(self, connection: Connection, member: Member) -> None:
        self._idle[connection] = member.address
        if len(self._idle) > _MOST_IDLE:
            oldest, _ = self._idle.popitem(last=False)
            oldest.close()

    def close(self) -> None:
        """Close idle connections, once nothing is fetched any more."""
        for one in self._idle:
            one.close()
        self._idle.clear()
