"""Lines of bounded size over a stream: the framing of :mod:`fetcher.agent_protocol`."""

from __future__ import annotations

from typing import Final

import trio

_RECEIVE_BYTES: Final = 64 * 1024


class Malformed(Exception):
    """A line that is not what it should be. The message never quotes it."""


class LineTooLong(Malformed):
    """The other side sends a line beyond the limit: nothing after it can be understood."""


class ConnectionLost(Exception):
    """The other side went away in the middle of a line or of an answer."""


class Lines:
    """Lines over a stream, none longer than ``limit`` bytes.

    One task receives at a time and one sends at a time. A send that is cancelled may leave half a
    line behind: close the stream then.
    """

    def __init__(self, stream: trio.abc.Stream, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0

    async def receive(self) -> bytes | None:
        """The next line without its newline, None at the end of the stream.

        Raises :class:`LineTooLong`, and :class:`ConnectionLost` when the stream ends inside a line
        or breaks. Cancelling loses nothing.
        """
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end > self._limit or (end < 0 and len(self._buffer) > self._limit):
                raise LineTooLong(f"a line of more than {self._limit} bytes")
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                self._searched = 0
                return line
            self._searched = len(self._buffer)
            if not await self._fill():
                if self._buffer:
                    raise ConnectionLost("the stream ended inside a line")
                return None

    async def wait_closed(self) -> None:
        """Return once the other side has closed its end; what it sends until then is kept.

        Raises :class:`LineTooLong` when it sends more than one line may hold.
        """
        while await self._fill():
            if len(self._buffer) > self._limit:
                raise LineTooLong(f"more than {self._limit} bytes ahead of the answer")

    async def send(self, line: bytes) -> None:
        """Send one encoded line; :class:`ConnectionLost` when the other side is gone."""
        try:
            await self._stream.send_all(line)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost("the other side is gone") from error

    async def _fill(self) -> bool:
        try:
            data = await self._stream.receive_some(_RECEIVE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost("the connection broke") from error
        self._buffer += data
        return bool(data)
