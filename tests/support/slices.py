"""A server that speaks Kubernetes' API for EndpointSlices: lists, watches, versions gone."""

from __future__ import annotations

import contextlib
import http.server
import json
import queue
import ssl
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from tests.support.registry import make_tls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class SlicesApi:
    """EndpointSlices, and those who watch them."""

    def __init__(self, folder: Path) -> None:
        self.account = folder / "account"
        tls = make_tls(folder / "tls")
        self.account.mkdir()
        (self.account / "ca.crt").write_bytes(tls.ca.read_bytes())
        self.token = "first"
        self.rotate("first")
        self.page = 500
        self.asked: list[dict[str, str]] = []
        """The parameters of every request."""
        self.refused = 0
        self._lock = threading.Lock()
        self._version = 1
        self._slices: dict[str, dict[str, Any]] = {}
        self._watches: list[queue.Queue[dict[str, Any] | None]] = []
        self._events: list[tuple[int, dict[str, Any]]] = []
        """What has changed, and the version since which it has."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.key)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    @property
    def environment(self) -> dict[str, str]:
        """As pods have it."""
        port = str(self._server.server_address[1])
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": port}

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            self.hang_up()
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def rotate(self, token: str) -> None:
        """Only this token is accepted from now on, and it is what pods find."""
        (self.account / "token").write_text(token + "\n")
        self.token = token

    def put(self, name: str, *endpoints: dict[str, Any], port: int = 8401) -> None:
        with self._lock:
            kind = "MODIFIED" if name in self._slices else "ADDED"
            self._version += 1
            self._slices[name] = {
                "metadata": {"name": name, "resourceVersion": str(self._version)},
                "addressType": "IPv4",
                "endpoints": list(endpoints),
                "ports": [{"name": "peer", "port": port}, {"name": "other", "port": 1}],
            }
            self._change(kind, self._slices[name])

    def delete(self, name: str) -> None:
        with self._lock:
            self._version += 1
            gone = self._slices.pop(name)
            gone["metadata"]["resourceVersion"] = str(self._version)
            self._change("DELETED", gone)

    def forget(self) -> None:
        """What watches know is too old, and they are told so."""
        with self._lock:
            self._version += 100
            self._events.clear()
            self._tell({"type": "ERROR", "object": {"kind": "Status", "code": 410}})
        self.hang_up()

    def hang_up(self) -> None:
        """End all watches, as a server does that is restarted."""
        with self._lock:
            for one in self._watches:
                one.put(None)
            self._watches.clear()

    def _change(self, kind: str, changed: dict[str, Any]) -> None:
        event = json.loads(json.dumps({"type": kind, "object": changed}))
        self._events.append((self._version, event))
        self._tell(event)

    def _tell(self, event: dict[str, Any]) -> None:
        for one in self._watches:
            one.put(event)

    def list(self, start: int) -> dict[str, Any]:
        with self._lock:
            names = sorted(self._slices)
            page = names[start : start + self.page]
            more = str(start + self.page) if start + self.page < len(names) else ""
            metadata = {"resourceVersion": str(self._version), "continue": more}
            return {"metadata": metadata, "items": [self._slices[name] for name in page]}

    def watch(self, since: int) -> queue.Queue[dict[str, Any] | None]:
        """What changes after version ``since``, also what has changed already."""
        with self._lock:
            events: queue.Queue[dict[str, Any] | None] = queue.Queue()
            bookmark = {"metadata": {"resourceVersion": str(since)}}
            events.put({"type": "BOOKMARK", "object": bookmark})
            for version, event in self._events:
                if version > since:
                    events.put(event)
            self._watches.append(events)
            return events


def _handler(api: SlicesApi) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            asked = {name: texts[0] for name, texts in parse_qs(parts.query).items()}
            right = "/apis/discovery.k8s.io/v1/namespaces/models/endpointslices"
            if self.headers.get("Authorization") != f"Bearer {api.token}":
                api.refused += 1
                self.send_error(401)
            elif parts.path != right or asked.get("labelSelector") != (
                "kubernetes.io/service-name=peers"
            ):
                self.send_error(404)
            else:
                api.asked.append(asked)
                if "watch" in asked:
                    self._watch(int(asked["resourceVersion"]))
                else:
                    self._list(int(asked.get("continue", "0")))

        def _list(self, start: int) -> None:
            body = json.dumps(api.list(start)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _watch(self, since: int) -> None:
            events = api.watch(since)
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while True:
                event = events.get()
                line = b"" if event is None else json.dumps(event).encode() + b"\n"
                with contextlib.suppress(OSError):
                    self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                if event is None:
                    return

        def log_message(self, format: str, *args: object) -> None:
            """Not to the terminal of tests."""

    return Handler
