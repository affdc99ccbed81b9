"""Who the members are: what each way of finding out has found, taken together.

A way that fails keeps what it found before: nodes that cannot be looked up for a while are still
there, and those that are not fail quickly when they are asked.
"""

from __future__ import annotations

import logging
import re
import socket
from typing import TYPE_CHECKING, Final, Protocol

from fetcher.peers.owners import Member

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fetcher.peers.members import Members

logger: Final = logging.getLogger(__name__)

_PEER: Final = re.compile(
    r"(?:(?P<name>[A-Za-z0-9._:\[\]-]{1,253})=)?"
    r"(?P<address>(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5})"
    r"(?:@(?P<zone>[A-Za-z0-9._-]{1,63}))?"
)

Found = tuple[Member, ...]


class Discovery(Protocol):
    """A way of finding members."""

    async def run(self, found: Callable[[Found], None]) -> None:
        """Tell ``found`` who there is, each time that it may have changed, until cancelled."""


def parse_peers(texts: Iterable[str]) -> Found:
    """Read ``[name=]host:port[@zone]``. Raises :class:`ValueError` with the reason."""
    members: dict[str, Member] = {}
    for text in texts:
        match = _PEER.fullmatch(text)
        if match is None or not 0 < int(match["address"].rpartition(":")[2]) < 65536:
            raise ValueError(f"{text[:100]!r} is not name=host:port, perhaps with @zone behind it")
        name = match["name"] or match["address"]
        if name in members:
            raise ValueError(f"there are two peers {name[:100]!r}")
        members[name] = Member(name, match["address"], match["zone"] or "")
    return tuple(members.values())


class StaticPeers:
    """A list that somebody wrote down."""

    def __init__(self, peers: Sequence[str]) -> None:
        """Raises :class:`ValueError`."""
        self._members = parse_peers(peers)

    async def run(self, found: Callable[[Found], None]) -> None:
        """Tell it, once."""
        found(self._members)


class Gathering:
    """What all ways together have found, for :class:`Members`."""

    def __init__(self, members: Members, port: int | None) -> None:
        """``port`` is that on which this node serves its peers, if it does."""
        self._members = members
        self._port = port
        self._found: dict[object, Found] = {}

    async def run(self, way: Discovery) -> None:
        """Let one way find members until cancelled."""

        def found(members: Found) -> None:
            self._found[way] = members
            everybody = [one for some in self._found.values() for one in some]
            self._members.replace(everybody, self._myself(everybody))

        try:
            await way.run(found)
        except Exception:
            # a fault of this program: whoever was found stays, and pulls go on
            logger.exception("peers are not looked for any more by %s", type(way).__name__)

    def _myself(self, members: Iterable[Member]) -> str | None:
        """The name of this node, where it goes by its address among them."""
        port, name = self._port, self._members.given_name
        candidates = [one for one in members if port and one.address.endswith(f":{port}")]
        if port is None or any(one.name == name for one in members):
            return None
        return next((one.name for one in candidates if is_own(one.address)), None)


def joined(host: str, port: int) -> str:
    """``host:port``, of an IPv6 address as well."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_own(address: str) -> bool:
    """Whether ``host:port`` has the IP address of an interface of this machine."""
    host = address.rpartition(":")[0].strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # the kernel lets nobody else's address be bound; a name is none
            socket.inet_pton(family, host)
            probe.bind((host, 0))
    except OSError:
        return False
    return True
