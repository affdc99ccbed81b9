"""Connections from worker threads: names looked up, addresses tried side by side, proxies, TLS.

Addresses are tried as RFC 8305 ("Happy Eyeballs") has it, without its sorting, which the look-up
has done. A look-up cannot be stopped: it has a thread of its own, which nobody waits for.
"""

from __future__ import annotations

import base64
import collections
import errno
import os
import select
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, unquote, urlsplit

import h11

from fetcher.streams import SocketStream, TlsStream
from fetcher.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from fetcher.streams import Stream, Watch
    from fetcher.trust import Contexts, Trust

    _Address = tuple[Any, ...]

_NEXT_ADDRESS_SECONDS: Final = 0.25
_PORTS: Final = {"http": 80, "https": 443}


class ProxyRefused(OSError):
    """The proxy does not let us through."""


@dataclass(frozen=True, slots=True)
class Goal:
    """Where a connection leads, and by what way; two requests with the same can share one."""

    scheme: str
    host: str
    port: int
    trust: Trust = field(repr=False)
    proxy: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, url: SplitResult, trust: Trust, proxy: str | None) -> Goal:
        """The goal of a request for ``url``. Raises :class:`OSError` for a host that cannot be."""
        host = url.hostname or ""
        try:
            host = host if host.isascii() else host.encode("idna").decode()
        except UnicodeError as error:
            raise _no_name() from error
        return cls(url.scheme, host, _port(url), trust, proxy)

    @property
    def netloc(self) -> str:
        """Host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def dial(
    goal: Goal,
    contexts: Contexts,
    proxy_trust: Trust,
    check: Callable[[str], None],
    watch: Watch,
) -> Wire:
    """A new connection. ``check`` is told of each address before it is connected to, and may raise.

    Behind a proxy, which the administrator named, nothing is checked. Raises :class:`OSError`,
    :class:`ProxyRefused`, :class:`fetcher.errors.InvalidRequest`, and what waiting does.
    """
    if goal.proxy is None:
        connected, peer = _connect(goal.host, goal.port, check, watch)
        stream: Stream = SocketStream(connected)
    else:
        stream, peer = _through_proxy(goal, goal.proxy, contexts, proxy_trust, watch), None
    try:
        if goal.scheme == "https":
            stream = TlsStream(stream, contexts.of(goal.trust), goal.host, watch)
    except BaseException:
        stream.close()
        raise
    return Wire(stream, peer)


# -- proxies ---------------------------------------------------------------------------------------


def _through_proxy(
    goal: Goal, proxy: str, contexts: Contexts, trust: Trust, watch: Watch
) -> Stream:
    """A stream to the proxy, and for TLS through it."""
    parts = urlsplit(proxy)
    host = parts.hostname or ""
    connected, _ = _connect(host, _port(parts), lambda _: None, watch)
    stream: Stream = SocketStream(connected)
    try:
        if parts.scheme == "https":
            stream = TlsStream(stream, contexts.of(trust), host, watch)
        if goal.scheme == "https":
            _open_tunnel(stream, goal, proxy, watch)
    except BaseException:
        stream.close()
        raise
    return stream


def _open_tunnel(stream: Stream, goal: Goal, proxy: str, watch: Watch) -> None:
    """RFC 9110 section 9.3.6."""
    wire = Wire(stream, None)
    headers = [("Host", goal.netloc), *proxy_headers(proxy)]
    wire.send(h11.Request(method="CONNECT", target=goal.netloc, headers=headers), watch)
    status = wire.head(watch).status
    if not 200 <= status < 300:
        raise ProxyRefused(errno.EPROTO, f"the proxy answers with the status {status}")


def proxy_headers(proxy: str) -> list[tuple[str, str]]:
    """What a proxy is shown of the name and password in its address (RFC 7617)."""
    parts = urlsplit(proxy)
    if parts.username is None:
        return []
    text = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return [("Proxy-Authorization", f"Basic {base64.b64encode(text.encode()).decode()}")]


def _port(parts: SplitResult) -> int:
    return parts.port or _PORTS[parts.scheme]


# -- addresses -------------------------------------------------------------------------------------


def _connect(
    host: str, port: int, check: Callable[[str], None], watch: Watch
) -> tuple[socket.socket, str]:
    """A connected socket that does not block, and the address at its other end."""
    addresses = _look_up(host, port, watch)
    with _Race(addresses, check, watch) as race:
        connected, peer = race.winner()
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return connected, peer


def _look_up(host: str, port: int, watch: Watch) -> list[_Address]:
    """What :func:`socket.getaddrinfo` finds. Raises :class:`OSError`."""
    # this machine's own names are not a matter for DNS (RFC 6761 section 6.3)
    name = "localhost" if host.lower().rstrip(".").endswith(".localhost") else host
    done = threading.Event()
    found: list[_Address] = []
    failures: list[Exception] = []

    def work(flags: int) -> None:
        try:
            found.extend(socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=flags))
        except (OSError, ValueError) as error:
            failures.append(error)
        finally:
            done.set()

    if _is_number(name):
        work(socket.AI_NUMERICHOST)
    else:
        threading.Thread(target=work, args=(0,), name=f"look up {host}", daemon=True).start()
        while not watch.wait(done.wait):
            pass
    if found:
        return _alternating(found)
    [failure] = failures
    if isinstance(failure, OSError):
        raise failure
    raise _no_name() from failure


def _no_name() -> OSError:
    return socket.gaierror(socket.EAI_NONAME, "it is not a name")


def _is_number(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, ValueError):
        return False
    return True


def _alternating(addresses: list[_Address]) -> list[_Address]:
    """The first kind of address and the other one in turn (RFC 8305 section 4)."""
    first = addresses[0][0]
    some = [one for one in addresses if one[0] == first]
    others = [one for one in addresses if one[0] != first]
    ordered = []
    while some or others:
        ordered += some[:1] + others[:1]
        some, others = some[1:], others[1:]
    return ordered


class _Race:
    """Tries addresses, each some time after the one before: whoever answers first is taken."""

    def __init__(
        self, addresses: list[_Address], check: Callable[[str], None], watch: Watch
    ) -> None:
        self._waiting = collections.deque(addresses)
        self._check = check
        self._watch = watch
        self._poll = select.poll()
        self._running: dict[int, tuple[socket.socket, str]] = {}
        self._next = 0.0
        """When the next one starts, whatever those before it do."""
        self._failure = OSError(errno.EADDRNOTAVAIL, "it has no address")

    def __enter__(self) -> _Race:
        return self

    def __exit__(self, *_: object) -> None:
        for loser, _peer in self._running.values():
            loser.close()

    def winner(self) -> tuple[socket.socket, str]:
        """A connected socket and its peer. Raises the last :class:`OSError` if there is none."""
        while self._waiting or self._running:
            now = time.monotonic()
            if self._waiting and (not self._running or now >= self._next):
                self._start(*self._waiting.popleft())
                self._next = now + _NEXT_ADDRESS_SECONDS
                continue
            for number, _ in self._watch.wait(self._look):
                one = self._running.pop(number)
                self._poll.unregister(number)
                problem = one[0].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not problem:
                    return one
                self._fail(one[0], problem)
        raise self._failure

    def _look(self, seconds: float) -> list[tuple[int, int]]:
        if self._waiting:
            seconds = min(seconds, max(0.0, self._next - time.monotonic()))
        return self._poll.poll(seconds * 1000)

    def _start(self, family: int, kind: int, protocol: int, _: str, address: _Address) -> None:
        peer = str(address[0])
        self._check(peer)
        try:
            one = socket.socket(family, kind, protocol)
        except OSError as error:
            # this machine may know nothing of IPv6
            self._failure = error
            return
        one.setblocking(False)
        problem = one.connect_ex(address)
        if problem in (0, errno.EINPROGRESS):
            self._running[one.fileno()] = one, peer
            self._poll.register(one, select.POLLOUT)
        else:
            self._fail(one, problem)

    def _fail(self, one: socket.socket, problem: int) -> None:
        one.close()
        self._failure = OSError(problem, os.strerror(problem))
        self._next = 0.0
