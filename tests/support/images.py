"""An ordinary container image, of which no model is made."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fetcher.oci import Digest
from tests.support.models import tar_files

if TYPE_CHECKING:
    from tests.support.registry import RegistryServer


@dataclass(frozen=True)
class Image:
    """What was pushed."""

    reference: str
    manifest: Digest
    config: Digest
    layer: Digest


def push_image(
    registry: RegistryServer, repository: str, tag: str = "v1", *, size: int = 300_000
) -> Image:
    """Push an image of one gzip layer with a file of random bytes."""
    archive = tar_files({"random.bin": os.urandom(size), "hello.txt": b"hello\n"})
    layer = gzip.compress(archive, mtime=0)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{hashlib.sha256(archive).hexdigest()}"],
            },
        }
    ).encode()
    descriptors = {
        kind: {
            "mediaType": media_type,
            "digest": str(registry.push_blob(repository, data)),
            "size": len(data),
        }
        for kind, media_type, data in (
            ("config", "application/vnd.oci.image.config.v1+json", config),
            ("layer", "application/vnd.oci.image.layer.v1.tar+gzip", layer),
        )
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptors["config"],
        "layers": [descriptors["layer"]],
    }
    digest = registry.push_manifest(repository, tag, json.dumps(manifest).encode())
    return Image(registry.reference(repository, tag), digest, Digest.of(config), Digest.of(layer))
