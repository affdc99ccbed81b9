"""Lazy models in the agent: what is shown early, in which order, and what happens when it fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fetcher.ranges import Range
from fetcher.schedule import Prefetch
from tests.support.lazy_models import LazyNode, in_lazy_node, until
from tests.support.proxy import serve_proxy
from tests.support.stores import CHUNK, weights

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.registry import RegistryServer


def test_a_want_brings_its_chunk_and_nothing_else(tmp_path: Path, registry: RegistryServer) -> None:
    builder = weights(64 * CHUNK)
    builder.push(registry, "lazy/want", "v1")
    [blob] = [one for one, data in builder.blobs.items() if len(data) == 64 * CHUNK]
    data = builder.blobs[blob]

    with serve_proxy(registry.address) as proxy:

        async def work(node: LazyNode) -> None:
            model = await node.open(f"{proxy.address}/lazy/want:v1")
            assert node.shown(blob, 0, 1) is None
            assert not await model.blob(str(blob)).want(Range(40 * CHUNK, 40 * CHUNK + 5))
            assert node.shown(blob, 40 * CHUNK, 41 * CHUNK) == data[40 * CHUNK : 41 * CHUNK]
            assert proxy.counts.bytes[str(blob)] == CHUNK

        in_lazy_node(tmp_path / "root", work)


def test_all_is_filled_and_built(tmp_path: Path, registry: RegistryServer) -> None:
    builder = weights(16 * CHUNK, 20 * CHUNK, 3)
    builder.add_tar({"a/b": b"c" * 100000, "d": b"e"}).add_raw("empty", b"")
    builder.push(registry, "lazy/fill", "v1")
    reference = registry.reference("lazy/fill", "v1")

    async def work(node: LazyNode) -> None:
        model = await node.open(reference, Prefetch.ALL)
        await until(lambda: model.complete)
        tree = node.store.tree(model.digest, model.selection)
        assert tree is not None
        progress = model.progress()
        assert progress.done == progress.total
        assert model.problem is None
        await node.models.close(model.digest, "")
        assert not model.mountpoint.with_name(model.mountpoint.name + ".json").exists()

    in_lazy_node(tmp_path / "root", work)
