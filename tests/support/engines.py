"""Mirrors that insist on what Dragonfly's and Spegel's daemons do, before a real registry."""

from __future__ import annotations

import contextlib
import http.client
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Asked:
    """One request, as it came."""

    method: str
    path: str
    """Without its query."""
    ns: str
    """The registry that is meant, as containerd says it."""
    headers: dict[str, str]
    """Their names in lower case."""


@dataclass
class Engine:
    """A mirror. ``address`` is what goes into ``hosts.toml``."""

    upstream: str
    takes: Callable[[Asked], int]
    """The status for a request; 200 to have it answered by the registry."""
    address: str = ""
    requests: list[Asked] = field(default_factory=list)
    refused: list[Asked] = field(default_factory=list)

    def answer(self, asked: Asked) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.requests.append(asked)
        status = self.takes(asked)
        if status != 200:
            self.refused.append(asked)
            return status, {}, b""
        wanted = ("range", "accept", "authorization")
        headers = {name: text for name, text in asked.headers.items() if name in wanted}
        connection = http.client.HTTPConnection(self.upstream, timeout=30)
        try:
            connection.request(asked.method, asked.path, headers=headers)
            reply = connection.getresponse()
            kept = ("content-type", "content-range", "docker-content-digest", "accept-ranges")
            found = {name: text for name, text in reply.getheaders() if name.lower() in kept}
            return reply.status, found, reply.read()
        finally:
            connection.close()


@contextlib.contextmanager
def serve_engine(upstream: str, takes: Callable[[Asked], int]) -> Iterator[Engine]:
    """Run a mirror before the registry at ``upstream`` until the block is left."""
    engine = Engine(upstream, takes)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def do_GET(self) -> None:
            target = urlsplit(self.path)
            headers = {name.lower(): text for name, text in self.headers.items()}
            ns = parse_qs(target.query).get("ns", [""])[0]
            asked = Asked(self.command, target.path, ns, headers)
            status, found, body = engine.answer(asked)
            self.send_response(status)
            for name, text in found.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(ConnectionError, TimeoutError):
                    self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    class Listener(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that goes away."""

    listener = Listener(("127.0.0.1", 0), Handler)
    engine.address = f"127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield engine
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


def dragonfly(registry: str) -> Callable[[Asked], int]:
    """What Dragonfly's daemon takes: only what names the registry to go to in its own header."""

    def takes(asked: Asked) -> int:
        right = asked.headers.get("x-dragonfly-registry") == f"http://{registry}"
        return 200 if right else 400

    return takes


def spegel(registry: str, has: set[str]) -> Callable[[Asked], int]:
    """What Spegel's daemon takes: reads, for the registry in ``ns``, of what some node has whole.

    ``has`` are the digests and tags of that. Whatever else it says 404 to, at once.
    """

    def takes(asked: Asked) -> int:
        if asked.ns != registry:
            return 404
        return 200 if asked.path.rpartition("/")[2] in has else 404

    return takes
