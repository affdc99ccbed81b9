"""Names of hosts, looked up in threads that nobody else needs.

trio looks names up in the threads that it lends to everybody, of which there are forty, and a name
server that does not answer holds one for half a minute, though its caller gave up. A few dozen pods
with such a registry would keep the driver from reading a file, or from starting the child that
unmounts.
"""

from __future__ import annotations

import socket
import weakref
from functools import partial
from typing import Any, Final

import trio

_FOR_ONE_NAME: Final = 8
"""Threads: connections to one host come about side by side, and a dead name takes no more."""


class NameLookups(trio.abc.HostnameResolver):
    """Looks names up as the system does. Belongs to one trio loop."""

    def __init__(self) -> None:
        self._threads: weakref.WeakValueDictionary[object, trio.CapacityLimiter] = (
            weakref.WeakValueDictionary()
        )

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        """As :func:`socket.getaddrinfo`; cancelled, it leaves its thread behind."""
        # the thread holds the limiter, and gives it back when the name server was heard
        limiter = self._threads.setdefault(host, trio.CapacityLimiter(_FOR_ONE_NAME))
        look_up = partial(socket.getaddrinfo, host, port, family, type, proto, flags)
        return await trio.to_thread.run_sync(
            look_up,
            abandon_on_cancel=True,
            limiter=limiter,
        )

    async def getnameinfo(
        self, sockaddr: tuple[str, int] | tuple[str, int, int, int], flags: int
    ) -> tuple[str, str]:
        """As :func:`socket.getnameinfo`."""
        return await trio.to_thread.run_sync(
            socket.getnameinfo, sockaddr, flags, abandon_on_cancel=True
        )


def look_up_apart() -> None:
    """Look names up with :class:`NameLookups` from here on, in this trio loop."""
    trio.socket.set_custom_hostname_resolver(NameLookups())
