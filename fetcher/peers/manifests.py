"""Manifests for others: from the records to whom the registry lets read them, else by its word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fetcher.oci import IMAGE_MANIFEST
from fetcher.peers.access import Asker
from fetcher.registry import Document

if TYPE_CHECKING:
    from fetcher.oci import Reference
    from fetcher.peers.http import HttpConnection
    from fetcher.peers.requests import Asked
    from fetcher.policy import ReferencePolicy
    from fetcher.registry import Registry
    from fetcher.store.catalog import Catalog


class AllowingManifests(Protocol):
    """Who may be given which manifest; see :class:`fetcher.peers.access.Rights`."""

    async def manifest(self, asker: Asker) -> None: ...


class Manifests:
    """The manifests of a node, for others. Belongs to the trio thread."""

    def __init__(
        self,
        catalog: Catalog,
        registry: Registry,
        rights: AllowingManifests,
        policy: ReferencePolicy,
    ) -> None:
        self._catalog = catalog
        self._registry = registry
        self._rights = rights
        self._policy = policy

    async def answer(self, connection: HttpConnection, asked: Asked) -> None:
        """Answer one request. Raises ``ModelError`` and what ends a connection."""
        self._policy.check(asked.reference)
        found = await self._document(asked)
        headers = (
            ("Content-Type", found.media_type or IMAGE_MANIFEST),
            ("Docker-Content-Digest", str(found.digest)),
            ("ETag", f'"{found.digest}"'),
        )
        await connection.answer(200, headers, found.body)

    async def _document(self, asked: Asked) -> Document:
        reference: Reference = asked.reference
        asker = Asker(reference, asked.authorization)
        digest = reference.digest
        known = None if digest is None else self._catalog.manifest_of(digest)
        if known is None:
            # what a tag names is for the registry to say, each time
            return await self._registry.document(reference, asker.keychain)
        await self._rights.manifest(asker)
        return Document(known.digest, known.media_type, known.body)
