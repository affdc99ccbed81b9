"""Bulk bytes over HTTP: one range of one blob at a time, in a worker thread.

They are received into one buffer, which is handed to the sink: measured on two cores against a
local server, httpx moves 0.2 to 0.3 GB/s, this several times as much. Redirects are followed here,
hop by hop, by the rules of :mod:`fetcher.routes`; what an answer is worth is for
:mod:`fetcher.answers`. Every failure is an error of :mod:`fetcher.errors` that names the registry.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlsplit, urlunsplit

import h11

from fetcher.answers import AddressRefused, BlobExchange
from fetcher.dialing import Goal, ProxyRefused, dial, proxy_headers
from fetcher.errors import Unavailable
from fetcher.streams import Silent, Watch
from fetcher.trust import Contexts, Trust
from fetcher.wire import TooLong

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from pathlib import Path

    from fetcher.answers import Piece, Sink
    from fetcher.registry import BlobAccess
    from fetcher.routes import Hop
    from fetcher.wire import Head, Wire

    _Key = tuple[Goal, tuple[int, ...]]

_BUFFER_BYTES: Final = 512 * 1024
_MOST_KEPT: Final = 4
_LONGEST_IDLE: Final = 60.0
LEAST_SPEED: Final = 4096
"""Bytes per second below which a host that gets little time counts as silent."""


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """How long a connection may take to come about, and how long it may stay silent; seconds."""

    connect_timeout: float = 10.0
    stall_timeout: float = 30.0
    user_agent: str = "model-csi"
    ca_file: Path | None = None
    """Certificate authorities in PEM that a proxy with TLS may have, besides the system's."""


class Connection:
    """What one thread at a time fetches with: a buffer, and connections that are kept alive."""

    def __init__(self, settings: TransferSettings, contexts: Contexts | None = None) -> None:
        """``contexts`` may be shared with others: making one takes 20 ms."""
        self._settings = settings
        self._contexts = contexts or Contexts()
        self._proxy_trust = Trust(ca_files=(str(settings.ca_file),) if settings.ca_file else ())
        self._kept = _Kept()
        self._buffer = memoryview(b"")

    def close(self) -> None:
        """Close its connections."""
        self._kept.close()

    def fetch(self, access: BlobAccess, piece: Piece, sink: Sink, stop: threading.Event) -> None:
        """Fetch ``piece`` and hand it to ``sink`` in order.

        Returns when the answer was complete; a server may answer a range with less of it than was
        asked for, and the sink knows. Raises :class:`Unauthenticated`, :class:`AccessDenied`,
        :class:`NotFound`, :class:`RangeIgnored`, :class:`Unavailable`, :class:`InvalidRequest` for
        a file of certificates that cannot be used, what ``sink`` raises, and
        :class:`fetcher.threads.Stopped`.
        """
        self._buffer = self._buffer or memoryview(bytearray(_BUFFER_BYTES))
        try:
            self._travel(access, piece, sink, stop)
        except AddressRefused:
            # a redirect is made anew for each request: this address was kept somewhere on the way
            self._travel(access, piece, sink, stop)

    def _travel(self, access: BlobAccess, piece: Piece, sink: Sink, stop: threading.Event) -> None:
        """Follow redirects, hop by hop, to the bytes."""
        hop = access.hop
        for _ in range(access.redirects + 1):
            exchange = BlobExchange(access, hop, piece, sink)
            self._request(access, hop, exchange, stop)
            location = exchange.location
            if location is None:
                exchange.finish()
                return
            hop = access.route.follow(hop, location)
        raise Unavailable(
            f"{access.route.who} redirects more than {access.redirects} times",
            registry=access.route.who,
        )

    def _request(
        self, access: BlobAccess, hop: Hop, exchange: BlobExchange, stop: threading.Event
    ) -> None:
        """One request and its answer."""
        with _translated(exchange):
            goal = Goal.of(urlsplit(hop.url), hop.trust, access.route.proxy(hop))
        request, watch = self._head(hop, goal, exchange), self._watch(access, stop)
        version = *goal.trust.version(), *self._proxy_trust.version()
        wire = self._kept.take((goal, version))
        head = None if wire is None else _answer_of_kept(wire, request, exchange, watch)
        if wire is None or head is None:
            wire = self._dial(access, goal, exchange, stop)
        good = False
        try:
            if head is None:
                head = _answer(wire, request, exchange, watch)
            exchange.begin(head)
            good = self._receive(wire, exchange, watch)
        finally:
            if good:
                self._kept.put((goal, version), wire)
            else:
                wire.close()

    def _receive(self, wire: Wire, exchange: BlobExchange, watch: Watch) -> bool:
        """The body of an answer; whether the connection is good for another request."""
        while True:
            with _translated(exchange):
                data = wire.read(self._buffer, watch)
            if not data:
                return wire.rest()
            if not exchange.take(data):
                return False

    def _dial(
        self, access: BlobAccess, goal: Goal, exchange: BlobExchange, stop: threading.Event
    ) -> Wire:
        limit = self._settings.connect_timeout
        watch = Watch(stop, min(limit, access.connect_timeout or limit), renewed_by=math.inf)
        with _translated(exchange):
            try:
                return dial(goal, self._contexts, self._proxy_trust, exchange.check_peer, watch)
            except Silent as error:
                raise exchange.not_in_time() from error
            except ProxyRefused as error:
                raise exchange.not_let_through() from error

    def _watch(self, access: BlobAccess, stop: threading.Event) -> Watch:
        limit = self._settings.stall_timeout
        if access.stall_timeout is None:
            return Watch(stop, limit)
        limit = min(limit, access.stall_timeout)
        return Watch(stop, limit, renewed_by=limit * LEAST_SPEED)

    def _head(self, hop: Hop, goal: Goal, exchange: BlobExchange) -> h11.Request:
        """What is sent. Headers of the hop stand instead of those that it would have anyway."""
        plain_proxy = goal.proxy if goal.scheme == "http" else None
        url = urlsplit(hop.url)
        theirs = [one for one in hop.headers if one[0].lower() != "range"]
        given = {name.lower() for name, _ in theirs}
        ours = [
            ("Host", goal.netloc if url.port else goal.netloc.rpartition(":")[0]),
            ("User-Agent", self._settings.user_agent),
            ("Accept", "*/*"),
            ("Range", f"bytes={exchange.wanted.http}"),
        ]
        headers = [one for one in ours if one[0].lower() not in given] + theirs
        target = urlunsplit(("", "", url.path or "/", url.query, ""))
        if plain_proxy is not None:
            target = f"{goal.scheme}://{goal.netloc}{target}"
            headers += proxy_headers(plain_proxy)
        with _translated(exchange):
            encoded = [(name.encode(), value.encode()) for name, value in headers]
            return h11.Request(method="GET", target=_quoted(target), headers=encoded)


class _Kept:
    """Idle connections, the one that was used last at the end."""

    def __init__(self) -> None:
        self._wires: dict[_Key, Wire] = {}

    def take(self, key: _Key) -> Wire | None:
        """A connection that is still open."""
        wire = self._wires.pop(key, None)
        if wire is not None and not wire.is_usable(_LONGEST_IDLE):
            wire.close()
            return None
        return wire

    def put(self, key: _Key, wire: Wire) -> None:
        """Keep it for a while."""
        self._wires[key] = wire
        if len(self._wires) > _MOST_KEPT:
            self._wires.pop(next(iter(self._wires))).close()

    def close(self) -> None:
        """Close all."""
        for wire in self._wires.values():
            wire.close()
        self._wires.clear()


def _answer_of_kept(
    wire: Wire, request: h11.Request, exchange: BlobExchange, watch: Watch
) -> Head | None:
    """What comes on a connection that was idle; None where it had ended, which is no failure."""
    good = False
    try:
        if wire.peer is not None:
            exchange.check_peer(wire.peer)
        with _translated(exchange):
            try:
                wire.send(request, watch)
                head = wire.head(watch)
            except ConnectionError:
                if wire.has_heard:
                    raise
                return None
        good = True
        return head
    finally:
        if not good:
            wire.close()


def _answer(wire: Wire, request: h11.Request, exchange: BlobExchange, watch: Watch) -> Head:
    with _translated(exchange):
        wire.send(request, watch)
        return wire.head(watch)


@contextlib.contextmanager
def _translated(exchange: BlobExchange) -> Iterator[None]:
    """What goes wrong on the way, in words for people."""
    try:
        yield
    except Silent as error:
        raise exchange.broken(error, silent=True) from error
    except TooLong as error:
        raise exchange.too_long() from error
    except (OSError, h11.ProtocolError) as error:
        raise exchange.broken(error) from error


def _quoted(target: str) -> str:
    """``target`` as a request may have it: addresses in redirects are not always."""
    return quote(target, safe="!#$%&'()*+,/:;=?@[]~", encoding="iso-8859-1", errors="replace")
