"""What a node fetches for others takes no more room than that, and costs its own pods nothing."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.modelpack import Packing, read_model
from fetcher.store import Limits
from tests.support.models import Member, ModelBuilder
from tests.support.peer_server import OwnsAll, PeerNode, Setup, peer_node
from tests.support.stores import pull, weights

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.registry import RegistryServer

MIB = 1024 * 1024
CAP = Limits(max_size=24 * MIB, min_free=0)


async def ask(node: PeerNode, url: str, data: bytes, number: int) -> int:
    """The status of the answer to a member that asks for one MiB, whose bytes are right."""
    start = number * MIB
    part = {"Range": f"bytes={start}-{start + MIB - 1}"}
    answer = await node.client.get(url, headers=part, timeout=30)
    if answer.status_code == 206:
        assert answer.content == data[start : start + MIB]
    return answer.status_code


@pytest.mark.parametrize("packing", [Packing.RAW, Packing.TAR, Packing.TAR_ZSTD])
def test_what_others_want_evicts_no_model(
    registry: RegistryServer, tmp_path: Path, packing: Packing
) -> None:
    kept, large = weights(8 * MIB), ModelBuilder()
    if packing is Packing.RAW:
        large.add_raw("model.safetensors", os.urandom(20 * MIB))
    else:
        large.add_tar([Member("model.safetensors", os.urandom(20 * MIB))], packing)
    kept.push(registry, "fills/kept", "v1")
    large.push(registry, f"fills/large-{packing.value.replace('+', '-')}", "v1")
    [layer] = read_model(large.manifest()).layers
    [mine] = read_model(kept.manifest()).layers
    data = large.blobs[layer.descriptor.digest]

    async def main() -> None:
        setup = Setup(ownership=OwnsAll(), limits=CAP, linger=0.2)
        async with peer_node(tmp_path / "root", setup) as node:
            await pull(node.pulls, registry.reference("fills/kept", "v1"))
            url = node.blob_url(
                f"fills/large-{packing.value.replace('+', '-')}",
                layer.descriptor.digest,
                registry.address,
            )
            assert await ask(node, url, data, 3) == 206
            assert node.store.space.usage().used < 12 * MIB
            statuses = [await ask(node, url, data, number) for number in range(20)]
            # as much as there is room for, and then a quick no: the asker goes on elsewhere
            assert statuses[0] == 206
            assert 404 in statuses
            assert set(statuses) == {206, 404}
            assert node.store.has_content(mine)
            assert await ask(node, url, data, 3) == 206

    trio.run(main)


def test_what_others_wanted_makes_room_for_a_pull(registry: RegistryServer, tmp_path: Path) -> None:
    data = os.urandom(14 * MIB)
    digest = registry.push_blob("fills/idle", data)
    weights(16 * MIB).push(registry, "fills/wanted", "v1")

    async def main() -> None:
        setup = Setup(ownership=OwnsAll(), limits=CAP, linger=0.2)
        async with peer_node(tmp_path / "root", setup) as node:
            url = node.blob_url("fills/idle", digest, registry.address)
            for number in range(14):
                assert await ask(node, url, data, number) == 206
            with trio.fail_after(10):
                while node.jobs.running(digest) is not None:  # noqa: ASYNC110 (no event for it)
                    await trio.sleep(0.01)
            tree = await pull(node.pulls, registry.reference("fills/wanted", "v1"))
            assert tree.files == 1

    trio.run(main)
