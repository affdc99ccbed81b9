"""The proxies of the environment: ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY``, ``NO_PROXY``.

Libraries read these variables each in its own way; what is decided here holds for control traffic
and bulk bytes alike. ``NO_PROXY`` is read as Go reads it, since that is what the rest of a
Kubernetes node is written in: names with and without a dot in front, addresses, CIDR, ports, ``*``.
This machine itself is never asked through a proxy.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from fetcher.addresses import is_loopback, parse_address
from fetcher.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Proxies:
    """Which proxy a request goes through."""

    http: str | None = field(default=None, repr=False)
    https: str | None = field(default=None, repr=False)
    exceptions: tuple[str, ...] = ()

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> Proxies:
        """Read the variables, in lower case before upper case, as curl and Python do.

        Raises :class:`InvalidRequest` for a proxy that is none of HTTP.
        """
        general = _proxy(environment, "all_proxy")
        return cls(
            _proxy(environment, "http_proxy") or general,
            _proxy(environment, "https_proxy") or general,
            tuple(one for one in _value(environment, "no_proxy").replace(",", " ").split() if one),
        )

    def of(self, url: str) -> str | None:
        """The proxy for ``url``, none to go straight there."""
        target = urlsplit(url)
        proxy = self.https if target.scheme == "https" else self.http
        host = (target.hostname or "").rstrip(".").lower()
        if proxy is None or not host or is_loopback(host):
            return None
        port = target.port or _PORTS.get(target.scheme, 0)
        excepted = any(_excepts(one.lower(), host, port) for one in self.exceptions)
        return None if excepted else proxy


def _value(environment: Mapping[str, str], name: str) -> str:
    return environment.get(name) or environment.get(name.upper()) or ""


def _proxy(environment: Mapping[str, str], name: str) -> str | None:
    text = _value(environment, name).strip()
    if not text:
        return None
    url = text if "://" in text else f"http://{text}"
    if _split(url).scheme not in ("http", "https") or not _split(url).hostname:
        # not quoted: it may have a password in it
        raise InvalidRequest(
            f"the proxy that the environment variable {name.upper()} names cannot be used: "
            "expected http://host:port or https://host:port"
        )
    return url


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        return parts if parts.port != 0 else urlsplit("")
    except ValueError:
        return urlsplit("")


def _excepts(rule: str, host: str, port: int) -> bool:
    """Whether a part of ``NO_PROXY`` is about this host."""
    if rule == "*":
        return True
    address = parse_address(host)
    if "/" in rule:
        try:
            return address is not None and address in ipaddress.ip_network(rule, strict=False)
        except ValueError:
            return False
    name, rule_port = _without_port(rule)
    if rule_port is not None and rule_port != port:
        return False
    if address is not None:
        return parse_address(name) == address
    if name.startswith("*."):
        name = name[1:]
    if name.startswith("."):
        return host.endswith(name)
    return host == name or host.endswith(f".{name}")


def _without_port(rule: str) -> tuple[str, int | None]:
    if parse_address(rule) is not None:
        return rule, None
    name, colon, port = rule.rpartition(":")
    return (name, int(port)) if colon and port.isdecimal() else (rule, None)
