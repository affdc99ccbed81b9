"""How a request travels: straight or through a proxy, and on from there where it is redirected.

Control traffic and bulk bytes follow redirects one hop at a time by these same rules. A registry
must not steer a privileged process: what it redirects to is hostile until it was looked at, and
gets nothing that is secret.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, urljoin, urlsplit

from fetcher.addresses import check_host, is_loopback, is_named, name_of
from fetcher.errors import AccessDenied
from fetcher.proxies import Proxies

if TYPE_CHECKING:
    from fetcher.trust import Trust

MAX_REDIRECTS: Final = 5
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_KEPT_HEADERS: Final = frozenset({"accept"})

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Hop:
    """Where one request goes, and what it shows there."""

    url: str = field(repr=False)
    headers: Headers = field(repr=False)
    trust: Trust

    @property
    def host(self) -> str:
        """Host and port, for people: addresses have queries that carry signatures."""
        return urlsplit(self.url).netloc.rpartition("@")[2]


@dataclass(frozen=True, slots=True)
class Route:
    """The rules for requests to one host, and for wherever it redirects them."""

    asked_host: str
    """Host and port of who was asked."""
    who: str
    """That, as people know it."""
    plain_http: tuple[str, ...] = ()
    """Hosts that may be spoken to without TLS, whoever redirects there."""
    insecure: tuple[str, ...] = ()
    """Hosts whose certificate is not verified."""
    proxies: Proxies = field(default_factory=Proxies)

    def proxy(self, hop: Hop) -> str | None:
        """The proxy that the request goes through, if any."""
        return self.proxies.of(hop.url)

    def steered(self, hop: Hop) -> bool:
        """Whether a registry elsewhere named this goal: then it must not be this machine."""
        asked = name_of(self.asked_host)
        return name_of(urlsplit(hop.url).netloc) != asked and not is_loopback(asked)

    def follow(self, hop: Hop, location: str) -> Hop:
        """The next hop after a redirect. Raises :class:`AccessDenied` for one that is not taken.

        At another origin it is without everything that was for the first: credentials, headers,
        the client certificate, and the leave not to verify.
        """
        target = joined(hop.url, location)
        host = target.hostname
        if not host or target.scheme not in ("http", "https") or target.username is not None:
            raise AccessDenied(
                f"{self.who} redirects to something that is not a plain web address",
                registry=self.who,
            )
        before = urlsplit(hop.url)
        downgrade = before.scheme == "https" and target.scheme == "http"
        if downgrade and not is_named(target.netloc, self.plain_http):
            raise AccessDenied(
                f"{self.who} redirects to http://{host}, unencrypted: refused", registry=self.who
            )
        check_host(host, asked_by=name_of(self.asked_host))
        if _origin(target) == _origin(before):
            return Hop(target.geturl(), hop.headers, hop.trust)
        kept = tuple(one for one in hop.headers if one[0].lower() in _KEPT_HEADERS)
        verify = not is_named(target.netloc, self.insecure)
        return Hop(target.geturl(), kept, hop.trust.elsewhere(verify=verify))


def joined(base: str, location: str) -> SplitResult:
    """Where ``location`` leads from ``base``; nowhere, for what only looks like a URL."""
    try:
        parts = urlsplit(urljoin(base, location))
        return parts if parts.port != 0 else urlsplit("")
    except ValueError:
        return urlsplit("")


def _origin(url: SplitResult) -> tuple[str, str, int]:
    port = url.port or (443 if url.scheme == "https" else 80)
    return url.scheme, (url.hostname or "").lower(), port
