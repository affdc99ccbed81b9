"""How a registry is convinced: its challenges, and the tokens that answer them.

The conversation is a generator that does no I/O (:func:`converse`): it says what to send and is
told what came back. Challenges are RFC 9110 section 11.6.1; tokens follow the distribution
project's "Token Authentication Specification" and its OAuth2 form. Everything a registry says here
is hostile until checked: where it sends us, how much it answers, what it calls a token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias
from urllib.parse import urlencode, urlsplit

from fetcher.addresses import check_host
from fetcher.errors import AccessDenied, Unauthenticated
from fetcher.trust import Trust

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping

    from fetcher.credentials import Credentials
    from fetcher.exchange import Patience

_MAX_HEADER: Final = 8192
_MAX_CHALLENGES: Final = 16
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TOKEN68: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*(?=[ \t]*(?:,|$))")
_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*)"')
_EQUALS: Final = re.compile(r"[ \t]*=[ \t]*")
_SEPARATORS: Final = re.compile(r"[ \t,]*")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way in that a server offers. Scheme and parameter names are in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(hash=False)


def parse_challenges(headers: Iterable[str]) -> tuple[Challenge, ...]:
    """The challenges of all ``WWW-Authenticate`` headers of an answer, in order.

    Reading stops where a header breaks the grammar or is too long: a challenge that cannot be
    read is one that cannot be answered.
    """
    found: list[Challenge] = []
    for header in headers:
        found.extend(_parse_header(header[:_MAX_HEADER]))
    return tuple(found[:_MAX_CHALLENGES])


def _parse_header(text: str) -> list[Challenge]:
    challenges: list[Challenge] = []
    parameters: dict[str, str] = {}
    position = 0
    while True:
        position = _end(_SEPARATORS, text, position)
        word = _TOKEN.match(text, position)
        if word is None:
            return challenges
        equals = _EQUALS.match(text, word.end())
        if equals is None or not challenges:
            parameters = {}
            challenges.append(Challenge(word[0].lower(), parameters))
            position = _end(_SEPARATORS, text, word.end())
            if not _starts_parameter(text, position):
                position = _end(_TOKEN68, text, position)
            continue
        value = _QUOTED.match(text, equals.end()) or _TOKEN.match(text, equals.end())
        if value is None:
            return challenges
        content = re.sub(r"\\(.)", r"\1", value[1]) if value.re is _QUOTED else value[0]
        parameters.setdefault(word[0].lower(), content)
        position = value.end()


def _starts_parameter(text: str, position: int) -> bool:
    word = _TOKEN.match(text, position)
    equals = _EQUALS.match(text, word.end()) if word else None
    return equals is not None and equals.end() < len(text) and text[equals.end()] not in "=,"


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


@dataclass(frozen=True, slots=True)
class Asked:
    """Whom we talk to, about what, and with which rights."""

    registry: str
    """As the reference has it, for people."""
    host: str
    """Host and port that requests go to."""
    plain: bool
    """Whether they go over plain HTTP."""
    repository: str
    actions: str = "pull"
    trust: Trust = field(default_factory=Trust, repr=False)
    """What TLS with it goes by."""
    patience: Patience | None = field(default=None, compare=False, repr=False)
    """For how long its token server is asked; makes no other token."""

    @property
    def scope(self) -> str:
        """What a token has to allow: this and nothing more, whatever the challenge suggests."""
        return f"repository:{self.repository}:{self.actions}"


@dataclass(frozen=True, slots=True)
class Basic:
    """The registry takes a name and a password."""


@dataclass(frozen=True, slots=True)
class Bearer:
    """The registry takes tokens that ``realm`` hands out."""

    realm: str
    service: str | None


@dataclass(frozen=True, slots=True)
class TokenKey:
    """What a token is good for: two wishes with the same key are answered with the same token."""

    asked: Asked
    realm: str
    service: str | None
    credentials: Credentials | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """Send the request with this ``Authorization``; the driver gives an :class:`Outcome` back."""

    authorization: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class TokenWanted:
    """Get a token other than ``stale``; the driver gives the token back."""

    key: TokenKey
    stale: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the registry answered to an attempt."""

    status: int
    challenges: tuple[str, ...] = ()


Way: TypeAlias = Basic | Bearer
"""What a registry was found to want: remembered, it saves the question next time."""


Conversation: TypeAlias = "Generator[Attempt | TokenWanted, Outcome | str, Way | None]"


def converse(
    asked: Asked, credentials: Credentials | None, way: Way | None, stale: str | None = None
) -> Conversation:
    """One request to a registry, from the first attempt to the last answer that matters.

    Yields what to do, takes what came of it, and returns the way that the last attempt took; the
    last :class:`Outcome` given is the answer. ``way`` is what the registry wanted last time, and
    ``stale`` an authorization known to be of no use any more. At most two attempts are made. What
    was passed on by somebody else is shown once, as it is.
    """
    if credentials is not None and credentials.passed:
        # whoever has it got it by the registry's own word, and gets the next one too
        yield Attempt(credentials.passed)
        return way
    authorization = None
    if way is not None:
        authorization = yield from _authorize(asked, credentials, way, stale)
    outcome = yield Attempt(authorization)
    if isinstance(outcome, str) or not _is_challenged(outcome):
        return way
    found = choose(asked, parse_challenges(outcome.challenges), credentials)
    if found is None or (isinstance(found, Basic) and isinstance(way, Basic)):
        return way
    authorization = yield from _authorize(asked, credentials, found, authorization)
    yield Attempt(authorization)
    return found


def _is_challenged(outcome: Outcome) -> bool:
    # some registries answer 403 to a token that has expired, and say what they want instead
    return outcome.status == 401 or (outcome.status == 403 and bool(outcome.challenges))


def _authorize(
    asked: Asked, credentials: Credentials | None, way: Way, stale: str | None
) -> Generator[Attempt | TokenWanted, Outcome | str, str | None]:
    if isinstance(way, Basic):
        return credentials.basic if credentials else None
    token = yield TokenWanted(TokenKey(asked, way.realm, way.service, credentials), stale)
    return f"Bearer {token}"


def choose(
    asked: Asked, challenges: tuple[Challenge, ...], credentials: Credentials | None
) -> Way | None:
    """The challenge to answer: a token where there is one to be had, else the password.

    Raises :class:`AccessDenied` for a realm that no credentials are sent to.
    """
    for challenge in challenges:
        realm = challenge.parameters.get("realm")
        if challenge.scheme == "bearer" and realm:
            check_realm(asked, realm)
            return Bearer(realm, challenge.parameters.get("service") or None)
    offered = any(challenge.scheme == "basic" for challenge in challenges)
    usable = credentials is not None and not credentials.identity_token
    return Basic() if offered and usable else None


def check_realm(asked: Asked, realm: str) -> None:
    """Refuse to send credentials to ``realm``: :class:`AccessDenied` with the reason.

    It has to be encrypted unless the registry itself is not, and must not be an address that only
    this machine can reach.
    """
    try:
        parts = urlsplit(realm)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    readable = realm.isascii() and realm.isprintable() and " " not in realm and len(realm) <= 2048
    if not readable or not host or port == 0 or parts.scheme not in ("http", "https"):
        raise AccessDenied(
            f"{asked.registry} wants a token from an address that is not one", registry=asked.host
        )
    if parts.username is not None or parts.password is not None:
        raise AccessDenied(
            f"{asked.registry} wants a token from an address with a password in it",
            registry=asked.host,
        )
    if parts.scheme == "http" and not asked.plain:
        raise AccessDenied(
            f"{asked.registry} wants credentials to be sent to http://{host}, unencrypted: refused",
            registry=asked.host,
        )
    check_host(host, asked_by=urlsplit(f"//{asked.host}").hostname or asked.host)


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What to send to the token server."""

    method: str
    url: str = field(repr=False)
    authorization: str | None = field(default=None, repr=False)
    form: bytes | None = field(default=None, repr=False)


def token_request(key: TokenKey, client_id: str) -> TokenRequest:
    """The request for a token: OAuth2 for an identity token, else the older form with Basic."""
    service = (("service", key.service),) if key.service else ()
    query = (*service, ("scope", key.asked.scope))
    credentials = key.credentials
    if credentials and credentials.identity_token:
        form = (
            ("grant_type", "refresh_token"),
            ("client_id", client_id),
            *query,
            ("refresh_token", credentials.identity_token),
        )
        return TokenRequest("POST", key.realm, form=urlencode(form).encode())
    joint = "&" if urlsplit(key.realm).query else "?"
    url = f"{key.realm.partition('#')[0]}{joint}{urlencode(query)}"
    return TokenRequest("GET", url, credentials.basic if credentials else None)


def unauthenticated(asked: Asked, credentials: Credentials | None) -> Unauthenticated:
    """The error for a registry that does not know us, in words that say what to do."""
    if credentials is None:
        does = "write to" if "push" in asked.actions else "read"
        return Unauthenticated(
            f"{asked.registry} lets nobody {does} {asked.repository} without credentials, and none "
            "were found for it in the volume's secret or in the node's docker config (some "
            "registries, GHCR and Docker Hub among them, answer the same when the repository does "
            "not exist: check its spelling)",
            registry=asked.registry,
            repository=asked.repository,
        )
    return Unauthenticated(
        f"{asked.registry} does not accept the credentials that it was given for "
        f"{asked.repository}: they are wrong, have expired, or the repository does not exist",
        registry=asked.registry,
        repository=asked.repository,
    )
