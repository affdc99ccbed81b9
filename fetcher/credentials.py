"""Whose name a registry is asked in: the volume's secrets, then the node's docker config.

A keychain gives the credentials for one repository of one registry. Credentials never appear in a
log, an error or a ``repr``; what is malformed is named by its key and never quoted. The helper
programs that a docker config names are run by :mod:`fetcher.credential_helper`.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import msgspec
import trio

from fetcher.credential_helper import ask_helper
from fetcher.errors import InvalidRequest
from fetcher.glances import Glance
from fetcher.oci import HUB_HOSTS

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from fetcher.oci import Reference

_T = TypeVar("_T")

log: Final = logging.getLogger(__name__)

DOCKER_CONFIG_JSON: Final = ".dockerconfigjson"
DOCKER_CFG: Final = ".dockercfg"
MAX_CONFIG_BYTES: Final = 1024 * 1024
"""What Kubernetes allows a secret to have; a node's file is held to the same."""

ANONYMOUS: Final = "anonymous"
"""The fingerprint of no credentials."""

_HUB_SERVER: Final = "https://index.docker.io/v1/"
_TOKEN_USER: Final = "<token>"  # noqa: S105 -- the user name that stands for "this is a token"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A name and a password, or an OAuth2 refresh token, for one registry.

    Nothing of it is in the ``repr``, not even the name: people put tokens there.
    """

    username: str = field(repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    passed: str = field(default="", repr=False)
    """An ``Authorization`` to be shown as it is, which somebody else has got: it is not renewed."""

    @property
    def basic(self) -> str:
        """The value of an ``Authorization`` header, RFC 7617, in UTF-8."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode("ascii")


class Keychain(Protocol):
    """Where credentials come from."""

    async def lookup(self, registry: str, repository: str) -> Credentials | None:
        """The credentials for ``repository`` of ``registry`` (both as in a reference), if any."""


class Anonymous:
    """The keychain of those who have no credentials."""

    async def lookup(self, registry: str, repository: str) -> Credentials | None:
        """Nothing, for every registry."""
        return None


@dataclass(frozen=True)
class PassedOn:
    """The keychain of who passes on what another node would show to the registry itself."""

    reference: Reference
    """For whose registry and repository it is, and for nothing else."""
    authorization: str = field(repr=False)

    async def lookup(self, registry: str, repository: str) -> Credentials | None:
        """It, for the one repository."""
        if (registry, repository) != (self.reference.registry, self.reference.repository):
            return None
        return Credentials("", passed=self.authorization)


@dataclass(frozen=True)
class Chain:
    """Several keychains in order: the first that has something decides."""

    keychains: tuple[Keychain, ...]

    def __init__(self, *keychains: Keychain) -> None:
        object.__setattr__(self, "keychains", keychains)

    async def lookup(self, registry: str, repository: str) -> Credentials | None:
        """The first match."""
        for keychain in self.keychains:
            found = await keychain.lookup(registry, repository)
            if found is not None:
                return found
        return None


@dataclass(frozen=True)
class VolumeSecrets:
    """The keychain of one volume, from the secret that its pod names."""

    _auths: Mapping[str, Credentials] = field(repr=False)
    _plain: Credentials | None = field(default=None, repr=False)
    _registry: str = ""

    @classmethod
    def parse(cls, secrets: Mapping[str, str], registry: str) -> VolumeSecrets:
        """Read a secret of type ``kubernetes.io/dockerconfigjson``, its older form
        ``kubernetes.io/dockercfg``, or the keys ``username`` and ``password``.

        ``registry`` is that of the volume's own reference: a bare user name and password say
        nothing of where they may go, so they go there and nowhere else. Raises
        :class:`InvalidRequest`, which never quotes what the secret contains.
        """
        if not secrets:
            return cls({})
        if DOCKER_CONFIG_JSON in secrets:
            text = secrets[DOCKER_CONFIG_JSON]
            return cls(_credentials_in(_decode(text, DOCKER_CONFIG_JSON).auths, DOCKER_CONFIG_JSON))
        if DOCKER_CFG in secrets:
            return cls(_credentials_in(_decode_legacy(secrets[DOCKER_CFG]), DOCKER_CFG))
        if "username" in secrets and "password" in secrets:
            return cls({}, _plain(secrets["username"], secrets["password"]), registry)
        raise InvalidRequest(
            "the volume's secret has no registry credentials: expected the key "
            f"{DOCKER_CONFIG_JSON} (type kubernetes.io/dockerconfigjson), or the keys username "
            "and password"
        )

    async def lookup(self, registry: str, repository: str) -> Credentials | None:
        """The most specific entry of the secret."""
        if self._plain and _same_registry(self._registry, registry):
            return self._plain
        return match(self._auths, registry, repository)


def docker_config_path(environment: Mapping[str, str]) -> Path:
    """Where docker keeps its configuration: ``$DOCKER_CONFIG/config.json``, else below home."""
    folder = environment.get("DOCKER_CONFIG")
    base = Path(folder) if folder else Path(environment.get("HOME") or "/root") / ".docker"
    return base / "config.json"


class DockerConfig:
    """The node's docker config: ``auths``, ``credHelpers``, ``credsStore``.

    Looked at once a second, and read again when it changes. A file that is not there has no
    credentials; one that cannot be read is reported once per change and has none either, as volumes
    must not fail for it that need no credentials.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._file: Glance[_DockerFile] = Glance(self._look, clock)

    async def lookup(self, registry: str, repository: str) -> Credentials | None:
        """The helper named for this registry, else the file's entry, else the credential store."""
        file = await self._file.seen()
        helper = match(file.document.cred_helpers, registry, repository)
        if helper is not None:
            found = await _from_helper(helper, registry)
            if found is not None:
                return found
        inline = match(file.auths, registry, repository)
        if inline is None and file.document.creds_store:
            return await _from_helper(file.document.creds_store, registry)
        return inline

    async def _look(self, known: _DockerFile | None) -> _DockerFile:
        try:
            status = await trio.to_thread.run_sync(self._path.stat)
        except FileNotFoundError:
            return _DockerFile()
        except OSError as error:
            log.warning("cannot read the docker config %s: %s", self._path, error.strerror)
            return _DockerFile()
        version = _version(status)
        return known if known and known.version == version else await self._load(version)

    async def _load(self, version: tuple[int, ...]) -> _DockerFile:
        document, auths = _ConfigDocument(), dict[str, Credentials]()
        try:
            text = await trio.to_thread.run_sync(_read_bounded, self._path)
            document = _decode(text, str(self._path))
            auths = _credentials_in(document.auths, str(self._path))
        except OSError as error:
            log.warning("cannot read the docker config %s: %s", self._path, error.strerror)
        except InvalidRequest as error:
            log.warning("ignoring the node's docker config: %s", error.message)
        return _DockerFile(version, document, auths)


async def fingerprint(shown: Sequence[Credentials | None], salt: bytes) -> str:
    """A text by which the same credentials are known again, and from which they cannot be had.

    They are those for each host that may be asked, in order. scrypt, so that a stolen database does
    not give away weak passwords. Takes about 50 ms and 16 MiB in a worker thread; nothing where
    there is nothing to hide.
    """
    if not any(shown):
        return ANONYMOUS
    return await trio.to_thread.run_sync(_fingerprint, shown, salt)


def _fingerprint(shown: Sequence[Credentials | None], salt: bytes) -> str:
    parts = [one and (one.username, one.password, one.identity_token) for one in shown]
    while parts[-1] is None:
        # nothing for another host changes nothing
        parts.pop()
    # JSON keeps the parts apart: ("ab", "c") and ("a", "bc") must not be the same credentials; for
    # one host it is as earlier versions had it, so that what they recorded is still known
    secret = msgspec.json.encode(parts if len(parts) > 1 else parts[0])
    return hashlib.scrypt(secret, salt=salt, n=2**14, r=8, p=1, dklen=32).hex()


def match(entries: Mapping[str, _T], registry: str, repository: str) -> _T | None:
    """The most specific entry for a repository, as kubelet matches them.

    A key is a host with an optional port and an optional path prefix; scheme, ``/v1/``, ``/v2/``
    and trailing slashes do not count; ``*`` and ``?`` stand for parts of one label of the host.
    Unlike kubelet's, a prefix ends at a slash: ``ghcr.io/acme`` is not for ``ghcr.io/acme-two``.
    """
    best: tuple[tuple[int, int], _T] | None = None
    for key, value in entries.items():
        host, path = _normal_key(key)
        if not _host_matches(host, registry) or not _path_matches(path, repository):
            continue
        rank = (len(path), _literal_characters(host))
        if best is None or rank > best[0]:
            best = rank, value
    return best[1] if best else None


def _normal_key(key: str) -> tuple[str, str]:
    _, scheme, rest = key.partition("://")
    host, _, path = (rest if scheme else key).partition("/")
    path = path.strip("/")
    for version in ("v1", "v2"):
        if path == version or path.startswith(version + "/"):
            path = path[len(version) :].strip("/")
    return host.lower(), path


def _host_matches(pattern: str, registry: str) -> bool:
    if pattern in HUB_HOSTS and registry in HUB_HOSTS:
        return True
    pattern_name, pattern_port = _split_port(pattern)
    name, port = _split_port(registry.lower())
    if pattern_port != port:
        return False
    patterns, labels = pattern_name.split("."), name.split(".")
    return len(patterns) == len(labels) and all(
        fnmatch.fnmatchcase(label, one) for label, one in zip(labels, patterns, strict=True)
    )


def _split_port(host: str) -> tuple[str, str]:
    if host.startswith("["):
        address, _, rest = host.partition("]")
        # brackets mean a character class to fnmatch, and an address is no pattern
        return address[1:], rest.removeprefix(":")
    name, _, port = host.partition(":")
    return name, port


def _path_matches(prefix: str, repository: str) -> bool:
    return not prefix or repository == prefix or repository.startswith(prefix + "/")


def _literal_characters(pattern: str) -> int:
    return sum(character not in "*?" for character in pattern)


def _same_registry(one: str, other: str) -> bool:
    return one.lower() == other.lower() or {one, other} <= HUB_HOSTS


class _AuthDocument(msgspec.Struct):
    auth: str | None = None
    username: str | None = None
    password: str | None = None
    identitytoken: str | None = None


class _ConfigDocument(msgspec.Struct, rename="camel"):
    auths: dict[str, _AuthDocument] = {}
    cred_helpers: dict[str, str] = {}
    creds_store: str = ""


@dataclass(frozen=True, slots=True)
class _DockerFile:
    """What was read of the node's docker config, and from which state of it."""

    version: tuple[int, ...] | None = None
    document: _ConfigDocument = field(default_factory=_ConfigDocument)
    auths: Mapping[str, Credentials] = field(default_factory=dict, repr=False)


def _decode(text: str | bytes, where: str) -> _ConfigDocument:
    try:
        return msgspec.json.decode(_bounded(text, where), type=_ConfigDocument)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        # not chained: what the decoder says may quote the secret
        raise _malformed(where, "is not the JSON of a docker config") from None


def _decode_legacy(text: str) -> dict[str, _AuthDocument]:
    try:
        return msgspec.json.decode(_bounded(text, DOCKER_CFG), type=dict[str, _AuthDocument])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise _malformed(DOCKER_CFG, "is not the JSON of a docker config") from None


def _bounded(text: str | bytes, where: str) -> str | bytes:
    if len(text) > MAX_CONFIG_BYTES:
        raise _malformed(where, f"is larger than {MAX_CONFIG_BYTES} bytes")
    return text


def _credentials_in(auths: Mapping[str, _AuthDocument], where: str) -> dict[str, Credentials]:
    found = {key: _credentials(entry, where) for key, entry in auths.items()}
    return {key: value for key, value in found.items() if value is not None}


def _credentials(entry: _AuthDocument, where: str) -> Credentials | None:
    """One entry. An empty one is normal: it says that the credential store has it."""
    username, password = entry.username or "", entry.password or ""
    if entry.auth:
        username, password = _decode_auth(entry.auth, where)
    if not username and not password and not entry.identitytoken:
        return None
    return Credentials(username, password, entry.identitytoken or "")


def _decode_auth(auth: str, where: str) -> tuple[str, str]:
    """``base64(name:password)``; docker pads, and some tools that write the file do not."""
    try:
        compact = auth.strip().rstrip("=")
        padded = compact + "=" * (-len(compact) % 4)
        text = base64.b64decode(padded, validate=True).decode()
    except (binascii.Error, ValueError):
        # not chained: a decoding error carries the bytes
        raise _malformed(where, "has an auth value that is not base64 of name:password") from None
    username, colon, password = text.partition(":")
    if not colon:
        raise _malformed(where, "has an auth value that is not base64 of name:password")
    return username, password.rstrip("\0")


def _plain(username: str, password: str) -> Credentials:
    # a trailing newline is what `echo` leaves in a hand-made secret; no registry has such a name
    username, password = username.rstrip("\r\n"), password.rstrip("\r\n")
    if not username or not password:
        raise InvalidRequest("the volume's secret has an empty username or an empty password")
    if ":" in username:
        raise InvalidRequest("the volume's secret has a username with a colon, which HTTP forbids")
    return Credentials(username, password)


def _malformed(where: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"{where} is malformed: it {what}")


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mtime_ns, status.st_ino, status.st_size


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_CONFIG_BYTES + 1)


async def _from_helper(helper: str, registry: str) -> Credentials | None:
    answer = await ask_helper(helper, _HUB_SERVER if registry in HUB_HOSTS else registry)
    if answer is None:
        return None
    username, secret = answer
    if username == _TOKEN_USER:
        return Credentials("", "", secret)
    return Credentials(username, secret)
