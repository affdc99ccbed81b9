"""Reading from registries: the distribution specification's "Pull", in the name of one keychain.

A call here is a question to the registry, each time: what a keychain may read is for the registry
to say. Where the node's administrator gave it mirrors that may resolve (:mod:`fetcher.hosts`), they
speak for a registry that cannot be reached. Manifests and small blobs are read here; large blobs
get their address and their ``Authorization`` from :meth:`Registry.blob_access`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Generic, TypeVar
from urllib.parse import quote

import trio

from fetcher.conversations import Conversations, Wish
from fetcher.errors import (
    DigestMismatch,
    InvalidArtifact,
    ModelError,
    Unavailable,
    Unreachable,
)
from fetcher.exchange import Patience, RegistrySettings
from fetcher.hosts import Hosts, itself
from fetcher.oci import MANIFEST_TYPES, MAX_MANIFEST_BYTES, Digest, Index, Manifest, parse_manifest
from fetcher.platforms import pick, this_platform
from fetcher.refusals import page
from fetcher.routes import MAX_REDIRECTS, Hop
from fetcher.sources import Health

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from fetcher.credentials import Credentials, Keychain
    from fetcher.exchange import Answer
    from fetcher.hosts import Host, HostSet
    from fetcher.oci import Reference
    from fetcher.routes import Route
    from fetcher.wire import Head

__all__ = ["BlobAccess", "Registry", "RegistrySettings"]

_T = TypeVar("_T")

logger: Final = logging.getLogger(__name__)

MAX_SMALL_BLOB: Final = 4 * 1024 * 1024
_MAX_INDEXES: Final = 2
_ACCEPT_MANIFESTS: Final = (("Accept", ", ".join(MANIFEST_TYPES)),)
_MIRROR_CONNECT_SECONDS: Final = 2.0
_MIRROR_STALL_SECONDS: Final = 5.0
_MOST_HURRIED: Final = Patience(
    connect_timeout=3.0, stall_timeout=5.0, attempts=2, retry_seconds=10.0
)


@dataclass(frozen=True, slots=True)
class Named:
    """What a reference names."""

    digest: Digest
    by_registry: bool
    """Whether the registry said so, or who was made to stand in its place; not only a mirror."""


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or an index, byte for byte."""

    digest: Digest
    media_type: str
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class BlobAccess:
    """How the transport gets at one blob, at one host."""

    hop: Hop
    """The first request; its headers go to that host and to no other."""
    route: Route
    connect_timeout: float | None = None
    stall_timeout: float | None = None
    """Seconds, where this host gets less time than others."""
    redirects: int = MAX_REDIRECTS
    """How many are followed."""
    on_answer: Callable[[Head], None] | None = None
    """Told of the status and the headers, their names in lower case, of every answer that is no
    redirect, before its body: in the thread that fetches.
    """


class Registry:
    """All registries, for many tasks of one trio loop."""

    def __init__(self, settings: RegistrySettings) -> None:
        self.health = Health()
        """What is known of hosts, from control traffic and from downloads."""
        self._settings = settings
        self._conversations = Conversations(settings)
        self._hosts = Hosts(settings)
        self._hurried = replace(
            _MOST_HURRIED,
            connect_timeout=min(_MOST_HURRIED.connect_timeout, settings.connect_timeout),
            stall_timeout=min(_MOST_HURRIED.stall_timeout, settings.stall_timeout),
        )
        """For a registry in whose place somebody else can answer, and for who does."""
        self._unhurried = replace(self._hurried, stall_timeout=settings.stall_timeout, attempts=1)
        """For a registry in whose place nobody has answered: slow is better than nothing."""
        self._platform = this_platform()

    @property
    def settings(self) -> RegistrySettings:
        """How registries are talked to."""
        return self._settings

    async def aclose(self) -> None:
        """Close all connections."""
        await self._conversations.aclose()

    async def hosts(self, reference: Reference) -> HostSet:
        """Who may be asked for what the registry of ``reference`` has."""
        return await self._hosts.lookup(reference.registry)

    async def credentials(
        self, reference: Reference, keychain: Keychain
    ) -> tuple[Credentials | None, ...]:
        """What is shown to whoever may say whether ``reference`` can be read, in their order."""
        hosts = await self.hosts(reference)
        speakers = (hosts.server, *hosts.able("resolve"))
        return tuple([await keychain.lookup(one.name, reference.repository) for one in speakers])

    async def manifest(self, reference: Reference, keychain: Keychain) -> Manifest | Index:
        """The manifest or index that ``reference`` names, checked against its digest.

        Raises ``NotFound``, ``Unauthenticated``, ``AccessDenied``, ``Unavailable``;
        ``InvalidArtifact`` for what is no manifest or too large; ``DigestMismatch``.
        """
        return (await self._manifest(reference, keychain)).value.found

    async def _manifest(self, reference: Reference, keychain: Keychain) -> _Word[_Sent]:

        async def ask(host: Host, patience: Patience | None) -> _Sent:
            wish = _manifest_wish(reference, "GET", patience)
            answer = await self._ask(host, wish, keychain)
            if answer.is_page:
                raise page(wish.asked(host), wish.what)
            told = _checked_digest(reference, answer)
            try:
                found = parse_manifest(answer.body, answer.media_type or None)
            except InvalidArtifact as error:
                raise InvalidArtifact(f"{reference}: {error.message}", **error.context) from error
            return _Sent(found, told or found.digest)

        return await self._prove(reference, ask)

    async def document(self, reference: Reference, keychain: Keychain) -> Document:
        """As :meth:`manifest`, but as it was sent, whatever it is a manifest of."""

        async def ask(host: Host, patience: Patience | None) -> Document:
            wish = _manifest_wish(reference, "GET", patience)
            answer = await self._ask(host, wish, keychain)
            if answer.is_page:
                raise page(wish.asked(host), wish.what)
            _checked_digest(reference, answer)
            digest = reference.digest or Digest.of(answer.body)
            return Document(digest, answer.media_type, answer.body)

        return (await self._prove(reference, ask)).value

    async def resolve_model(
        self, reference: Reference, keychain: Keychain
    ) -> tuple[Manifest, Named]:
        """The manifest of the model, through an index if there is one, and what pins it.

        The digest is that of what the reference names, which is the index where there is one: a
        reference pinned to it gives the same bytes for ever, on each platform its own. To be sent
        it is the same proof as to be told it by :meth:`named`.
        """
        word = await self._manifest(reference, keychain)
        found, named = word.value.found, Named(word.value.digest, word.by_registry)
        for _ in range(_MAX_INDEXES):
            if isinstance(found, Manifest):
                return found, named
            child = pick(found, self._platform)
            found = await self.manifest(reference.with_digest(child.digest), keychain)
        if isinstance(found, Manifest):
            return found, named
        raise InvalidArtifact(f"{reference}: more than {_MAX_INDEXES} indexes lie in each other")

    async def head_manifest(self, reference: Reference, keychain: Keychain) -> Digest:
        """The digest of what ``reference`` names, and the proof that ``keychain`` may read it."""
        return (await self.named(reference, keychain)).digest

    async def named(self, reference: Reference, keychain: Keychain) -> Named:
        """As :meth:`head_manifest`, and who said so."""

        async def ask(host: Host, patience: Patience | None) -> Digest | None:
            wish = _manifest_wish(reference, "HEAD", patience)
            answer = await self._ask(host, wish, keychain)
            told = answer.headers.get("docker-content-digest")
            if told is None or answer.is_page or answer.status >= 300:
                return None
            digest = Digest.parse(told)
            if reference.digest is not None and digest != reference.digest:
                raise _mismatch(reference, f"{host.name} says that it is {digest}")
            return digest

        word = await self._prove(reference, ask)
        if word.value is not None:
            return Named(word.value, word.by_registry)
        sent = await self._manifest(reference, keychain)
        return Named(sent.value.digest, word.by_registry and sent.by_registry)

    async def head_blob(self, reference: Reference, blob: Digest, keychain: Keychain) -> int | None:
        """The proof that ``keychain`` may read a blob there, and its size where the registry says
        it. Raises as :meth:`manifest`.
        """

        async def ask(host: Host, patience: Patience | None) -> int | None:
            wish = replace(_blob_wish(reference, blob, "HEAD"), patience=patience)
            answer = await self._ask(host, wish, keychain)
            if answer.is_page:
                raise page(wish.asked(host), wish.what)
            if answer.status >= 400:
                raise Unavailable(
                    f"{host.name} does not say whether it has {wish.what} of {reference}: it "
                    f"answers HTTP status {answer.status} to HEAD",
                    registry=host.name,
                )
            length: str = answer.headers.get("content-length", "")
            told = answer.status == 200 and length.isascii() and length.isdigit()
            return int(length) if told else None

        return (await self._prove(reference, ask)).value

    async def blob(
        self, reference: Reference, digest: Digest, size: int, keychain: Keychain
    ) -> bytes:
        """A blob of at most 4 MiB, such as a config, checked against its digest and its size."""
        if size > MAX_SMALL_BLOB:
            raise InvalidArtifact(
                f"{reference}: the blob {digest} has {size} bytes; at most {MAX_SMALL_BLOB} are "
                "read for a config"
            )

        async def ask(host: Host, patience: Patience | None) -> bytes:
            wish = replace(_blob_wish(reference, digest, "GET"), patience=patience)
            answer = await self._ask(host, replace(wish, max_bytes=MAX_SMALL_BLOB), keychain)
            if answer.is_page and len(answer.body) != size:
                raise page(wish.asked(host), wish.what)
            if len(answer.body) != size or not digest.matches(answer.body):
                raise DigestMismatch(
                    f"{reference}: {host.name} sent {len(answer.body)} bytes that are not the "
                    f"blob {digest} of {size} bytes",
                    reference=reference,
                    digest=digest,
                )
            return answer.body

        return (await self._prove(reference, ask)).value

    async def ask_server(
        self, reference: Reference, path: str, what: str, keychain: Keychain, accept: str
    ) -> Answer:
        """The registry's own answer to a GET of ``path``, behind ``/v2``: no mirror speaks for it.

        At most 4 MiB. Raises as :meth:`manifest`, and does not wait long for a registry that is
        away.
        """
        server = (await self.hosts(reference)).server
        wish = Wish(
            "GET",
            reference.repository,
            path,
            what,
            (("Accept", accept),),
            max_bytes=MAX_MANIFEST_BYTES,
            patience=self._hurried,
        )
        return await self._ask(server, wish, keychain)

    async def blob_access(
        self,
        reference: Reference,
        digest: Digest,
        keychain: Keychain,
        *,
        host: Host | None = None,
        renew: bool = False,
    ) -> BlobAccess:
        """Address and headers with which the transport gets ``digest`` from one of the hosts of
        its registry: the registry itself, unless given.

        ``renew`` after the transport was refused: the host is asked whether it still takes what is
        kept, and a new token is fetched only if it does not. So many connections of one blob that
        are refused together cost one token.
        """
        hosts = await self.hosts(reference)
        if host is None:
            host = hosts.server
        credentials = await keychain.lookup(host.name, reference.repository)
        wish = _blob_wish(reference, digest, "HEAD")
        if hosts.mirrors:
            # somebody else may have it meanwhile; but the registry is the last that is asked
            wish = replace(wish, patience=self._hurried if host.mirror else self._unhurried)
        known, authorization = await self._conversations.known_authorization(
            host, wish, credentials
        )
        # a mirror is not asked how it wants to be asked before it has refused: many want nothing
        if renew or not (known or host.mirror):
            reply = await self._conversations.ask(host, wish, credentials)
            authorization = reply.authorization
        return BlobAccess(
            Hop(host.url(wish.path), host.showing(authorization), host.trust),
            self._conversations.route(host),
            host.connect_timeout or (_MIRROR_CONNECT_SECONDS if host.mirror else None),
            _MIRROR_STALL_SECONDS if host.mirror else None,
        )

    async def authorization(
        self, reference: Reference, keychain: Keychain, actions: str, *, stale: str | None = None
    ) -> str | None:
        """An ``Authorization`` for other ``actions`` than reading, such as ``pull,push``.

        It is for the registry itself, whatever stands in for it when models are read. ``stale`` is
        one that the registry has refused since.
        """
        host = itself(reference.registry, self._settings)
        credentials = await keychain.lookup(reference.registry, reference.repository)
        # the base endpoint is the one place to ask that does not depend on what exists already
        wish = Wish(
            "GET", reference.repository, "/", "its API version", actions=actions, follow=False
        )
        return (await self._conversations.ask(host, wish, credentials, stale)).authorization

    async def _prove(
        self, reference: Reference, ask: Callable[[Host, Patience | None], Awaitable[_T]]
    ) -> _Word[_T]:
        """What the registry answers; where it cannot be reached, a mirror that may resolve.

        Where there are such mirrors, a registry that is away is not waited for at every publish;
        one that is slow is, when nobody else has an answer.
        """
        hosts = await self.hosts(reference)
        server, others = hosts.server, hosts.able("resolve")
        if not others:
            return _Word(await ask(server, None), by_registry=True)
        order = self.health.order([one.base for one in others], trio.current_time())
        ordered = [one for base in order for one in others if one.base == base]
        speaks = "resolve" in server.capabilities
        turns: list[tuple[Host, Patience | None]] = [(one, self._hurried) for one in ordered]
        if speaks and self.health.is_away(server.base, trio.current_time()):
            turns.append((server, self._hurried))
        elif speaks:
            turns = [(server, self._hurried), *turns, (server, None)]
        failures: dict[str, ModelError] = {}
        for host, patience in turns:
            try:
                found = await ask(host, patience)
            except ModelError as error:
                if host is server and not isinstance(error, Unavailable):
                    raise
                failures[host.base] = error
                self._note_failure(host, error)
            else:
                self.health.succeeded(host.base)
                return _Word(found, by_registry=host is server or not speaks)
        raise _unproven(reference, failures.values())

    def _note_failure(self, host: Host, error: ModelError) -> None:
        now = trio.current_time()
        if not host.mirror:
            # nothing else: what it answers for one repository must not decide about all others
            if isinstance(error, Unreachable) and error.context.get("registry") == host.netloc:
                self.health.left(host.base, now)
        elif isinstance(error, Unavailable):
            self.health.failed(host.base, now, now, error.retry_after)
        logger.warning("%s", error.message)

    async def _ask(self, host: Host, wish: Wish, keychain: Keychain) -> Answer:
        credentials = await keychain.lookup(host.name, wish.repository)
        return (await self._conversations.ask(host, wish, credentials)).answer


@dataclass(frozen=True, slots=True)
class _Sent:
    """A manifest or an index, and the digest by which the reference names it."""

    found: Manifest | Index
    digest: Digest


@dataclass(frozen=True, slots=True)
class _Word(Generic[_T]):
    """An answer, and who gave it."""

    value: _T
    by_registry: bool


def _unproven(reference: Reference, failures: Iterable[ModelError]) -> Unavailable:
    """Whatever mirrors say: without the registry's own word this is no more than its absence."""
    words = "; ".join(one.message for one in failures)
    return Unavailable(
        f"no host that may resolve {reference} gives an answer: {words}",
        registry=reference.registry,
    )


def _manifest_wish(reference: Reference, method: str, patience: Patience | None) -> Wish:
    path = f"/{reference.repository}/manifests/{quote(reference.target, safe=':')}"
    what = f"{reference.repository} with the {_target_words(reference)}"
    return Wish(
        method,
        reference.repository,
        path,
        what,
        _ACCEPT_MANIFESTS,
        max_bytes=MAX_MANIFEST_BYTES,
        patience=patience,
    )


def _target_words(reference: Reference) -> str:
    return f"digest {reference.digest}" if reference.digest else f"tag {reference.tag}"


def _blob_wish(reference: Reference, digest: Digest, method: str) -> Wish:
    path = f"/{reference.repository}/blobs/{digest}"
    # a HEAD is the question whether we may; where the bytes lie is answered to a GET
    return Wish(method, reference.repository, path, f"the blob {digest}", follow=method != "HEAD")


def _checked_digest(reference: Reference, answer: Answer) -> Digest | None:
    """The digest by which a manifest was asked for, or which was told of it; None without either.

    Raises :class:`DigestMismatch` where it is another one's.
    """
    if reference.digest is not None:
        if not reference.digest.matches(answer.body):
            raise _mismatch(reference, f"the registry sent {Digest.of(answer.body)}")
        return reference.digest
    header = answer.headers.get("docker-content-digest")
    if header is None:
        return None
    told = Digest.parse(header)
    if not told.matches(answer.body):
        raise _mismatch(reference, f"the registry calls {header[:140]} what it sent")
    return told


def _mismatch(reference: Reference, what: str) -> DigestMismatch:
    return DigestMismatch(
        f"{reference}: the manifest is not what its digest says: {what}", reference=reference
    )
