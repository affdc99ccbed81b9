"""Reading from registries: the distribution specification's "Pull", in the name of one keychain.

A call here is a question to the registry, each time: what a keychain may read is for the registry
to say. What is kept between calls is what a registry wants of its users, and tokens until they
expire. Manifests and small blobs are read here; large blobs get their address and their
``Authorization`` from :meth:`Registry.blob_access`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from fetcher.auth import (
    Asked,
    Attempt,
    Bearer,
    Conversation,
    Outcome,
    TokenKey,
    Way,
    converse,
    token_request,
)
from fetcher.errors import DigestMismatch, InvalidArtifact
from fetcher.exchange import (
    MAX_ERROR_BODY,
    Answer,
    Exchange,
    Question,
    RegistrySettings,
    endpoint,
)
from fetcher.oci import MANIFEST_TYPES, MAX_MANIFEST_BYTES, Digest, Index, Manifest, parse_manifest
from fetcher.platforms import pick, this_platform
from fetcher.refusals import Refused, page, refusal
from fetcher.tokens import MAX_TOKEN_BODY, Tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fetcher.credentials import Credentials, Keychain
    from fetcher.oci import Reference

__all__ = ["BlobAccess", "Registry", "RegistrySettings"]

MAX_SMALL_BLOB: Final = 4 * 1024 * 1024
_MAX_INDEXES: Final = 2
_MAX_WAYS: Final = 4096
_NO_SUCH_METHOD: Final = 405
_ACCEPT_MANIFESTS: Final = {"Accept": ", ".join(MANIFEST_TYPES)}


@dataclass(frozen=True, slots=True)
class BlobAccess:
    """How the transport gets at one blob. ``headers`` go to the host of ``url`` and to no other."""

    url: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    verify_tls: bool
    ca_file: str | None
    """Certificate authorities in PEM, to be trusted besides those of the system."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """What to ask of a repository. ``what`` names it for people."""

    method: str
    path: str
    what: str
    headers: Mapping[str, str] = field(default_factory=dict)
    max_bytes: int = MAX_ERROR_BODY
    follow: bool = True


@dataclass(frozen=True, slots=True)
class _Reply:
    answer: Answer
    authorization: str | None = field(repr=False)


class Registry:
    """All registries, for many tasks of one trio loop."""

    def __init__(self, settings: RegistrySettings) -> None:
        self._settings = settings
        self._exchange = Exchange(settings)
        self._tokens = Tokens(self._fetch_token)
        self._ways: OrderedDict[tuple[str, str, str], Way | None] = OrderedDict()
        self._platform = this_platform()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._exchange.aclose()

    async def manifest(self, reference: Reference, keychain: Keychain) -> Manifest | Index:
        """The manifest or index that ``reference`` names, checked against its digest.

        Raises ``NotFound``, ``Unauthenticated``, ``AccessDenied``, ``Unavailable``;
        ``InvalidArtifact`` for what is no manifest or too large; ``DigestMismatch``.
        """
        asked = self._asked(reference)
        wish = replace(_manifest_wish(reference, "GET"), max_bytes=MAX_MANIFEST_BYTES)
        reply = await self._ask(asked, wish, keychain)
        answer = reply.answer
        if answer.is_page:
            raise page(asked, wish.what)
        _check_digest(reference, answer)
        try:
            return parse_manifest(answer.body, answer.media_type or None)
        except InvalidArtifact as error:
            raise InvalidArtifact(f"{reference}: {error.message}", **error.context) from error

    async def resolve_model(
        self, reference: Reference, keychain: Keychain
    ) -> tuple[Manifest, Digest]:
        """The manifest of the model, through an index if there is one, and what pins it.

        The digest is that of what the reference names, which is the index where there is one: a
        reference pinned to it gives the same bytes for ever, on each platform its own.
        """
        found = await self.manifest(reference, keychain)
        top = found.digest if reference.digest is None else reference.digest
        for _ in range(_MAX_INDEXES):
            if isinstance(found, Manifest):
                return found, top
            child = pick(found, self._platform)
            found = await self.manifest(reference.with_digest(child.digest), keychain)
        if isinstance(found, Manifest):
            return found, top
        raise InvalidArtifact(f"{reference}: more than {_MAX_INDEXES} indexes lie in each other")

    async def head_manifest(self, reference: Reference, keychain: Keychain) -> Digest:
        """The digest of what ``reference`` names, and the proof that ``keychain`` may read it."""
        asked, wish = self._asked(reference), _manifest_wish(reference, "HEAD")
        answer = (await self._ask(asked, wish, keychain)).answer
        told = answer.headers.get("docker-content-digest")
        if told is None or answer.is_page or answer.status == _NO_SUCH_METHOD:
            return (await self.manifest(reference, keychain)).digest
        digest = Digest.parse(told)
        if reference.digest is not None and digest != reference.digest:
            raise _mismatch(reference, f"the registry says that it is {digest}")
        return digest

    async def blob(
        self, reference: Reference, digest: Digest, size: int, keychain: Keychain
    ) -> bytes:
        """A blob of at most 4 MiB, such as a config, checked against its digest and its size."""
        if size > MAX_SMALL_BLOB:
            raise InvalidArtifact(
                f"{reference}: the blob {digest} has {size} bytes; at most {MAX_SMALL_BLOB} are "
                "read for a config"
            )
        asked = self._asked(reference)
        wish = replace(_blob_wish(reference, digest, "GET"), max_bytes=MAX_SMALL_BLOB)
        answer = (await self._ask(asked, wish, keychain)).answer
        if answer.is_page and len(answer.body) != size:
            raise page(asked, wish.what)
        if len(answer.body) != size or not digest.matches(answer.body):
            raise DigestMismatch(
                f"{reference}: the registry sent {len(answer.body)} bytes that are not the blob "
                f"{digest} of {size} bytes",
                reference=reference,
                digest=digest,
            )
        return answer.body

    async def blob_access(
        self,
        reference: Reference,
        digest: Digest,
        keychain: Keychain,
        *,
        renew: bool = False,
    ) -> BlobAccess:
        """Address and headers with which the transport gets ``digest`` from the registry itself.

        ``renew`` after the transport was refused: the registry is asked whether it still takes
        what is kept, and a new token is fetched only if it does not. So many connections of one
        blob that are refused together cost one token.
        """
        asked = self._asked(reference)
        credentials = await keychain.lookup(reference.registry, reference.repository)
        known, way = self._way(asked)
        if renew or not known:
            wish = _blob_wish(reference, digest, "HEAD")
            authorization = (await self._ask_as(asked, wish, credentials)).authorization
        elif isinstance(way, Bearer):
            key = TokenKey(asked, way.realm, way.service, credentials)
            authorization = f"Bearer {await self._tokens.get(key)}"
        else:
            authorization = credentials.basic if way is not None and credentials else None
        return self._access(reference, digest, authorization)

    async def authorization(
        self, reference: Reference, keychain: Keychain, actions: str, *, stale: str | None = None
    ) -> str | None:
        """An ``Authorization`` for other ``actions`` than reading, such as ``pull,push``.

        ``stale`` is one that the registry has refused since.
        """
        asked = self._asked(reference, actions)
        credentials = await keychain.lookup(reference.registry, reference.repository)
        # the base endpoint is the one place to ask that does not depend on what exists already
        wish = _Wish("GET", "/v2/", "its API version", follow=False)
        return (await self._ask_as(asked, wish, credentials, stale)).authorization

    def _asked(self, reference: Reference, actions: str = "pull") -> Asked:
        found = endpoint(reference.registry, self._settings)
        return Asked(reference.registry, found.host, found.plain, reference.repository, actions)

    def _access(
        self, reference: Reference, digest: Digest, authorization: str | None
    ) -> BlobAccess:
        found = endpoint(reference.registry, self._settings)
        ca_file = self._settings.ca_file
        return BlobAccess(
            url=found.url + _blob_wish(reference, digest, "GET").path,
            headers=(("Authorization", authorization),) if authorization else (),
            verify_tls=found.verify,
            ca_file=str(ca_file) if ca_file else None,
        )

    async def _ask(self, asked: Asked, wish: _Wish, keychain: Keychain) -> _Reply:
        credentials = await keychain.lookup(asked.registry, asked.repository)
        return await self._ask_as(asked, wish, credentials)

    async def _ask_as(
        self,
        asked: Asked,
        wish: _Wish,
        credentials: Credentials | None,
        stale: str | None = None,
    ) -> _Reply:
        """The reply to a wish; raises the refusal unless it is a success."""
        conversation = converse(asked, credentials, self._way(asked)[1], stale)
        reply, way = await self._drive(conversation, asked, wish)
        success = _is_success(reply.answer, wish)
        if success or way is not None:
            # after a refusal too: only a token that was tried first is known to be stale
            self._remember(asked, way)
        if not success:
            raise refusal(Refused(asked, wish.what, reply.answer, credentials, reply.authorization))
        return reply

    async def _drive(
        self, conversation: Conversation, asked: Asked, wish: _Wish
    ) -> tuple[_Reply, Way | None]:
        """Do what the conversation says, to its end: the last reply, and the way it took."""
        reply: _Reply | None = None
        step = next(conversation)
        while True:
            told: Outcome | str
            if isinstance(step, Attempt):
                answer = await self._attempt(asked, wish, step.authorization)
                reply = _Reply(answer, step.authorization)
                told = Outcome(answer.status, tuple(answer.headers.get_list("www-authenticate")))
            else:
                told = await self._tokens.get(step.key, step.stale)
            try:
                step = conversation.send(told)
            except StopIteration as end:
                if reply is None:
                    raise AssertionError("a conversation has at least one attempt") from end
                return reply, end.value

    async def _attempt(self, asked: Asked, wish: _Wish, authorization: str | None) -> Answer:
        headers = dict(wish.headers)
        if authorization is not None:
            headers["Authorization"] = authorization
        url = endpoint(asked.registry, self._settings).url + wish.path
        return await self._exchange.ask(
            Question(
                registry=asked.registry,
                asked_host=asked.host,
                method=wish.method,
                url=url,
                headers=headers,
                max_bytes=wish.max_bytes,
                follow=wish.follow,
            )
        )

    async def _fetch_token(self, key: TokenKey) -> tuple[int, bytes]:
        request = token_request(key, self._settings.user_agent)
        headers = {"Accept": "application/json"}
        if request.authorization is not None:
            headers["Authorization"] = request.authorization
        if request.form is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        answer = await self._exchange.ask(
            Question(
                registry=f"the token server of {key.asked.registry}",
                asked_host=key.asked.host,
                method=request.method,
                url=request.url,
                headers=headers,
                content=request.form,
                max_bytes=MAX_TOKEN_BODY,
                # a realm was checked before a password goes to it; where it leads on was not
                follow=False,
            )
        )
        return answer.status, answer.body

    def _way(self, asked: Asked) -> tuple[bool, Way | None]:
        key = (asked.host, asked.repository, asked.actions)
        return key in self._ways, self._ways.get(key)

    def _remember(self, asked: Asked, way: Way | None) -> None:
        key = (asked.host, asked.repository, asked.actions)
        self._ways[key] = way
        self._ways.move_to_end(key)
        while len(self._ways) > _MAX_WAYS:
            self._ways.popitem(last=False)


def _is_success(answer: Answer, wish: _Wish) -> bool:
    if 300 <= answer.status < 400:
        return not wish.follow
    # a registry that does not do HEAD says so after it has let us in
    return answer.status < 300 or (answer.status == _NO_SUCH_METHOD and wish.method == "HEAD")


def _manifest_wish(reference: Reference, method: str) -> _Wish:
    path = f"/v2/{reference.repository}/manifests/{quote(reference.target, safe=':')}"
    what = f"{reference.repository} with the {_target_words(reference)}"
    return _Wish(method, path, what, _ACCEPT_MANIFESTS)


def _target_words(reference: Reference) -> str:
    return f"digest {reference.digest}" if reference.digest else f"tag {reference.tag}"


def _blob_wish(reference: Reference, digest: Digest, method: str) -> _Wish:
    path = f"/v2/{reference.repository}/blobs/{digest}"
    # a HEAD is the question whether we may; where the bytes lie is answered to a GET
    return _Wish(method, path, f"the blob {digest}", follow=method != "HEAD")


def _check_digest(reference: Reference, answer: Answer) -> None:
    if reference.digest is not None:
        if not reference.digest.matches(answer.body):
            raise _mismatch(reference, f"the registry sent {Digest.of(answer.body)}")
        return
    told = answer.headers.get("docker-content-digest")
    if told is not None and not Digest.parse(told).matches(answer.body):
        raise _mismatch(reference, f"the registry calls {told[:140]} what it sent")


def _mismatch(reference: Reference, what: str) -> DigestMismatch:
    return DigestMismatch(
        f"{reference}: the manifest is not what its digest says: {what}", reference=reference
    )
