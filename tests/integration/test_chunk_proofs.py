"""Pulls with chunk digests: every chunk is proven when it comes, and nobody has to be believed."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.chunk_digests import BlobChunks, ChunkDigests, ChunkHasher
from fetcher.chunk_lists import ChunkLists
from fetcher.chunk_sizes import chunk_size_for
from fetcher.errors import ChunkMismatch, DigestMismatch, ModelError
from fetcher.modelpack import Kind, Packing, Selection, read_model
from fetcher.oci import Digest, Reference
from fetcher.publishing import publish
from fetcher.ranges import Range
from fetcher.store import Store
from tests.support.models import Member, ModelBuilder
from tests.support.proxy import Faults, Proxy
from tests.support.registry_calls import NOBODY, QUICK
from tests.support.sources import mirrors_toml, shown, write_hosts
from tests.support.stores import (
    CHUNK,
    NO_FLOOR,
    REGISTRIES,
    STILL,
    node_parts,
    pull,
    pulling,
    weights,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fetcher.registry import RegistrySettings
    from fetcher.store.blobs import PartialBlob
    from tests.support.faulty_registry import FaultyRegistry, Reply
    from tests.support.registry import RegistryServer


def chunks_of(data: bytes, chunk_size: int = CHUNK, digest: Digest | None = None) -> BlobChunks:
    """The right list; of other bytes a forged one, for ``digest``."""
    hasher = ChunkHasher(Digest.of(data), len(data), chunk_size)
    hasher.update(data)
    found = hasher.finish()
    return found if digest is None else replace(found, digest=digest)


def push_list(
    registry: RegistryServer, repository: str, builder: ModelBuilder, *blobs: BlobChunks
) -> None:
    body = ChunkDigests.over(blobs, CHUNK).encode()
    pinned = Reference.parse(registry.reference(repository)).with_digest(builder.digest)

    async def main() -> None:
        await publish(body, CHUNK, pinned, NOBODY, QUICK)

    trio.run(main)


def indexed(registry: RegistryServer, at: str, builder: ModelBuilder, repository: str) -> str:
    """Push a model with its list; its reference at the proxy ``at``."""
    builder.push(registry, repository, "v1")
    sizes = {
        layer.descriptor.digest: chunk_size_for(layer, CHUNK)
        for layer in read_model(builder.manifest()).layers
    }
    large = [data for data in builder.blobs.values() if len(data) > CHUNK]
    chunks = (chunks_of(one, sizes[Digest.of(one)]) for one in large)
    push_list(registry, repository, builder, *chunks)
    return f"{at}/{repository}:v1"


def listed(root: Path, reference: str, builder: ModelBuilder) -> None:
    """Have a node know the list before it pulls: else it comes beside the first chunks."""

    async def main() -> None:
        async with node_parts(root, NO_FLOOR) as node:
            lists = ChunkLists(node.store, node.registry, CHUNK)
            model = read_model(builder.manifest())
            assert await lists.find(Reference.parse(reference), model, NOBODY) is not None

    trio.run(main)


def pulled(
    root: Path, reference: str, registries: RegistrySettings = REGISTRIES
) -> dict[str, bytes]:
    async def main() -> dict[str, bytes] | ModelError:
        with trio.fail_after(60):
            async with pulling(root, NO_FLOOR, registries=registries) as (pulls, _):
                try:
                    return shown(await pull(pulls, reference))
                except ModelError as error:
                    # raised out there: nurseries would put it into a group
                    return error

    result = trio.run(main)
    if isinstance(result, ModelError):
        raise result
    return result


def files_of(builder: ModelBuilder) -> dict[str, bytes]:
    return {
        layer.path: builder.blobs[layer.descriptor.digest]
        for layer in read_model(builder.manifest()).layers
        if layer.path is not None
    }


def with_mirror(tmp_path: Path, home: Proxy, *mirrors: Proxy) -> RegistrySettings:
    text = mirrors_toml(*(one.address for one in mirrors))
    write_hosts(tmp_path / "certs.d", home.address, text)
    return replace(REGISTRIES, hosts_dir=tmp_path / "certs.d")


# -- one blob --------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(
    root: Path, builder: ModelBuilder, chunk_size: int | None = None
) -> Iterator[tuple[Store, PartialBlob]]:
    store = Store.open(root, CHUNK, NO_FLOOR)
    partial = store.open_partial(read_model(builder.manifest()).layers[0], "r/m", chunk_size)
    try:
        yield store, partial
    finally:
        partial.close()
        store.close()


def blob_of(builder: ModelBuilder) -> bytes:
    return builder.blobs[read_model(builder.manifest()).layers[0].descriptor.digest]


def test_what_was_proven_is_not_read_again(tmp_path: Path) -> None:
    builder = weights(4 * CHUNK + 7)
    data = blob_of(builder)
    with opened(tmp_path, builder) as (store, partial):
        assert partial.expect(chunks_of(data), "r/m")
        for start in range(4 * CHUNK, -1, -CHUNK):
            part = data[start : start + CHUNK]
            assert partial.sink(Range(start, start + len(part)))(part)
            assert partial.is_trusted(start // CHUNK)
        # behind its back, to see that nobody looks
        os.truncate(store.blob_path(partial.digest), 0)
        assert partial.verify(STILL) is True


def test_a_wrong_chunk_is_not_there_and_comes_again_whole(tmp_path: Path) -> None:
    builder = weights(3 * CHUNK)
    data = blob_of(builder)
    with opened(tmp_path, builder) as (_, partial):
        partial.expect(chunks_of(data), "r/m")
        sink = partial.sink(Range(0, len(data)), trusted=True)
        sink.sender = "a"
        assert sink(data[: CHUNK + 100])
        sink.sender = "b"
        with pytest.raises(ChunkMismatch, match="chunk 1") as raised:
            sink(bytes(2 * CHUNK - 100))
        # whoever of the two it was
        assert not raised.value.sole
        assert sink.remaining == Range(CHUNK, 3 * CHUNK)
        assert [partial.has(number) for number in range(3)] == [True, False, False]
        assert partial.fill(1) == (0, False)
        with pytest.raises(ChunkMismatch) as raised:
            sink(bytes(CHUNK))
        assert raised.value.sole
        assert sink(data[CHUNK:])
        assert partial.verify(STILL) is True


def test_what_another_names_list_proves_is_not_trusted(tmp_path: Path) -> None:
    builder = weights(2 * CHUNK)
    data = blob_of(builder)
    with opened(tmp_path, builder) as (_, partial):
        partial.expect(chunks_of(data), "r/other")
        assert partial.sink(Range(0, len(data)))(data)
        assert not partial.is_trusted(0)
        assert partial.verify(STILL) is True


def test_what_an_earlier_process_left_is_proven_before_it_counts(tmp_path: Path) -> None:
    builder = weights(4 * CHUNK)
    data = blob_of(builder)
    with opened(tmp_path, builder) as (store, partial):
        wrong = data[:CHUNK] + bytes(CHUNK) + data[2 * CHUNK :]
        assert partial.sink(Range(0, 3 * CHUNK))(wrong[: 3 * CHUNK])
    with opened(tmp_path, builder) as (store, partial):
        partial.expect(chunks_of(data), "r/m")
        assert partial.verify(STILL, 0.0) is None
        # only the one that is wrong
        assert [partial.has(number) for number in range(4)] == [True, False, True, False]
        assert partial.sink(Range(CHUNK, 2 * CHUNK))(data[CHUNK : 2 * CHUNK])
        assert partial.sink(Range(3 * CHUNK, 4 * CHUNK))(data[3 * CHUNK :])
        assert partial.verify(STILL) is True
        assert store.blob_path(partial.digest).read_bytes() == data


def test_digests_that_are_given_up_prove_nothing(tmp_path: Path) -> None:
    """A forged list passes forged chunks, and the blob's own digest has the last word."""
    builder = weights(3 * CHUNK)
    data, forged = blob_of(builder), os.urandom(3 * CHUNK)
    with opened(tmp_path, builder) as (_, partial):
        partial.expect(chunks_of(forged, digest=partial.digest), "r/m")
        sink = partial.sink(Range(0, len(data)))
        assert sink(forged[: 2 * CHUNK])
        with pytest.raises(ChunkMismatch):
            sink(forged[2 * CHUNK :])
        with pytest.raises(ChunkMismatch):
            sink(data[2 * CHUNK :])
        partial.expect(None)
        # nothing but that list has spoken for these
        assert [partial.has(number) for number in range(3)] == [False, False, False]
        assert partial.done == 0
        assert sink(data[2 * CHUNK :])
        assert partial.sink(Range(0, 2 * CHUNK), trusted=True)(data[: 2 * CHUNK])
        assert partial.verify(STILL) is True


def test_what_the_registry_itself_sent_outlives_digests_that_are_given_up(tmp_path: Path) -> None:
    builder = weights(3 * CHUNK)
    data = blob_of(builder)
    with opened(tmp_path, builder) as (_, partial):
        partial.expect(chunks_of(data), "r/m")
        assert partial.sink(Range(0, 2 * CHUNK), trusted=True)(data[: 2 * CHUNK])
        partial.expect(None)
        assert [partial.is_trusted(number) for number in range(3)] == [True, True, False]
        assert partial.sink(Range(2 * CHUNK, 3 * CHUNK))(data[2 * CHUNK :])
        assert not partial.is_trusted(2)
        assert partial.verify(STILL) is True


def test_chunks_are_as_large_as_those_with_digests_unless_begun(tmp_path: Path) -> None:
    builder = weights(5 * CHUNK)
    data = blob_of(builder)
    with opened(tmp_path / "new", builder, 2 * CHUNK) as (_, partial):
        assert partial.chunk_size == 2 * CHUNK
        assert partial.expect(chunks_of(data, 2 * CHUNK), "r/m")
    with opened(tmp_path / "begun", builder) as (_, partial):
        assert partial.sink(Range(0, CHUNK))(data[:CHUNK])
    with opened(tmp_path / "begun", builder, 2 * CHUNK) as (_, partial):
        assert not partial.expect(chunks_of(data, 2 * CHUNK), "r/m")
        assert partial.sink(Range(CHUNK, len(data)))(data[CHUNK:])
        assert partial.verify(STILL) is True


# -- pulls -----------------------------------------------------------------------------------------


def everything() -> ModelBuilder:
    tree = [Member(f"data/{number}.bin", os.urandom(90_000)) for number in range(9)]
    return (
        ModelBuilder()
        .add_raw("model.safetensors", os.urandom(9 * CHUNK + 1))
        .add_tar(tree, Packing.TAR, Kind.WEIGHT_CONFIG)
        .add_tar([Member("code/b.bin", os.urandom(5 * CHUNK))], Packing.TAR_ZSTD, Kind.CODE)
        .add_raw("config.json", b"{}", Kind.WEIGHT_CONFIG)
    )


def test_every_packing_is_pulled_with_a_list(
    registry: RegistryServer, home: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = everything()
    reference = indexed(registry, home.address, builder, "proofs/all")
    caplog.set_level(logging.INFO)
    listed(tmp_path, reference, builder)
    files = pulled(tmp_path, reference)
    assert "has chunk digests for 3 blobs" in caplog.text
    assert len(files) == 12
    assert files["model.safetensors"] == files_of(builder)["model.safetensors"]
    assert not caplog.records or "ERROR" not in {one.levelname for one in caplog.records}


def test_a_lying_mirror_is_found_out_at_once_and_costs_one_chunk(
    registry: RegistryServer,
    home: Proxy,
    mirror: Proxy,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    builder = weights(64 * CHUNK)
    reference = indexed(registry, home.address, builder, "proofs/liar")
    mirror.faults = Faults(corrupt_at=20 * CHUNK + 5)
    listed(tmp_path, reference, builder)
    before = home.counts.total
    assert pulled(tmp_path, reference, with_mirror(tmp_path, home, mirror)) == files_of(builder)
    assert "what came for chunk 20 of blob" in caplog.text
    assert f"it came from {mirror.address}" in caplog.text
    assert "fetching anew" not in caplog.text
    # what the mirror had sent before is proven, and stays
    assert 4 * CHUNK <= home.counts.total - before < 60 * CHUNK


def test_without_a_list_the_same_liar_costs_all_that_came(
    registry: RegistryServer,
    home: Proxy,
    mirror: Proxy,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    builder = weights(64 * CHUNK)
    builder.push(registry, "proofs/none", "v1")
    mirror.faults = Faults(corrupt_at=20 * CHUNK + 5)
    reference = f"{home.address}/proofs/none:v1"
    assert pulled(tmp_path, reference, with_mirror(tmp_path, home, mirror)) == files_of(builder)
    assert "fetching anew" in caplog.text


def test_a_list_that_is_wrong_costs_no_pull(
    registry: RegistryServer, home: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = weights(9 * CHUNK)
    data = blob_of(builder)
    builder.push(registry, "proofs/wrong", "v1")
    reference = f"{home.address}/proofs/wrong:v1"
    wrong = chunks_of(os.urandom(len(data)), digest=Digest.of(data))
    push_list(registry, "proofs/wrong", builder, wrong)
    listed(tmp_path, reference, builder)
    assert pulled(tmp_path, reference) == files_of(builder)
    assert "contradict" in caplog.text
    caplog.clear()

    async def again() -> None:
        async with pulling(tmp_path, NO_FLOOR) as (_, store):
            record = store.lists.get(Reference.parse(reference).name, builder.digest)
            assert record is not None
            # in its place is what the node made itself, of the bytes that are right
            assert record.body == ChunkDigests.over([chunks_of(data)], CHUNK).encode()

    trio.run(again)


def test_a_forged_list_cannot_make_forged_bytes_right(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    """Who owns a repository, and its registry, poisons no blob of the node."""
    builder = weights(4 * CHUNK)
    data, forged = blob_of(builder), os.urandom(4 * CHUNK)
    builder.push(registry, "proofs/forged", "v1")
    reference = f"{home.address}/proofs/forged:v1"
    lie = chunks_of(forged, digest=Digest.of(data))
    push_list(registry, "proofs/forged", builder, lie)
    stored = registry.blob_path(Digest.of(data))
    stored.write_bytes(forged)
    listed(tmp_path, reference, builder)
    with pytest.raises(DigestMismatch):
        pulled(tmp_path, reference)

    async def look() -> None:
        async with pulling(tmp_path, NO_FLOOR) as (_, store):
            assert not store.is_complete(Digest.of(data))

    trio.run(look)
    stored.write_bytes(data)
    assert pulled(tmp_path, reference) == files_of(builder)


def test_a_registry_that_sends_one_wrong_chunk_is_asked_again(
    registry: RegistryServer,
    faulty: FaultyRegistry,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    builder = weights(9 * CHUNK)
    reference = indexed(registry, faulty.address, builder, "proofs/once")

    def corrupt(reply: Reply) -> Reply:
        return replace(reply, body=bytes([reply.body[0] ^ 1]) + reply.body[1:])

    faulty.add(str(Digest.of(blob_of(builder))), change=corrupt, method="GET", times=1)
    listed(tmp_path, reference, builder)
    assert pulled(tmp_path, reference) == files_of(builder)
    assert "what came for chunk 0" in caplog.text
    assert "contradict" not in caplog.text


def test_blobs_that_end_with_a_chunk_or_a_byte_behind_it(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(3 * CHUNK, 3 * CHUNK + 1, CHUNK, CHUNK + 1)
    reference = indexed(registry, home.address, builder, "proofs/ends")
    listed(tmp_path, reference, builder)
    assert pulled(tmp_path, reference) == files_of(builder)


def test_a_node_that_completed_a_model_has_its_list(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    """Made on the way, while its blobs were hashed: others may have it from here."""
    builder = everything()
    builder.push(registry, "proofs/made", "v1")
    reference = f"{home.address}/proofs/made:v1"

    async def main() -> None:
        async with pulling(tmp_path, NO_FLOOR) as (pulls, store):
            await pull(pulls, reference)
            record = store.lists.get(Reference.parse(reference).name, builder.digest)
            assert record is not None
            assert record.body is not None
            blobs = [layer.descriptor for layer in read_model(builder.manifest()).layers]
            found = ChunkDigests.parse(record.body, blobs)
            large = [data for data in builder.blobs.values() if len(data) > CHUNK]
            assert len(found.blobs) == len(large) == 3
            for data in large:
                known = found.of(Digest.of(data))
                assert known is not None
                assert known == chunks_of(data, known.chunk_size)

    trio.run(main)


def test_no_list_is_made_of_a_part_of_a_model(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(3 * CHUNK, 2 * CHUNK)
    builder.push(registry, "proofs/part", "v1")
    reference = f"{home.address}/proofs/part:v1"

    async def main() -> None:
        async with pulling(tmp_path, NO_FLOOR) as (pulls, store):
            await pull(pulls, reference, Selection(exclude_patterns=("model-1*",)))
            record = store.lists.get(Reference.parse(reference).name, builder.digest)
            # the registry may not have said yet that it has none
            assert record is None or record.body is None

    trio.run(main)
