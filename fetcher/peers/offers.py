"""The lists of chunk digests that a node knows, offered to whom may read the model.

Distribution specification 1.1, "Listing Referrers". What a list says is proven by the blob's own
digest, so it may come from anybody; a node that has it saves others the way to the registry, and
offers it also where the registry itself lists nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from fetcher.chunk_digests import LIST_TYPE, ChunkDigests
from fetcher.chunk_documents import EMPTY, list_manifest, list_row, with_row
from fetcher.errors import InvalidArtifact
from fetcher.oci import IMAGE_INDEX, IMAGE_MANIFEST, Digest
from fetcher.peers.access import Asker
from fetcher.peers.requests import Refusal

if TYPE_CHECKING:
    from fetcher.peers.http import HttpConnection
    from fetcher.peers.manifests import AllowingManifests
    from fetcher.peers.requests import Asked
    from fetcher.policy import ReferencePolicy
    from fetcher.store.store import Store

_MAX_KNOWN: Final = 4096


@dataclass(frozen=True, slots=True)
class _Offer:
    """A list, and the documents around it."""

    body: bytes
    manifest: bytes
    index: bytes

    def find(self, digest: Digest) -> tuple[str, bytes] | None:
        """Media type and bytes of one of them."""
        for media_type, data in (
            (IMAGE_MANIFEST, self.manifest),
            ("application/octet-stream", self.body),
            ("application/octet-stream", EMPTY),
        ):
            if digest.matches(data):
                return media_type, data
        return None


class Offers:
    """The lists of a node, for others. Belongs to the trio thread."""

    def __init__(self, store: Store, rights: AllowingManifests, policy: ReferencePolicy) -> None:
        self._store = store
        self._rights = rights
        self._policy = policy
        self._subjects: OrderedDict[tuple[str, Digest], Digest] = OrderedDict()
        """By a repository's name and the digest of something offered: the model that it is about.

        Documents are made anew each time, as lists may have megabytes.
        """

    async def answer(self, connection: HttpConnection, asked: Asked) -> None:
        """Answer with what refers to a model. Raises :class:`Refusal` and ``ModelError``."""
        offer = await self._offer(asked, asked.digest)
        if offer is None:
            raise Refusal(404, "MANIFEST_UNKNOWN", "nothing is known that refers to it")
        for data in (offer.manifest, offer.body, EMPTY):
            key = asked.reference.name, Digest.of(data)
            self._subjects[key] = asked.digest
            self._subjects.move_to_end(key)
        while len(self._subjects) > _MAX_KNOWN:
            self._subjects.popitem(last=False)
        filtered = (("OCI-Filters-Applied", "artifactType"),) if asked.artifact_type else ()
        await connection.answer(200, (("Content-Type", IMAGE_INDEX), *filtered), offer.index)

    async def answer_part(self, connection: HttpConnection, asked: Asked) -> bool:
        """Answer with a document that was offered before, if it is one."""
        digest = asked.reference.digest
        subject = digest and self._subjects.get((asked.reference.name, digest))
        offer = subject and await self._offer(asked, subject)
        found = offer.find(digest) if offer and digest else None
        if found is None:
            return False
        media_type, data = found
        headers = (("Content-Type", media_type), ("Docker-Content-Digest", str(digest)))
        await connection.answer(200, headers, data)
        return True

    async def _offer(self, asked: Asked, subject: Digest) -> _Offer | None:
        """The list of a model, if there is one, for somebody who may read the model."""
        self._policy.check(asked.reference)
        record = self._store.lists.get(asked.reference.name, subject)
        model = self._store.catalog.manifest_of(subject)
        if record is None or record.body is None or model is None:
            return None
        reference = replace(asked.reference, digest=subject)
        await self._rights.manifest(Asker(reference, asked.authorization))
        try:
            size = ChunkDigests.parse(record.body, model.layers).chunk_size
        except InvalidArtifact:
            return None
        manifest = list_manifest(record.body, size, model)
        row = list_row(manifest, Digest.of(manifest), size)
        wanted = asked.artifact_type in ("", LIST_TYPE)
        index = with_row(None, row) if wanted else _EMPTY_INDEX
        return _Offer(record.body, manifest, index)


_EMPTY_INDEX: Final = (
    b'{"schemaVersion":2,"mediaType":"' + IMAGE_INDEX.encode() + b'","manifests":[]}'
)
