"""Nodes offer the lists of chunk digests that they know to others that may read the model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import trio

from fetcher.chunk_digests import LIST_TYPE, ChunkDigests, ChunkHasher
from fetcher.modelpack import Kind
from fetcher.oci import Digest, Reference
from fetcher.store.lists import ListRecord
from tests.support.models import ModelBuilder
from tests.support.peer_server import peer_node
from tests.support.stores import CHUNK, pull

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.registry import RegistryServer


def test_a_list_is_offered_as_a_referrer(registry: RegistryServer, tmp_path: Path) -> None:
    data = bytes(range(256)) * 2048
    model = ModelBuilder().add_raw("all.bin", data, Kind.WEIGHT)
    reference = Reference.parse(model.push(registry, "peers/offers"))
    hasher = ChunkHasher(Digest.of(data), len(data), CHUNK)
    hasher.update(data)
    body = ChunkDigests.over([hasher.finish()], CHUNK).encode()

    async def main() -> None:
        async with peer_node(tmp_path / "root") as node:
            ns = f"?ns={registry.address}"
            url = f"/v2/peers/offers/referrers/{model.digest}{ns}"
            assert (await node.client.get(url)).status_code == 404
            await pull(node.pulls, str(reference))
            record = ListRecord(body, time.time())
            node.store.lists.put(reference.name, model.digest, record)
            listed = await node.client.get(url)
            assert listed.status_code == 200
            [row] = listed.json()["manifests"]
            assert row["artifactType"] == LIST_TYPE
            filtered = await node.client.get(f"{url}&artifactType=application/other")
            assert filtered.json()["manifests"] == []
            assert filtered.headers["oci-filters-applied"] == "artifactType"
            manifest = await node.client.get(f"/v2/peers/offers/manifests/{row['digest']}{ns}")
            assert str(Digest.of(manifest.content)) == row["digest"]
            assert manifest.json()["subject"]["digest"] == str(model.digest)
            [layer] = manifest.json()["layers"]
            found = await node.client.get(f"/v2/peers/offers/blobs/{layer['digest']}{ns}")
            assert found.content == body
            elsewhere = f"/v2/peers/others/referrers/{model.digest}{ns}"
            assert (await node.client.get(elsewhere)).status_code == 404

    trio.run(main)
