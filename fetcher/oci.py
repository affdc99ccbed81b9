"""Values of the OCI specifications: digests, references, descriptors, manifests, indexes. No I/O.

Everything that comes from outside passes through a ``parse`` here and is safe to use as a key, a
URL path or a file name afterwards. Sections are those of the OCI image specification 1.1, the OCI
distribution specification 1.1, and of the reference grammar that the distribution project
publishes.
"""

from __future__ import annotations

import hashlib
import re
import types
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from fetcher.errors import InvalidArtifact, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_MANIFEST_BYTES: Final = 4 * 1024 * 1024
"""The size at which the distribution specification lets registries refuse a manifest."""

MAX_BLOB_BYTES: Final = 1 << 50
MAX_LAYERS: Final = 10_000
MAX_REFERENCE_CHARACTERS: Final = 2048

IMAGE_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX: Final = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"

MANIFEST_TYPES: Final = (IMAGE_MANIFEST, IMAGE_INDEX, DOCKER_MANIFEST, DOCKER_LIST)
"""What a client accepts when it asks for a manifest, best first."""

_INDEX_TYPES: Final = frozenset({IMAGE_INDEX, DOCKER_LIST})
_DIGEST_LENGTHS: Final = {"sha256": 64, "sha512": 128}
_HEX: Final = re.compile(r"[0-9a-f]+")

_NO_ANNOTATIONS: Final[Mapping[str, str]] = types.MappingProxyType({})


class Hasher(Protocol):
    """What ``hashlib`` gives: a running digest."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...
    def copy(self) -> Hasher: ...


@dataclass(frozen=True, order=True, slots=True)
class Digest:
    """A content address, image specification "Descriptors: Digests". Only what can be verified
    here.

    ``hex`` is lower-case and of the algorithm's length, so it is safe as a file name.
    """

    algorithm: str
    hex: str

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read ``algorithm:hex``; :class:`InvalidArtifact` when it is not a digest or not a known
        one.
        """
        algorithm, _, encoded = text.partition(":")
        length = _DIGEST_LENGTHS.get(algorithm)
        if length is None or len(encoded) != length or not _HEX.fullmatch(encoded):
            raise InvalidArtifact(
                f"{text[:160]!r} is not a digest: expected sha256: with 64 or sha512: with 128 "
                "lower-case hexadecimal digits"
            )
        return cls(algorithm, encoded)

    @classmethod
    def of(cls, data: bytes) -> Digest:
        """The SHA-256 digest of ``data``."""
        return cls("sha256", hashlib.sha256(data).hexdigest())

    def hasher(self) -> Hasher:
        """A fresh running digest of this algorithm."""
        return hashlib.new(self.algorithm)

    def matches(self, data: bytes) -> bool:
        """Whether ``data`` is what this digest names."""
        return hashlib.new(self.algorithm, data).hexdigest() == self.hex

    @property
    def short(self) -> str:
        """Twelve digits, as people read them."""
        return self.hex[:12]

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"


_HOST: Final = re.compile(
    r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*"
    r"|\[[0-9a-fA-F:.]+\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
_PATH: Final = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
)
_TAG: Final = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_SCHEME: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")

DOCKER_HUB: Final = "docker.io"
HUB_HOSTS: Final = frozenset({DOCKER_HUB, "index.docker.io", "registry-1.docker.io"})
"""The names that mean Docker Hub."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The name of a model: ``registry/repository``, and a tag, a digest, or both.

    With both, the digest decides and the tag is for people, as everywhere in the field.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference as the distribution project's grammar has it.

        A name without a host means Docker Hub, a name there without a folder means ``library/``,
        and neither tag nor digest means ``latest``. Raises :class:`InvalidRequest` saying what is
        wrong.
        """
        _refuse_unreadable(text)
        name, at, digest_text = text.partition("@")
        digest = _reference_digest(digest_text, text) if at else None
        registry, remainder = _split_registry(name, text)
        repository, colon, tag = remainder.partition(":")
        if colon and not _TAG.fullmatch(tag):
            raise _bad_reference(text, f"{tag[:140]!r} is not a tag")
        if registry == DOCKER_HUB and repository and "/" not in repository:
            repository = f"library/{repository}"
        _check_repository(repository, text)
        if len(registry) + 1 + len(repository) > 255:
            raise _bad_reference(text, "registry and repository have more than 255 characters")
        return cls(
            registry, repository, (tag or None) if colon else (None if digest else "latest"), digest
        )

    def with_digest(self, digest: Digest) -> Reference:
        """The same name pinned to ``digest``; the tag stays, for people."""
        return replace(self, digest=digest)

    @property
    def name(self) -> str:
        """``registry/repository``."""
        return f"{self.registry}/{self.repository}"

    @property
    def target(self) -> str:
        """What follows ``/manifests/`` when the registry is asked: the digest if there is one."""
        return str(self.digest) if self.digest else (self.tag or "latest")

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.name}{tag}{digest}"


def _bad_reference(text: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{text[:200]!r} is not a model reference: {why}; expected registry/repository:tag or "
        "registry/repository@sha256:…"
    )


def _refuse_unreadable(text: str) -> None:
    if not text:
        raise InvalidRequest("the model reference is empty; expected registry/repository:tag")
    if len(text) > MAX_REFERENCE_CHARACTERS:
        raise _bad_reference(text, f"it has more than {MAX_REFERENCE_CHARACTERS} characters")
    if _SCHEME.match(text):
        raise _bad_reference(text, "a reference has no scheme such as https://")
    if any(not character.isprintable() or character.isspace() for character in text):
        raise _bad_reference(text, "it contains white space or control characters")


def _reference_digest(digest: str, text: str) -> Digest:
    try:
        return Digest.parse(digest)
    except InvalidArtifact as error:
        raise _bad_reference(text, error.message) from error


def _split_registry(name: str, text: str) -> tuple[str, str]:
    """A first component is a host if it has a dot, a colon, or is ``localhost``."""
    first, slash, rest = name.partition("/")
    is_host = slash and ("." in first or ":" in first or first == "localhost")
    if not is_host:
        return DOCKER_HUB, name
    match = _HOST.fullmatch(first)
    if match is None or len(first) > 253 + 6:
        raise _bad_reference(text, f"{first[:100]!r} is not a registry host")
    if match["port"] and not 0 < int(match["port"]) < 65536:
        raise _bad_reference(text, f"{match['port']} is not a port")
    host = first.lower()
    return (DOCKER_HUB if host == "index.docker.io" else host), rest


def _check_repository(repository: str, text: str) -> None:
    if not repository:
        raise _bad_reference(text, "the repository is missing")
    if repository != repository.lower():
        raise _bad_reference(text, "a repository is lower-case")
    if not _PATH.fullmatch(repository):
        raise _bad_reference(text, f"{repository[:140]!r} is not a repository")


@dataclass(frozen=True, slots=True)
class Platform:
    """Operating system and processor of one manifest of an index."""

    os: str
    architecture: str
    variant: str | None = None

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to content by digest, image specification "Content Descriptors"."""

    media_type: str
    digest: Digest
    size: int
    """Bytes; between 0 and :data:`MAX_BLOB_BYTES`."""
    annotations: Mapping[str, str] = field(default_factory=lambda: _NO_ANNOTATIONS, hash=False)
    artifact_type: str | None = None
    platform: Platform | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """An image manifest, image specification "Image Manifest"."""

    digest: Digest
    size: int
    media_type: str
    artifact_type: str | None
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(hash=False)
    body: bytes = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Index:
    """An image index, image specification "Image Index"."""

    digest: Digest
    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(hash=False)


class _PlatformDocument(msgspec.Struct):
    os: str = ""
    architecture: str = ""
    variant: str | None = None


class _DescriptorDocument(msgspec.Struct, rename="camel"):
    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] | None = None
    artifact_type: str | None = None
    platform: _PlatformDocument | None = None


class _ManifestDocument(msgspec.Struct, rename="camel"):
    schema_version: int
    media_type: str | None = None
    artifact_type: str | None = None
    config: _DescriptorDocument | None = None
    layers: list[_DescriptorDocument] | None = None
    manifests: list[_DescriptorDocument] | None = None
    annotations: dict[str, str] | None = None


def parse_manifest(body: bytes, media_type: str | None) -> Manifest | Index:
    """Read a manifest or an index.

    ``media_type`` is the ``Content-Type`` it came with, if any; the document's own ``mediaType``
    and shape decide, as the two contradict each other in the wild only for hostile documents (the
    image specification demands that they agree). Raises :class:`InvalidArtifact`.
    """
    document = _decode(body)
    declared = document.media_type or (media_type or "").partition(";")[0].strip()
    if document.schema_version != 2:
        raise InvalidArtifact(f"the manifest has schemaVersion {document.schema_version}, not 2")
    if document.manifests is not None and (
        document.layers is not None or document.config is not None
    ):
        raise InvalidArtifact(
            "the document is both a manifest and an index: it has layers and manifests"
        )
    digest = Digest.of(body)
    annotations = types.MappingProxyType(document.annotations or {})
    if document.manifests is not None:
        if declared and declared not in _INDEX_TYPES:
            raise InvalidArtifact(
                f"the document has manifests, yet calls itself {declared[:120]!r}"
            )
        manifests = _descriptors(document.manifests, "manifests")
        return Index(digest, declared or IMAGE_INDEX, manifests, annotations)
    if declared in _INDEX_TYPES:
        raise InvalidArtifact("the index has no manifests")
    if document.config is None or document.layers is None:
        raise InvalidArtifact(
            "the manifest has no config or no layers: it is not an image manifest"
        )
    return Manifest(
        digest=digest,
        size=len(body),
        media_type=declared or IMAGE_MANIFEST,
        artifact_type=document.artifact_type or None,
        config=_descriptor(document.config, "config"),
        layers=_descriptors(document.layers, "layers"),
        annotations=annotations,
        body=body,
    )


def _decode(body: bytes) -> _ManifestDocument:
    if len(body) > MAX_MANIFEST_BYTES:
        raise InvalidArtifact(f"the manifest has more than {MAX_MANIFEST_BYTES} bytes")
    if body.lstrip()[:1] == b"<":
        raise InvalidArtifact(
            "the registry answered with a page instead of a manifest; is there a login page or a "
            "captive portal between this node and the registry?"
        )
    try:
        return msgspec.json.decode(body, type=_ManifestDocument)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidArtifact(f"the manifest cannot be read: {str(error)[:200]}") from error
    except RecursionError as error:
        raise InvalidArtifact("the manifest is nested too deeply") from error


def _descriptors(documents: list[_DescriptorDocument], where: str) -> tuple[Descriptor, ...]:
    if len(documents) > MAX_LAYERS:
        raise InvalidArtifact(
            f"the manifest lists {len(documents)} {where}; at most {MAX_LAYERS} are read"
        )
    return tuple(_descriptor(one, f"{where}[{number}]") for number, one in enumerate(documents))


def _descriptor(document: _DescriptorDocument, where: str) -> Descriptor:
    if not 0 <= document.size <= MAX_BLOB_BYTES:
        raise InvalidArtifact(f"{where} has the size {document.size}, which no blob has")
    try:
        digest = Digest.parse(document.digest)
    except InvalidArtifact as error:
        raise InvalidArtifact(f"{where}: {error.message}") from error
    found = document.platform
    platform = Platform(found.os, found.architecture, found.variant) if found else None
    return Descriptor(
        media_type=document.media_type,
        digest=digest,
        size=document.size,
        annotations=types.MappingProxyType(document.annotations or {}),
        artifact_type=document.artifact_type or None,
        platform=platform,
    )
