"""Lazy models in the agent: what is shown early, in which order, and what happens when it fails."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher import lazy_blobs
from fetcher.credentials import VolumeSecrets
from fetcher.download import DownloadSettings, Source
from fetcher.errors import (
    AccessDenied,
    DigestMismatch,
    InProgress,
    NoSpace,
    NotFound,
    Unauthenticated,
)
from fetcher.lazy_plan import plan_path
from fetcher.modelpack import Kind, Packing, layer_type
from fetcher.oci import Reference
from fetcher.policy import PullPolicy
from fetcher.ranges import Range
from fetcher.registry import RegistrySettings
from fetcher.schedule import Prefetch
from fetcher.store import Limits
from fetcher.transport import TransferSettings
from tests.support.lazy_models import LazyNode, in_lazy_node, until
from tests.support.models import ModelBuilder, tar_files
from tests.support.proxy import Faults, Proxy
from tests.support.sources import mirrors_toml, write_hosts
from tests.support.steps import cancelled_at
from tests.support.stores import (
    CHUNK,
    EVERYTHING,
    MIB,
    NOBODY,
    in_store,
    put_model,
    small_disk,
    weights,
)
from tests.support.token_server import PASSWORD

if TYPE_CHECKING:
    from pathlib import Path

    from fetcher.lazy import LazyModel
    from fetcher.oci import Digest
    from fetcher.store import Store
    from tests.support.registry import RegistryServer


def large(builder: ModelBuilder) -> tuple[Digest, bytes]:
    """The largest blob of a model."""
    return max(builder.blobs.items(), key=lambda one: len(one[1]))


def problem_of(model: LazyModel) -> str | None:
    return model.problem


def chunk(number: int) -> Range:
    return Range(number * CHUNK, (number + 1) * CHUNK)


# On demand


def test_a_want_brings_its_chunk_and_nothing_else(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = weights(64 * CHUNK)
    builder.push(registry, "lazy/want", "v1")
    blob, data = large(builder)

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{proxy.address}/lazy/want:v1")
        assert node.shown(blob, 0, 1) is None
        assert not await model.blob(str(blob)).want(Range(40 * CHUNK, 40 * CHUNK + 5))
        assert node.shown(blob, 40 * CHUNK, 41 * CHUNK) == data[40 * CHUNK : 41 * CHUNK]
        await until(lambda: proxy.counts.bytes.get(str(blob)) == CHUNK)

    in_lazy_node(tmp_path / "root", work)


def test_many_wants_of_everything_fetch_each_byte_once(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = weights(48 * CHUNK + 5)
    builder.push(registry, "lazy/many", "v1")
    blob, data = large(builder)

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{proxy.address}/lazy/many:v1", Prefetch.ALL)

        async def read(number: int) -> None:
            wanted = Range(number * CHUNK, min((number + 2) * CHUNK, len(data)))
            await model.blob(str(blob)).want(wanted, ahead=number % 3 == 0)
            assert node.shown(blob, wanted.start, wanted.stop) == data[wanted.start : wanted.stop]

        async with trio.open_nursery() as nursery:
            for number in range(48):
                nursery.start_soon(read, number)
        await until(lambda: model.complete)
        assert proxy.counts.bytes[str(blob)] == len(data)

    in_lazy_node(tmp_path / "root", work)


def test_a_want_comes_first_on_a_slow_link(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    chunk_size, size = MIB, 128 * MIB
    builder = ModelBuilder().add_raw("model.safetensors", os.urandom(MIB) * (size // MIB))
    builder.push(registry, "lazy/first", "v1")
    blob, data = large(builder)
    proxy.faults = Faults(bytes_per_second=4 * MIB)

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{proxy.address}/lazy/first:v1", Prefetch.ALL)
        await until(lambda: proxy.counts.total > 2 * MIB)
        for offset in (77 * MIB + 3, 101 * MIB):
            begin = trio.current_time()
            await model.blob(str(blob)).want(Range(offset, offset + 1))
            # the whole takes 32 s; alone it is a quarter of one
            assert trio.current_time() - begin < 4
            assert node.shown(blob, offset, offset + 5) == data[offset : offset + 5]
        # as much as comes in the time that the two may take; test_lazy_clients is stricter
        assert proxy.counts.total < size / 4

    in_lazy_node(tmp_path / "root", work, chunk_size=chunk_size)


def test_what_is_opened_comes_whole_and_before_others(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = weights(40 * CHUNK, 40 * CHUNK)
    builder.push(registry, "lazy/opened", "v1")
    first, second = [one for one, data in builder.blobs.items() if len(data) == 40 * CHUNK]

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{proxy.address}/lazy/opened:v1", Prefetch.OPENED)
        model.blob(str(second)).open(Range(0, 40 * CHUNK))
        await until(lambda: model.blob(str(second)).complete)
        assert str(first) not in proxy.counts.bytes

    in_lazy_node(tmp_path / "root", work)


def test_the_rate_of_the_background_is_kept_and_wants_do_not_wait_for_it(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = weights(200 * CHUNK)
    builder.push(registry, "lazy/rate", "v1")
    blob, _ = large(builder)
    rate = 8 * CHUNK
    slow = DownloadSettings(prefetch_rate=rate, transfer=TransferSettings(stall_timeout=5))

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{proxy.address}/lazy/rate:v1", Prefetch.ALL)
        begin = trio.current_time()
        await until(lambda: proxy.counts.total > 12 * CHUNK)
        seconds = trio.current_time() - begin
        # what is in the buffers of each connection has not been taken yet
        assert model.progress().done <= rate * (seconds + 2)
        with trio.fail_after(5):
            await model.blob(str(blob)).want(Range(100 * CHUNK, 200 * CHUNK))

    in_lazy_node(tmp_path / "root", work, downloads=slow)


# Archives


def test_a_tar_is_listed_by_its_headers_alone(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    files = {f"part-{number}": os.urandom(30 * CHUNK) for number in range(5)}
    builder = ModelBuilder().add_tar(files)
    builder.push(registry, "lazy/tar", "v1")
    blob, data = large(builder)

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{proxy.address}/lazy/tar:v1")
        assert not await model.blob(str(blob)).index()
        assert node.names_in(blob) == list(files)
        assert proxy.counts.total < 8 * CHUNK
        await model.blob(str(blob)).want(Range(0, len(data)))
        await until(lambda: model.complete)
        tree = node.store.tree(model.digest, model.selection)
        assert tree is not None
        assert {path.name: path.read_bytes() for path in tree.path.iterdir()} == files

    in_lazy_node(tmp_path / "root", work)


def test_headers_that_a_mirror_made_up_are_never_shown(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy, mirror: Proxy
) -> None:
    files = {f"part-{number}": os.urandom(6 * CHUNK) for number in range(4)}
    builder = ModelBuilder().add_tar(files)
    builder.push(registry, "lazy/headers", "v1")
    blob, data = large(builder)
    write_hosts(tmp_path / "hosts", proxy.address, mirrors_toml(mirror.address))
    # in the name of the first file: the archive cannot be read any further
    mirror.faults = Faults(corrupt_at=0, bytes_per_second=16 * CHUNK)

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{proxy.address}/lazy/headers:v1", Prefetch.ALL)
        await until(lambda: model.progress().done >= 4 * CHUNK)
        await model.blob(str(blob)).index()
        assert node.names_in(blob) == list(files)
        await model.blob(str(blob)).want(Range(0, len(data)))
        await until(lambda: model.complete)
        tree = node.store.tree(model.digest, model.selection)
        assert tree is not None
        assert {path.name: path.read_bytes() for path in tree.path.iterdir()} == files
        assert not problem_of(model)

    settings = RegistrySettings(hosts_dir=tmp_path / "hosts")
    in_lazy_node(tmp_path / "root", work, registries=settings)


@pytest.mark.parametrize("packing", [Packing.TAR_GZIP, Packing.TAR_ZSTD])
def test_a_compressed_layer_is_unpacked_on_first_touch(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy, packing: Packing
) -> None:
    builder = weights(40 * CHUNK).add_tar({"a": os.urandom(3 * CHUNK)}, packing, Kind.CODE)
    builder.push(registry, f"lazy/{packing.value.replace('+', '-')}", "v1")
    blob = builder.manifest().layers[1].digest

    async def work(node: LazyNode) -> None:
        name = f"{proxy.address}/lazy/{packing.value.replace('+', '-')}:v1"
        model = await node.open(name)
        assert await model.blob(str(blob)).index()
        assert node.names_in(blob) == ["a"]
        assert set(proxy.counts.bytes) == {str(blob)}

    in_lazy_node(tmp_path / "root", work)


# The whole


@pytest.mark.parametrize("prefetch", list(Prefetch))
def test_a_model_that_is_all_read_becomes_a_plain_tree(
    tmp_path: Path, registry: RegistryServer, prefetch: Prefetch
) -> None:
    builder = weights(16 * CHUNK, 20 * CHUNK, 3)
    builder.add_tar({"a/b": b"c" * 100000, "d": b"e"}).add_raw("empty", b"")
    builder.add_raw("model.safetensors.index.json", b'{"weight_map": {"t": "model-1.safetensors"}}')
    builder.push(registry, f"lazy/fill-{prefetch.value}", "v1")
    reference = registry.reference(f"lazy/fill-{prefetch.value}", "v1")

    async def work(node: LazyNode) -> None:
        model = await node.open(reference, prefetch)
        if prefetch is not Prefetch.ALL:
            for layer in builder.manifest().layers:
                blob = model.blob(str(layer.digest))
                await blob.index()
                await blob.want(Range(0, layer.size))
        await until(lambda: model.complete)
        assert node.store.tree(model.digest, model.selection) is not None
        assert model.progress().done == model.progress().total
        assert not problem_of(model)
        assert not await _opened_again_asks_for_bytes(node, reference, prefetch)
        await node.models.close(model.digest, "")
        assert not plan_path(node.store.root, model.digest, "").exists()

    in_lazy_node(tmp_path / "root", work)


async def _opened_again_asks_for_bytes(node: LazyNode, reference: str, prefetch: Prefetch) -> bool:
    model = await node.open(reference, prefetch)
    return not model.complete


def test_an_empty_store_without_room_refuses_before_a_byte(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    weights(300 * CHUNK).push(registry, "lazy/room", "v1")

    async def work(node: LazyNode) -> None:
        with pytest.raises(NoSpace):
            await node.open(f"{proxy.address}/lazy/room:v1", Prefetch.ALL)
        assert proxy.counts.total == 0

    in_lazy_node(tmp_path / "root", work, limits=Limits(max_size=8 * MIB, min_free=0))


# Truth


def test_bytes_of_a_mirror_are_not_shown_before_all_are_verified(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy, mirror: Proxy
) -> None:
    builder = weights(64 * CHUNK)
    builder.push(registry, "lazy/mirror", "v1")
    blob, data = large(builder)
    write_hosts(tmp_path / "hosts", proxy.address, mirrors_toml(mirror.address))
    mirror.faults = Faults(bytes_per_second=8 * CHUNK)

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{proxy.address}/lazy/mirror:v1", Prefetch.ALL)
        await until(lambda: model.progress().done >= 4 * CHUNK)
        # what is wanted must not have to hurry, however busy the machine is
        mirror.faults = Faults(bytes_per_second=CHUNK)
        assert node.shown(blob, 0, 5) is None
        await model.blob(str(blob)).want(Range(0, 5))
        # it was there, and was compared with the registry's
        assert node.shown(blob, 0, 5) == data[:5]
        assert proxy.counts.total == CHUNK
        mirror.faults = Faults()
        await until(lambda: model.complete)

    settings = RegistrySettings(hosts_dir=tmp_path / "hosts")
    in_lazy_node(tmp_path / "root", work, registries=settings)


def test_a_mirror_that_lies_is_found_out_and_nothing_wrong_is_shown(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy, mirror: Proxy
) -> None:
    builder = weights(64 * CHUNK)
    builder.push(registry, "lazy/liar", "v1")
    blob, data = large(builder)
    write_hosts(tmp_path / "hosts", proxy.address, mirrors_toml(mirror.address))
    mirror.faults = Faults(corrupt_at=50 * CHUNK + 7)

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{proxy.address}/lazy/liar:v1")
        await model.blob(str(blob)).want(chunk(3))
        model = await node.open(f"{proxy.address}/lazy/liar:v1", Prefetch.ALL)
        await until(lambda: model.complete)
        assert not problem_of(model)
        assert node.shown(blob, 0, len(data)) == data

    settings = RegistrySettings(hosts_dir=tmp_path / "hosts")
    in_lazy_node(tmp_path / "root", work, registries=settings)


def test_a_registry_that_sends_wrong_bytes_spoils_the_model(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = weights(32 * CHUNK, 16 * CHUNK)
    builder.push(registry, "lazy/spoiled", "v1")
    blob, _ = large(builder)
    proxy.faults = Faults(corrupt_at=20 * CHUNK)
    told = []

    class Listener:
        def spoiled(self, digest: Digest, reason: str) -> None:
            told.append((digest, reason))

        def renewed(self, ticket: str) -> None: ...

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{proxy.address}/lazy/spoiled:v1")
        model.listeners.add(Listener())
        small = model.blob(
            str(next(one for one, data in builder.blobs.items() if len(data) == 16 * CHUNK))
        )
        proxy.faults = Faults(corrupt_at=20 * CHUNK)
        await model.blob(str(blob)).want(Range(0, CHUNK))
        chunks = node.store.blob_path(blob).with_name(f"{blob.hex}.chunks")
        with chunks.open("rb") as chunk_map:
            model.blob(str(blob)).open(Range(0, 32 * CHUNK))
            await until(lambda: told)
            with pytest.raises(DigestMismatch):
                await model.blob(str(blob)).want(Range(0, 32 * CHUNK))
            # whoever had it open learns the end
            assert os.pread(chunk_map.fileno(), 1, 61) == b"\2"
        with pytest.raises(DigestMismatch):
            await model.blob(str(blob)).want(Range(0, 1))
        assert told[0][0] == blob
        assert model.problem == told[0][1]
        proxy.faults = Faults()
        await small.want(Range(0, 5))

    in_lazy_node(tmp_path / "root", work)


def test_what_one_name_sends_is_not_shown_below_another(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = weights(32 * CHUNK)
    builder.push(registry, "lazy/good", "v1")
    builder.push(registry, "lazy/evil", "v1")
    blob, data = large(builder)
    proxy.faults = Faults(corrupt_at=7)

    async def work(node: LazyNode) -> None:
        evil = await node.open(f"{proxy.address}/lazy/evil:v1")
        await evil.blob(str(blob)).want(Range(0, 5))
        assert node.shown(blob, 0, 8) != data[:8]
        with pytest.raises(InProgress, match="shares layers"):
            await node.open(f"{registry.address}/lazy/good:v1")
        await node.models.close(evil.digest, "")
        good = await node.open(f"{registry.address}/lazy/good:v1")
        assert node.store.blob_path(blob).exists()
        assert node.shown(blob, 0, 8) is None
        await good.blob(str(blob)).want(Range(0, 8))
        assert node.shown(blob, 0, 8) == data[:8]
        await good.blob(str(blob)).want(Range(0, len(data)))
        await until(lambda: good.complete)

    in_lazy_node(tmp_path / "root", work, most_shared=0)


def test_what_an_eager_pull_of_another_name_fetches_is_not_shown(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = weights(64 * CHUNK)
    builder.push(registry, "lazy/mine", "v1")
    builder.push(registry, "lazy/theirs", "v1")
    blob, data = large(builder)
    proxy.faults = Faults(corrupt_at=7, bytes_per_second=32 * CHUNK)

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{registry.address}/lazy/mine:v1")
        theirs = Reference.parse(f"{proxy.address}/lazy/theirs:v1")
        resolved = await node.pulls.resolve(theirs, NOBODY, PullPolicy.ALWAYS)
        with node.pulls.join(resolved, EVERYTHING) as pull:
            await until(lambda: pull.progress().done >= 8 * CHUNK)
            assert node.shown(blob, 0, 8) is None
            await model.blob(str(blob)).want(Range(0, 8))
            assert node.shown(blob, 0, 8) == data[:8]
            proxy.faults = Faults(corrupt_at=7)
            await pull.wait()
        assert node.shown(blob, 0, len(data)) == data
        assert not problem_of(model)

    in_lazy_node(tmp_path / "root", work)


def test_what_another_name_listed_is_not_believed(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = ModelBuilder().add_tar({"a": os.urandom(20 * CHUNK), "b": os.urandom(20 * CHUNK)})
    builder.push(registry, "lazy/listed", "v1")
    builder.push(registry, "lazy/forged", "v1")
    blob, _ = large(builder)

    async def work(node: LazyNode) -> None:
        theirs = await node.open(f"{proxy.address}/lazy/forged:v1")
        await theirs.blob(str(blob)).index()
        assert node.names_in(blob) == ["a", "b"]
        await node.models.close(theirs.digest, "")
        mine = await node.open(f"{registry.address}/lazy/listed:v1")
        with pytest.raises(AssertionError, match="no worker could list"):
            node.names_in(blob)
        await mine.blob(str(blob)).index()
        assert node.names_in(blob) == ["a", "b"]

    in_lazy_node(tmp_path / "root", work, most_shared=0)


def test_one_blob_as_a_file_and_as_an_archive_is_shown_once_it_is_whole(
    tmp_path: Path, registry: RegistryServer
) -> None:
    archive = tar_files({"a": os.urandom(3 * CHUNK), "b": b"c"})
    raw = ModelBuilder().add_raw("archive.tar", archive).add_raw("x", b"x")
    tar = ModelBuilder().add_layer(layer_type(Kind.WEIGHT, Packing.TAR), archive)
    raw.push(registry, "lazy/both", "raw")
    tar.push(registry, "lazy/both", "tar")
    blob, _ = large(raw)

    async def work(node: LazyNode) -> None:
        file = await node.open(registry.reference("lazy/both", "raw"))
        packed = await node.open(registry.reference("lazy/both", "tar"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.blob(str(blob)).want, Range(0, 5))
            nursery.start_soon(packed.blob(str(blob)).index)
        assert node.names_in(blob) == ["a", "b"]
        await file.blob(str(blob)).want(Range(0, len(archive)))
        await until(lambda: packed.complete)

    in_lazy_node(tmp_path / "root", work)


def test_who_else_finds_a_blob_wrong_tells_the_model_that_shows_it(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = weights(32 * CHUNK)
    monkeypatch.setattr(lazy_blobs, "_LINGER_SECONDS", 0.05)
    builder.push(registry, "lazy/found", "v1")
    blob, _ = large(builder)
    reference = f"{proxy.address}/lazy/found:v1"
    proxy.faults = Faults(corrupt_at=7)
    found: list[Digest] = []

    async def first(node: LazyNode) -> None:
        model = await node.open(reference)
        found.append(model.digest)
        await model.blob(str(blob)).want(Range(0, 5))
        # nobody reads it any more, and what was read is in somebody's memory
        await until(lambda: node.jobs.current(blob) is None)
        assert model.progress().done == CHUNK
        parsed = Reference.parse(reference)
        resolved = await node.pulls.resolve(parsed, NOBODY, PullPolicy.ALWAYS)
        with pytest.raises(DigestMismatch), node.pulls.join(resolved, EVERYTHING) as pull:
            await pull.wait()
        assert problem_of(model)
        await until(lambda: b'spoiled":{"sha256' in plan_of(node, model).read_bytes())

    async def second(node: LazyNode) -> None:
        model = await node.models.restore(found[0], "")
        await model.ready.wait()
        assert problem_of(model)
        assert [one for one, _ in model.ruins()] == [blob]
        with pytest.raises(DigestMismatch):
            await model.blob(str(blob)).want(Range(0, 5))

    in_lazy_node(tmp_path / "root", first)
    proxy.faults = Faults()
    in_lazy_node(tmp_path / "root", second)


def plan_of(node: LazyNode, model: LazyModel) -> Path:
    return plan_path(node.store.root, model.digest, model.selection.key)


def test_a_model_that_somebody_else_fetches_is_not_lazy_meanwhile(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = weights(64 * CHUNK)
    builder.push(registry, "lazy/late", "v1")
    builder.push(registry, "lazy/early", "v1")
    proxy.faults = Faults(bytes_per_second=CHUNK)

    async def work(node: LazyNode) -> None:
        theirs = Reference.parse(f"{proxy.address}/lazy/early:v1")
        resolved = await node.pulls.resolve(theirs, NOBODY, PullPolicy.ALWAYS)
        with node.pulls.join(resolved, EVERYTHING) as pull:
            await until(lambda: pull.progress().done)
            with pytest.raises(InProgress):
                await node.open(f"{registry.address}/lazy/late:v1")

    in_lazy_node(tmp_path / "root", work, most_shared=0)


def test_who_lies_to_another_pull_neither_spoils_nor_stops_anything(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of it was shown by one name, and the rest of it comes wrong by another."""
    monkeypatch.setattr(lazy_blobs, "_LINGER_SECONDS", 0.05)
    builder = weights(32 * CHUNK)
    builder.push(registry, "lazy/calm", "v1")
    builder.push(registry, "lazy/lied-to", "v1")
    blob, data = large(builder)
    proxy.faults = Faults(corrupt_at=20 * CHUNK)

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{registry.address}/lazy/calm:v1")
        await model.blob(str(blob)).want(chunk(3))
        theirs = Reference.parse(f"{proxy.address}/lazy/lied-to:v1")
        resolved = await node.pulls.resolve(theirs, NOBODY, PullPolicy.ALWAYS)
        # without whoever showed it, who could say what is right
        await until(lambda: node.jobs.running(blob) is None)
        with pytest.raises(DigestMismatch), node.pulls.join(resolved, EVERYTHING) as pull:
            await pull.wait()
        assert not problem_of(model)
        assert node.shown(blob, 3 * CHUNK, 4 * CHUNK) == data[3 * CHUNK : 4 * CHUNK]
        proxy.faults = Faults()
        before = proxy.counts.bytes[str(blob)]
        with node.pulls.join(resolved, EVERYTHING) as pull:
            await pull.wait()
        assert proxy.counts.bytes[str(blob)] - before == len(data) - CHUNK
        assert node.shown(blob, 0, len(data)) == data
        assert not problem_of(model)

    in_lazy_node(tmp_path / "root", work)


def test_small_layers_that_another_name_shows_are_completed_first(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    base = os.urandom(5 * CHUNK)
    one = ModelBuilder().add_raw("tokenizer.json", base).add_raw("a", os.urandom(CHUNK))
    other = ModelBuilder().add_raw("tokenizer.json", base).add_raw("b", os.urandom(CHUNK))
    one.push(registry, "lazy/tuned-one", "v1")
    other.push(registry, "lazy/tuned-other", "v1")
    blob = one.manifest().layers[0].digest

    async def work(node: LazyNode) -> None:
        await node.open(f"{proxy.address}/lazy/tuned-one:v1")
        assert proxy.counts.total == 0
        model = await node.open(f"{proxy.address}/lazy/tuned-other:v1")
        assert node.shown(blob, 0, len(base)) == base
        assert model.blob(str(blob)).complete
        assert proxy.counts.total == len(base)

    in_lazy_node(tmp_path / "root", work)


def test_a_layer_of_another_name_needs_a_proof(
    tmp_path: Path, guarded: RegistryServer, registry: RegistryServer
) -> None:
    secret = weights(4 * CHUNK)
    shared = large(secret)[1]
    # whoever knows a digest can write a manifest that lists it
    theirs = weights(3 * CHUNK).add_raw("stolen", shared)
    for data in theirs.blobs.values():
        if data != shared:
            registry.push_blob("lazy/stolen", data)
    registry.push_blob("lazy/stolen", shared)
    registry.push_manifest(
        "lazy/stolen", "v1", theirs.body, "application/vnd.oci.image.manifest.v1+json"
    )
    registry.blob_path(large(secret)[0]).unlink()

    async def fill(store: Store) -> None:
        await put_model(store, secret, name="other/model:v1")

    async def work(node: LazyNode) -> None:
        with pytest.raises(NotFound):
            await node.open(registry.reference("lazy/stolen", "v1"))

    in_store(tmp_path / "root", fill)
    in_lazy_node(tmp_path / "root", work)


# Faults


def test_a_registry_that_is_away_is_waited_for(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = weights(32 * CHUNK)
    builder.push(registry, "lazy/away", "v1")
    blob, data = large(builder)

    async def work(node: LazyNode) -> None:
        model = await node.open(f"{proxy.address}/lazy/away:v1")
        proxy.faults = Faults(statuses=[503] * 1000)
        assert not problem_of(model)
        with trio.move_on_after(0.5) as waiting:
            await model.blob(str(blob)).want(chunk(1))
        assert waiting.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(model.blob(str(blob)).want, chunk(5))
            await until(lambda: model.problem)
            proxy.faults = Faults()
        assert not problem_of(model)
        assert node.shown(blob, 5 * CHUNK, 6 * CHUNK) == data[5 * CHUNK : 6 * CHUNK]

    in_lazy_node(tmp_path / "root", work)


def test_a_refusal_is_told_at_once_and_ends_with_other_credentials(
    tmp_path: Path, guarded: RegistryServer
) -> None:
    builder = weights(32 * CHUNK)
    builder.push(guarded, "lazy/refused", "v1")
    blob, data = large(builder)
    reference = guarded.reference("lazy/refused", "v1")
    right = VolumeSecrets.parse({"username": "robot", "password": PASSWORD}, guarded.address)
    wrong = VolumeSecrets.parse({"username": "robot", "password": "no"}, guarded.address)

    async def work(node: LazyNode) -> None:
        model = await node.open(reference, keychain=right)
        await model.blob(str(blob)).want(chunk(0))
        parsed = Reference.parse(reference).with_digest(model.digest)
        # as when a secret was rotated to something that does not work
        await model.renew(Source(parsed, wrong), "volume")
        with pytest.raises((Unauthenticated, AccessDenied)), trio.fail_after(5):
            await model.blob(str(blob)).want(chunk(9))
        assert problem_of(model)
        await node.open(reference, keychain=right)
        await model.blob(str(blob)).want(chunk(9))
        assert not problem_of(model)
        assert node.shown(blob, 9 * CHUNK, 10 * CHUNK) == data[9 * CHUNK : 10 * CHUNK]

    in_lazy_node(tmp_path / "root", work)


def test_one_volumes_bad_secret_is_no_other_volumes_trouble(
    tmp_path: Path, guarded: RegistryServer
) -> None:
    builder = weights(32 * CHUNK)
    builder.push(guarded, "lazy/several", "v1")
    blob, data = large(builder)
    reference = guarded.reference("lazy/several", "v1")
    right = VolumeSecrets.parse({"username": "robot", "password": PASSWORD}, guarded.address)
    wrong = VolumeSecrets.parse({"username": "robot", "password": "no"}, guarded.address)

    async def work(node: LazyNode) -> None:
        model = await node.open(reference, keychain=right)
        parsed = Reference.parse(reference).with_digest(model.digest)
        for number in (1, 9):
            # kubelet brings its secret again and again
            await model.renew(Source(parsed, wrong), "another volume")
            async with trio.open_nursery() as nursery:
                for more in range(3):
                    nursery.start_soon(model.blob(str(blob)).want, chunk(number + more))
            assert not problem_of(model)
            span = number * CHUNK, (number + 3) * CHUNK
            assert node.shown(blob, *span) == data[slice(*span)]
        # both of them bad: that is told, and ends with the first that is right
        await model.renew(Source(parsed, wrong), "volume")
        with pytest.raises((Unauthenticated, AccessDenied)), trio.fail_after(5):
            await model.blob(str(blob)).want(chunk(20))
        assert problem_of(model)
        await node.open(reference, keychain=right)
        await model.blob(str(blob)).want(chunk(20))

    in_lazy_node(tmp_path / "root", work)


def test_the_next_agent_goes_on_by_plan_and_ticket(tmp_path: Path, guarded: RegistryServer) -> None:
    builder = weights(32 * CHUNK)
    builder.push(guarded, "lazy/next", "v1")
    blob, data = large(builder)
    secrets = VolumeSecrets.parse({"username": "robot", "password": PASSWORD}, guarded.address)
    told: list[tuple[Digest, str]] = []

    async def first(node: LazyNode) -> None:
        model = await node.open(guarded.reference("lazy/next", "v1"), keychain=secrets)
        await model.blob(str(blob)).want(chunk(4))
        told.append((model.digest, model.ticket))

    async def second(node: LazyNode) -> None:
        digest, ticket = told[0]
        model = await node.models.restore(digest, "")
        await model.ready.wait()
        assert node.shown(blob, 4 * CHUNK, 5 * CHUNK) == data[4 * CHUNK : 5 * CHUNK]
        with pytest.raises((Unauthenticated, AccessDenied)):
            await model.blob(str(blob)).want(chunk(9))
        await model.recall(ticket)
        await model.blob(str(blob)).want(chunk(9))
        assert node.shown(blob, 9 * CHUNK, 10 * CHUNK) == data[9 * CHUNK : 10 * CHUNK]

    in_lazy_node(tmp_path / "root", first)
    plan = plan_path(tmp_path / "root", told[0][0], "")
    assert PASSWORD.encode() not in plan.read_bytes()
    in_lazy_node(tmp_path / "root", second)


def test_a_full_disk_fails_reads_until_there_is_room(
    tmp_path: Path, registry: RegistryServer
) -> None:
    builder = weights(64 * CHUNK)
    builder.push(registry, "lazy/full", "v1")
    blob, data = large(builder)

    async def work(node: LazyNode) -> None:
        model = await node.open(registry.reference("lazy/full", "v1"))
        filler = node.store.root / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(MIB))
            except OSError:
                os.fsync(file.fileno())
        with pytest.raises(NoSpace):
            await model.blob(str(blob)).want(Range(0, 64 * CHUNK))
        assert model.problem is not None
        filler.unlink()
        with trio.fail_after(30):
            while node.shown(blob, 0, len(data)) is None:
                # the file system gives back what was freed in its own time
                model.tell()
                with contextlib.suppress(NoSpace):
                    await model.blob(str(blob)).want(Range(0, 64 * CHUNK))
        await until(lambda: model.complete)
        assert node.shown(blob, 0, len(data)) == data

    with small_disk(tmp_path / "disk", 32 * MIB) as disk:
        in_lazy_node(disk / "root", work)


def test_a_call_that_is_cancelled_anywhere_leaves_nothing(
    tmp_path: Path, registry: RegistryServer
) -> None:
    builder = weights(16 * CHUNK).add_tar({"a": os.urandom(4 * CHUNK)})
    builder.push(registry, "lazy/cancelled", "v1")
    reference = registry.reference("lazy/cancelled", "v1")
    layers = builder.manifest().layers

    async def work(node: LazyNode) -> None:
        parsed = Reference.parse(reference)
        resolved = await node.pulls.resolve(parsed, NOBODY, PullPolicy.ALWAYS)

        async def use() -> None:
            model = await node.models.open(resolved, EVERYTHING, Prefetch.NONE, "v")
            await model.blob(str(layers[0].digest)).want(chunk(3))
            await model.blob(str(layers[1].digest)).index()
            await node.models.close(model.digest, "")

        step, more = 0, True
        while more:
            more = await cancelled_at(step, use)
            await node.models.close(resolved.model.digest, "")
            assert node.jobs.running(layers[0].digest) is None
            step += 1
        assert step > 5

    in_lazy_node(tmp_path / "root", work)
