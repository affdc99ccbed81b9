"""HTTP/1.1 as peers serve it: requests without bodies, answers that come from files. RFC 9112.

h11 reads and writes the heads. Bodies go from the page cache to the socket with ``sendfile``, in
worker threads, where the connection is plain. Every wait has an end: for a request, for its head,
and for a client that does not take its answer.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import os
import select
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import h11
import trio

from fetcher.peers.requests import Refusal, Request
from fetcher.ranges import Range
from fetcher.threads import Stopped, run_stoppable

if TYPE_CHECKING:
    import threading
    from pathlib import Path

    from fetcher.peers.bodies import Body, Span
    from fetcher.peers.following import Following

    Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]
    Headers = tuple[tuple[str, str], ...]

_MAX_HEAD_BYTES: Final = 64 * 1024
_RECEIVE_BYTES: Final = 16 * 1024
_FILE_BYTES: Final = 1024 * 1024
_READ_BYTES: Final = 256 * 1024
_LOOK_SECONDS: Final = 0.2
"""How often a waiting thread looks whether it should stop."""

_MANY: Final = frozenset({"accept", "cache-control", "forwarded", "via", "x-forwarded-for"})
"""Headers that may be there more than once, and are not looked at."""

LOST: Final = (
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    ConnectionError,
    h11.LocalProtocolError,
)
"""What ends a connection without its being anybody's fault here."""


class BytesMissing(Exception):
    """What is to be sent cannot be had any more: the answer ends before its end."""


@dataclass(frozen=True, slots=True)
class HttpPatience:
    """How long a client may take. Seconds."""

    idle: float = 60.0
    """Until it asks for something more."""
    head: float = 10.0
    """For a request, from its first byte on; for the first one from the connection's begin on."""
    stall: float = 30.0
    """Without taking a byte of an answer."""


class HttpConnection:
    """One connection of a client; used by one task at a time."""

    def __init__(self, stream: Stream, patience: HttpPatience) -> None:
        self._stream = stream
        self._patience = patience
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD_BYTES)
        self._has_body = False
        self._is_head = False
        self._patience_for_next = patience.head

    async def receive(self) -> Request | None:
        """The next request; None where there is no other. Raises :class:`Refusal` for nonsense."""
        if self._http.our_state is h11.DONE:
            if self._http.their_state is not h11.DONE:
                return None
            self._http.start_next_cycle()
        if self._http.our_state is not h11.IDLE:
            return None
        # who it is shows in the first request: strangers are not to hold connections for long
        with trio.move_on_after(self._patience_for_next) as waiting:
            try:
                return await self._next_request(waiting)
            except h11.RemoteProtocolError as error:
                raise Refusal(error.error_status_hint, "UNSUPPORTED", "this is not HTTP") from error
        return None

    async def _next_request(self, waiting: trio.CancelScope) -> Request | None:
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Request):
                self._patience_for_next = self._patience.idle
                request = _read(event)
                self._has_body, self._is_head = _announces_body(request), request.is_head
                if not self._has_body:
                    self._http.next_event()
                return request
            if event is not h11.NEED_DATA:
                return None
            begun = bool(self._http.trailing_data[0])
            data = await self._stream.receive_some(_RECEIVE_BYTES)
            if data and not begun:
                waiting.deadline = min(waiting.deadline, trio.current_time() + self._patience.head)
            self._http.receive_data(bytes(data))

    async def answer(
        self, status: int, headers: Headers, body: bytes, *, close: bool = False
    ) -> None:
        """Send a small answer whole; for a HEAD without its body."""
        length = ("Content-Length", str(len(body)))
        events: list[h11.Event] = [self._head(status, (*headers, length), close=close)]
        if body and not self._is_head:
            events.append(h11.Data(data=body))
        await self._send_events(*events, h11.EndOfMessage())

    async def begin(self, status: int, headers: Headers, *, close: bool = False) -> None:
        """Send the head of an answer."""
        await self._send_events(self._head(status, headers, close=close))

    def _head(self, status: int, headers: Headers, *, close: bool) -> h11.Response:
        if self._has_body:
            # it is not read: the next request could not be found behind it
            close = True
        own = [
            ("Date", email.utils.formatdate(usegmt=True)),
            ("Docker-Distribution-API-Version", "registry/2.0"),
            *([("Connection", "close")] if close else []),
        ]
        return h11.Response(status_code=status, headers=[*headers, *own])

    async def end(self) -> None:
        """The answer is complete."""
        await self._send_events(h11.EndOfMessage())

    async def _send_events(self, *events: h11.Event) -> None:
        data = b"".join(self._http.send(event) or b"" for event in events)
        if isinstance(self._stream, trio.SocketStream):
            # nearly always there is room for it: then nothing has to be waited for
            data = data[_send_now(self._stream.socket.fileno(), data) :]
        if data:
            with trio.fail_after(self._patience.stall):
                await self._stream.send_all(data)

    async def send_part(self, following: Following) -> None:
        """Send bytes of the body of an answer, for as long as there are some.

        Raises what is in :data:`LOST`.
        """
        before = following.sent
        if isinstance(self._stream, trio.SocketStream):
            descriptor, patience = self._stream.socket.fileno(), self._patience.stall
            await run_stoppable(lambda stop: _Sending(descriptor, patience, stop).send(following))
        else:
            await self._send_secured(following)
        if following.sent > before:
            # h11 keeps count of bytes that it does not see
            uncopied: Any = _Uncopied(following.sent - before)
            self._http.send_with_data_passthrough(h11.Data(data=uncopied))

    async def _send_secured(self, following: Following) -> None:
        buffer = memoryview(bytearray(min(_READ_BYTES, len(following.left))))
        read_next = functools.partial(_read_next, following, buffer)
        while following.left and (read := await run_stoppable(read_next)):
            with trio.fail_after(self._patience.stall):
                await self._stream.send_all(buffer[:read])
            following.took(read)


class _Uncopied:
    """Bytes that go past h11."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


class _Sending:
    """Bytes on their way to a socket, in a worker thread. It does not block."""

    def __init__(self, descriptor: int, patience: float, stop: threading.Event) -> None:
        self._socket = descriptor
        self._patience = patience
        self._stop = stop
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._files = contextlib.ExitStack()
        self._path: Path | None = None
        self._file = -1

    def send(self, following: Following) -> None:
        with self._files:
            while following.left and (piece := following.next(self._stop)):
                if not self._send_piece(following, piece):
                    return

    def _send_piece(self, following: Following, piece: Range) -> bool:
        """Send bytes that are there; whether all of them were."""
        spans = following.body.spans(piece)
        if spans is None:
            return self._send_read(following, piece)
        return all(self._send_span(following, span) for span in spans)

    def _send_span(self, following: Following, span: Span) -> bool:
        file = self._opened(span.path)
        if file is None or following.body.is_over:
            # it has become something else: the same bytes are elsewhere, or nowhere
            return False
        offset, stop = span.offset, span.offset + span.count
        while offset < stop:
            self._wait()
            try:
                sent = os.sendfile(self._socket, file, offset, min(stop - offset, _FILE_BYTES))
            except BlockingIOError:
                continue
            if sent == 0:
                return False
            following.took(sent)
            offset += sent
        return True

    def _opened(self, path: Path) -> int | None:
        """The file, which stays open, as what arrives in it is sent in many pieces."""
        if self._path != path:
            self._files.close()
            self._path = None
            try:
                self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            self._files.callback(os.close, self._file)
            self._path = path
        return self._file

    def _send_read(self, following: Following, piece: Range) -> bool:
        buffer = memoryview(bytearray(min(_READ_BYTES, len(piece))))
        left = piece
        while left and (read := _read_part(following.body, left, buffer)):
            view = buffer[:read]
            while view:
                self._wait()
                try:
                    sent = os.write(self._socket, view)
                except BlockingIOError:
                    continue
                following.took(sent)
                view = view[sent:]
            left = Range(left.start + read, left.stop)
        return not left

    def _wait(self) -> None:
        """Return once the socket takes bytes."""
        until = time.monotonic() + self._patience
        while not self._stop.is_set():
            if self._poll.poll(_LOOK_SECONDS * 1000):
                return
            if time.monotonic() > until:
                raise trio.TooSlowError
        raise Stopped


def _read_next(following: Following, buffer: memoryview, stop: threading.Event) -> int:
    piece = following.next(stop)
    return _read_part(following.body, piece, buffer) if piece else 0


def _read_part(body: Body, part: Range, buffer: memoryview) -> int:
    try:
        return body.read(part.start, buffer[: len(part)])
    except FileNotFoundError:
        return 0


def _send_now(descriptor: int, data: bytes) -> int:
    """Send what there is room for at once; how much that was."""
    try:
        return os.write(descriptor, data) if data else 0
    except BlockingIOError:
        return 0


def _announces_body(request: Request) -> bool:
    headers = request.headers
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _read(request: h11.Request) -> Request:
    headers: dict[str, str] = {}
    for name, value in request.headers:
        text = name.decode("ascii")
        if text in headers and text not in _MANY:
            # which of the two counts must not be a matter of taste
            raise Refusal(400, "UNSUPPORTED", f"the header {text[:100]} is there twice")
        headers[text] = value.decode("iso-8859-1")
    return Request(request.method.decode("ascii"), request.target.decode("ascii"), headers)
