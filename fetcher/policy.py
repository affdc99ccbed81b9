"""What may be pulled at all, and when a pull may be answered from the store.

Pure decisions about references; nobody is asked anything.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fetcher.errors import AccessDenied, InvalidRequest
from fetcher.oci import DOCKER_HUB, HUB_HOSTS, Reference

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_PATTERN_CHARACTERS: Final = 512
_PART: Final = re.compile(r"[a-z0-9*](?:[a-z0-9._*-]*[a-z0-9*])?")
_ANY_DEPTH: Final = "**"


class PullPolicy(enum.Enum):
    """The words of Kubernetes' ``imagePullPolicy``, for models.

    Whatever the policy, a cached model is never handed to somebody whom the registry did not let
    read it: ``IF_NOT_PRESENT`` without a registry, and ``NEVER``, believe only a digest for which
    these same credentials were accepted before.
    """

    IF_NOT_PRESENT = "IfNotPresent"
    """Ask the registry; without an answer use what the store has."""

    ALWAYS = "Always"
    """Ask the registry; without an answer fail."""

    NEVER = "Never"
    """Use what the store has, without a word to the registry."""


@dataclass(frozen=True, slots=True)
class ModelPattern:
    """A registry, or repositories of one, that models may come from.

    ``host[:port]`` is every repository of that registry; ``host[:port]/path`` those whose path
    matches part by part, between the slashes: ``*`` stands for any characters within one part, and
    ``**`` as the last part for one part or more. Host and port are compared whole and have no
    wildcards, so that no pattern is for a name that only looks like it.
    """

    registry: str
    path: tuple[str, ...]
    """Empty for every repository."""

    @classmethod
    def parse(cls, text: str) -> ModelPattern:
        """Read a pattern; what a reference may leave out for Docker Hub must be written.

        Only ``library/`` may be missing there, as in references. Raises :class:`InvalidRequest`.
        """
        host, slash, rest = text.partition("/")
        if len(text) > MAX_PATTERN_CHARACTERS or not _names_a_host(host):
            raise _bad_pattern(text, "it does not begin with a registry's host")
        registry = _normal_registry(host)
        path = tuple(rest.split("/")) if slash else ()
        for part in path:
            if not _PART.fullmatch(part):
                raise _bad_pattern(text, f"{part[:100]!r} is no part of a repository's name")
        if any(_ANY_DEPTH in part for part in path) and not (
            path[-1] == _ANY_DEPTH and _ANY_DEPTH not in "/".join(path[:-1])
        ):
            raise _bad_pattern(text, "** can only be its last part")
        if registry == DOCKER_HUB and len(path) == 1 and path != (_ANY_DEPTH,):
            path = ("library", *path)
        return cls(registry, path)

    def matches(self, reference: Reference) -> bool:
        """Whether the pattern is for the reference's registry and repository."""
        if _normal_registry(reference.registry) != self.registry:
            return False
        if not self.path:
            return True
        parts, patterns = reference.repository.split("/"), self.path
        if patterns[-1] == _ANY_DEPTH:
            patterns = patterns[:-1]
            if len(parts) <= len(patterns):
                return False
            parts = parts[: len(patterns)]
        return len(parts) == len(patterns) and all(
            fnmatch.fnmatchcase(part, pattern)
            for part, pattern in zip(parts, patterns, strict=True)
        )

    def __str__(self) -> str:
        return "/".join((self.registry, *self.path))


@dataclass(frozen=True, slots=True)
class ReferencePolicy:
    """Which references this node pulls, whoever asks and wherever the bytes would come from."""

    allowed: tuple[ModelPattern, ...] = ()
    """What models may be; empty for every one."""
    require_digest: bool = False
    """Whether a reference has to name a digest, and a tag alone is refused."""

    @classmethod
    def parse(cls, allowed: Iterable[str], *, require_digest: bool) -> ReferencePolicy:
        """The policy of these settings. Raises :class:`InvalidRequest` for a bad pattern."""
        return cls(tuple(ModelPattern.parse(text) for text in allowed), require_digest)

    def check(self, reference: Reference) -> None:
        """Raise :class:`AccessDenied` naming the reference, the rule and its setting."""
        if self.allowed and not any(pattern.matches(reference) for pattern in self.allowed):
            raise AccessDenied(
                f"{reference} is refused by this node's policy: {reference.name} is not among the "
                f"models that it may pull (setting allowed-models: {_listed(self.allowed)})",
                reference=reference,
                setting="allowed-models",
            )
        if self.require_digest and reference.digest is None:
            raise AccessDenied(
                f"{reference} is refused by this node's policy: it names no digest (setting "
                f"require-digest); write {reference.name}@sha256:…",
                reference=reference,
                setting="require-digest",
            )


def _names_a_host(host: str) -> bool:
    """Whether a reference that begins so names a registry: the reference's own rules decide."""
    try:
        parsed = Reference.parse(f"{host}/path/name")
    except InvalidRequest:
        return False
    return parsed.repository == "path/name"


def _normal_registry(host: str) -> str:
    lower = host.lower()
    return DOCKER_HUB if lower in HUB_HOSTS else lower


def _bad_pattern(text: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{text[:200]!r} is not a pattern of models: {why}; expected a registry such as "
        "registry.example.org:5000, or repositories such as ghcr.io/acme/*"
    )


def _listed(patterns: tuple[ModelPattern, ...], most: int = 10) -> str:
    shown = ", ".join(map(str, patterns[:most]))
    return shown if len(patterns) <= most else f"{shown} and {len(patterns) - most} more"
