"""What is asked of a peer: the paths of the distribution API's "Pull", read and checked. No I/O.

Nothing of a request is believed: names, digests, tags and the registry of ``?ns=`` pass through the
parsers that references of pods pass through.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs, unquote

import msgspec

from fetcher.errors import (
    AccessDenied,
    InvalidArtifact,
    InvalidRequest,
    ModelError,
    NotFound,
    OutOfRange,
    Unauthenticated,
    Unavailable,
)
from fetcher.modelpack import Position
from fetcher.oci import DOCKER_HUB, HUB_HOSTS, Digest, Reference
from fetcher.peers import protocol
from fetcher.peers.owners import Deal

if TYPE_CHECKING:
    from collections.abc import Mapping

_MAX_TARGET: Final = 2048
_MAX_NAME: Final = 253
_KINDS: Final = ("manifests", "blobs", "referrers")


class Refusal(Exception):
    """An answer that is not what was asked for: its status and the specification's error code."""

    def __init__(
        self, status: int, code: str, message: str, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers

    @property
    def body(self) -> bytes:
        """The specification's "Error Codes"."""
        error = {"code": self.code, "message": self.message}
        return msgspec.json.encode({"errors": [error]})


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came; header names are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str] = field(repr=False)

    @property
    def is_head(self) -> bool:
        """Whether the answer has no body."""
        return self.method == "HEAD"


@dataclass(frozen=True, slots=True)
class Asked:
    """One checked request for something of a repository."""

    kind: str
    """``manifests``, ``blobs`` or ``referrers``."""
    reference: Reference
    """What is asked for; the repository's name, and the tag or the digest."""
    member: str
    """Who asks; empty for a foreign client."""
    hops: int
    authorization: str | None = field(repr=False)
    """What the asker shows to the registry."""
    range: str
    layer: str
    """The blob's media type, by the asker's word."""
    chunk_size: int
    """Of the asker; 0 where it does not say it."""
    position: Position | None = None
    """As which layer of which model the asker knows the blob."""
    ready: bool = False
    """Only what is there whole is wanted."""
    urgent: bool = False
    """A pod waits for it."""
    spare: int | None = None
    """Where more uploads than this are under way, another member will do."""
    artifact_type: str = ""
    """What of all that refers to a manifest is asked for; empty for everything."""

    @property
    def digest(self) -> Digest:
        """What is asked for by digest. Raises :class:`Refusal` where it is asked for by tag."""
        if self.reference.digest is None:
            raise Refusal(400, "DIGEST_INVALID", f"{self.kind} are asked for by digest")
        return self.reference.digest

    @property
    def deal(self) -> Deal:
        """How the blob's chunks are dealt out by the asker's count."""
        return Deal.of(self.digest, self.position)


def read(request: Request, namespace: str) -> Asked | None:
    """What is asked for; None for the API's base. ``namespace`` is meant where none is named.

    Raises :class:`Refusal`.
    """
    path, _, query = request.target.partition("?")
    below = path.startswith("/v2/") and len(request.target) <= _MAX_TARGET
    if not below and path != "/v2":
        raise Refusal(404, "NAME_UNKNOWN", "here is only the API below /v2/")
    if request.method not in ("GET", "HEAD"):
        raise Refusal(
            405,
            "UNSUPPORTED",
            f"{request.method[:20]} is not for peers: nothing is written here",
            (("Allow", "GET, HEAD"),),
        )
    if path in ("/v2", "/v2/"):
        return None
    name, kind, target = _split(unquote(path.removeprefix("/v2/")))
    parameters = _parameters(query)
    registry = parameters.get("ns") or namespace
    if not registry:
        raise Refusal(
            404, "NAME_UNKNOWN", "this is a mirror of many registries: name one with ?ns=HOST"
        )
    headers = request.headers
    return Asked(
        kind,
        _reference(registry, name, kind, target),
        member=_member(headers.get(protocol.FROM.lower(), "")),
        hops=_hops(headers.get(protocol.HOPS.lower(), "")),
        authorization=_authorization(headers),
        # a condition that is not understood must not turn into a part that was not asked for
        range="" if "if-range" in headers else headers.get("range", ""),
        layer=headers.get(protocol.LAYER.lower(), ""),
        chunk_size=_number(headers.get(protocol.CHUNK.lower(), ""), 10) or 0,
        position=_position(headers.get(protocol.MODEL.lower(), "")),
        ready=protocol.READY.lower() in headers,
        urgent=protocol.URGENT.lower() in headers,
        spare=_number(headers.get(protocol.SPARE.lower(), ""), 5),
        artifact_type=parameters.get("artifactType", ""),
    )


def _split(path: str) -> tuple[str, str, str]:
    """Repository, kind and target of what follows ``/v2/``."""
    parts = path.split("/")
    if len(parts) < 3 or parts[-2] not in _KINDS:
        raise Refusal(404, "NAME_UNKNOWN", "there is no such thing in the distribution API")
    return "/".join(parts[:-2]), parts[-2], parts[-1]


def _parameters(query: str) -> dict[str, str]:
    """Of each parameter its first value; none of too many."""
    if query.count("&") >= 16:
        return {}
    return {name: values[0] for name, values in parse_qs(query, max_num_fields=16).items()}


def _reference(registry: str, name: str, kind: str, target: str) -> Reference:
    try:
        parsed = Reference.parse(f"{registry}/{name}")
    except InvalidRequest as error:
        raise Refusal(400, "NAME_INVALID", error.message) from error
    # a registry that is no host, or a name with a tag in it, would have become something else
    is_hub = registry.lower() in HUB_HOSTS
    repository = f"library/{name}" if is_hub and "/" not in name else name
    if parsed.repository != repository or (parsed.registry == DOCKER_HUB and not is_hub):
        raise Refusal(400, "NAME_INVALID", f"{registry[:100]}/{name[:200]} names no repository")
    if kind == "manifests" and ":" not in target:
        try:
            return Reference.parse(f"{registry}/{name}:{target}")
        except InvalidRequest as error:
            # it may be a digest that lacks its algorithm as well as a tag: both are unknown
            raise Refusal(404, "MANIFEST_UNKNOWN", error.message) from error
    try:
        return Reference(parsed.registry, parsed.repository, None, Digest.parse(target))
    except InvalidArtifact as error:
        raise Refusal(400, "DIGEST_INVALID", error.message) from error


def _authorization(headers: Mapping[str, str]) -> str | None:
    shown = headers.get("authorization")
    if shown is not None and not (shown.isascii() and shown.isprintable()):
        raise Refusal(400, "UNSUPPORTED", "an Authorization has characters that none has")
    return shown


def _member(text: str) -> str:
    usable = len(text) <= _MAX_NAME and text.isascii() and text.isprintable() and " " not in text
    return text if usable else ""


def _hops(text: str) -> int:
    hops = _number(text, 3)
    # who says nonsense gets no further
    return hops if hops is not None else protocol.MOST_HOPS if text else 0


def _position(text: str) -> Position | None:
    model, _, index = text.partition(" ")
    number = _number(index, 6)
    if number is None:
        return None
    try:
        return Position(Digest.parse(model), number)
    except InvalidArtifact:
        # by itself: whoever asks another member with the same words is told the same
        return None


def _number(text: str, digits: int) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= digits else None


def refusal(error: ModelError, kind: str, size: int | None = None) -> Refusal:
    """What an error is to a client: the registry's own word is passed on."""
    match error:
        case Unauthenticated():
            # a client that has a name and a password may show them; tokens are renewed elsewhere
            challenge = (("WWW-Authenticate", 'Basic realm="registry"'),)
            return Refusal(401, "UNAUTHORIZED", error.message, challenge)
        case AccessDenied():
            return Refusal(403, "DENIED", error.message)
        case NotFound():
            code = "BLOB_UNKNOWN" if kind == "blobs" else "MANIFEST_UNKNOWN"
            return Refusal(404, code, error.message)
        case OutOfRange():
            header = (("Content-Range", f"bytes */{size}"),)
            return Refusal(416, "SIZE_INVALID", error.message, header)
        case Unavailable():
            wait = str(max(1, round(error.retry_after or 1)))
            return Refusal(503, "TOOMANYREQUESTS", error.message, (("Retry-After", wait),))
        case _ if error.transient:
            return Refusal(503, "TOOMANYREQUESTS", error.message, (("Retry-After", "1"),))
        case _:
            # a cache that cannot is one that does not have it: the asker goes on elsewhere
            code = "BLOB_UNKNOWN" if kind == "blobs" else "MANIFEST_UNKNOWN"
            return Refusal(404, code, error.message)
