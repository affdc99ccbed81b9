"""A store that keeps within bounds while real pulls fill it, and on disks that others fill."""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.collector import collect, keep_in_order
from fetcher.errors import ModelError, NoSpace
from fetcher.modelpack import Packing, Selection
from fetcher.oci import Digest
from fetcher.pull import PullSettings
from fetcher.store import Database, Limits
from fetcher.store.holdings import Holdings
from tests.support.models import Member, ModelBuilder
from tests.support.stores import (
    CHUNK,
    MIB,
    NO_FLOOR,
    disk_bytes,
    fill,
    pull,
    pulling,
    small_disk,
    weights,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from fetcher.pull import Pulls
    from fetcher.store import ModelTree, Store
    from tests.support.proxy import Proxy
    from tests.support.registry import RegistryServer


def in_node(
    root: Path,
    limits: Limits,
    work: Callable[[Pulls, Store], Awaitable[None]],
    settings: PullSettings | None = None,
) -> None:
    async def main() -> None:
        with trio.fail_after(100):
            async with pulling(root, limits, settings) as (pulls, store):
                await work(pulls, store)

    trio.run(main)


def shown(tree: ModelTree) -> set[Digest]:
    """The digests of the files that a tree shows."""
    return {Digest.of(path.read_bytes()) for path in tree.path.rglob("*") if path.is_file()}


def layers(builder: ModelBuilder) -> set[Digest]:
    return {layer.digest for layer in builder.manifest().layers}


@contextmanager
def sampled(root: Path) -> Iterator[list[int]]:
    """What ``du`` says of ``root``, again and again, while the block runs."""
    samples: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.is_set():
            samples.append(disk_bytes(root))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


# -- a cap -----------------------------------------------------------------------------------------


def mixed(number: int, size: int) -> ModelBuilder:
    """A model of about ``size`` bytes: raw, tar with many files, or compressed."""
    builder = ModelBuilder()
    if number % 4 == 3:
        files = [Member(f"data/{part}.bin", os.urandom(size // 40)) for part in range(20)]
        builder.add_tar(files, Packing.TAR)
        return builder.add_raw("model.safetensors", os.urandom(size // 2))
    if number % 8 == 1:
        data = os.urandom(size // 4)
        builder.add_tar([Member("text.bin", data + bytes(size // 4))], Packing.TAR_ZSTD)
        return builder.add_raw("model.safetensors", os.urandom(size // 2))
    return builder.add_raw("a.safetensors", os.urandom(size // 2)).add_raw(
        "b.safetensors", os.urandom(size // 2)
    )


def test_sixteen_pulls_at_once_below_a_cap_of_three_fifths(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    size = 3 * MIB
    builders = [mixed(number, size) for number in range(16)]
    for number, builder in enumerate(builders):
        builder.push(registry, f"capped/{number}", "v1")
    root = tmp_path / "root"
    root.mkdir()
    cap = 16 * size * 6 // 10
    proxy.faults.bytes_per_second = 60 * MIB
    pins: set[tuple[Digest, str]] = set()
    trees: dict[int, ModelTree] = {}
    refused: dict[int, NoSpace] = {}

    async def work(pulls: Pulls, store: Store) -> None:
        store.garbage.pin(lambda: pins)

        async def one(number: int) -> None:
            # as a volume does: pinned before the pull begins, and no more when it fails
            pin = (builders[number].digest, "")
            pins.add(pin)
            try:
                trees[number] = await pull(pulls, f"{proxy.address}/capped/{number}:v1")
            except NoSpace as error:
                pins.discard(pin)
                refused[number] = error

        async with trio.open_nursery() as keeping:
            keeping.start_soon(keep_in_order, store)
            async with trio.open_nursery() as nursery:
                for number in range(16):
                    nursery.start_soon(one, number)
            assert len(trees) + len(refused) == 16
            # most of what may be there is there
            assert 6 <= len(trees) < 16
            for error in refused.values():
                assert int(error.context["limit"]) == cap
                assert int(error.context["needed"]) > int(error.context["free"])
            for number, tree in trees.items():
                if number % 2 == 0:
                    assert shown(tree) == layers(builders[number])
            # others are unpublished: those that did not fit do now
            while refused:
                waiting, done = set(refused), set(trees)
                for number in done:
                    pins.discard((builders[number].digest, ""))
                refused.clear()
                trees.clear()
                async with trio.open_nursery() as nursery:
                    for number in waiting:
                        nursery.start_soon(one, number)
                assert len(refused) < len(waiting)
            keeping.cancel_scope.cancel()

    with sampled(root) as samples:
        in_node(root, Limits(max_size=cap, min_free=0), work)
    assert max(samples) <= cap
    assert max(samples) > cap // 2


def test_what_pods_read_is_not_touched_by_pulls_that_want_room(
    tmp_path: Path, registry: RegistryServer
) -> None:
    mounted = weights(4 * MIB)
    others = [weights(6 * MIB) for _ in range(4)]
    mounted.push(registry, "kept/mounted", "v1")
    for number, builder in enumerate(others):
        builder.push(registry, f"kept/{number}", "v1")

    async def work(pulls: Pulls, store: Store) -> None:
        tree = await pull(pulls, registry.reference("kept/mounted", "v1"))
        store.garbage.pin(lambda: {(tree.digest, "")})
        inode = (tree.path / "model-0.safetensors").stat().st_ino
        for number in range(4):
            await pull(pulls, registry.reference(f"kept/{number}", "v1"))
            assert shown(tree) == layers(mounted)
        assert (tree.path / "model-0.safetensors").stat().st_ino == inode
        assert {digest for digest, _, _ in store.catalog.trees()} == {
            mounted.digest,
            others[3].digest,
        }

    in_node(tmp_path / "root", Limits(max_size=13 * MIB, min_free=0), work)


def test_a_pull_that_makes_room_does_not_evict_what_it_shares(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    data = os.urandom(4 * MIB)
    first = ModelBuilder().add_raw("a", data).add_raw("b", os.urandom(3 * MIB))
    second = ModelBuilder().add_raw("a", data).add_raw("c", os.urandom(4 * MIB))
    first.push(registry, "sharing/first", "v1")
    second.push(registry, "sharing/second", "v1")

    async def work(pulls: Pulls, store: Store) -> None:
        await pull(pulls, f"{proxy.address}/sharing/first:v1")
        tree = await pull(pulls, f"{proxy.address}/sharing/second:v1")
        assert shown(tree) == layers(second)
        # the shared layer was fetched once, and outlived the model that it came with
        assert proxy.counts.total == 11 * MIB
        assert len(store.catalog.trees()) == 1

    in_node(tmp_path / "root", Limits(max_size=12 * MIB + 4 * CHUNK, min_free=0), work)


def test_a_layer_that_unpacks_to_more_than_the_cap_is_refused_on_the_way(
    tmp_path: Path, registry: RegistryServer
) -> None:
    data = os.urandom(2 * MIB) + bytes(40 * MIB)
    large = ModelBuilder().add_tar([Member("sparse.bin", data)], Packing.TAR_ZSTD)
    large.push(registry, "unpacking/large", "v1")
    small = weights(MIB)
    small.push(registry, "unpacking/small", "v1")
    root = tmp_path / "root"
    root.mkdir()

    async def work(pulls: Pulls, store: Store) -> None:
        with pytest.raises(NoSpace):
            await pull(pulls, registry.reference("unpacking/large", "v1"))
        assert shown(await pull(pulls, registry.reference("unpacking/small", "v1"))) == layers(
            small
        )

    with sampled(root) as samples:
        in_node(root, Limits(max_size=16 * MIB, min_free=0), work)
    assert max(samples) <= 16 * MIB


def test_a_stopped_pull_gives_back_what_it_did_not_use(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = weights(64 * CHUNK)
    builder.push(registry, "stopped", "v1")
    proxy.faults.stall = threading.Event()

    async def work(pulls: Pulls, store: Store) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull, pulls, f"{proxy.address}/stopped:v1")
            while not proxy.counts.blob_requests():  # noqa: ASYNC110 - another thread counts
                await trio.sleep(0.01)
            assert store.space.usage().reserved > 60 * CHUNK
            nursery.cancel_scope.cancel()
        while store.space.holding():  # noqa: ASYNC110 - the pull ends by itself
            await trio.sleep(0.01)
        await collect(store)
        usage = store.space.usage()
        assert usage.reserved == 0
        assert usage.used == disk_bytes(store.root) < 20 * CHUNK

    try:
        in_node(tmp_path / "root", NO_FLOOR, work, PullSettings(grace=0.0))
    finally:
        proxy.faults.stall.set()


def test_what_is_here_is_given_though_the_cap_was_lowered_below_it(
    tmp_path: Path, registry: RegistryServer
) -> None:
    builder = weights(6 * MIB)
    reference = builder.push(registry, "capped/lowered", "v1")
    other = weights(CHUNK).push(registry, "capped/other", "v1")

    async def first(pulls: Pulls, _: Store) -> None:
        await pull(pulls, reference)

    async def lowered(pulls: Pulls, store: Store) -> None:
        store.garbage.pin(lambda: {(builder.digest, "")})
        tree = await pull(pulls, reference)
        assert shown(tree) == layers(builder)
        with pytest.raises(NoSpace):
            await pull(pulls, other)

    in_node(tmp_path / "root", NO_FLOOR, first)
    in_node(tmp_path / "root", Limits(max_size=4 * MIB, min_free=0), lowered)


def test_a_pull_of_what_is_here_measures_nothing_else(
    tmp_path: Path, registry: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are at contents that take long to measure, or that cannot be measured."""
    here = weights(CHUNK).push(registry, "beside/here", "v1")
    new = weights(CHUNK).push(registry, "beside/new", "v1")
    trouble = f"blobs/sha256/{'a' * 300}"

    async def work(pulls: Pulls, store: Store) -> None:
        await pull(pulls, here)
        with store.space.held([trouble]):
            store.space.claim({trouble: CHUNK})
            with pytest.raises(ModelError, match="name too long"):
                store.rooms.taken(trouble, threading.Event())
            await pull(pulls, new)
            taken, measured = store.rooms.taken, []

            def noted(name: str, stop: threading.Event) -> int:
                measured.append(name)
                return taken(name, stop)

            monkeypatch.setattr(store.rooms, "taken", noted)
            await pull(pulls, here)
            assert measured == []
            assert store.space.holdings.get([trouble]) == {trouble: CHUNK}

    in_node(tmp_path / "root", NO_FLOOR, work)


# -- a disk ----------------------------------------------------------------------------------------


def test_a_disk_that_is_full_from_the_start(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = weights(8 * MIB)
    builder.push(registry, "full/start", "v1")
    with small_disk(tmp_path / "disk", 64 * MIB) as disk:
        filler = disk / "somebody-elses"
        subprocess.run(["fallocate", "-l", "48M", str(filler)], check=True)

        async def work(pulls: Pulls, store: Store) -> None:
            with pytest.raises(NoSpace, match=r"needs 8\.\d MiB more .* min-free keeps 4") as no:
                await pull(pulls, f"{proxy.address}/full/start:v1")
            assert int(no.value.context["needed"]) > 8 * MIB > int(no.value.context["free"])
            assert proxy.counts.total == 0
            filler.unlink()
            tree = await pull(pulls, f"{proxy.address}/full/start:v1")
            assert shown(tree) == layers(builder)

        in_node(disk / "root", Limits(min_free=4 * MIB, high=99, low=98), work)


@pytest.mark.parametrize("packing", [Packing.RAW, Packing.TAR])
def test_a_disk_that_others_fill_while_a_pull_runs(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy, packing: Packing
) -> None:
    kept, large = weights(2 * MIB), ModelBuilder()
    if packing is Packing.RAW:
        large.add_raw("model.safetensors", os.urandom(30 * MIB))
    else:
        files = {f"part-{number}": os.urandom(3 * MIB) for number in range(10)}
        large.add_tar(files)
    kept.push(registry, f"full/kept-{packing.value}", "v1")
    large.push(registry, f"full/large-{packing.value}", "v1")
    reference = f"{proxy.address}/full/large-{packing.value}:v1"
    with small_disk(tmp_path / "disk", 64 * MIB) as disk:
        filler = disk / "somebody-elses"

        async def work(pulls: Pulls, store: Store) -> None:
            tree = await pull(pulls, registry.reference(f"full/kept-{packing.value}", "v1"))
            store.garbage.pin(lambda: {(tree.digest, "")})
            proxy.faults.bytes_per_second = 20 * MIB
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fill_when, proxy, 8 * MIB, filler)
                with pytest.raises(NoSpace, match=r"the disk below .* is full"):
                    await pull(pulls, reference)
            assert shown(tree) == layers(kept)
            # full as it is, what is there already can be used, and what is not is refused
            await pull(pulls, registry.reference(f"full/kept-{packing.value}", "v1"))
            with pytest.raises(NoSpace):
                await pull(pulls, reference)
            filler.unlink()
            proxy.faults.bytes_per_second = None
            assert (await pull(pulls, reference)).files == (1 if packing is Packing.RAW else 10)
            # what each of eight connections had in its buffers was lost, each time it was full
            assert proxy.counts.total <= sum(map(len, large.blobs.values())) + 8 * MIB

        in_node(disk / "root", Limits(min_free=0, high=99, low=98), work)


async def fill_when(proxy: Proxy, count: int, filler: Path) -> None:
    """Somebody else takes the rest of the disk once so much of a pull has come."""
    while proxy.counts.total < count:  # noqa: ASYNC110 - another thread counts
        await trio.sleep(0.01)
    await trio.to_thread.run_sync(fill, filler)


def test_on_a_full_disk_what_is_not_used_still_goes(
    tmp_path: Path, registry: RegistryServer
) -> None:
    old, new = weights(20 * MIB), weights(10 * MIB)
    old.push(registry, "full/old", "v1")
    new.push(registry, "full/new", "v1")
    with small_disk(tmp_path / "disk", 64 * MIB) as disk:

        async def work(pulls: Pulls, store: Store) -> None:
            tree = await pull(pulls, registry.reference("full/old", "v1"))
            fill(disk / "somebody-elses")
            fill(disk / "the-last-blocks")
            assert store.space.excess() > 0
            await collect(store)
            assert not tree.path.exists()
            assert shown(await pull(pulls, registry.reference("full/new", "v1"))) == layers(new)

        in_node(disk / "root", Limits(min_free=MIB, high=90, low=60), work)


def test_records_are_written_on_a_disk_that_others_have_filled(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 * MIB) as disk:
        root = disk / "root"
        root.mkdir()

        def note(count: int) -> None:
            database = Database(root / "state.db")
            try:
                holdings = Holdings(database)
                for number in range(count):
                    holdings.promise({"blobs/sha256/one": number})
            finally:
                database.close()

        note(1)
        fill(disk / "somebody-elses")
        fill(disk / "the-last-blocks")
        # more than the log holds, and a start on the full disk
        note(300)
        note(300)


def test_selections_of_one_model_are_evicted_by_their_own_use(
    tmp_path: Path, registry: RegistryServer
) -> None:
    builder = weights(2 * MIB, MIB)
    builder.push(registry, "selections", "v1")
    some = Selection(exclude_patterns=("model-0*",))

    async def work(pulls: Pulls, store: Store) -> None:
        await pull(pulls, registry.reference("selections", "v1"))
        part = await pull(pulls, registry.reference("selections", "v1"), some)
        store.garbage.pin(lambda: {(part.digest, some.key)})
        store.garbage.evict(store.garbage.plan(float("inf")))
        await store.garbage.empty_trash()
        assert len(shown(part)) == 1
        assert [selection for _, selection, _ in store.catalog.trees()] == [some.key]
        assert disk_bytes(store.root) < 2 * MIB
        assert len(shown(await pull(pulls, registry.reference("selections", "v1")))) == 2

    in_node(tmp_path / "root", NO_FLOOR, work)
