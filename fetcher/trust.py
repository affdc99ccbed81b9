"""Whom a TLS connection to a registry trusts, and who it says that it is."""

from __future__ import annotations

import contextlib
import os
import ssl
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fetcher.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Trust:
    """What TLS with one host goes by. Files are in PEM and are read when a connection is made."""

    verify: bool = True
    ca_files: tuple[str, ...] = ()
    """Certificate authorities that are trusted."""
    client: tuple[str, str] | None = None
    """The files of our certificate and its key, for a host that asks for one; may be one file."""
    system: bool = True
    """Whether the system's authorities are trusted, too."""

    def elsewhere(self, *, verify: bool) -> Trust:
        """The trust for where this host redirects to: its authorities, but not our certificate."""
        return replace(self, verify=verify, client=None)

    def version(self) -> tuple[int, ...]:
        """What changes when one of the files does."""
        found = []
        for file in (*self.ca_files, *(self.client or ())):
            changed = 0
            with contextlib.suppress(OSError):
                changed = os.stat(file).st_mtime_ns
            found.append(changed)
        return tuple(found)

    def context(self) -> ssl.SSLContext:
        """It as Python's TLS wants it. Raises :class:`InvalidRequest` naming the unusable file.

        Takes about 20 ms, most of it for the system's authorities.
        """
        context = self._empty()
        self._load_authorities(context)
        if self.client is not None:
            try:
                # an empty password: a key that is encrypted is an error and not a question
                context.load_cert_chain(*self.client, password="")
            except (OSError, ssl.SSLError) as error:
                raise _unusable("a client certificate and key", self.client[0], error) from error
        return context

    def _empty(self) -> ssl.SSLContext:
        if not self.verify:
            return unverified()
        # without authorities yet, but it verifies and looks at names as a default context does
        return (
            ssl.create_default_context() if self.system else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        )

    def _load_authorities(self, context: ssl.SSLContext) -> None:
        for file in self.ca_files:
            try:
                context.load_verify_locations(cafile=file)
            except (OSError, ssl.SSLError) as error:
                raise _unusable("certificate authorities", file, error) from error


class Contexts:
    """Python's TLS for HTTP/1.1, made once for each trust and anew when its files change.

    May be asked by several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[Trust, tuple[tuple[int, ...], ssl.SSLContext]] = {}

    def of(self, trust: Trust) -> ssl.SSLContext:
        """See :meth:`Trust.context`."""
        version = trust.version()
        with self._lock:
            known = self._made.get(trust)
            if known is None or known[0] != version:
                context = trust.context()
                context.set_alpn_protocols(["http/1.1"])
                known = self._made[trust] = version, context
            return known[1]


def check_authorities(ca_file: Path | None) -> None:
    """Raise :class:`InvalidRequest` for a file of certificate authorities that cannot be used."""
    if ca_file is not None:
        Trust(verify=False, ca_files=(str(ca_file),)).context()


def unverified() -> ssl.SSLContext:
    """Verifies nobody, and so needs no authorities: also for connections that have no TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def trusting(ca_file: Path | None) -> ssl.SSLContext:
    """The trust of registries in general: the system's authorities, and those of ``ca_file``."""
    return Trust(ca_files=(str(ca_file),) if ca_file else ()).context()


def _unusable(what: str, file: str, error: OSError) -> InvalidRequest:
    reason = "it is not what it should be, in PEM format"
    if not isinstance(error, ssl.SSLError) and error.strerror:
        reason = error.strerror
    return InvalidRequest(f"the file of {what} {file} cannot be used: {reason}", path=file)
