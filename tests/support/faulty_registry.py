"""A registry's evil twin: a proxy before a real registry that misbehaves as it is told.

Each test adds faults; the first one that fits a request decides, and what fits none goes to the
real registry. Every request is noted.
"""

from __future__ import annotations

import contextlib
import http.client
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.support.registry import RegistryServer

LOGIN_PAGE = (
    b"<!DOCTYPE html><html><body><form>Please sign in to the hotel's wifi</form></body></html>"
)


@dataclass(frozen=True)
class Noted:
    """One request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""

    @property
    def authorization(self) -> str | None:
        return self.headers.get("authorization")


@dataclass(frozen=True)
class Reply:
    """An answer. ``body`` may be endless; then no length is told."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    endless: bool = False
    cut: int | None = None
    """Close the connection after so many bytes of the body."""


@dataclass
class Fault:
    """What to do to requests whose path contains ``where``, the first ``times`` of them."""

    where: str
    reply: Reply | None = None
    change: Callable[[Reply], Reply] | None = None
    """Or: what to do to the real registry's answer."""
    times: int = 1_000_000
    method: str | None = None
    shown: str | None = None
    """Only where this ``Authorization`` is shown."""
    drop: bool = False
    """Or: close the connection without an answer."""

    def fits(self, noted: Noted) -> bool:
        right_method = self.method in (None, noted.method)
        right_asker = self.shown in (None, noted.authorization)
        return self.times > 0 and self.where in noted.path and right_method and right_asker


@dataclass
class FaultyRegistry:
    """The proxy. ``address`` is what goes into references."""

    port: int = 0
    faults: list[Fault] = field(default_factory=list)
    requests: list[Noted] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def reference(self, repository: str, tag: str = "latest") -> str:
        return f"{self.address}/{repository}:{tag}"

    def add(self, where: str, reply: Reply | None = None, **options: object) -> Fault:
        """Misbehave from now on."""
        fault = Fault(where, reply, **options)  # type: ignore[arg-type]  # checked by the dataclass
        self.faults.append(fault)
        return fault

    def asked(self, where: str) -> list[Noted]:
        """The requests whose path contains ``where``."""
        return [noted for noted in self.requests if where in noted.path]


@contextlib.contextmanager
def serve_faulty(upstream: RegistryServer | None = None) -> Iterator[FaultyRegistry]:
    """Run a faulty registry before ``upstream`` until the block is left; without one it has
    nothing but its faults.
    """
    faulty = FaultyRegistry()
    listener = _Listener(("127.0.0.1", 0), _handler(faulty, upstream))
    faulty.port = listener.server_address[1]
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield faulty
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what some tests are about."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # stub too narrow


def _handler(
    faulty: FaultyRegistry, upstream: RegistryServer | None
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def _handle(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            noted = Noted(self.command, self.path, headers)
            body = self.rfile.read(int(headers.get("content-length", "0")))
            faulty.requests.append(noted)
            fault = next((one for one in faulty.faults if one.fits(noted)), None)
            if fault is not None:
                fault.times -= 1
            if fault is not None and fault.drop:
                self.close_connection = True
                return
            if fault is not None and fault.reply is not None:
                self._send(fault.reply)
                return
            reply = _forward(upstream, noted, body)
            if fault is not None and fault.change is not None:
                reply = fault.change(reply)
            self._send(reply)

        do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _handle

        def _send(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.endless:
                self.send_header("Connection", "close")
                self.close_connection = True
            elif self.command != "HEAD" and reply.status != 204:
                self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            with contextlib.suppress(ConnectionError, TimeoutError):
                self.wfile.write(reply.body if reply.cut is None else reply.body[: reply.cut])
                while reply.endless:
                    self.wfile.write(b" " * 65536)
            if reply.cut is not None:
                self.close_connection = True

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    return Handler


def _forward(upstream: RegistryServer | None, noted: Noted, body: bytes) -> Reply:
    if upstream is None:
        return Reply(404)
    dropped = ("connection", "accept-encoding")
    headers = {name: value for name, value in noted.headers.items() if name not in dropped}
    connection = http.client.HTTPConnection(upstream.address, timeout=30)
    try:
        connection.request(noted.method, noted.path, body=body or None, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        framing = {"connection", "transfer-encoding", "date", "server"}
        if noted.method != "HEAD":
            framing.add("content-length")
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in framing}
        return Reply(answer.status, kept, content)
    finally:
        connection.close()
