"""Control traffic over HTTP: one question, one small answer, whatever the network does meanwhile.

Connections, TLS trust, retries, redirects and limits are here; what is asked and what an answer
means is for :mod:`fetcher.registry`. Bulk bytes go through :mod:`fetcher.transport` instead.
Requests are RFC 9110; nothing that a message or a log shows has a query or a header in it.
"""

from __future__ import annotations

import contextlib
import http.cookiejar
import logging
import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import httpx
import trio

from fetcher.addresses import check_host, guard, is_loopback, is_named, name_of
from fetcher.errors import InvalidArtifact, ModelError, Unavailable
from fetcher.network_errors import explain_failure, retry_after
from fetcher.oci import DOCKER_HUB
from fetcher.proxies import Proxies
from fetcher.routes import MAX_REDIRECTS, REDIRECTS, Hop, Route
from fetcher.trust import Trust, check_authorities, trusting, unverified

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

log: Final = logging.getLogger(__name__)

MAX_ERROR_BODY: Final = 16 * 1024
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
    hosts_dir: Path | None = None
    """Where containerd's ``hosts.toml`` folders lie; see :mod:`fetcher.hosts`."""
    proxies: Proxies = field(default_factory=Proxies)
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


def endpoint_host(registry: str) -> str:
    """Host and port to which requests for a registry go by themselves."""
    return _HUB_ENDPOINT if registry == DOCKER_HUB else registry


def endpoint(registry: str, settings: RegistrySettings) -> Endpoint:
    """The endpoint of a registry as a reference names it."""
    host = endpoint_host(registry)
    if is_named(host, settings.insecure):
        return Endpoint(host, plain=False, verify=False)
    local = is_loopback(name_of(host)) and not is_named(host, settings.https)
    return Endpoint(host, plain=local or is_named(host, settings.plain_http), verify=True)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one question may be asked for. Times are seconds."""

    connect_timeout: float
    stall_timeout: float
    attempts: int
    retry_seconds: float
    """No attempt starts later than this after the first."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request."""

    method: str
    hop: Hop
    route: Route
    content: bytes | None = field(default=None, repr=False)
    max_bytes: int = MAX_ERROR_BODY
    follow: bool = True
    """Whether redirects are followed; a redirect is the answer otherwise."""
    patience: Patience | None = None
    """What the settings say, unless given."""

    @property
    def who(self) -> str:
        """Who is asked, as people know it."""
        return self.route.who


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
        # a file that cannot be used is an error of the configuration, and not of the first pod
        check_authorities(settings.ca_file)
        self._patience = Patience(
            settings.connect_timeout,
            settings.stall_timeout,
            settings.attempts,
            settings.retry_seconds,
        )
        self._clients: dict[_ClientKey, tuple[tuple[int, ...], httpx.AsyncClient]] = {}
        self._retired: list[httpx.AsyncClient] = []
        self._jitter = random.SystemRandom()

    async def aclose(self) -> None:
        """Close all connections. Nothing can be asked afterwards."""
        clients = [client for _, client in self._clients.values()] + self._retired
        self._clients, self._retired = {}, []
        for client in clients:
            await client.aclose()

    async def ask(self, question: Question) -> Answer:
        """The answer, after as many attempts as its patience allows.

        Raises :class:`Unavailable` when there is none, :class:`AccessDenied` for an address that
        is never gone to, and :class:`InvalidArtifact` for a body of more than ``max_bytes``.
        """
        check_host(name_of(question.route.asked_host))
        patience = question.patience or self._patience
        started, attempt = trio.current_time(), 0
        while True:
            attempt += 1
            failure, pause = await self._attempt(question, patience)
            if isinstance(failure, Answer):
                return failure
            wait = pause if pause is not None else self._back_off(attempt)
            late = trio.current_time() + wait - started > patience.retry_seconds
            if attempt >= patience.attempts or late:
                raise type(failure)(_after(failure.message, attempt), **failure.context) from (
                    failure.__cause__
                )
            log.info("%s; trying again in %.1f s", failure.message, wait)
            await trio.sleep(wait)

    async def _attempt(
        self, question: Question, patience: Patience
    ) -> tuple[Answer | ModelError, float | None]:
        """An answer, or a failure that may pass and for how long to wait, if the other side said.

        Failures that will not pass are raised.
        """
        try:
            answer = await self._follow(question, patience)
        except _Passing as passing:
            return passing.error, None
        if answer.status not in _AGAIN:
            return answer, None
        reason = "asks to slow down" if answer.status == 429 else "has an internal problem"
        failure = Unavailable(
            f"{question.who} {reason} (HTTP status {answer.status})", registry=question.who
        )
        pause = retry_after(answer.headers.get("retry-after", ""))
        return failure, None if pause is None else min(pause, self.settings.max_retry_after)

    def _back_off(self, attempt: int) -> float:
        longest = min(10.0, 0.5 * 2.0 ** (attempt - 1))
        return self._jitter.uniform(longest / 2, longest)

    async def _follow(self, question: Question, patience: Patience) -> Answer:
        current = question
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._send(current, patience)
            location: str | None = answer.headers.get("location")
            if not question.follow or answer.status not in REDIRECTS or not location:
                return answer
            current = replace(current, hop=current.route.follow(current.hop, location))
        raise Unavailable(
            f"{question.who} redirects more than {MAX_REDIRECTS} times", registry=question.who
        )

    async def _send(self, question: Question, patience: Patience) -> Answer:
        """One request, one answer. Raises :class:`_Passing` for what another attempt may cure."""
        host = question.hop.host
        with trio.move_on_after(self.settings.answer_timeout):
            try:
                return await self._stream(question, patience)
            except ModelError:
                raise
            except (httpx.InvalidURL, UnicodeError) as error:
                # a label of a name that DNS has no room for is a UnicodeError, from the socket
                raise Unavailable(
                    f"{question.who} leads to something that is not a host", registry=question.who
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

    async def _stream(self, question: Question, patience: Patience) -> Answer:
        hop, route = question.hop, question.route
        plain = hop.url.startswith("http:")
        key = _ClientKey(hop.trust, plain, route.steered(hop), route.proxy(hop))
        client = self._client(key)
        headers = [
            *hop.headers,
            # bodies are bounded as they come: a compressed one would be bounded after it exploded
            ("Accept-Encoding", "identity"),
            ("User-Agent", self.settings.user_agent),
        ]
        timeout = httpx.Timeout(patience.stall_timeout, connect=patience.connect_timeout)
        async with client.stream(
            question.method, hop.url, headers=headers, content=question.content, timeout=timeout
        ) as response:
            body = await _read(response, question)
            return Answer(response.status_code, response.headers, body)

    def _client(self, key: _ClientKey) -> httpx.AsyncClient:
        """The client whose trust and whose guard fit; a new one once its files have changed."""
        version = key.trust.version()
        kept = self._clients.get(key)
        if kept is not None and kept[0] == version:
            return kept[1]
        client = self._new_client(key)
        if kept is not None:
            # others may be in the middle of a request with it
            self._retired.append(kept[1])
        self._clients[key] = version, client
        return client

    def _new_client(self, key: _ClientKey) -> httpx.AsyncClient:
        # no cookies: what a registry sets for one pod must not come back with another's request
        no_cookies = http.cookiejar.CookieJar(
            http.cookiejar.DefaultCookiePolicy(allowed_domains=())
        )
        proxy = None
        if key.proxy is not None:
            secure = key.proxy.startswith("https:")
            trust = trusting(self.settings.ca_file) if secure else None
            proxy = httpx.Proxy(key.proxy, ssl_context=trust)
        client = httpx.AsyncClient(
            verify=unverified() if key.plain else key.trust.context(),
            http2=False,
            follow_redirects=False,
            cookies=no_cookies,
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=16),
            # which proxy, and whether any, was decided for this request
            trust_env=False,
            proxy=proxy,
        )
        guard(client, steered=key.steered and proxy is None)
        return client


@dataclass(frozen=True, slots=True)
class _ClientKey:
    """What requests have in common that may use the same connections."""

    trust: Trust
    plain: bool
    """Without TLS, so that there is nothing to trust."""
    steered: bool
    proxy: str | None = field(repr=False)


class _Passing(Exception):
    """Carries an error that another attempt may cure."""

    def __init__(self, error: ModelError) -> None:
        super().__init__(error.message)
        self.error = error


async def _read(response: httpx.Response, question: Question) -> bytes:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Unavailable(
            f"{question.who} compressed its answer without having been asked to",
            registry=question.who,
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
            f"the answer of {question.who} is larger than the {limit} bytes that are read",
            registry=question.who,
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


def _after(message: str, attempts: int) -> str:
    return message if attempts == 1 else f"{message}, after {attempts} attempts"
