"""The peer server with a real registry behind it: who gets what, and from where."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from fetcher.oci import Digest
from tests.support.models import tiny_model
from tests.support.peer_server import OwnsAll, Setup, peer_node
from tests.support.stores import CHUNK, pull, weights

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.registry import RegistryServer

NOTHING = "sha256:" + 64 * "0"


def test_what_is_in_the_store_is_served_in_parts(registry: RegistryServer, tmp_path: Path) -> None:
    model = weights(5 * CHUNK + 3)
    reference = model.push(registry, "peers/stored")
    data = max(model.blobs.values(), key=len)
    digest = Digest.of(data)

    async def main() -> None:
        async with peer_node(tmp_path / "root") as node:
            await pull(node.pulls, reference)
            url = node.blob_url("peers/stored", digest, registry.address)
            whole = await node.client.get(url)
            assert whole.status_code == 200
            assert whole.content == data
            assert whole.headers["docker-content-digest"] == str(digest)
            assert whole.headers["model-csi-have"] == "all"
            part = await node.client.get(url, headers={"Range": f"bytes={CHUNK}-{2 * CHUNK - 1}"})
            assert part.status_code == 206
            assert part.content == data[CHUNK : 2 * CHUNK]
            assert part.headers["content-range"] == f"bytes {CHUNK}-{2 * CHUNK - 1}/{len(data)}"
            end = await node.client.get(url, headers={"Range": "bytes=-3"})
            assert end.content == data[-3:]
            beyond = await node.client.get(url, headers={"Range": f"bytes={len(data)}-"})
            assert beyond.status_code == 416
            assert beyond.headers["content-range"] == f"bytes */{len(data)}"
            head = await node.client.head(url)
            assert head.headers["content-length"] == str(len(data))
            assert head.content == b""
            assert node.served.from_store == 3

    trio.run(main)


def test_a_node_fetches_what_it_owns_and_says_no_to_the_rest(
    registry: RegistryServer, tmp_path: Path
) -> None:
    data = os.urandom(5 * CHUNK + 3)
    digest = registry.push_blob("peers/owned", data)

    async def main() -> None:
        async with peer_node(tmp_path / "other") as node:
            url = node.blob_url("peers/owned", digest, registry.address)
            missing = await node.client.get(url, headers={"Range": f"bytes=0-{CHUNK - 1}"})
            assert missing.status_code == 404
            assert missing.json()["errors"][0]["code"] == "BLOB_UNKNOWN"
        async with peer_node(tmp_path / "owner", Setup(ownership=OwnsAll())) as node:
            url = node.blob_url("peers/owned", digest, registry.address)
            second = {"Range": f"bytes={CHUNK}-{2 * CHUNK - 1}"}
            found = await node.client.get(url, headers=second)
            assert (found.status_code, found.content) == (206, data[CHUNK : 2 * CHUNK])
            assert node.served.filled == 1
            again = await node.client.get(url, headers=second)
            assert again.content == found.content
            assert node.served.passed_on == 1
            job = node.jobs.running(digest)
            assert job is not None
            assert job.done == CHUNK
            assert again.headers["model-csi-have"] == f"{CHUNK}:40"

    trio.run(main)


def test_foreign_clients_get_everything(registry: RegistryServer, tmp_path: Path) -> None:
    model = tiny_model()
    reference = model.push(registry, "peers/foreign")

    async def main() -> None:
        async with peer_node(tmp_path / "root") as node:
            del node.client.headers["Model-CSI-From"]
            ns = registry.address
            by_tag = await node.client.get(f"/v2/peers/foreign/manifests/latest?ns={ns}")
            assert by_tag.status_code == 200
            assert by_tag.content == model.manifest().body
            digest = by_tag.headers["docker-content-digest"]
            by_digest = await node.client.get(f"/v2/peers/foreign/manifests/{digest}?ns={ns}")
            assert by_digest.content == by_tag.content
            for blob, data in model.blobs.items():
                found = await node.client.get(node.blob_url("peers/foreign", blob, ns))
                assert found.content == data
            assert reference.endswith("latest")

    trio.run(main)
