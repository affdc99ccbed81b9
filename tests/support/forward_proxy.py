"""A forward proxy as companies have them: plain requests by whole address, the rest by ``CONNECT``.

Every name that it is asked for is this machine to it, so that a test needs no DNS: whatever reaches
its goal under a name that nobody else knows went through here.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator


class ForwardProxy(socketserver.ThreadingTCPServer):
    """A running proxy; ``address`` is ``127.0.0.1:PORT``."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, authorization: str | None, tls: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.authorization = authorization
        """The ``Proxy-Authorization`` without which nothing goes through."""
        self._tls = tls
        self.asked: list[tuple[str, str]] = []
        """Method and goal of every request."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, client = super().get_request()
        if self._tls is None:
            return connection, client
        # the handshake is for the thread of the connection, with its first byte
        tls = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return tls, client

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that end are nothing new."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ForwardProxy

    def do_CONNECT(self) -> None:
        if not self._may():
            return
        port = int(self.path.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as goal:
            self.send_response_only(200)
            self.end_headers()
            back = threading.Thread(target=_copy, args=(goal, self.connection), daemon=True)
            back.start()
            _copy(self.connection, goal)
            back.join()
        self.close_connection = True

    def do_GET(self) -> None:
        if not self._may():
            return
        goal = urlsplit(self.path)
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("proxy-connection", "proxy-authorization", "connection")
        }
        upstream = http.client.HTTPConnection("127.0.0.1", goal.port or 80, timeout=60)
        try:
            query = f"?{goal.query}" if goal.query else ""
            upstream.request(self.command, f"{goal.path}{query}", headers=headers)
            answer = upstream.getresponse()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.read())
        finally:
            upstream.close()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests look at what was asked."""

    def _may(self) -> bool:
        self.server.asked.append((self.command, self.path))
        wanted = self.server.authorization
        if wanted is None or self.headers.get("Proxy-Authorization") == wanted:
            return True
        self.send_response_only(407)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False


def _copy(source: socket.socket, goal: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            goal.sendall(data)
    with contextlib.suppress(OSError):
        goal.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def serve_forward_proxy(
    authorization: str | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[ForwardProxy]:
    """Run a forward proxy until the block is left; with ``tls``, one that is spoken to in TLS."""
    with ForwardProxy(authorization, tls) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
