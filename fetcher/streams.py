"""Bytes over sockets for worker threads: waiting that can be told to stop, and TLS on top.

A :class:`Watch` says for how long it is worth waiting. TLS is done in memory, over any stream, so
that it also works inside the TLS of a proxy.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, cast

from fetcher.threads import Stopped

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

_T = TypeVar("_T")

_LOOK_UP_SECONDS: Final = 0.2
"""How long a waiting thread sleeps before it looks whether it should stop."""
_GATHER_SECONDS: Final = 0.06
"""What is gathered is lost to a kill: on a slow line it is not gathered for long."""
_RECORDS_BYTES: Final = 256 * 1024
"""Of TLS, received at one time."""


class Silent(Exception):
    """The other side let us wait for longer than it is worth."""


class Watch:
    """For how long one thread waits for sockets. Time that passes elsewhere does not count."""

    def __init__(self, stop: threading.Event, seconds: float, *, renewed_by: float = 1) -> None:
        """Wait for ``seconds`` in all, and for as long again once ``renewed_by`` bytes came."""
        self._stop = stop
        self._seconds = seconds
        self._renewed_by = renewed_by
        self._waited = 0.0
        self._got = 0

    def wait(self, ready: Callable[[float], _T], longest: float = _LOOK_UP_SECONDS) -> _T:
        """What ``ready`` returns, called with the seconds that it may take.

        Raises :class:`fetcher.threads.Stopped` and :class:`Silent`.
        """
        if self._stop.is_set():
            raise Stopped
        if self._waited >= self._seconds:
            raise Silent
        started = time.monotonic()
        result = ready(longest)
        self._waited += time.monotonic() - started
        return result

    def got(self, count: int) -> None:
        """So many bytes came."""
        self._got += count
        if self._got >= self._renewed_by:
            self._got, self._waited = 0, 0.0


class Stream(Protocol):
    """A connection. Errors are :class:`OSError` besides those of :class:`Watch`."""

    def read(self, buffer: memoryview, watch: Watch, least: int = 1) -> int:
        """Bytes that came into ``buffer``; 0 at the end.

        Where fewer than ``least`` are there, waits a moment for more.
        """

    def write(self, data: bytes, watch: Watch) -> None:
        """Send all of ``data``."""

    def is_quiet(self) -> bool:
        """Whether nothing has come that was not read, not even the end."""

    def close(self) -> None:
        """Close it."""


class SocketStream:
    """A connected socket."""

    def __init__(self, connected: socket.socket) -> None:
        """Takes over the socket, which does not block."""
        self._socket = connected
        self._input = select.poll()
        self._input.register(connected, select.POLLIN)
        self._output = select.poll()
        self._output.register(connected, select.POLLOUT)
        self._least = 1

    def read(self, buffer: memoryview, watch: Watch, least: int = 1) -> int:
        """See :class:`Stream`."""
        least = min(least, len(buffer))
        while True:
            self._wake_at(least)
            if least > 1:
                watch.wait(self._readable, _GATHER_SECONDS)
            else:
                watch.wait(self._readable)
            # not in the handler: what waiting raises would seem to be caused by that error
            with contextlib.suppress(BlockingIOError):
                count = self._socket.recv_into(buffer)
                watch.got(count)
                return count
            # nothing at all: no need to look so often
            self._wake_at(1)
            watch.wait(self._readable)

    def _readable(self, seconds: float) -> bool:
        return bool(self._input.poll(seconds * 1000))

    def _wake_at(self, least: int) -> None:
        """Have the socket count as readable with so many bytes, or at its end."""
        if least != self._least:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
            self._least = least

    def write(self, data: bytes, watch: Watch) -> None:
        """See :class:`Stream`."""
        left = memoryview(data)
        while left:
            try:
                left = left[self._socket.send(left) :]
            except BlockingIOError:
                watch.wait(lambda seconds: self._output.poll(seconds * 1000))

    def is_quiet(self) -> bool:
        """See :class:`Stream`."""
        self._wake_at(1)
        return not self._readable(0)

    def close(self) -> None:
        """See :class:`Stream`."""
        self._socket.close()


class TlsStream:
    """TLS over another stream."""

    def __init__(self, inner: Stream, context: ssl.SSLContext, host: str, watch: Watch) -> None:
        """Shake hands as the client of ``host``. Takes over ``inner``, but if this raises."""
        self._inner = inner
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._records = memoryview(bytearray(_RECORDS_BYTES))
        while not self._shake_hands(watch):
            self._receive(watch, 1)

    def _shake_hands(self, watch: Watch) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        finally:
            # an alert, too, which says why
            self._send(watch)
        return True

    def _send(self, watch: Watch) -> None:
        if self._outgoing.pending:
            self._inner.write(self._outgoing.read(), watch)

    def _receive(self, watch: Watch, least: int) -> None:
        count = self._inner.read(self._records, watch, least)
        if count:
            self._incoming.write(self._records[:count])
        else:
            self._incoming.write_eof()

    def read(self, buffer: memoryview, watch: Watch, least: int = 1) -> int:
        """See :class:`Stream`."""
        count = 0
        while count < len(buffer):
            try:
                got = cast("int", self._tls.read(len(buffer) - count, buffer[count:]))
            except ssl.SSLWantReadError:
                if count:
                    break
                self._send(watch)
                self._receive(watch, least)
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                break
            else:
                if not got:
                    break
                count += got
        return count

    def write(self, data: bytes, watch: Watch) -> None:
        """See :class:`Stream`."""
        self._tls.write(data)
        self._send(watch)

    def is_quiet(self) -> bool:
        """See :class:`Stream`."""
        return not self._incoming.pending and self._inner.is_quiet()

    def close(self) -> None:
        """See :class:`Stream`."""
        self._inner.close()
