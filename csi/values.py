"""Reading and checking the value of one setting, and the rule that says how.

A reader turns a text into what the setting's type wants and raises ValueError; a check returns why
a converted value cannot be used, or None.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fetcher.errors import InvalidRequest
from fetcher.peers.discovery import parse_peers
from fetcher.policy import ModelPattern

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# CSI specification, GetPluginInfo: "domain name notation", at most 63 characters.
_DRIVER_NAME: Final = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*"
)
_REGISTRY_HOST: Final = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_LISTEN: Final = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])?:([0-9]{1,5})")
_SERVICE: Final = re.compile(r"[a-z0-9-]{1,63}/[a-z0-9-]{1,63}")
_PEER_NAME: Final = re.compile(r"[A-Za-z0-9._:\[\]-]{1,253}")
_SIZE: Final = re.compile(r"([0-9]{1,18})\s*(?:(B)|([KMGT])i(?:B)?)?", re.IGNORECASE)
_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ms|s|m|h)?")
_SECONDS: Final = {"ms": 0.001, None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}

KIB: Final = 1024
MIB: Final = 1024 * KIB
MAX_SOCKET_PATH: Final = 107
"""``sockaddr_un.sun_path`` without its NUL."""


@dataclass(frozen=True)
class Rule:
    """What is said about a setting besides its type."""

    summary: str
    check: Callable[[Any], str | None] | None = None
    read: Callable[[object], object] | None = None


def parse_size(value: object) -> object:
    """Bytes of ``4194304``, ``4MiB`` or ``4Mi``; what is no text goes through unchanged."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("expected bytes, or a number with KiB, MiB, GiB or TiB")
    power = "KMGT".index(match[3].upper()) + 1 if match[3] else 0
    return int(match[1]) * 1024**power


def parse_duration(value: object) -> object:
    """Seconds of ``30``, ``30s``, ``500ms``, ``2m`` or ``1h``; other types go through unchanged."""
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise ValueError("expected seconds, or a number with ms, s, m or h")
    return float(match[1]) * _SECONDS[match[2]]


def parse_names(value: object) -> object:
    """Names of a list, or of a text with commas."""
    if isinstance(value, str):
        return [name for name in re.split(r"[,\s]+", value) if name]
    return value


def check_driver_name(name: str) -> str | None:
    if len(name) > 63 or not _DRIVER_NAME.fullmatch(name):
        return (
            "a driver name is a domain name of at most 63 characters, such as model.csi.example.org"
        )
    return None


def check_endpoint(endpoint: str) -> str | None:
    path = endpoint.removeprefix("unix://")
    if path == endpoint or not path.startswith("/"):
        return "expected unix:// and an absolute path, such as unix:///csi/csi.sock"
    if len(path.encode()) > MAX_SOCKET_PATH or "\0" in path:
        return f"the path of a unix socket has at most {MAX_SOCKET_PATH} bytes"
    return None


def check_node_id(name: str) -> str | None:
    # CSI specification, NodeGetInfoResponse.node_id: at most 256 bytes
    if not 0 < len(name.encode()) <= 256 or not name.isprintable() or " " in name:
        return "expected 1 to 256 printable bytes without spaces, such as the node's name"
    return None


def check_path(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_absolute() or ".." in path.parts or "\0" in str(path):
        return "expected an absolute path without '..'"
    return None


def check_folder(path: Path) -> str | None:
    return "the file system's root cannot be used" if path == Path("/") else check_path(path)


def check_chunk_size(size: int) -> str | None:
    if not 64 * KIB <= size <= 64 * MIB or size & (size - 1):
        return "expected a power of two from 64KiB to 64MiB"
    return None


def check_connections(count: int) -> str | None:
    return None if 1 <= count <= 64 else "expected 1 to 64"


def check_stall_timeout(seconds: float) -> str | None:
    return None if 1 <= seconds <= 3600 else "expected 1s to 1h"


def check_read_timeout(seconds: float) -> str | None:
    return None if 1 <= seconds <= 3600 else "expected 1s to 1h"


def check_deadline_margin(seconds: float) -> str | None:
    return None if 0.1 <= seconds <= 60 else "expected 100ms to 60s"


def check_pull_grace(seconds: float) -> str | None:
    return None if 0 <= seconds <= 86400 else "expected 0s to 24h"


def check_models(patterns: tuple[str, ...]) -> str | None:
    try:
        for pattern in patterns:
            ModelPattern.parse(pattern)
    except InvalidRequest as error:
        return error.message
    return None


def check_max_size(size: int | None) -> str | None:
    # below that, the records alone leave no room for a model
    return None if size is None or 8 * MIB <= size < 1 << 60 else "expected 8MiB or more"


def check_min_free(size: int) -> str | None:
    return None if 0 <= size < 1 << 60 else "expected 0 or more bytes"


def check_percent(percent: int) -> str | None:
    return None if 1 <= percent <= 100 else "expected 1 to 100"


def check_ratio(ratio: int) -> str | None:
    return None if 1 <= ratio <= 100_000 else "expected 1 to 100000"


def check_hosts(hosts: tuple[str, ...]) -> str | None:
    for host in hosts:
        if not _REGISTRY_HOST.fullmatch(host):
            return f"{host[:100]!r} is not a registry host: expected host or host:port"
    return None


def check_registry(host: str | None) -> str | None:
    return None if host is None else check_hosts((host,))


def check_listen(address: str | None) -> str | None:
    if address is None:
        return None
    match = _LISTEN.fullmatch(address)
    if match is None or not 0 < int(match[1]) < 65536:
        return "expected host:port, or :port for all addresses of this machine"
    return None


def check_uploads(count: int) -> str | None:
    return None if 1 <= count <= 1024 else "expected 1 to 1024"


def check_rate(rate: int | None) -> str | None:
    return None if rate is None or 64 * KIB <= rate < 1 << 60 else "expected 64KiB or more"


def check_peers(peers: tuple[str, ...]) -> str | None:
    """See :func:`fetcher.peers.discovery.parse_peers`."""
    try:
        parse_peers(peers)
    except ValueError as error:
        return str(error)
    return None


def check_peer_dns(address: str) -> str | None:
    match = _LISTEN.fullmatch(address)
    if match is None or address.startswith(":") or not 0 < int(match[1]) < 65536:
        return "expected host:port"
    return None


def check_peer_service(service: str) -> str | None:
    return None if _SERVICE.fullmatch(service) else "expected namespace/name"


def check_peer_name(name: str) -> str | None:
    return None if _PEER_NAME.fullmatch(name) else "expected letters, digits and any of - . _ : [ ]"


def near_match(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` where some known name is close, else nothing."""
    near = difflib.get_close_matches(name[:100], list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
