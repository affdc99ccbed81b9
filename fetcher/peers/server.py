"""The peer server: the distribution API of a node, for those who belong to it and nobody else.

A connection is followed from here: who is it, what does it ask, who answers that. A stranger learns
nothing, not even what would be an error.
"""

from __future__ import annotations

import collections
import logging
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from fetcher.errors import AccessDenied, InvalidRequest, ModelError, Unauthenticated
from fetcher.peers import protocol, requests
from fetcher.peers.http import LOST, BytesMissing, HttpConnection, HttpPatience
from fetcher.peers.requests import Refusal
from fetcher.threads import Stopped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fetcher.peers.blobs import Blobs
    from fetcher.peers.http import Stream
    from fetcher.peers.manifests import Manifests
    from fetcher.peers.offers import Offers
    from fetcher.peers.requests import Asked, Request
    from fetcher.peers.served import Served
    from fetcher.peers.trust import PeerTls, PeerToken

logger: Final = logging.getLogger(__name__)

_BACKLOG: Final = 1024
_HANDSHAKE_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class PeerServerSettings:
    """What a peer server allows."""

    namespace: str = ""
    """The registry that is meant by requests that name none."""
    connections: int = 1024
    """At one time."""
    connections_of_one: int = 128
    """From one address."""
    patience: HttpPatience = field(default_factory=HttpPatience)


async def listen(address: str) -> list[trio.SocketListener]:
    """Listen on ``host:port``; without a host on all addresses. Raises :class:`InvalidRequest`."""
    host, _, port = address.rpartition(":")
    try:
        return await trio.open_tcp_listeners(
            int(port), host=host.strip("[]") or None, backlog=_BACKLOG
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidRequest(
            f"peers cannot be listened to on {address}: {reason}", setting="peer-listen"
        ) from error


class PeerServer:
    """Answers peers."""

    def __init__(
        self,
        blobs: Blobs,
        manifests: Manifests,
        offers: Offers,
        token: PeerToken | None,
        tls: PeerTls | None,
        served: Served,
        settings: PeerServerSettings,
    ) -> None:
        """``token`` and ``tls`` are required of everybody where they are given."""
        self._blobs = blobs
        self._manifests = manifests
        self._offers = offers
        self._token = token
        self._tls = tls
        self.served = served
        """What it has sent so far."""
        self._settings = settings
        self._addresses: collections.Counter[str] = collections.Counter()

    async def serve_on(
        self, address: str, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Answer connections to ``address`` until cancelled; see :func:`listen`."""
        listeners = await listen(address)
        task_status.started()
        await self.serve(listeners)

    async def serve(self, listeners: Sequence[trio.SocketListener]) -> None:
        """Answer connections until cancelled."""
        await trio.serve_listeners(self._accepted, list(listeners))

    async def _accepted(self, stream: trio.SocketStream) -> None:
        """One connection to its end. Nothing that happens on it gets further than here."""
        address = _address(stream)
        self._addresses[address] += 1
        self.served.connections += 1
        try:
            settings = self._settings
            full = (
                self.served.connections > settings.connections
                or self._addresses[address] > settings.connections_of_one
            )
            if full:
                logger.info("turned a peer at %s away: too many connections", address)
            else:
                await self._secured(stream, address)
        except (*LOST, ssl.SSLError, Stopped) as error:
            logger.debug("a peer at %s left: %s", address, error)
        except (BytesMissing, ModelError, OSError) as error:
            logger.info("an answer to the peer at %s ended early: %s", address, error)
        except Exception:
            logger.exception("fault of this program on a connection of the peer at %s", address)
        finally:
            self.served.connections -= 1
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]
            await trio.aclose_forcefully(stream)

    async def _secured(self, stream: trio.SocketStream, address: str) -> None:
        if self._tls is None:
            await self._converse(stream, address)
            return
        context = self._tls.context()
        secure = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        try:
            with trio.fail_after(_HANDSHAKE_SECONDS):
                await secure.do_handshake()
        except (trio.BrokenResourceError, ssl.SSLError) as error:
            self.served.strangers += 1
            reason = error.__cause__ or error
            logger.info("turned a stranger at %s away from the peers: %s", address, reason)
            return
        await self._converse(secure, address)
        with trio.move_on_after(_CLOSE_SECONDS):
            await secure.aclose()

    async def _converse(self, stream: Stream, address: str) -> None:
        connection = HttpConnection(stream, self._settings.patience)
        try:
            while (request := await connection.receive()) is not None:
                if not self._is_peer(request):
                    self.served.strangers += 1
                    logger.info("turned a stranger at %s away from the peers", address)
                    await self._refuse(connection, _stranger(), close=True)
                    return
                await self._answer(connection, request)
        except Refusal as error:
            # a head that is none: what follows it cannot be understood
            await self._refuse(connection, error, close=True)

    def _is_peer(self, request: Request) -> bool:
        shown = request.headers.get(protocol.TOKEN.lower(), "")
        return self._token is None or self._token.accepts(shown)

    async def _answer(self, connection: HttpConnection, request: Request) -> None:
        asked = None
        try:
            asked = requests.read(request, self._settings.namespace)
            if asked is None:
                headers = (("Content-Type", "application/json"),)
                await connection.answer(200, headers, b"{}")
            else:
                await self._answer_asked(connection, asked, is_head=request.is_head)
        except Refusal as error:
            await self._refuse(connection, error)
        except ModelError as error:
            if isinstance(error, Unauthenticated | AccessDenied):
                self.served.refused += 1
            logger.debug("a peer asked for %s: %s", request.target, error.message)
            kind = "" if asked is None else asked.kind
            await self._refuse(connection, requests.refusal(error, kind))

    async def _answer_asked(
        self, connection: HttpConnection, asked: Asked, *, is_head: bool
    ) -> None:
        if asked.kind == "referrers":
            await self._offers.answer(connection, asked)
        elif await self._offers.answer_part(connection, asked):
            return
        elif asked.kind == "blobs":
            await self._blobs.answer(connection, asked, is_head=is_head)
        else:
            await self._manifests.answer(connection, asked)

    async def _refuse(
        self, connection: HttpConnection, refusal: Refusal, *, close: bool = False
    ) -> None:
        headers = (("Content-Type", "application/json"), *refusal.headers)
        await connection.answer(refusal.status, headers, refusal.body, close=close)


def _stranger() -> Refusal:
    return Refusal(401, "UNAUTHORIZED", f"peers show their token in the header {protocol.TOKEN}")


def _address(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        # it left before it was looked at
        return ""
