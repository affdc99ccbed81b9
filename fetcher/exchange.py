"""Control traffic over HTTP: one question, one small answer, whatever the network does meanwhile.

Connections, TLS trust, retries, redirects and limits are here; what is asked and what an answer
means is for :mod:`fetcher.registry`. Bulk bytes go through :mod:`fetcher.transport` instead.
Requests are RFC 9110; nothing that a message or a log shows has a query or a header in it.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.cookiejar
import logging
import random
import ssl
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx
import trio

from fetcher.addresses import check_host, guard, is_loopback
from fetcher.errors import AccessDenied, InvalidArtifact, InvalidRequest, ModelError, Unavailable
from fetcher.network_errors import explain_failure
from fetcher.oci import DOCKER_HUB

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

log: Final = logging.getLogger(__name__)

MAX_ERROR_BODY: Final = 16 * 1024
_MAX_REDIRECTS: Final = 5
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_AGAIN: Final = frozenset({408, 429, 500, 502, 503, 504})
_HUB_ENDPOINT: Final = "registry-1.docker.io"


@dataclass(frozen=True)
class RegistrySettings:
    """How registries are talked to. Hosts are ``host`` or ``host:port``, times are seconds."""

    plain_http: tuple[str, ...] = ()
    """Registries without TLS. Those on this machine are taken for plain unless named elsewhere."""
    https: tuple[str, ...] = ()
    """Registries on this machine that do speak TLS."""
    insecure: tuple[str, ...] = ()
    """Registries with TLS whose certificate is not verified."""
    ca_file: Path | None = None
    """Certificate authorities in PEM, trusted besides those of the system."""
    connect_timeout: float = 10.0
    stall_timeout: float = 30.0
    """How long a connection may stay silent."""
    answer_timeout: float = 120.0
    """How long one small answer may take in all, so that dripping bytes hold nobody up."""
    attempts: int = 5
    retry_seconds: float = 60.0
    """No attempt starts later than this after the first."""
    max_retry_after: float = 30.0
    """The longest that a registry's ``Retry-After`` is honoured for."""
    user_agent: str = "model-csi"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a registry's requests go."""

    host: str
    plain: bool
    verify: bool

    @property
    def url(self) -> str:
        """Scheme and host."""
        return f"{'http' if self.plain else 'https'}://{self.host}"


def endpoint(registry: str, settings: RegistrySettings) -> Endpoint:
    """The endpoint of a registry as a reference names it."""
    host = _HUB_ENDPOINT if registry == DOCKER_HUB else registry
    if _named(host, settings.insecure):
        return Endpoint(host, plain=False, verify=False)
    local = is_loopback(_name(host)) and not _named(host, settings.https)
    return Endpoint(host, plain=local or _named(host, settings.plain_http), verify=True)


def _named(host: str, names: tuple[str, ...]) -> bool:
    return host in names or _name(host) in names


def _name(host: str) -> str:
    return urlsplit(f"//{host}").hostname or host


@dataclass(frozen=True, slots=True)
class Question:
    """One request. ``registry`` is who is asked, as people know it, and ``asked_host`` where."""

    registry: str
    asked_host: str
    method: str
    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    content: bytes | None = field(default=None, repr=False)
    max_bytes: int = MAX_ERROR_BODY
    follow: bool = True
    """Whether redirects are followed; a redirect is the answer otherwise."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; ``body`` is complete for a success, and cut to a bound for an error."""

    status: int
    headers: httpx.Headers = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def media_type(self) -> str:
        """The ``Content-Type`` without its parameters, in lower case."""
        content_type: str = self.headers.get("content-type", "")
        return content_type.partition(";")[0].strip().lower()

    @property
    def is_page(self) -> bool:
        """Whether this is for a person's browser."""
        return self.media_type in ("text/html", "application/xhtml+xml")


class Exchange:
    """The HTTP clients of one process. Used by many tasks of one trio loop."""

    def __init__(self, settings: RegistrySettings) -> None:
        # httpx logs every URL at INFO, redirects with their signatures among them, and httpcore
        # logs headers at DEBUG. Whatever level the root logger has, these two never go that low.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.settings = settings
        self._trust = {True: trusting(settings.ca_file), False: _trusting_anybody()}
        self._clients: dict[tuple[bool, bool], httpx.AsyncClient] = {}
        self._jitter = random.SystemRandom()

    async def aclose(self) -> None:
        """Close all connections. Nothing can be asked afterwards."""
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.aclose()

    async def ask(self, question: Question) -> Answer:
        """The answer, after as many attempts as the settings allow.

        Raises :class:`Unavailable` when there is none, :class:`AccessDenied` for an address that
        is never gone to, and :class:`InvalidArtifact` for a body of more than ``max_bytes``.
        """
        check_host(_name(question.asked_host))
        started, attempt = trio.current_time(), 0
        while True:
            attempt += 1
            failure, pause = await self._attempt(question)
            if isinstance(failure, Answer):
                return failure
            wait = pause if pause is not None else self._back_off(attempt)
            late = trio.current_time() + wait - started > self.settings.retry_seconds
            if attempt >= self.settings.attempts or late:
                raise type(failure)(_after(failure.message, attempt), **failure.context) from (
                    failure.__cause__
                )
            log.info("%s; trying again in %.1f s", failure.message, wait)
            await trio.sleep(wait)

    async def _attempt(self, question: Question) -> tuple[Answer | ModelError, float | None]:
        """An answer, or a failure that may pass and for how long to wait, if the other side said.

        Failures that will not pass are raised.
        """
        try:
            answer = await self._follow(question)
        except _Passing as passing:
            return passing.error, None
        if answer.status not in _AGAIN:
            return answer, None
        reason = "asks to slow down" if answer.status == 429 else "has an internal problem"
        failure = Unavailable(
            f"{question.registry} {reason} (HTTP status {answer.status})",
            registry=question.registry,
        )
        return failure, self._retry_after(answer)

    def _back_off(self, attempt: int) -> float:
        longest = min(10.0, 0.5 * 2.0 ** (attempt - 1))
        return self._jitter.uniform(longest / 2, longest)

    def _retry_after(self, answer: Answer) -> float | None:
        text: str = answer.headers.get("retry-after", "").strip()
        if text.isascii() and text.isdigit():
            seconds = float(text[:9])
        else:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, OverflowError):
                return None
        return min(max(seconds, 0.0), self.settings.max_retry_after)

    async def _follow(self, question: Question) -> Answer:
        current = question
        for _ in range(_MAX_REDIRECTS + 1):
            answer = await self._send(current)
            location: str | None = answer.headers.get("location")
            if not question.follow or answer.status not in _REDIRECTS or not location:
                return answer
            current = self._redirected(current, location)
        raise Unavailable(
            f"{question.registry} redirects more than {_MAX_REDIRECTS} times",
            registry=question.registry,
        )

    def _redirected(self, question: Question, location: str) -> Question:
        """The question at its new place: without what is secret, where that is another host."""
        target = joined(question.url, location)
        host = target.hostname
        if not host or target.scheme not in ("http", "https") or target.username is not None:
            raise AccessDenied(
                f"{question.registry} redirects to something that is not a plain web address",
                registry=question.registry,
            )
        before = urlsplit(question.url)
        downgrade = before.scheme == "https" and target.scheme == "http"
        if downgrade and not _named(target.netloc, self.settings.plain_http):
            raise AccessDenied(
                f"{question.registry} redirects to http://{host}, unencrypted: refused",
                registry=question.registry,
            )
        check_host(host, asked_by=_name(question.asked_host))
        kept = question.headers
        if _origin(target) != _origin(before):
            kept = {key: value for key, value in kept.items() if key.lower() != "authorization"}
        return replace(question, url=target.geturl(), headers=kept)

    async def _send(self, question: Question) -> Answer:
        """One request, one answer. Raises :class:`_Passing` for what another attempt may cure."""
        target = urlsplit(question.url)
        host = target.netloc
        with trio.move_on_after(self.settings.answer_timeout):
            try:
                return await self._stream(question, target)
            except ModelError:
                raise
            except (httpx.InvalidURL, UnicodeError) as error:
                # a label of a name that DNS has no room for is a UnicodeError, from the socket
                raise Unavailable(
                    f"{question.registry} leads to something that is not a host",
                    registry=question.registry,
                ) from error
            except Exception as error:
                problem, passes = explain_failure(error, host)
                if passes:
                    raise _Passing(problem) from error
                raise problem from error
        raise _Passing(
            Unavailable(
                f"{host} did not complete its answer in {self.settings.answer_timeout:.0f} seconds",
                registry=host,
            )
        )

    async def _stream(self, question: Question, target: SplitResult) -> Answer:
        client = self._client(question, target)
        headers = {
            **question.headers,
            # bodies are bounded as they come: a compressed one would be bounded after it exploded
            "Accept-Encoding": "identity",
            "User-Agent": self.settings.user_agent,
        }
        async with client.stream(
            question.method, question.url, headers=headers, content=question.content
        ) as response:
            body = await _read(response, question)
            return Answer(response.status_code, response.headers, body)

    def _client(self, question: Question, target: SplitResult) -> httpx.AsyncClient:
        """The client whose trust and whose guard fit the target."""
        verify = not _named(target.netloc, self.settings.insecure)
        elsewhere = _name(target.netloc) != _name(question.asked_host)
        steered = elsewhere and not is_loopback(_name(question.asked_host))
        key = (verify, steered)
        if key not in self._clients:
            self._clients[key] = self._new_client(verify, steered)
        return self._clients[key]

    def _new_client(self, verify: bool, steered: bool) -> httpx.AsyncClient:
        # no cookies: what a registry sets for one pod must not come back with another's request
        no_cookies = http.cookiejar.CookieJar(
            http.cookiejar.DefaultCookiePolicy(allowed_domains=())
        )
        client = httpx.AsyncClient(
            verify=self._trust[verify],
            http2=False,
            follow_redirects=False,
            cookies=no_cookies,
            timeout=httpx.Timeout(
                self.settings.stall_timeout, connect=self.settings.connect_timeout
            ),
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=16),
            # proxies are the environment's, never for this machine, as in Go's HTTP client
            mounts={f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")},
        )
        guard(client, steered=steered)
        return client


class _Passing(Exception):
    """Carries an error that another attempt may cure."""

    def __init__(self, error: ModelError) -> None:
        super().__init__(error.message)
        self.error = error


async def _read(response: httpx.Response, question: Question) -> bytes:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Unavailable(
            f"{question.registry} compressed its answer without having been asked to",
            registry=question.registry,
        )
    limit = question.max_bytes if response.status_code < 300 else MAX_ERROR_BODY
    body = bytearray()
    parts = response.aiter_raw()
    async for part in parts:
        body += part
        if len(body) > limit:
            await _abandon(response, parts)
            break
    if len(body) > limit and response.status_code < 300:
        raise InvalidArtifact(
            f"the answer of {question.registry} is larger than the {limit} bytes that are read",
            registry=question.registry,
        )
    # what is cut here is an error's text, which is shown cut anyway
    return bytes(body[:limit])


async def _abandon(response: httpx.Response, parts: AsyncIterator[bytes]) -> None:
    """Close the connection in the middle of a body.

    httpx's generators lie in each other, and only an exception from the innermost ends them all;
    otherwise trio finds them unfinished, long after, and says so.
    """
    await response.aclose()
    with contextlib.suppress(httpx.HTTPError, httpx.StreamError):
        async for _ in parts:
            pass


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


def _after(message: str, attempts: int) -> str:
    return message if attempts == 1 else f"{message}, after {attempts} attempts"


def trusting(ca_file: Path | None) -> ssl.SSLContext:
    """The TLS trust of all registry access: the system's authorities, and those of ``ca_file``."""
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as error:
            raise InvalidRequest(
                f"the file of certificate authorities {ca_file} cannot be used: "
                f"{error.strerror or 'it is not in PEM format'}"
            ) from error
    return context


def _trusting_anybody() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
