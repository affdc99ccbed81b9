"""Where a registry may not lead us.

The driver runs privileged on a node, and what it talks to is named by pods and by registries:
references, token realms, redirects, DNS names. Link-local addresses are where clouds keep the
credentials of machines, so nothing named by a stranger leads there, whatever name stands for it.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import httpcore
import trio

from fetcher.errors import AccessDenied

if TYPE_CHECKING:
    from collections.abc import Iterable

    import httpx

    _Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA: Final = tuple(
    ipaddress.ip_network(text)
    for text in (
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure's wire server
        "192.0.0.192",  # Oracle's classic
        "fd00:ec2::/32",  # Amazon's own services: EC2 at ::254, EKS Pod Identity at ::23
        "fd20:ce::254",  # Google
        "fd00:c1::a9fe:a9fe",  # Oracle
        "fd00:42::42",  # Scaleway
        "fd00:a9fe:a9fe::1",  # Akamai
        "fd00:100::100:200",  # Alibaba
    )
)
"""Where clouds hand out what belongs to the machine, or to its pods, outside of link-local ranges.

Networks of one's own have unique local addresses too, so these are refused one by one.
"""
_EMBEDDING: Final = tuple(ipaddress.ip_network(text) for text in ("64:ff9b::/96", "::/96"))
"""IPv6 networks whose last four bytes are an IPv4 address: RFC 6052 and 4291 section 2.5.5.1."""


class RefusedAddress(Exception):
    """A connection was refused by us. Not a ``ModelError``: it passes through two libraries before
    it is translated, see ``fetcher.exchange``.
    """


def refused(host: str, *, steered: bool = False) -> str | None:
    """Why no request goes to this address, or None; names are for the connection to judge.

    ``steered`` means that a registry elsewhere named the address, as a realm or in a redirect: then
    this machine's own addresses are refused too.
    """
    address = parse_address(host)
    if address is None:
        return None
    if address.is_link_local:
        return "is link-local, where clouds keep the credentials of machines"
    if any(address in network for network in _METADATA):
        return "is a cloud's metadata service"
    if address.is_multicast or address.is_unspecified:
        return "is not the address of a machine"
    if steered and address.is_loopback:
        return "is this machine's own"
    return None


def parse_address(host: str) -> _Address | None:
    """The address that ``host`` is, through the forms in which IPv6 wraps IPv4; None for a name.

    ``::`` and ``::1`` are themselves, though they look like one of these forms.
    """
    text = host.strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped or address.sixtofour:
            return address.ipv4_mapped or address.sixtofour
        own = address.is_unspecified or address.is_loopback
        if not own and any(address in network for network in _EMBEDDING):
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its literal address or by the name ``localhost``."""
    address = parse_address(host)
    return address.is_loopback if address else host.lower().rstrip(".") == "localhost"


def name_of(host: str) -> str:
    """The name or address in ``host`` or ``host:port``, without brackets."""
    return urlsplit(f"//{host}").hostname or host


def is_named(host: str, names: tuple[str, ...]) -> bool:
    """Whether a list of hosts, each with or without a port, has ``host`` or ``host:port``."""
    return host in names or name_of(host) in names


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects as httpcore does on trio, and looks at the peer before a byte is sent."""

    def __init__(self, *, steered: bool) -> None:
        self._inner = httpcore.TrioBackend()
        self._steered = steered

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 -- httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """As the base class; :class:`RefusedAddress` when the name leads where it may not."""
        stream = await self._inner.connect_tcp(
            host, port, timeout, local_address=local_address, socket_options=socket_options
        )
        peer = str(stream.get_extra_info("server_addr")[0])
        reason = refused(peer, steered=self._steered)
        if reason is not None:
            await stream.aclose()
            raise RefusedAddress(f"{host} is at {peer}, which {reason}")
        return stream

    async def sleep(self, seconds: float) -> None:
        """As the base class."""
        await trio.sleep(seconds)


def guard(client: httpx.AsyncClient, *, steered: bool) -> None:
    """Make every connection of ``client`` look at its peer.

    httpx has no parameter for httpcore's public ``network_backend``, hence the reach into its
    pools; it fails loudly where a new version has them elsewhere. A proxy is the administrator's
    choice: it may be on this machine even for what a registry named.
    """
    _guard_pool(client._transport, GuardedBackend(steered=steered))
    for proxy in client._mounts.values():
        if proxy is not None:
            _guard_pool(proxy, GuardedBackend(steered=False))


def _guard_pool(transport: httpx.AsyncBaseTransport, backend: GuardedBackend) -> None:
    pool = getattr(transport, "_pool", None)
    if not isinstance(pool, httpcore.AsyncConnectionPool) or not hasattr(pool, "_network_backend"):
        raise RuntimeError("this version of httpx keeps its connections where no guard can be put")
    pool._network_backend = backend


def check_host(host: str, *, asked_by: str | None = None) -> None:
    """Refuse a literal address before a request is made for it: :class:`AccessDenied`.

    ``asked_by`` is the registry that named it, when that is not who the host is.
    """
    steered = asked_by is not None and not is_loopback(asked_by)
    reason = refused(host, steered=steered)
    if reason is None and steered and is_loopback(host):
        reason = "is this machine's own"
    if reason is not None:
        what = f"{asked_by} leads to {host}, which" if asked_by else host
        raise AccessDenied(f"{what} {reason}: refused", registry=asked_by or host)
