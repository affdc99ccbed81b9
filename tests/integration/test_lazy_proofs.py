"""Lazy models with chunk digests: what proves a chunk lets it be shown, whoever sent it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from fetcher.chunk_digests import ChunkDigests, ChunkHasher
from fetcher.oci import Digest, Reference
from fetcher.publishing import publish
from fetcher.ranges import Range
from fetcher.registry import RegistrySettings
from fetcher.schedule import Prefetch
from tests.support.lazy_models import LazyNode, in_lazy_node, until
from tests.support.proxy import Faults, Proxy
from tests.support.registry_calls import NOBODY, QUICK
from tests.support.sources import mirrors_toml, write_hosts
from tests.support.stores import CHUNK, weights

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.models import ModelBuilder
    from tests.support.registry import RegistryServer


def indexed(registry: RegistryServer, repository: str) -> tuple[ModelBuilder, Digest, bytes]:
    """Push a model of one large file with its list."""
    builder = weights(64 * CHUNK)
    pinned = Reference.parse(builder.push(registry, repository, "v1")).with_digest(builder.digest)
    data = max(builder.blobs.values(), key=len)
    hasher = ChunkHasher(Digest.of(data), len(data), CHUNK)
    hasher.update(data)
    body = ChunkDigests.over([hasher.finish()], CHUNK).encode()

    async def main() -> None:
        await publish(body, CHUNK, pinned, NOBODY, QUICK)

    trio.run(main)
    return builder, Digest.of(data), data


def mirrored(tmp_path: Path, home: Proxy, mirror: Proxy) -> RegistrySettings:
    write_hosts(tmp_path / "hosts", home.address, mirrors_toml(mirror.address))
    return RegistrySettings(hosts_dir=tmp_path / "hosts", attempts=2, retry_seconds=5)


def test_what_is_proven_is_shown_though_a_mirror_sent_it(
    tmp_path: Path, registry: RegistryServer, home: Proxy, mirror: Proxy
) -> None:
    _, blob, data = indexed(registry, "lazy-proofs/mirror")
    assert str(blob) not in home.counts.bytes

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{home.address}/lazy-proofs/mirror:v1")
        await model.blob(str(blob)).want(Range(40 * CHUNK, 41 * CHUNK))
        assert node.shown(blob, 40 * CHUNK, 41 * CHUNK) == data[40 * CHUNK : 41 * CHUNK]
        assert str(blob) not in home.counts.bytes
        assert mirror.counts.bytes[str(blob)] == CHUNK

    settings = mirrored(tmp_path, home, mirror)
    in_lazy_node(tmp_path / "root", work, registries=settings, with_lists=True)


def test_a_liar_is_found_out_at_the_first_chunk_that_is_wanted(
    tmp_path: Path, registry: RegistryServer, home: Proxy, mirror: Proxy
) -> None:
    _, blob, data = indexed(registry, "lazy-proofs/liar")
    mirror.faults = Faults(corrupt_at=40 * CHUNK + 7)

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{home.address}/lazy-proofs/liar:v1")
        await model.blob(str(blob)).want(Range(40 * CHUNK, 41 * CHUNK))
        assert node.shown(blob, 40 * CHUNK, 41 * CHUNK) == data[40 * CHUNK : 41 * CHUNK]
        assert mirror.counts.bytes[str(blob)] == CHUNK
        assert home.counts.bytes[str(blob)] == CHUNK
        model = await node.open(f"{home.address}/lazy-proofs/liar:v1", Prefetch.ALL)
        await until(lambda: model.complete)
        assert model.problem is None
        assert mirror.counts.bytes[str(blob)] == CHUNK

    settings = mirrored(tmp_path, home, mirror)
    in_lazy_node(tmp_path / "root", work, registries=settings, with_lists=True)


def test_an_agent_that_comes_back_has_the_list_without_a_network(
    tmp_path: Path, registry: RegistryServer, home: Proxy, mirror: Proxy
) -> None:
    builder, blob, data = indexed(registry, "lazy-proofs/restored")
    settings = mirrored(tmp_path, home, mirror)

    async def opens(node: LazyNode) -> None:
        await node.open(f"{home.address}/lazy-proofs/restored:v1")

    async def restores(node: LazyNode) -> None:
        home.counts.requests.clear()
        model = await node.models.restore(builder.digest, "")
        await model.ready.wait()
        assert not home.counts.requests
        await model.blob(str(blob)).want(Range(0, CHUNK))
        assert node.shown(blob, 0, CHUNK) == data[:CHUNK]
        assert mirror.counts.bytes[str(blob)] == CHUNK

    in_lazy_node(tmp_path / "root", opens, registries=settings, with_lists=True)
    in_lazy_node(tmp_path / "root", restores, registries=settings, with_lists=True)


def test_a_list_that_lies_shows_nothing_wrong_of_an_honest_registry(
    tmp_path: Path, registry: RegistryServer, home: Proxy
) -> None:
    builder = weights(8 * CHUNK)
    reference = builder.push(registry, "lazy-proofs/lie", "v1")
    data = max(builder.blobs.values(), key=len)
    hasher = ChunkHasher(Digest.of(bytes(len(data))), len(data), CHUNK)
    hasher.update(bytes(len(data)))
    made = ChunkDigests.over([hasher.finish()], CHUNK).encode()
    body = made.replace(str(Digest.of(bytes(len(data)))).encode(), str(Digest.of(data)).encode())
    pinned = Reference.parse(reference).with_digest(builder.digest)

    async def publishes() -> None:
        await publish(body, CHUNK, pinned, NOBODY, QUICK)

    trio.run(publishes)
    blob = Digest.of(data)

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{home.address}/lazy-proofs/lie:v1")
        await model.blob(str(blob)).want(Range(CHUNK, 2 * CHUNK))
        assert node.shown(blob, CHUNK, 2 * CHUNK) == data[CHUNK : 2 * CHUNK]
        model = await node.open(f"{home.address}/lazy-proofs/lie:v1", Prefetch.ALL)
        await until(lambda: model.complete)
        assert model.problem is None

    in_lazy_node(tmp_path / "root", work, with_lists=True)
