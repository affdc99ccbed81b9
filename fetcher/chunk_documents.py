"""The documents around a list of chunk digests: its manifest, and how an index names that. No I/O.

Image specification 1.1, "Guidelines for Artifact Usage". The same list has the same documents,
whoever makes them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from fetcher.chunk_digests import CHUNK_SIZE_KEY, LIST_TYPE
from fetcher.oci import IMAGE_INDEX, IMAGE_MANIFEST, Digest

if TYPE_CHECKING:
    from fetcher.oci import Manifest

EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
EMPTY: Final = b"{}"
"""The config of an artifact that has none."""


def list_manifest(body: bytes, chunk_size: int, subject: Manifest) -> bytes:
    """The manifest of a list, whose document is ``body``, about a model's manifest."""
    document = {
        "schemaVersion": 2,
        "mediaType": IMAGE_MANIFEST,
        "artifactType": LIST_TYPE,
        "config": _descriptor(EMPTY_TYPE, Digest.of(EMPTY), len(EMPTY)),
        "layers": [_descriptor(LIST_TYPE, Digest.of(body), len(body))],
        "subject": _descriptor(subject.media_type, subject.digest, subject.size),
        "annotations": {CHUNK_SIZE_KEY: str(chunk_size)},
    }
    return _encoded(document)


def list_row(manifest: bytes, digest: Digest, chunk_size: int) -> dict[str, Any]:
    """The list as an index names it: with its type and its annotations."""
    return {
        **_descriptor(IMAGE_MANIFEST, digest, len(manifest)),
        "artifactType": LIST_TYPE,
        "annotations": {CHUNK_SIZE_KEY: str(chunk_size)},
    }


def with_row(body: bytes | None, row: dict[str, Any]) -> bytes:
    """The index in ``body``, as it is but for one row more."""
    document: dict[str, Any] = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": []}
    if body is not None:
        document = json.loads(body)
    others = [one for one in document["manifests"] if one.get("digest") != row["digest"]]
    document["manifests"] = [*others, row]
    return _encoded(document)


def _descriptor(media_type: str, digest: Digest, size: int) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(digest), "size": size}


def _encoded(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
