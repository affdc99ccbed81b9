"""Publishing a list of chunk digests: a manifest whose subject is the model's, in its repository.

Distribution specification 1.1, "Pushing Manifests with Subject". A registry that does not keep the
list of referrers has it kept by its clients, in an index under a tag.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from fetcher.chunk_digests import LIST_TYPE
from fetcher.chunk_documents import EMPTY, list_manifest, list_row, with_row
from fetcher.errors import InvalidArtifact, Unavailable
from fetcher.oci import IMAGE_INDEX, IMAGE_MANIFEST, Digest, Manifest
from fetcher.referrers import Referrers, has, referrers_tag
from fetcher.registry import Registry, RegistrySettings
from fetcher.upload import Document, upload_document

if TYPE_CHECKING:
    from fetcher.credentials import Keychain
    from fetcher.oci import Reference

logger: Final = logging.getLogger(__name__)

_SEEN_SECONDS: Final = 10.0
"""How long a registry may take to list what it was given."""
_LOOK_SECONDS: Final = 0.5
_TAG_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class Published:
    """Where a list is."""

    digest: Digest
    """Of its manifest."""
    pushed: bool
    """False where it was there before."""
    tag: str
    """Of the index that refers to it; empty where the registry itself lists it."""


async def publish(
    body: bytes,
    chunk_size: int,
    reference: Reference,
    keychain: Keychain,
    settings: RegistrySettings,
) -> Published:
    """Push a list's document, of the model at ``reference``, which has its manifest's digest.

    A list of the same content is not pushed again, and no other one is touched. Raises
    :class:`ModelError`.
    """
    # what is pushed goes to the registry itself, so that is who is asked for it
    registry = Registry(replace(settings, hosts_dir=None))
    try:
        return await _Publishing(registry, reference, keychain, settings).run(body, chunk_size)
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(5):
            await registry.aclose()


class _Publishing:
    def __init__(
        self,
        registry: Registry,
        reference: Reference,
        keychain: Keychain,
        settings: RegistrySettings,
    ) -> None:
        if reference.digest is None:
            raise ValueError(f"{reference} has no digest")
        self._subject = reference.digest
        self._registry = registry
        self._referrers = Referrers(registry)
        self._reference = reference
        self._keychain = keychain
        self._settings = settings
        self._authorize = partial(registry.authorization, reference, keychain, "pull,push")

    async def run(self, body: bytes, chunk_size: int) -> Published:
        model = await self._registry.manifest(self._reference, self._keychain)
        if not isinstance(model, Manifest):
            raise InvalidArtifact(f"{self._reference} is an index, and not a model's manifest")
        manifest = list_manifest(body, chunk_size, model)
        digest = Digest.of(manifest)
        listed = await self._referrers.listed(
            self._reference, self._subject, LIST_TYPE, self._keychain
        )
        if listed is not None:
            if has(listed, digest):
                return Published(digest, pushed=False, tag="")
            await self._send(str(digest), IMAGE_MANIFEST, manifest, (body, EMPTY))
            await self._wait_until_listed(digest)
            return Published(digest, pushed=True, tag="")
        tag = referrers_tag(self._subject)
        index = await self._referrers.tagged(self._reference, self._subject, self._keychain)
        if index is not None and has(index.manifests, digest):
            return Published(digest, pushed=False, tag=tag)
        await self._send(str(digest), IMAGE_MANIFEST, manifest, (body, EMPTY))
        await self._add_to_tag(list_row(manifest, digest, chunk_size), digest)
        return Published(digest, pushed=True, tag=tag)

    async def _send(
        self, target: str, media_type: str, body: bytes, blobs: tuple[bytes, ...] = ()
    ) -> None:
        reference = self._reference
        credentials = await self._keychain.lookup(reference.registry, reference.repository)
        document = Document(reference, credentials, target, media_type, body, blobs)
        await upload_document(document, self._authorize, self._settings)

    async def _wait_until_listed(self, digest: Digest) -> None:
        with trio.move_on_after(_SEEN_SECONDS):
            while True:
                listed = await self._referrers.listed(
                    self._reference, self._subject, LIST_TYPE, self._keychain
                )
                if has(listed or (), digest):
                    return
                await trio.sleep(_LOOK_SECONDS)
        raise Unavailable(
            f"{self._reference.registry} took the list {digest} and does not name it among what "
            f"refers to {self._subject}: nobody will find it",
            registry=self._reference.registry,
        )

    async def _add_to_tag(self, row: dict[str, Any], digest: Digest) -> None:
        """Add a row to the tagged index, and keep all others.

        Nothing keeps two clients from doing that at one time: it is looked at again afterwards.
        """
        tag = referrers_tag(self._subject)
        index = await self._referrers.tagged(self._reference, self._subject, self._keychain)
        for _ in range(_TAG_ATTEMPTS):
            await self._send(tag, IMAGE_INDEX, with_row(index.body if index else None, row))
            index = await self._referrers.tagged(self._reference, self._subject, self._keychain)
            if index is not None and has(index.manifests, digest):
                return
            logger.info("somebody else changed the tag %s at the same time; trying again", tag)
        raise Unavailable(
            f"the tag {tag} of {self._reference.name} is changed by others all the time: try again"
        )
