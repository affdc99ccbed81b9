"""Bearer tokens: kept in memory until shortly before they expire, fetched once for all who wait."""

from __future__ import annotations

import datetime
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import urlsplit

import msgspec
import trio

from fetcher.auth import unauthenticated
from fetcher.errors import ModelError, Unavailable

if TYPE_CHECKING:
    from fetcher.auth import TokenKey

MAX_TOKEN_BODY: Final = 256 * 1024
_MAX_TOKENS: Final = 4096
_DEFAULT_LIFETIME: Final = 60.0
_MAX_LIFETIME: Final = 86_400.0
_MARGIN: Final = 30.0
_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,32768}")


class FetchToken(Protocol):
    """Asks a token server: status and body, which is at most :data:`MAX_TOKEN_BODY` long."""

    async def __call__(self, key: TokenKey) -> tuple[int, bytes]: ...


@dataclass(frozen=True, slots=True)
class Token:
    """A token, and for how many seconds from now it is of use."""

    value: str = field(repr=False)
    lifetime: float


class Tokens:
    """The tokens of one process. Belongs to one trio loop."""

    def __init__(self, fetch: FetchToken) -> None:
        self._fetch = fetch
        self._kept: OrderedDict[TokenKey, tuple[str, float]] = OrderedDict()
        self._flights: dict[TokenKey, _Flight] = {}

    async def get(self, key: TokenKey, stale: str | None = None) -> str:
        """A token for ``key``, other than the ``stale`` authorization.

        However many ask at once, the token server is asked once, and once more only where the
        caller who asked was cancelled: then the next one does. Raises ``Unauthenticated`` when the
        server refuses these credentials and ``Unavailable`` when it does not make sense; all who
        waited for that answer get it.
        """
        token = self._kept_for(key, stale)
        if token is not None:
            return token
        flight = self._flights.setdefault(key, _Flight())
        seen = flight.failures
        flight.passengers += 1
        try:
            async with flight.lock:
                return self._kept_for(key, stale) or await self._fly(flight, seen, key)
        finally:
            flight.passengers -= 1
            if not flight.passengers:
                self._flights.pop(key, None)

    async def _fly(self, flight: _Flight, seen: int, key: TokenKey) -> str:
        if flight.failure is not None and flight.failures > seen:
            # a fresh one for each task: an exception raised twice mixes up its tracebacks
            failure = flight.failure
            raise type(failure)(failure.message, **failure.context) from failure
        try:
            status, body = await self._fetch(key)
            token = read_token(key, status, body, datetime.datetime.now(datetime.UTC))
        except ModelError as error:
            flight.failures += 1
            flight.failure = error
            raise
        self._keep(key, token)
        return token.value

    def _kept_for(self, key: TokenKey, stale: str | None) -> str | None:
        value, expires = self._kept.get(key, ("", 0.0))
        if not value or f"Bearer {value}" == stale or trio.current_time() >= expires:
            return None
        self._kept.move_to_end(key)
        return value

    def _keep(self, key: TokenKey, token: Token) -> None:
        margin = min(_MARGIN, token.lifetime / 4)
        self._kept[key] = (token.value, trio.current_time() + token.lifetime - margin)
        self._kept.move_to_end(key)
        while len(self._kept) > _MAX_TOKENS:
            self._kept.popitem(last=False)


@dataclass
class _Flight:
    lock: trio.Lock = field(default_factory=trio.Lock)
    passengers: int = 0
    failures: int = 0
    failure: ModelError | None = None


class _Document(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None
    expires_in: float | None = None
    issued_at: str | None = None


def read_token(key: TokenKey, status: int, body: bytes, now: datetime.datetime) -> Token:
    """The token in a token server's answer. ``now`` is the time of day, with its zone."""
    host = urlsplit(key.realm).hostname
    if status in (400, 401, 403):
        raise unauthenticated(key.asked, key.credentials)
    if status != 200:
        raise _nonsense(key, f"answered {status}")
    try:
        document = msgspec.json.decode(body, type=_Document, strict=False)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        # not chained: the answer may hold a token, and a decoder may quote it
        page = body.lstrip()[:1] == b"<"
        raise _nonsense(key, "answered with a page" if page else "answered no JSON") from None
    value = document.token or document.access_token
    if not value or not _TOKEN.fullmatch(value):
        raise Unavailable(f"the token server {host} answered without a usable token", host=host)
    return Token(value, _lifetime(document, now))


def _lifetime(document: _Document, now: datetime.datetime) -> float:
    """Seconds left. Servers keep tokens too, and then ``issued_at`` is in the past; a clock that
    is wrong makes a token look old, so it costs a token per request, and no more than that.
    """
    given = _DEFAULT_LIFETIME if document.expires_in is None else document.expires_in
    age = 0.0
    if document.issued_at:
        try:
            issued = datetime.datetime.fromisoformat(document.issued_at)
        except ValueError:
            issued = now
        zoned = issued if issued.tzinfo else issued.replace(tzinfo=datetime.UTC)
        age = max(0.0, (now - zoned).total_seconds())
    left = given - age
    # written so that NaN ends as nothing
    return min(left, _MAX_LIFETIME) if left > 0 else 0.0


def _nonsense(key: TokenKey, what: str) -> Unavailable:
    host = urlsplit(key.realm).hostname
    return Unavailable(
        f"the token server {host}, to which {key.asked.registry} sends its users, {what}; is there "
        "a proxy or a captive portal between this node and it?",
        host=host,
    )
