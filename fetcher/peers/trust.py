"""Who belongs to the peers: a shared token, certificates, or both. Files are read again by change.

What is configured is required, all of it: with authorities a certificate that one of them signed,
with a token file the token. Neither is known to strangers, who get nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import ssl
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fetcher.errors import InvalidRequest
from fetcher.glances import GLANCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger: Final = logging.getLogger(__name__)

_LEAST_CHARACTERS: Final = 16
_MAX_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class PeerFiles:
    """Where the secrets of the peers lie; PEM but for the token."""

    token: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    authorities: Path | None = None
    """Who signs the certificates of peers. Without it a certificate is shown and none is wanted."""
    insecure: bool = False
    """Everybody is a peer: for laboratories."""

    def check(self) -> None:
        """Raise :class:`InvalidRequest` for what would let strangers in, or cannot work."""
        if (self.certificate is None) != (self.key is None):
            raise InvalidRequest(
                "a certificate for peers needs its key: give both peer-cert and peer-key",
                setting="peer-cert",
            )
        if self.authorities is not None and self.certificate is None:
            raise InvalidRequest(
                "peer-ca lets peers show certificates, which needs TLS: give peer-cert and "
                "peer-key too",
                setting="peer-ca",
            )
        if self.token is None and self.authorities is None and not self.insecure:
            raise InvalidRequest(
                "peers would serve anybody: give them a shared token (peer-token-file) or "
                "certificates (peer-cert, peer-key, peer-ca), or say peer-insecure",
                setting="peer-listen",
            )


class PeerToken:
    """The shared token, one a line: the first is shown, and each is accepted.

    So it is rotated without a gap: add the new one below the old one everywhere, swap them, remove
    the old one. The file is looked at once a second; one that cannot be used any more leaves the
    tokens as they were.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises :class:`InvalidRequest` for a file that cannot be used."""
        self._path = path
        self._clock = clock
        self._version = _version(path)
        self._adopt(_read_tokens(path))
        self._look_at = clock() + GLANCE_SECONDS

    @property
    def shown(self) -> str:
        """What this node shows to others."""
        self._refresh()
        return self._shown

    def accepts(self, shown: str) -> bool:
        """Whether this is one of the tokens; takes the same time whatever is shown."""
        self._refresh()
        given = _hash(shown)
        same = [hmac.compare_digest(given, one) for one in self._accepted]
        return any(same)

    def _refresh(self) -> None:
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + GLANCE_SECONDS
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._adopt(_read_tokens(self._path))
        except InvalidRequest as error:
            logger.error("%s; the tokens from before stay in use", error.message)
        else:
            logger.info("the peers' tokens were read again from %s", self._path)

    def _adopt(self, tokens: tuple[str, ...]) -> None:
        self._shown = tokens[0]
        self._accepted = tuple(map(_hash, tokens))


def _hash(token: str) -> bytes:
    # of one length, so that not even the length of a token shows in the time
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _read_tokens(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        lines = content.decode().splitlines()
    except OSError as error:
        raise _unusable("peers' tokens", path, error.strerror or "it cannot be read") from error
    except UnicodeDecodeError:
        # not chained: a decoding error carries the bytes
        raise _unusable("peers' tokens", path, "it is no text") from None
    tokens = tuple(line.strip() for line in lines if line.strip())
    if len(content) > _MAX_BYTES:
        raise _unusable("peers' tokens", path, f"it is larger than {_MAX_BYTES} bytes")
    for token in tokens:
        if len(token) < _LEAST_CHARACTERS or not (token.isascii() and token.isprintable()):
            raise _unusable(
                "peers' tokens",
                path,
                f"a token is a line of at least {_LEAST_CHARACTERS} printable ASCII characters",
            )
    if not tokens:
        raise _unusable("peers' tokens", path, "there is none in it")
    return tokens


class PeerTls:
    """What the peer server shows and wants in TLS; made anew when a file has changed."""

    def __init__(self, files: PeerFiles) -> None:
        """Raises :class:`InvalidRequest` for files that cannot be used."""
        self._files = files
        self._version = self._versions()
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        """For the next connection."""
        version = self._versions()
        if version != self._version:
            self._version = version
            try:
                self._context = self._load()
            except InvalidRequest as error:
                # the pair may be half replaced; its other half changes the version again
                logger.error("%s; the certificate from before stays in use", error.message)
        return self._context

    def _versions(self) -> tuple[object, ...]:
        files = self._files
        paths = (files.certificate, files.key, files.authorities)
        return tuple(_version(path) for path in paths if path is not None)

    def _load(self) -> ssl.SSLContext:
        files = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if files.certificate is not None:
            try:
                # an empty password: a key that is encrypted is an error and not a question
                context.load_cert_chain(files.certificate, files.key, password="")
            except (OSError, ssl.SSLError) as error:
                raise _unusable("this peer's certificate", files.certificate, _why(error)) from (
                    error
                )
        if files.authorities is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(files.authorities)
            except (OSError, ssl.SSLError) as error:
                raise _unusable("the peers' authorities", files.authorities, _why(error)) from error
        return context


def _why(error: OSError) -> str:
    reason = "it is not what it should be, in PEM format"
    if not isinstance(error, ssl.SSLError) and error.strerror:
        reason = error.strerror
    return reason


def _version(path: Path) -> tuple[int, ...]:
    """What changes when a file does; secrets of Kubernetes change by a link."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_mtime_ns, status.st_ino, status.st_size
    return ()


def _unusable(what: str, path: Path, why: str) -> InvalidRequest:
    return InvalidRequest(f"the file of {what} {path} cannot be used: {why}", path=path)
