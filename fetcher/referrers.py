"""Referrers: manifests that name another one as their subject; distribution specification 1.1,
"Listing Referrers".

Where a registry does not have that interface, clients keep the list themselves, in an index under
a tag that is made of the subject's digest ("Referrers Tag Schema"). Only the registry itself is
asked, with the asker's credentials: what refers to a manifest is its word, and nothing proves it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlsplit

from fetcher.errors import InvalidArtifact, NotFound, Unavailable
from fetcher.oci import IMAGE_INDEX, Index, parse_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fetcher.credentials import Keychain
    from fetcher.exchange import Answer
    from fetcher.oci import Descriptor, Digest, Reference
    from fetcher.registry import Registry

_MAX_PAGES: Final = 8
_NEXT: Final = re.compile(r"<([^<>]{1,4096})>\s*;\s*rel=\"?next\"?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Referrers:
    """What refers to manifests of a registry."""

    registry: Registry

    async def of(
        self, reference: Reference, subject: Digest, artifact_type: str, keychain: Keychain
    ) -> tuple[Descriptor, ...]:
        """The manifests of one type in the repository of ``reference`` whose subject it is.

        Nothing where there are none. Raises :class:`ModelError` as
        :meth:`fetcher.registry.Registry.manifest`.
        """
        found = await self.listed(reference, subject, artifact_type, keychain)
        if found is None:
            index = await self.tagged(reference, subject, keychain)
            found = () if index is None else index.manifests
        return tuple(one for one in found if one.artifact_type == artifact_type)

    async def listed(
        self, reference: Reference, subject: Digest, artifact_type: str, keychain: Keychain
    ) -> tuple[Descriptor, ...] | None:
        """What the registry lists; None where it does not have that interface."""
        base = f"/{reference.repository}/referrers/{subject}"
        path: str | None = f"{base}?artifactType={quote(artifact_type, safe='')}"
        what = f"what refers to {subject}"
        found: list[Descriptor] = []
        for _ in range(_MAX_PAGES):
            if path is None:
                break
            try:
                answer = await self.registry.ask_server(
                    reference, path, what, keychain, IMAGE_INDEX
                )
            except NotFound:
                return None
            if answer.is_page:
                return None
            found.extend(_index(answer, what).manifests)
            path = _next_page(answer, base)
        return tuple(found)

    async def tagged(
        self, reference: Reference, subject: Digest, keychain: Keychain
    ) -> Tagged | None:
        """The index that clients keep where the registry keeps none; None where there is none."""
        path = f"/{reference.repository}/manifests/{referrers_tag(subject)}"
        what = f"the tag {referrers_tag(subject)}, with what refers to {subject}"
        try:
            answer = await self.registry.ask_server(reference, path, what, keychain, IMAGE_INDEX)
        except NotFound:
            return None
        return Tagged(_index(answer, what).manifests, answer.body)


@dataclass(frozen=True, slots=True)
class Tagged:
    """An index of referrers, as clients keep it."""

    manifests: tuple[Descriptor, ...]
    body: bytes = field(repr=False)


def referrers_tag(subject: Digest) -> str:
    """The tag of the index of what refers to ``subject``."""
    return f"{subject.algorithm[:32]}-{subject.hex[:64]}"


def has(descriptors: Iterable[Descriptor], digest: Digest) -> bool:
    """Whether a manifest is among them."""
    return any(one.digest == digest for one in descriptors)


def _index(answer: Answer, what: str) -> Index:
    if answer.is_page:
        raise Unavailable(f"the registry answered with an HTML page when asked for {what}")
    found = parse_manifest(answer.body, answer.media_type or None)
    if not isinstance(found, Index):
        raise InvalidArtifact(f"{what} is no index")
    return found


def _next_page(answer: Answer, base: str) -> str | None:
    """Where the list goes on, RFC 8288; only below the same address, with another query."""
    match = _NEXT.search(answer.headers.get("link", ""))
    if match is None:
        return None
    target = urlsplit(match[1])
    if not target.path.endswith(base) and target.path:
        return None
    return f"{base}?{target.query}" if target.query else None
