"""Bulk bytes over HTTP through libcurl: one range of one blob at a time, in a worker thread.

Measured on two cores against a local server, libcurl moves 1 GB/s where httpx moves 0.2 to 0.3.
Redirects are followed here, hop by hop, by the rules of :mod:`fetcher.routes`; what an answer is
worth is for :mod:`fetcher.answers`. Every failure is an error of :mod:`fetcher.errors` that names
the registry.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pycurl

from fetcher.answers import AddressRefused, BlobExchange
from fetcher.errors import InvalidRequest, Unavailable
from fetcher.routes import MAX_REDIRECTS

if TYPE_CHECKING:
    import threading

    from fetcher.answers import Piece, Sink
    from fetcher.registry import BlobAccess
    from fetcher.routes import Hop
    from fetcher.trust import Trust

_BUFFER_BYTES: Final = 512 * 1024
_LOOK_UP_SECONDS: Final = 0.2
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
    """A libcurl handle with its kept-alive connections; used by one thread at a time."""

    def __init__(self, settings: TransferSettings) -> None:
        self._curl = pycurl.Curl()
        self._loop = pycurl.CurlMulti()
        self._settings = settings

    def close(self) -> None:
        """Close its connections."""
        self._loop.close()
        self._curl.close()

    def fetch(self, access: BlobAccess, piece: Piece, sink: Sink, stop: threading.Event) -> None:
        """Fetch ``piece`` and hand it to ``sink`` in order.

        Returns when the answer was complete; a server may answer a range with less of it than was
        asked for, and the sink knows. Raises :class:`Unauthenticated`, :class:`AccessDenied`,
        :class:`NotFound`, :class:`RangeIgnored`, :class:`Unavailable`, what ``sink`` raises, and
        :class:`fetcher.threads.Stopped`.
        """
        try:
            self._travel(access, piece, sink, stop)
        except AddressRefused:
            # a redirect is made anew for each request: this address was kept somewhere on the way
            self._travel(access, piece, sink, stop)

    def _travel(self, access: BlobAccess, piece: Piece, sink: Sink, stop: threading.Event) -> None:
        """Follow redirects, hop by hop, to the bytes."""
        hop = access.hop
        for _ in range(MAX_REDIRECTS + 1):
            exchange = BlobExchange(access, hop, piece, sink, stop)
            self._request(access, hop, piece, exchange, stop)
            location = exchange.location
            if location is None:
                exchange.finish()
                return
            hop = access.route.follow(hop, location)
        raise Unavailable(
            f"{access.route.who} redirects more than {MAX_REDIRECTS} times",
            registry=access.route.who,
        )

    def _request(
        self,
        access: BlobAccess,
        hop: Hop,
        piece: Piece,
        exchange: BlobExchange,
        stop: threading.Event,
    ) -> None:
        """One request and its answer."""
        self._curl.reset()
        self._prepare(access, hop, exchange)
        self._curl.setopt(pycurl.RANGE, piece.wanted.http)
        try:
            problem = self._run(stop)
        finally:
            # no callback may keep the exchange, and with it the blob, alive
            self._curl.reset()
        exchange.keep_gathered()
        if problem is not None and not exchange.is_enough:
            raise exchange.failure(*problem)

    def _run(self, stop: threading.Event) -> tuple[int, str] | None:
        """Run the transfer to its end: libcurl's number and text of what was wrong, if anything.

        A loop of our own looks at ``stop`` now and then. A progress callback could too, at the cost
        of one more call into Python for every 16 KiB.
        """
        loop = self._loop
        loop.add_handle(self._curl)
        try:
            while not stop.is_set():
                _, running = loop.perform()
                if not running:
                    break
                # bytes that TLS holds decrypted make no socket readable: libcurl says not to wait
                due = loop.timeout()
                loop.select(_LOOK_UP_SECONDS if due < 0 else min(_LOOK_UP_SECONDS, due / 1000))
            _, _, failed = loop.info_read()
            if failed:
                _, number, text = failed[0]
                return number, text
            return (pycurl.E_ABORTED_BY_CALLBACK, "stopped") if stop.is_set() else None
        finally:
            loop.remove_handle(self._curl)

    def _prepare(self, access: BlobAccess, hop: Hop, exchange: BlobExchange) -> None:
        curl, settings = self._curl, self._settings
        curl.setopt(pycurl.URL, hop.url)
        curl.setopt(pycurl.HTTPHEADER, [f"{name}: {value}" for name, value in hop.headers])
        curl.setopt(pycurl.USERAGENT, settings.user_agent)
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        curl.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTPS | pycurl.PROTO_HTTP)
        self._trust(hop.trust)
        proxy = access.route.proxy(hop)
        # both set, even to nothing: libcurl would read the environment in its own way
        curl.setopt(pycurl.PROXY, proxy or "")
        curl.setopt(pycurl.NOPROXY, "")
        if proxy is None:
            # behind a proxy the other end is the proxy, which the administrator named
            curl.setopt(pycurl.PREREQFUNCTION, exchange.check_peer)
        else:
            self._trust_proxy()
        curl.setopt(pycurl.NOSIGNAL, 1)
        curl.setopt(pycurl.TCP_KEEPALIVE, 1)
        curl.setopt(pycurl.BUFFERSIZE, _BUFFER_BYTES)
        connect = min(settings.connect_timeout, access.connect_timeout or settings.connect_timeout)
        stall = min(settings.stall_timeout, access.stall_timeout or settings.stall_timeout)
        curl.setopt(pycurl.CONNECTTIMEOUT_MS, max(1, int(connect * 1000)))
        curl.setopt(pycurl.LOW_SPEED_LIMIT, 1 if access.stall_timeout is None else LEAST_SPEED)
        curl.setopt(pycurl.LOW_SPEED_TIME, max(1, round(stall)))
        curl.setopt(pycurl.HEADERFUNCTION, exchange.take_header)
        curl.setopt(pycurl.WRITEFUNCTION, exchange.take_body)

    def _trust(self, trust: Trust) -> None:
        """Trust the system's authorities and those of ``trust``, and show its certificate."""
        curl = self._curl
        curl.setopt(pycurl.SSL_VERIFYPEER, int(trust.verify))
        curl.setopt(pycurl.SSL_VERIFYHOST, 2 if trust.verify else 0)
        self._authorities(trust.ca_files, pycurl.CAPATH, pycurl.CAINFO, pycurl.CAINFO_BLOB)
        if trust.client is not None:
            certificate, key = trust.client
            curl.setopt(pycurl.SSLCERT, certificate)
            curl.setopt(pycurl.SSLKEY, key)
            curl.setopt(pycurl.KEYPASSWD, "")

    def _trust_proxy(self) -> None:
        """Trust the system's authorities and our own for the proxy: nobody's word excepts it."""
        files = (str(self._settings.ca_file),) if self._settings.ca_file else ()
        options = pycurl.PROXY_CAPATH, pycurl.PROXY_CAINFO, pycurl.PROXY_CAINFO_BLOB
        self._authorities(files, *options)

    def _authorities(self, ours: tuple[str, ...], path: int, info: int, blob: int) -> None:
        """Set libcurl's three options for the system's authorities and those in ``ours``.

        The wheels of pycurl bring a libcurl that does not know where this system keeps them.
        """
        curl, system = self._curl, ssl.get_default_verify_paths()
        if system.capath:
            curl.setopt(path, system.capath)
        files = [*ours, system.cafile] if system.cafile else list(ours)
        if len(files) == 1:
            curl.setopt(info, files[0])
        elif files:
            # libcurl takes one file, or the text of several
            curl.setopt(blob, b"\n".join(_content(file) for file in files))


def _content(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"the file of certificate authorities {file} cannot be used: {error.strerror}",
            path=file,
        ) from error
