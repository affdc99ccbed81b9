"""The referrers interface of the distribution specification 1.1, which Debian's registry lacks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fetcher.oci import IMAGE_INDEX, Digest
from tests.support.faulty_registry import Fault, Reply
from tests.support.registry import OCI_MANIFEST

if TYPE_CHECKING:
    from tests.support.faulty_registry import FaultyRegistry
    from tests.support.registry import RegistryServer


def list_referrers(
    faulty: FaultyRegistry, upstream: RegistryServer, repository: str, subject: Digest
) -> Fault:
    """Let ``faulty`` list what was pushed through it to a repository and has this subject."""

    def listed(_: Reply) -> Reply:
        rows = []
        for noted in list(faulty.requests):
            target = noted.path.partition(f"/v2/{repository}/manifests/")[2]
            if noted.method == "PUT" and target.startswith("sha256:"):
                row = _row(upstream, repository, target, subject)
                rows += [row] if row else []
        body = json.dumps({"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": rows})
        return Reply(200, {"Content-Type": IMAGE_INDEX}, body.encode())

    return faulty.add(f"/v2/{repository}/referrers/", change=listed)


def _row(
    upstream: RegistryServer, repository: str, target: str, subject: Digest
) -> dict[str, Any] | None:
    _, headers, body = upstream.request(
        "GET", repository, f"/v2/{repository}/manifests/{target}", headers={"Accept": OCI_MANIFEST}
    )
    document = json.loads(body)
    if document.get("subject", {}).get("digest") != str(subject):
        return None
    return {
        "mediaType": headers["content-type"],
        "digest": target,
        "size": len(body),
        "artifactType": document["artifactType"],
        "annotations": document.get("annotations", {}),
    }
