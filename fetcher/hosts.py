"""containerd's ``hosts.toml`` folders: the mirrors that a node's administrator gave a registry.

A registry ``host:port`` has the folder ``host_port_`` or ``host:port``, else ``_default``, below
one root (``/etc/containerd/certs.d``). In it ``hosts.toml`` names hosts in the order in which they
are asked, and the server that stands behind them; a folder without that file has certificates in
docker's older form. What is read here is what containerd reads, so that one configuration serves
images and models; where this program does otherwise, ``docs/configuration.md`` says so.
"""

from __future__ import annotations

import functools
import logging
import posixpath
import re
import time
import tomllib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

import trio

from fetcher.addresses import is_named
from fetcher.exchange import endpoint, endpoint_host
from fetcher.glances import Glance
from fetcher.trust import Trust

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from fetcher.exchange import RegistrySettings
    from fetcher.routes import Headers

logger: Final = logging.getLogger(__name__)

MAX_HOSTS_BYTES: Final = 1024 * 1024
_MAX_KNOWN: Final = 4096
_CAPABILITIES: Final = frozenset({"pull", "resolve", "push", "referrers"})
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_DURATION: Final = re.compile(r"(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+")
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_SECONDS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Host:
    """One host that may be asked for what a registry has."""

    registry: str
    """The registry for which it speaks, as references name it."""
    scheme: str
    netloc: str
    """Its own host and port."""
    path: str = "/v2"
    """Where the API of the distribution specification begins."""
    trust: Trust = field(default_factory=Trust)
    headers: Headers = field(default=(), repr=False)
    """What every request to it carries, and none that it redirects elsewhere."""
    capabilities: frozenset[str] = _CAPABILITIES
    connect_timeout: float | None = None
    mirror: bool = False
    """False for the one that stands for the registry itself."""

    @property
    def base(self) -> str:
        """The address of its API, by which it is known."""
        return f"{self.scheme}://{self.netloc}{self.path}"

    @property
    def is_own(self) -> bool:
        """Whether this is where references that name the registry lead by themselves."""
        return self.netloc == endpoint_host(self.registry)

    @property
    def name(self) -> str:
        """Whose credentials and errors these are: the registry as references have it, or itself."""
        return self.registry if self.is_own else self.netloc

    def showing(self, authorization: str | None) -> Headers:
        """Its headers, with an ``Authorization`` unless the administrator gave it one."""
        own = any(name.lower() == "authorization" for name, _ in self.headers)
        if authorization is None or own:
            return self.headers
        return (*self.headers, ("Authorization", authorization))

    def url(self, path: str) -> str:
        """The address of ``path``, which begins behind ``/v2`` and may have a query.

        A host that stands in for a registry is told for which one, as containerd tells it.
        """
        mark = "&" if "?" in path else "?"
        query = "" if self.is_own else f"{mark}ns={quote(self.registry, safe=':')}"
        return f"{self.base}{path}{query}"


@dataclass(frozen=True, slots=True)
class HostSet:
    """Who may be asked for what one registry has."""

    server: Host
    mirrors: tuple[Host, ...] = ()
    """In the order in which they are to be asked."""

    def able(self, capability: str) -> tuple[Host, ...]:
        """The mirrors that may be asked for this: ``pull`` or ``resolve``."""
        return tuple(one for one in self.mirrors if capability in one.capabilities)


@dataclass(frozen=True, slots=True)
class _Folder:
    """What was read for one registry, and from which state of the files."""

    version: tuple[object, ...]
    found: HostSet


class Hosts:
    """The hosts of every registry, read again when a file changed. Belongs to the trio thread."""

    def __init__(
        self, settings: RegistrySettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._known: dict[str, Glance[_Folder]] = {}

    async def lookup(self, registry: str) -> HostSet:
        """The hosts for ``registry``, as the files had them at most a second ago.

        A file that cannot be used is logged, once for each of its states, and the registry itself
        is asked then: an administrator's mistake must not keep pods from starting.
        """
        root = self._settings.hosts_dir
        if root is None:
            return HostSet(itself(registry, self._settings))
        known = self._known.get(registry)
        if known is None:
            look = functools.partial(self._look, root, registry)
            known = self._known[registry] = Glance(look, self._clock)
            while len(self._known) > _MAX_KNOWN:
                del self._known[next(iter(self._known))]
        return (await known.seen()).found

    async def _look(self, root: Path, registry: str, known: _Folder | None) -> _Folder:
        return await trio.to_thread.run_sync(_look, self._settings, root, registry, known)


def itself(registry: str, settings: RegistrySettings) -> Host:
    """The registry, as it is asked where no file says anything else."""
    found = endpoint(registry, settings)
    scheme = "http" if found.plain else "https"
    return Host(registry, scheme, found.host, trust=_trust_by_name(found.host, settings))


def _trust_by_name(host: str, settings: RegistrySettings) -> Trust:
    ca_files = (str(settings.ca_file),) if settings.ca_file else ()
    return Trust(verify=not is_named(host, settings.insecure), ca_files=ca_files)


def _look(settings: RegistrySettings, root: Path, registry: str, known: _Folder | None) -> _Folder:
    """In a worker thread: what there is now, which is ``known`` unless something changed."""
    try:
        folder = next((one for one in _candidates(root, registry) if one.is_dir()), None)
    except OSError as error:
        if known is None or known.version != (error.errno,):
            logger.error("%s cannot be read: %s; asking %s itself", root, error.strerror, registry)
        return _Folder((error.errno,), HostSet(itself(registry, settings)))
    if folder is None:
        return _Folder((), HostSet(itself(registry, settings)))
    version = (folder, _state(folder), _state(folder / "hosts.toml"))
    if known is not None and known.version == version:
        return known
    return _Folder(version, _read(folder, registry, settings))


def _candidates(root: Path, registry: str) -> Iterable[Path]:
    name, colon, port = registry.rpartition(":")
    if colon and port.isdecimal():
        yield root / f"{name}_{port}_"
    yield root / registry
    yield root / "_default"


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def _read(folder: Path, registry: str, settings: RegistrySettings) -> HostSet:
    file = folder / "hosts.toml"
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_HOSTS_BYTES + 1)
        if content.strip():
            return parse_hosts(content, folder, registry, settings)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        logger.error("%s cannot be used: %s; asking %s itself", file, reason, registry)
    return HostSet(_with_certificates(folder, registry, settings))


def _with_certificates(folder: Path, registry: str, settings: RegistrySettings) -> Host:
    """The server with docker's files: authorities ``*.crt``, a pair ``*.cert`` and ``*.key``."""
    default = itself(registry, settings)
    try:
        names = sorted(one.name for one in folder.iterdir() if one.is_file())
    except OSError as error:
        logger.error("%s cannot be read: %s", folder, error.strerror)
        return default
    authorities = tuple(str(folder / one) for one in names if one.endswith(".crt"))
    ours = next((folder / one for one in names if one.endswith(".cert")), None)
    if ours is None and not authorities:
        return default
    client = None
    if ours is not None:
        key = ours.with_suffix(".key")
        client = str(ours), str(key if key.name in names else ours)
    trust = replace(default.trust, ca_files=(*default.trust.ca_files, *authorities), client=client)
    return _over_tls(replace(default, trust=trust), settings)


def _over_tls(host: Host, settings: RegistrySettings) -> Host:
    """A registry that somebody says something of TLS for, which on this machine is no default."""
    plain = is_named(host.netloc, settings.plain_http)
    return host if plain else replace(host, scheme="https")


def parse_hosts(content: bytes, folder: Path, registry: str, settings: RegistrySettings) -> HostSet:
    """What a ``hosts.toml`` in ``folder`` says. Raises :class:`ValueError` with the reason."""
    if len(content) > MAX_HOSTS_BYTES:
        raise ValueError(f"it has more than {MAX_HOSTS_BYTES} bytes")
    document = tomllib.loads(content.decode())
    tables = document.get("host", {})
    if not isinstance(tables, dict):
        raise ValueError("'host' has to be tables, such as [host.\"https://mirror.example\"]")
    mirrors = tuple(
        _configured(
            replace(_address(url, registry, settings), mirror=True), _table(table, url), folder
        )
        for url, table in tables.items()
    )
    named = document.get("server", "")
    if not isinstance(named, str):
        raise ValueError("'server' has to be an address")
    server = _address(named, registry, settings) if named else itself(registry, settings)
    server = _configured(server, document, folder)
    if not named and document.keys() & {"ca", "client", "skip_verify"}:
        server = _over_tls(server, settings)
    own = next((one for one in mirrors if one.is_own), None)
    if own is not None and server.is_own:
        # what is said of the registry as one of its hosts is how it is to be asked
        server = replace(own, mirror=False)
    return HostSet(server, tuple(one for one in mirrors if one.base != server.base))


def _table(value: object, url: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"host {url!r} has to be a table")
    return value


def _address(url: str, registry: str, settings: RegistrySettings) -> Host:
    parts = urlsplit(url if "://" in url else f"https://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"{url[:200]!r} is not the address of a host")
    # the page that "docker.io" is in a browser is no registry, and yet often named as one
    netloc = endpoint_host(parts.netloc.rpartition("@")[2].lower())
    path = posixpath.normpath(parts.path).rstrip("/") if parts.path else ""
    return Host(registry, parts.scheme, netloc, path, _trust_by_name(netloc, settings))


def _configured(host: Host, table: dict[str, Any], folder: Path) -> Host:
    """The host with what its table says; keys that are not known are passed over."""
    path = host.path
    if not table.get("override_path", False) and not path.endswith("/v2"):
        path += "/v2"
    verify = host.trust.verify
    if "skip_verify" in table:
        verify = not _typed(table["skip_verify"], bool, "skip_verify")
    client = _client(table.get("client"), folder)
    trust = Trust(verify, (*host.trust.ca_files, *_authorities(table.get("ca"), folder)), client)
    return replace(
        host,
        path=path,
        trust=trust,
        headers=_headers(table.get("header", {})),
        capabilities=_capabilities(table.get("capabilities", [])),
        connect_timeout=_duration(table.get("dial_timeout", "")),
    )


def _capabilities(value: object) -> frozenset[str]:
    found = frozenset(one.lower() for one in _texts(value, "capabilities"))
    unknown = found - _CAPABILITIES
    if unknown:
        raise ValueError(
            f"there is no capability {min(unknown)[:100]!r}: expected pull, resolve or push"
        )
    return found or _CAPABILITIES


def _authorities(value: object, folder: Path) -> tuple[str, ...]:
    if value is None:
        return ()
    files = [value] if isinstance(value, str) else _texts(value, "ca")
    return tuple(str(folder / one) for one in files)


def _client(value: object, folder: Path) -> tuple[str, str] | None:
    """The first certificate and key: TLS here shows one certificate to a host."""
    if value is None or value == []:
        return None
    first = value[0] if isinstance(value, list) else value
    names = [first, ""] if isinstance(first, str) else _texts(first, "client")
    if len(names) != 2 or not names[0]:
        raise ValueError("'client' has to be a file, or pairs of a certificate and a key")
    certificate, key = names
    return str(folder / certificate), str(folder / (key or certificate))


def _headers(value: object) -> Headers:
    if not isinstance(value, dict):
        raise ValueError("'header' has to be a table")
    return tuple(
        (_header_name(name), _header_value(text))
        for name, texts in value.items()
        for text in ([texts] if isinstance(texts, str) else _texts(texts, f"header {name}"))
    )


def _header_name(name: str) -> str:
    if not _HEADER_NAME.fullmatch(name):
        raise ValueError(f"{name[:100]!r} is not the name of a header")
    return name


def _header_value(text: str) -> str:
    # a line break would make two headers of one
    if not (text.isascii() and text.isprintable()):
        raise ValueError("a header has a character that cannot be sent")
    return text


def _duration(value: object) -> float | None:
    """Seconds of a duration as Go writes it, such as ``1m30s``."""
    text = _typed(value, str, "dial_timeout")
    if not text:
        return None
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{text[:100]!r} is not a duration, such as 3s")
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(text))


def _texts(value: object, key: str) -> list[str]:
    found: list[object] = _typed(value, list, key)
    return [_typed(one, str, key) for one in found]


def _typed(value: object, kind: type[Any], key: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{key!r} has to be of another type")
    return value
