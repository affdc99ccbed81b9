"""HTTP/1.1 for bulk bytes: one connection, one request after the other (RFC 9112).

Heads, and bodies in the chunked coding, are read by h11. Any other body goes straight from the
stream into the buffer of who reads it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import h11

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fetcher.streams import Stream, Watch

_HEAD_BYTES: Final = 16 * 1024
_GATHER_BYTES: Final = 256 * 1024
"""So many bytes are waited for, for a moment: each write costs Python some microseconds."""
MAX_HEADER_BYTES: Final = 64 * 1024


class TooLong(h11.RemoteProtocolError):
    """An answer's headers have no end."""


class Hung(ConnectionError):
    """The other side ended the connection instead of answering."""


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str] = field(repr=False)


class Wire:
    """A connection to a server. Errors are those of its stream and of h11."""

    def __init__(self, stream: Stream, peer: str | None) -> None:
        """Takes over ``stream``; ``peer`` is the address that it leads to, if that matters."""
        self.peer = peer
        self.is_new = True
        """Nothing has been asked on it before."""
        self.idle_since = 0.0
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT, MAX_HEADER_BYTES)
        self._head_bytes = 0
        self._early = memoryview(b"")
        """What came of the body together with the head."""
        self._left: int | None = 0
        """Bytes of the body that are still to come; None while only its end will tell."""
        self._chunked = False
        self._reusable = False

    def close(self) -> None:
        """Close it."""
        self._stream.close()

    def send(self, request: h11.Request, watch: Watch) -> None:
        """Ask; the answer before has been read to its end."""
        self._http = h11.Connection(h11.CLIENT, MAX_HEADER_BYTES)
        self._head_bytes = 0
        self._reusable = False
        data = (self._http.send(request) or b"") + (self._http.send(h11.EndOfMessage()) or b"")
        self._stream.write(data, watch)

    def head(self, watch: Watch) -> Head:
        """The beginning of the answer. Raises :class:`Hung` if there is none."""
        buffer = memoryview(bytearray(_HEAD_BYTES))
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Response):
                return self._begin(event)
            if event is not h11.NEED_DATA:
                # an interim answer
                continue
            count = self._stream.read(buffer, watch)
            if not count and not self._head_bytes:
                raise Hung("no answer came")
            self._head_bytes += count
            if self._head_bytes > MAX_HEADER_BYTES:
                raise TooLong(f"more than {MAX_HEADER_BYTES} bytes of headers")
            self._http.receive_data(bytes(buffer[:count]))

    @property
    def has_heard(self) -> bool:
        """Whether any byte of the present answer came."""
        return self._head_bytes > 0

    def _begin(self, answer: h11.Response) -> Head:
        headers = {
            name.decode("ascii"): value.decode("iso-8859-1") for name, value in answer.headers
        }
        self._chunked = "transfer-encoding" in headers
        self._early = memoryview(b"")
        if answer.status_code in (204, 304):
            self._left = 0
        elif "content-length" in headers and not self._chunked:
            self._left = int(headers["content-length"])
        else:
            self._left = None
        if not self._chunked:
            self._early = memoryview(self._http.trailing_data[0])
        self._reusable = (
            answer.http_version == b"1.1"
            and "close" not in _tokens(headers.get("connection", ""))
            and (self._chunked or self._left is not None)
        )
        return Head(answer.status_code, headers)

    def read(self, buffer: memoryview, watch: Watch) -> memoryview:
        """The next bytes of the body, in ``buffer`` or elsewhere; none at its end.

        They are good until the next call. An end that comes too early is one as well.
        """
        if self._chunked:
            return self._read_chunked(buffer, watch)
        if self._left == 0:
            return buffer[:0]
        wanted = buffer if self._left is None else buffer[: self._left]
        if self._early:
            found, self._early = self._early[: len(wanted)], self._early[len(wanted) :]
        else:
            found = wanted[: self._stream.read(wanted, watch, _GATHER_BYTES)]
        if not found:
            self._reusable = False
        if self._left is not None:
            self._left -= len(found)
        return found

    def _read_chunked(self, buffer: memoryview, watch: Watch) -> memoryview:
        pieces: list[bytes] = []
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Data):
                pieces.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                self._chunked, self._left = False, 0
                self._early = memoryview(self._http.trailing_data[0])
                break
            elif pieces:
                break
            else:
                count = self._stream.read(buffer, watch, _GATHER_BYTES)
                if not count:
                    self._reusable = False
                    break
                self._http.receive_data(bytes(buffer[:count]))
        return memoryview(b"".join(pieces))

    def rest(self) -> bool:
        """The answer was read: whether the connection is good for another request."""
        ended = self._left == 0 and not self._chunked and not self._early
        self.is_new = False
        self.idle_since = time.monotonic()
        return ended and self._reusable

    def is_usable(self, longest_idle: float) -> bool:
        """Whether it is still open, after it was idle."""
        idle = time.monotonic() - self.idle_since
        return idle < longest_idle and self._stream.is_quiet()


def _tokens(text: str) -> set[str]:
    return {one.strip().lower() for one in text.split(",")}
