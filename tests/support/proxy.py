"""A proxy in front of a real registry that counts, slows, cuts, stalls and corrupts blob bytes.

Requests pass through unchanged, answers too, but for what :class:`Faults` says about the answers to
``GET`` of a blob. Faults may be changed while it runs.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping

_BLOB = re.compile(r"/v2/.+/blobs/(?P<digest>[a-z0-9]+:[0-9a-f]+)")
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "host"}
_PIECE = 64 * 1024


@dataclass
class Faults:
    """What is done to the answers for blobs. Bytes are counted over the body of one answer."""

    bytes_per_second: float | None = None
    """A limit for all connections together."""
    cut_after: int | None = None
    """Close the connection after so many bytes."""
    cuts_left: int | None = None
    """How many answers are cut; ``None`` for all."""
    cut_every: float | None = None
    """Reset every connection that sends a blob, all at once, each time so many seconds are over."""
    corrupt_at: int | None = None
    """Flip a bit of the byte at this offset of the blob."""
    ignore_range: bool = False
    wholes: list[int] = field(default_factory=list)
    """In turn, offsets: the next range that starts there or behind is ignored, once."""
    strict_tokens: bool = False
    """Refuse bearer tokens at the very second; the registry itself allows for clocks that differ.
    """
    statuses: list[int] = field(default_factory=list)
    """Statuses that the next blob requests get in turn instead of an answer."""
    stall: threading.Event | None = None
    """While it is clear, no blob bytes flow."""
    latency: float = 0.0
    """Seconds that pass before each request is looked at, as over a long way."""
    extra_headers: dict[str, str] = field(default_factory=dict)
    signed_seconds: float | None = None
    """Redirect blob requests to a signed address, which is refused after so many seconds; until
    then the same address is given to all."""
    rewrites: list[Rewrite] = field(default_factory=list)
    """What is done to the next blob answers in turn, instead of all else."""


@dataclass
class BlobAnswer:
    """An answer that can be changed at will; it is sent as it is then."""

    status: int
    headers: dict[str, str]
    body: bytes
    raw: bytes | None = None
    """Sent instead of all else."""


Rewrite = Callable[[BlobAnswer], BlobAnswer]


class Counts:
    """What went through, by digest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.bytes: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request, in the order of their arrival."""
        self.ranges: list[str | None] = []
        """The ``Range`` of every request for a blob."""
        self.refused_addresses = 0
        """Requests to signed addresses that had expired."""
        self.others = 0
        """Bytes of answers that were no blob's."""

    def add(self, digest: str, count: int) -> None:
        with self._lock:
            self.bytes[digest] = self.bytes.get(digest, 0) + count

    def request(self, method: str, path: str) -> None:
        with self._lock:
            self.requests.append((method, path))

    def add_other(self, count: int) -> None:
        with self._lock:
            self.others += count

    @property
    def total(self) -> int:
        """Bytes of blobs sent, all together."""
        with self._lock:
            return sum(self.bytes.values())

    def blob_requests(self) -> int:
        with self._lock:
            return sum(
                1
                for method, path in self.requests
                if method == "GET" and _BLOB.fullmatch(path.partition("?")[0])
            )


class _Pace:
    """Deals out bytes at a rate, to all connections together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self, count: int, rate: float) -> None:
        with self._lock:
            now = time.monotonic()
            self._next = max(self._next, now) + count / rate
            pause = self._next - now
        time.sleep(pause)


class Proxy(socketserver.ThreadingTCPServer):
    """A running proxy; ``address`` is ``127.0.0.1:PORT``."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(
        self, upstream: str, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
    ) -> None:
        super().__init__((host, 0), _Handler)
        # what is counted is what was sent, and not what waits in the kernel to be
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIECE)
        self.upstream = upstream
        self._host, self._tls = host, tls
        self._signed: dict[str, tuple[str, float]] = {}
        self.faults = Faults()
        self.counts = Counts()
        self.pace = _Pace()

    @property
    def address(self) -> str:
        return f"{self._host}:{self.server_address[1]}"

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        if self._tls is not None:
            # the handshake belongs to the connection's thread: it happens at the first read
            connection = self._tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def sign(self, path: str, seconds: float) -> str:
        """The signed address of a blob: the last one, until it was refused."""
        if path not in self._signed:
            query = f"signature={len(self.counts.requests)}"
            self._signed[path] = f"{path}?{query}", time.monotonic() + seconds
        return self._signed[path][0]

    def accepts(self, address: str) -> bool:
        """Whether a signed address is still good; one that is not is forgotten."""
        path = address.partition("?")[0]
        known, expires = self._signed.get(path, ("", 0.0))
        if known == address and time.monotonic() < expires:
            return True
        if known == address:
            self._signed.pop(path, None)
        self.counts.refused_addresses += 1
        return False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away in the middle are what these tests are about."""

    def ignores(self, asked: str | None) -> bool:
        """Whether this range is answered with the whole blob."""
        wholes = self.faults.wholes
        start = re.match(r"bytes=(\d+)-", asked or "")
        if wholes and start is not None and int(start[1]) >= wholes[0]:
            wholes.pop(0)
            return True
        return self.faults.ignore_range

    def take_cut(self) -> int | None:
        """After how many bytes this answer is to be cut."""
        faults = self.faults
        if faults.cut_after is None or faults.cuts_left == 0:
            return None
        if faults.cuts_left is not None:
            faults.cuts_left -= 1
        return faults.cut_after


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # as registries do: a body would wait for the answer to its head, 40 ms
    disable_nagle_algorithm = True
    server: Proxy

    def do_GET(self) -> None:
        self._pass_on()

    def do_HEAD(self) -> None:
        self._pass_on()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests look at the counts."""

    def _pass_on(self) -> None:
        self.server.counts.request(self.command, self.path)
        if self.server.faults.latency:
            time.sleep(self.server.faults.latency)
        path, _, query = self.path.partition("?")
        match = _BLOB.fullmatch(path)
        is_blob = self.command == "GET" and match is not None
        faults = self.server.faults
        if is_blob:
            self.server.counts.ranges.append(self.headers.get("Range"))
        if is_blob and faults.statuses:
            self._answer_status(faults.statuses.pop(0))
            return
        if is_blob and faults.signed_seconds is not None:
            if not query.startswith("signature="):
                location = self.server.sign(path, faults.signed_seconds)
                self._answer_status(307, {"Location": location})
                return
            if not self.server.accepts(self.path):
                self._answer_status(403)
                return
        dropped = set(_HOP_BY_HOP)
        if is_blob and self.server.ignores(self.headers.get("Range")):
            dropped.add("range")
        if faults.strict_tokens and _is_expired(self.headers.get("Authorization", "")):
            dropped.add("authorization")
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in dropped
        }
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.request(self.command, self.path, headers=headers)
            answer = upstream.getresponse()
            if is_blob and faults.rewrites:
                self._send_rewritten(answer, faults.rewrites.pop(0))
                return
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if match is not None and is_blob:
                self._send_blob(answer, match["digest"])
            else:
                body = answer.read()
                self.wfile.write(body)
                self.server.counts.add_other(len(body))
        finally:
            upstream.close()

    def _send_rewritten(self, answer: http.client.HTTPResponse, rewrite: Rewrite) -> None:
        headers = {
            name.title(): value
            for name, value in answer.getheaders()
            if name.lower() not in _HOP_BY_HOP
        }
        changed = rewrite(BlobAnswer(answer.status, headers, answer.read()))
        self.close_connection = True
        if changed.raw is not None:
            self.wfile.write(changed.raw)
            return
        self.send_response_only(changed.status)
        for name, value in {**changed.headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.server.counts.add("rewritten", len(changed.body))
        self.wfile.write(changed.body)

    def _answer_status(self, status: int, headers: Mapping[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in {**self.server.faults.extra_headers, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_blob(self, answer: http.client.HTTPResponse, digest: str) -> None:
        content_range = re.match(r"bytes (\d+)-", answer.getheader("Content-Range") or "")
        offset = int(content_range[1]) if content_range else 0
        cut, began = self.server.take_cut(), time.monotonic()
        sent = 0
        while piece := answer.read(_PIECE):
            faults = self.server.faults
            if faults.stall is not None:
                faults.stall.wait(60)
            if faults.bytes_per_second is not None:
                self.server.pace.wait(len(piece), faults.bytes_per_second)
            if (
                faults.cut_every
                and began // faults.cut_every < time.monotonic() // faults.cut_every
            ):
                self._reset()
                return
            if cut is not None:
                piece = piece[: cut - sent]
            # before: who has the bytes may look at once how many there were
            self.server.counts.add(digest, len(piece))
            try:
                self.wfile.write(_corrupted(piece, offset + sent, faults.corrupt_at))
            except OSError:
                self.server.counts.add(digest, -len(piece))
                raise
            sent += len(piece)
            if cut is not None and sent >= cut:
                self.close_connection = True
                return

    def _reset(self) -> None:
        """End the connection as a broken line does: what is on its way is lost."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


def _is_expired(authorization: str) -> bool:
    """Whether this is a JWT that is good no more."""
    scheme, _, token = authorization.partition(" ")
    if scheme != "Bearer":
        return False
    claims = token.split(".")[1]
    told = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    return float(told["exp"]) < time.time()


def _corrupted(piece: bytes, offset: int, at: int | None) -> bytes:
    if at is None or not offset <= at < offset + len(piece):
        return piece
    changed = bytearray(piece)
    changed[at - offset] ^= 1
    return bytes(changed)


@contextlib.contextmanager
def serve_proxy(
    upstream: str, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
) -> Iterator[Proxy]:
    """Run a proxy in front of the registry at ``upstream``, ``host:port``."""
    with running(Proxy(upstream, tls, host)) as proxy:
        yield proxy


@contextlib.contextmanager
def running(proxy: Proxy) -> Iterator[Proxy]:
    """Run a proxy that was made elsewhere, such as in another network."""
    with proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
