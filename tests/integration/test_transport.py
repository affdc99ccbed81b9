"""Bulk bytes over HTTP/1.1 against a server that sends exactly what it is told."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING

import pytest

from fetcher.answers import Piece
from fetcher.errors import AccessDenied, NotFound, Unavailable
from fetcher.oci import Digest
from fetcher.ranges import Range
from fetcher.registry import BlobAccess
from fetcher.routes import Hop, Route
from fetcher.threads import Stopped
from fetcher.transport import LEAST_SPEED, Connection, TransferSettings
from fetcher.trust import Trust

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fetcher.wire import Head

DATA = b"0123456789" * 1000
DIGEST = Digest.of(DATA)
WHOLE = Range(0, len(DATA))
LENGTH = f"Content-Length: {len(DATA)}\r\n"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%x\r\n%s\r\n" % (1000, DATA[at : at + 1000]) for at in range(0, len(DATA), 1000))
    + b"0\r\n\r\n"
)


def answer(extra: str = "", body: bytes = DATA, version: str = "1.1", status: int = 200) -> bytes:
    return f"HTTP/{version} {status} OK\r\n{extra}\r\n".encode() + body


GOOD = answer(LENGTH)


class Server:
    """Each connection gets its list of answers, one for each request, and is closed then.

    An answer of None is none: the connection stays open until the test ends.
    """

    def __init__(self, listener: socket.socket, connections: list[list[bytes | None]]) -> None:
        self._listener = listener
        self._connections = deque(connections)
        self._end = threading.Event()
        self._open: list[socket.socket] = []
        self.accepted = 0
        self.requests: list[bytes] = []
        host, port = listener.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.port = port

    def serve(self) -> None:
        threads = []
        while True:
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                if self._end.is_set():
                    connection.close()
                    break
                self.accepted += 1
                self._open.append(connection)
                arguments = connection, self._connections.popleft()
                threads.append(threading.Thread(target=self._answer, args=arguments))
                threads[-1].start()
        for thread in threads:
            thread.join()

    def _answer(self, connection: socket.socket, answers: list[bytes | None]) -> None:
        with connection, contextlib.suppress(OSError):
            for one in answers:
                request = b""
                while b"\r\n\r\n" not in request:
                    received = connection.recv(4096)
                    if not received:
                        return
                    request += received
                self.requests.append(request)
                if one is None:
                    self._end.wait()
                    return
                connection.sendall(one)

    def end(self) -> None:
        self._end.set()
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError), socket.socket(self._listener.family) as last:
            last.connect(self._listener.getsockname())


@contextlib.contextmanager
def serving(*connections: list[bytes | None], host: str = "127.0.0.1") -> Iterator[Server]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        server = Server(listener, list(connections))
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.end()
            thread.join()


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.data = b""

    def whole(self) -> bool:
        return True

    def __call__(self, data: memoryview) -> bool:
        self.data += data
        return True


@pytest.fixture
def connection() -> Iterator[Connection]:
    with contextlib.closing(
        Connection(TransferSettings(connect_timeout=5, stall_timeout=5))
    ) as made:
        yield made


def access(address: str, path: str = "/v2/a/blobs/b") -> BlobAccess:
    return BlobAccess(Hop(f"http://{address}{path}", (), Trust()), Route(address, address))


def fetched(
    connection: Connection, asked: BlobAccess, stop: threading.Event | None = None
) -> bytes:
    sink = Kept()
    piece = Piece(DIGEST, len(DATA), WHOLE)
    connection.fetch(asked, piece, sink, stop or threading.Event())
    return sink.data


# One connection, several requests

INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
REUSED = {
    "with a length": GOOD,
    "in chunks": CHUNKED,
    "after interim answers": INTERIM * 2 + GOOD,
}


@pytest.mark.parametrize("name", REUSED)
def test_a_connection_is_kept(connection: Connection, name: str) -> None:
    with serving([REUSED[name], GOOD]) as server:
        for _ in range(2):
            assert fetched(connection, access(server.address)) == DATA
        assert server.accepted == 1


ENDS = {
    "says so": answer(f"{LENGTH}Connection: keep-alive, Close\r\n"),
    "is old": answer(LENGTH, version="1.0"),
    "ends with its connection": answer(),
    "sends more than it said": GOOD + b"more",
}


@pytest.mark.parametrize("name", ENDS)
def test_a_connection_that_ends_is_not_kept(connection: Connection, name: str) -> None:
    with serving([ENDS[name]], [GOOD]) as server:
        for _ in range(2):
            assert fetched(connection, access(server.address)) == DATA
        assert server.accepted == 2


@pytest.mark.parametrize("later", [[], [b""]])
def test_a_kept_connection_that_has_ended_is_no_failure(
    connection: Connection, later: list[bytes | None]
) -> None:
    """Whether it ends before it is asked again, or then."""
    with serving([GOOD, *later], [GOOD]) as server:
        for _ in range(2):
            assert fetched(connection, access(server.address)) == DATA
        assert server.accepted == 2


def test_an_answer_that_was_broken_off_is_a_failure(connection: Connection) -> None:
    with serving([GOOD, GOOD[:20]], [GOOD]) as server:
        assert fetched(connection, access(server.address)) == DATA
        with pytest.raises(Unavailable, match=r"the connection to .* broke"):
            fetched(connection, access(server.address))


@pytest.mark.parametrize("broken", [GOOD[:-500], CHUNKED[:-500]])
def test_what_came_before_the_end_is_kept(connection: Connection, broken: bytes) -> None:
    sink, piece = Kept(), Piece(DIGEST, len(DATA), WHOLE)
    with serving([broken]) as server, pytest.raises(Unavailable, match="bytes early"):
        connection.fetch(access(server.address), piece, sink, threading.Event())
    assert len(sink.data) > len(DATA) - 1000
    assert DATA.startswith(sink.data)


# Waiting


def test_waiting_for_an_answer_can_be_stopped(connection: Connection) -> None:
    stop = threading.Event()
    with serving([None]) as server:
        timer = threading.Timer(0.3, stop.set)
        timer.start()
        with pytest.raises(Stopped):
            fetched(connection, access(server.address), stop)
        timer.join()


@pytest.mark.parametrize("begun", [[None], [answer(LENGTH, DATA[:10]), None]])
def test_silence_has_an_end(begun: list[bytes | None]) -> None:
    settings = TransferSettings(connect_timeout=5, stall_timeout=0.3)
    with (
        serving([*begun]) as server,
        contextlib.closing(Connection(settings)) as connection,
        pytest.raises(Unavailable, match="fell silent"),
    ):
        fetched(connection, access(server.address))


@pytest.mark.parametrize("little", [True, False])
def test_who_gets_little_time_must_not_drip(little: bool) -> None:
    """The same drips are fine from who has all the time."""
    drips = 20
    assert LEAST_SPEED > 100 / 0.1

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(4096)
            connection.sendall(answer(LENGTH, b""))
            for at in range(0, 100 * drips, 100):
                connection.sendall(DATA[at : at + 100])
                gone.wait(0.1)
            connection.sendall(DATA[100 * drips :])

    gone = threading.Event()
    settings = TransferSettings(stall_timeout=1.5)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        contextlib.closing(Connection(settings)) as connection,
    ):
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        asked = access(f"127.0.0.1:{listener.getsockname()[1]}")
        try:
            if little:
                asked = BlobAccess(asked.hop, asked.route, stall_timeout=1)
                with pytest.raises(Unavailable, match="fell silent"):
                    fetched(connection, asked)
            else:
                assert fetched(connection, asked) == DATA
        finally:
            gone.set()
            thread.join()


# Addresses


def test_an_address_that_does_not_answer_costs_a_moment(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first address of the name leads nowhere (RFC 5737), and so does one of its IPv6."""
    real = socket.getaddrinfo

    def looked_up(host: str, port: int, **options: int) -> list[object]:
        if host != "two.example":
            return [*real(host, port, **options)]
        one = socket.SOCK_STREAM, socket.IPPROTO_TCP, ""
        return [
            (socket.AF_INET6, *one, ("2001:db8::1", port, 0, 0)),
            (socket.AF_INET, *one, ("192.0.2.1", port)),
            (socket.AF_INET, *one, ("127.0.0.1", port)),
        ]

    with serving([GOOD]) as server:
        monkeypatch.setattr(socket, "getaddrinfo", looked_up)
        assert fetched(connection, access(f"two.example:{server.port}")) == DATA


def test_an_address_of_ipv6(connection: Connection) -> None:
    try:
        running = serving([GOOD], host="::1")
        server = running.__enter__()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with contextlib.ExitStack() as closing:
        closing.push(running)
        assert fetched(connection, access(server.address)) == DATA
        assert b"Host: " + server.address.encode() + b"\r\n" in server.requests[0]


def test_nothing_is_sent_to_a_refused_address(connection: Connection) -> None:
    with pytest.raises(AccessDenied, match="link-local"):
        fetched(connection, access("169.254.169.254"))


def test_nobody_listens(connection: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(Unavailable, match="nothing listens there"):
        fetched(connection, access(address))


# What is asked, and who hears of the answer


def test_addresses_of_redirects_are_made_fit_for_a_request(connection: Connection) -> None:
    moved = answer(
        "Location: /with space/\xe4?a=%20&b=c d#end\r\nContent-Length: 0\r\n", b"", status=307
    )
    with serving([moved.decode().encode("iso-8859-1"), GOOD]) as server:
        assert fetched(connection, access(server.address)) == DATA
        assert server.requests[1].startswith(b"GET /with%20space/%E4?a=%20&b=c%20d HTTP/1.1\r\n")
        assert b"\r\nRange: bytes=0-9999\r\n" in server.requests[1]


@pytest.mark.parametrize("host", ["\xfc.example", "\xfc" * 70, "a..b", "x" * 70, "\u2488.example"])
def test_redirects_to_names_that_lead_nowhere(connection: Connection, host: str) -> None:
    location = f"Location: http://{host}/\r\nContent-Length: 0\r\n"
    moved = b"HTTP/1.1 307 Moved\r\n" + location.encode() + b"\r\n"
    with serving([moved]) as server, pytest.raises(Unavailable, match="there is no host"):
        fetched(connection, access(server.address))


def test_headers_are_sent_as_they_are(connection: Connection) -> None:
    with serving([GOOD]) as server:
        asked = access(server.address)
        headers = ("X-Name", "\xfc"), ("user-agent", "mine"), ("Range", "bytes=7-8")
        hop = Hop(asked.hop.url, headers, Trust())
        assert fetched(connection, BlobAccess(hop, asked.route)) == DATA
        [request] = server.requests
        assert b"\r\nX-Name: \xc3\xbc\r\nuser-agent: mine\r\n" in request
        assert b"User-Agent" not in request
        assert request.count(b"Range") == 1


def test_answers_are_told_of_before_their_body(connection: Connection) -> None:
    heard: list[tuple[int, str | None]] = []

    def hear(head: Head) -> None:
        heard.append((head.status, head.headers.get("x-have")))

    moved = answer("Location: /there\r\nX-Have: 0\r\nContent-Length: 0\r\n", b"", status=307)
    missing = answer("X-Have: 1\r\nContent-Length: 0\r\n", b"", status=404)
    found = INTERIM * 2 + answer(f"{LENGTH}X-Have: 2\r\n")
    with serving([moved, missing, found, moved]) as server:
        asked = access(server.address)
        asked = BlobAccess(asked.hop, asked.route, on_answer=hear)
        with pytest.raises(NotFound):
            fetched(connection, asked)
        assert fetched(connection, asked) == DATA
        assert heard == [(404, "1"), (200, "2")]
        with pytest.raises(Unavailable, match="redirects more than 0 times"):
            fetched(connection, BlobAccess(asked.hop, asked.route, redirects=0))
        assert len(server.requests) == 4
