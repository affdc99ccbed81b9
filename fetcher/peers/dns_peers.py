"""Members by a name of the DNS: each of its addresses is a node, as of a headless Service.

Asked here and not by the system's resolver, whose answers are as long as it likes: of thousands of
addresses a server says at first only that they do not fit, and has to be asked again over TCP.
"""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Final

import dns.asyncresolver
import dns.exception
import dns.resolver
import trio

from fetcher.peers.discovery import Found, joined
from fetcher.peers.owners import Member

if TYPE_CHECKING:
    from collections.abc import Callable

logger: Final = logging.getLogger(__name__)

_AGAIN_SECONDS: Final = 10.0
_LONGEST_QUESTION: Final = 8.0
_FAMILIES: Final = ("A", "AAAA")


class DnsPeers:
    """The addresses of a name. Their names are ``address:port``, the same on every node."""

    def __init__(self, address: str, resolver: dns.asyncresolver.Resolver | None = None) -> None:
        """``address`` is ``name:port``."""
        self._name, _, port = address.rpartition(":")
        self._port = int(port)
        self._resolver = resolver

    async def run(self, found: Callable[[Found], None]) -> None:
        """Look the name up again and again."""
        known: str | None = None
        while True:
            problem = None
            try:
                found(await self.look_up())
            except (dns.exception.DNSException, OSError) as error:
                problem = f"{type(error).__name__}: {error}"[:300]
            if problem is not None and problem != known:
                logger.warning("peers cannot be looked up at %s: %s", self._name, problem)
            known = problem
            # not all nodes at the same moment
            await trio.sleep(_AGAIN_SECONDS * random.uniform(0.8, 1.2))  # noqa: S311 - no secret

    async def look_up(self) -> Found:
        """Who is there now; nobody where the name is not there. Raises ``DNSException``."""
        resolver = self._resolver or dns.asyncresolver.Resolver()
        addresses: list[str] = []
        for family in _FAMILIES:
            try:
                answer = await resolver.resolve(
                    self._name, family, lifetime=_LONGEST_QUESTION, search=True
                )
            except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
                continue
            addresses += [record.address for record in answer]
        names = sorted({joined(one, self._port) for one in addresses})
        return tuple(Member(name, name) for name in names)
