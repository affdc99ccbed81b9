"""Reservations, evictions and orphans in a real store, without a network."""

from __future__ import annotations

import contextlib
import random
import threading
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.archives import UnpackLimits
from fetcher.collector import keep_in_order
from fetcher.errors import Conflict, InProgress, ModelError, NoSpace, NotFound, Unavailable
from fetcher.modelpack import Packing, Selection, read_model
from fetcher.oci import Reference
from fetcher.ranges import Range
from fetcher.store import Limits, Store
from fetcher.store.footprint import content_name, tree_name
from fetcher.threads import run_stoppable
from tests.support.models import Member, ModelBuilder
from tests.support.stores import (
    CHUNK,
    EVERYTHING,
    MIB,
    STILL,
    build,
    disk_bytes,
    in_store,
    put_content,
    put_model,
    set_used,
    weights,
)

if TYPE_CHECKING:
    from pathlib import Path

    from fetcher.oci import Digest

CAP = Limits(max_size=17 * MIB, min_free=0)


def names_below(root: Path) -> set[str]:
    """What lies in the store, records aside."""
    return {
        str(path.relative_to(root))
        for kind in ("blobs", "models", "trash")
        for path in (root / kind).rglob("*")
        if path.parent.name != kind or kind == "trash"
    }


# -- what is taken ---------------------------------------------------------------------------------


def test_the_records_say_what_du_says(tmp_path: Path) -> None:
    builder = weights(3 * MIB, 5, 700_000)
    builder.add_tar([Member(f"code/{n}.py", b"x" * n) for n in range(50)], Packing.TAR)

    async def work(store: Store) -> None:
        await put_model(store, builder)
        usage = store.space.usage()
        assert usage.reserved == 0
        assert usage.used == disk_bytes(store.root)
        assert (usage.trees, usage.contents) == (1, 4)

    in_store(tmp_path / "root", work)


def test_a_reservation_counts_before_the_first_byte_and_once(tmp_path: Path) -> None:
    model = read_model(weights(2 * MIB).manifest())
    other = Selection(exclude_patterns=("*.py",))

    async def work(store: Store) -> None:
        with store.held(model, EVERYTHING):
            await store.reserve("r/m:v1", model, EVERYTHING)
            first = store.space.usage()
            assert first.reserved > 2 * MIB
            with store.held(model, other):
                await store.reserve("r/m:v1", model, other)
                assert store.space.usage().reserved - first.reserved < MIB
        assert store.space.usage().reserved == 0
        await store.rooms.settle()
        assert store.space.usage().contents == 0

    in_store(tmp_path / "root", work)


def test_what_was_written_of_a_reservation_counts_once(tmp_path: Path) -> None:
    builder = weights(4 * MIB)
    model = read_model(builder.manifest())
    [layer] = model.layers
    half = builder.blobs[layer.descriptor.digest][: 2 * MIB]

    async def work(store: Store) -> None:
        with store.held(model, EVERYTHING):
            await store.reserve("r/m:v1", model, EVERYTHING)
            before = store.space.usage()
            partial = store.open_partial(layer)
            partial.sink(Range(0, len(half)))(half)
            await store.rooms.settle()
            after = store.space.usage()
            assert after.used + after.reserved == pytest.approx(
                before.used + before.reserved, abs=64 * 1024
            )
            assert before.reserved - after.reserved == pytest.approx(2 * MIB, abs=16 * 1024)
            partial.close()
        await store.rooms.settle()
        # stopped: what it has is what it takes
        assert store.space.usage().used == disk_bytes(store.root)

    in_store(tmp_path / "root", work)


def test_nothing_is_written_down_where_nothing_has_changed(tmp_path: Path) -> None:
    builder = weights(CHUNK, CHUNK)
    model = read_model(builder.manifest())
    names = [content_name(layer.descriptor.digest) for layer in model.layers]
    statements: list[str] = []

    def written() -> int:
        return sum(map(statements.count, ("BEGIN IMMEDIATE", "COMMIT")))

    async def work(store: Store) -> None:
        space = store.space
        with store.held(model, EVERYTHING):
            await store.reserve("m", model, EVERYTHING)
            assert space.holdings.promised([*names, "blobs/sha256/none"]) == names
            store.database.connection.set_trace_callback(statements.append)
            with space.held(names):
                # others hold them, too, and what is worked on is not settled
                space.believe(dict.fromkeys(names, 1), set(names))
            assert written() == 0
        assert written() == 2
        space.holdings.settle({names[0]: 5})
        assert space.holdings.promised(names) == names[1:]
        assert space.holdings.get(names[:1]) == {names[0]: 5}
        assert space.holdings.get([]) == {}

    in_store(tmp_path / "root", work)


def test_a_kill_leaves_a_figure_that_is_too_large_until_it_is_measured(tmp_path: Path) -> None:
    builder = weights(4 * MIB)
    model = read_model(builder.manifest())

    async def killed(store: Store) -> None:
        with contextlib.ExitStack() as kill:
            kill.enter_context(store.held(model, EVERYTHING))
            await store.reserve("r/m:v1", model, EVERYTHING)
            store.open_partial(model.layers[0]).close()

    async def started_again(store: Store) -> None:
        assert store.space.usage().used > 4 * MIB > disk_bytes(store.root)
        await store.rooms.settle()
        assert store.space.usage().used == disk_bytes(store.root)

    in_store(tmp_path / "root", killed)
    in_store(tmp_path / "root", started_again)


def test_who_measures_at_the_same_time_sees_the_same(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        with store.space.watched() as first:
            with store.space.watched() as second:
                with store.space.held(["blobs/sha256/one"]):
                    pass
                assert second == {"blobs/sha256/one"}
            with store.space.held(["blobs/sha256/two"]):
                pass
            assert first == {"blobs/sha256/one", "blobs/sha256/two"}

    in_store(tmp_path / "root", work)


# -- what fits -------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_the_figures(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        first = read_model(weights(10 * MIB).manifest())
        second = weights(8 * MIB)
        with store.held(first, EVERYTHING):
            await store.reserve("r/first:v1", first, EVERYTHING)
            with pytest.raises(
                NoSpace, match=r"r/second:v1 does not fit: it needs 8\.\d MiB"
            ) as no:
                await put_model(store, second, name="r/second:v1")
            assert int(no.value.context["needed"]) > 8 * MIB
            assert int(no.value.context["limit"]) == 17 * MIB
            assert 0 < int(no.value.context["free"]) < 7 * MIB
            assert "17.0 MiB that max-size allows" in no.value.message
            assert store.space.usage().contents == 1
        await put_model(store, second)

    in_store(tmp_path / "root", work, CAP)


def test_what_can_never_fit_evicts_nothing(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await put_model(store, weights(6 * MIB))
        before = names_below(store.root)
        with pytest.raises(NoSpace, match="can never fit"):
            await put_model(store, weights(18 * MIB))
        assert names_below(store.root) == before

    in_store(tmp_path / "root", work, CAP)


def test_nothing_is_evicted_where_that_is_not_enough(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        pinned = await put_model(store, weights(6 * MIB))
        await put_model(store, weights(3 * MIB))
        store.garbage.pin(lambda: {(pinned.digest, "")})
        before = names_below(store.root)
        with pytest.raises(NoSpace, match=r"evicting all that is not in use would give 3\.\d MiB"):
            await put_model(store, weights(10 * MIB))
        assert names_below(store.root) == before

    in_store(tmp_path / "root", work, CAP)


def test_room_is_made_by_least_recent_use(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        trees = [await put_model(store, weights(4 * MIB)) for _ in range(3)]
        for tree, used in zip(trees, (20.0, 10.0, 30.0), strict=True):
            set_used(store, tree, used)
        await put_model(store, weights(6 * MIB))
        assert [tree.path.exists() for tree in trees] == [True, False, True]
        assert store.garbage.trash() == frozenset()
        assert list((store.root / "trash").iterdir()) == []
        assert disk_bytes(store.root) <= 17 * MIB
        assert store.space.usage().used == disk_bytes(store.root)

    in_store(tmp_path / "root", work, CAP)


def test_nothing_is_evicted_while_it_cannot_be_told_what_is_pinned(tmp_path: Path) -> None:
    def blind() -> set[tuple[Digest, str]]:
        raise Unavailable("the mount table cannot be read")

    async def work(store: Store) -> None:
        await put_model(store, weights(10 * MIB))
        store.garbage.pin(blind)
        before = names_below(store.root)
        with pytest.raises(Unavailable):
            await put_model(store, weights(10 * MIB))
        assert names_below(store.root) == before

    in_store(tmp_path / "root", work, CAP)


def test_a_volume_that_waits_for_its_pull_pins_what_is_there_of_it(tmp_path: Path) -> None:
    builder = weights(4 * MIB, 4 * MIB)
    model = read_model(builder.manifest())
    layer = model.layers[0]

    async def work(store: Store) -> None:
        with store.held(model, EVERYTHING):
            await store.reserve("r/m:v1", model, EVERYTHING)
            put_content(store, layer, builder.blobs[layer.descriptor.digest])
        _resolved(store, builder)
        pins = {(model.digest, "")}
        store.garbage.pin(lambda: pins)
        await store.rooms.settle()
        with pytest.raises(NoSpace):
            await put_model(store, weights(14 * MIB))
        assert store.has_content(layer)
        pins.clear()
        await put_model(store, weights(14 * MIB))
        assert not store.has_content(layer)

    in_store(tmp_path / "root", work, CAP)


def _resolved(store: Store, builder: ModelBuilder) -> None:
    """Record the model as resolved from a tag, as a registry's word does."""
    reference = Reference("r.example.org", "acme/m", "v1")
    store.catalog.add_resolution(reference, builder.digest, builder.manifest(), "nobody")


def test_a_large_manifest_does_not_pass_the_cap(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        first = read_model(weights(10 * MIB).manifest())
        with store.held(first, EVERYTHING):
            await store.reserve("r/first:v1", first, EVERYTHING)
            await store.rooms.check_records(2 * MIB)
            with pytest.raises(NoSpace, match=r"a manifest of 4\.0 MiB does not fit"):
                await store.rooms.check_records(4 * MIB)

    in_store(tmp_path / "root", work, CAP)


# -- growing ---------------------------------------------------------------------------------------


def test_rooms_grow_in_threads_up_to_the_cap_and_not_beyond(tmp_path: Path) -> None:
    models = [read_model(weights(256 * 1024 + n).manifest()) for n in range(4)]
    granted = [0] * len(models)

    async def work(store: Store) -> None:
        async def one(number: int) -> None:
            digest = models[number].layers[0].descriptor.digest
            room = store.room(digest)

            def grow(stop: threading.Event) -> None:
                dice = random.Random(number)  # noqa: S311 (a test's dice)
                while True:
                    count = dice.randrange(1, 300_000)
                    room.grow(count)
                    granted[number] += count

            with pytest.raises(NoSpace):
                await run_stoppable(grow)

        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(store.held(model, EVERYTHING))
                await store.reserve("r/m:v1", model, EVERYTHING)
            reserved = store.space.usage().reserved
            async with trio.open_nursery() as nursery:
                for number in range(len(models)):
                    nursery.start_soon(one, number)
            after = store.space.usage()
            assert sum(granted) <= after.reserved - reserved
            assert after.used + after.reserved <= 17 * MIB
            # all of the room was given, but for what the records keep to grow
            assert after.used + after.reserved > 14 * MIB

    in_store(tmp_path / "root", work, CAP)


def test_a_room_that_grows_evicts_what_is_not_used(tmp_path: Path) -> None:
    model = read_model(weights(CHUNK).manifest())

    async def work(store: Store) -> None:
        old = await put_model(store, weights(10 * MIB))
        with store.held(model, EVERYTHING):
            await store.reserve("r/m:v1", model, EVERYTHING)
            room = store.room(model.layers[0].descriptor.digest)
            await run_stoppable(lambda _: room.grow(3 * MIB))
            assert old.path.exists()
            await run_stoppable(lambda _: room.grow(8 * MIB))
            assert not old.path.exists()
            assert disk_bytes(store.root) < 2 * MIB

    in_store(tmp_path / "root", work, CAP)


# -- the watermarks --------------------------------------------------------------------------------


def test_collection_goes_from_the_high_watermark_to_the_low_one(tmp_path: Path) -> None:
    limits = Limits(max_size=20 * MIB, min_free=0, high=80, low=50)

    async def work(store: Store) -> None:
        trees = [await put_model(store, weights(4 * MIB)) for _ in range(3)]
        assert store.garbage.by_watermarks().victims == ()
        trees.append(await put_model(store, weights(4 * MIB)))
        for number, tree in enumerate(trees):
            set_used(store, tree, float(number))
        planned = store.garbage.by_watermarks()
        store.garbage.evict(planned)
        await store.garbage.empty_trash()
        assert [tree.path.exists() for tree in trees] == [False, False, True, True]
        assert store.space.usage().used < 10 * MIB

    in_store(tmp_path / "root", work, limits)


# -- one model -------------------------------------------------------------------------------------


def test_a_model_is_removed_with_what_only_it_needs(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        shared = weights(CHUNK)
        data = next(iter(shared.blobs[layer.digest] for layer in shared.manifest().layers))
        one = await put_model(store, ModelBuilder().add_raw("a", data).add_raw("b", b"own"))
        other = await put_model(store, ModelBuilder().add_raw("c", data))
        store.garbage.evict(store.garbage.plan_removal(one.digest))
        assert not one.path.exists()
        assert store.catalog.trees()[0][0] == other.digest
        assert store.has_blob(read_model(shared.manifest()).layers[0].descriptor)
        with pytest.raises(NotFound):
            store.garbage.plan_removal(one.digest)
        with store.space.held([tree_name(other.digest, "some")]), pytest.raises(InProgress):
            store.garbage.plan_removal(other.digest)
        store.garbage.pin(lambda: {(other.digest, "some")})
        with pytest.raises(Conflict):
            store.garbage.plan_removal(other.digest)

    in_store(tmp_path / "root", work)


def test_with_the_last_tree_goes_what_led_to_it(tmp_path: Path) -> None:
    builder = weights(CHUNK)
    some = Selection(exclude_patterns=("x",))

    async def work(store: Store) -> None:
        _resolved(store, builder)
        await put_model(store, builder)
        tree = await put_model(store, builder, some)
        store.garbage.pin(lambda: {(tree.digest, some.key)})
        store.garbage.evict(store.garbage.plan(1e9))
        assert len(store.catalog.trees()) == 1
        assert store.catalog.manifest(builder.digest) is not None

    async def unpinned(store: Store) -> None:
        store.garbage.evict(store.garbage.plan_removal(builder.digest))
        assert store.catalog.manifest(builder.digest) is None
        assert store.catalog.layers(builder.digest) == []
        assert store.space.holdings.uses() == {}

    in_store(tmp_path / "root", work)
    in_store(tmp_path / "root", unpinned)


# -- orphans ---------------------------------------------------------------------------------------


def test_orphans_are_adopted_or_released(tmp_path: Path) -> None:
    builder = weights(4 * CHUNK, 3 * CHUNK, CHUNK)
    model = read_model(builder.manifest())
    half, whole, _ = model.layers
    root = tmp_path / "root"

    async def work(store: Store) -> None:
        partial = store.open_partial(half)
        partial.sink(Range(0, CHUNK))(builder.blobs[half.descriptor.digest][:CHUNK])
        partial.close()
        store.blob_path(whole.descriptor.digest).write_bytes(b"never verified" * 1000)
        (root / f"models/sha256/{'a' * 64}").mkdir(parents=True)
        (root / f"models/sha256/{'b' * 64}.new").mkdir()
        (root / "trash/deadbeef").write_bytes(b"x" * 10_000)
        (root / "blobs/lost+found").mkdir()
        (root / "blobs/lost+found/#12").touch()
        assert await store.orphans.bytes() > CHUNK
        await store.orphans.reconcile()
        assert await store.orphans.bytes() == 0
        assert store.open_partial(half).done == CHUNK
        assert not store.blob_path(whole.descriptor.digest).exists()
        assert list((root / "models").glob("*/*")) == list((root / "trash").iterdir()) == []
        (root / "blobs/lost+found/#12").unlink()
        (root / "blobs/lost+found").rmdir()
        assert store.space.usage().used == disk_bytes(root)

    in_store(root, work)


def test_a_tree_that_is_mounted_is_adopted_and_any_other_one_is_not(tmp_path: Path) -> None:
    mounted, other = weights(2 * MIB), weights(2 * MIB)
    root = tmp_path / "root"

    async def put(store: Store) -> None:
        for builder in (mounted, other):
            await put_model(store, builder)

    in_store(root, put)
    for file in root.glob("state.db*"):
        file.unlink()

    async def work(store: Store) -> None:
        store.garbage.pin(lambda: {(mounted.digest, "")})
        await store.orphans.reconcile()
        [(digest, selection, _)] = store.catalog.trees()
        assert (digest, selection) == (mounted.digest, "")
        tree = store.tree(digest, EVERYTHING)
        assert tree is not None
        assert (tree.size, tree.files) == (2 * MIB, 1)
        assert list((root / "blobs").glob("*/*")) == []
        assert store.space.usage().used == disk_bytes(root)
        assert await store.orphans.bytes() == 0

    in_store(root, work)


def test_the_store_is_kept_in_order_while_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(store: Store) -> None:
        async def released(name: str) -> None:
            orphan = store.root / "models/sha256" / name
            orphan.mkdir(parents=True)
            while orphan.exists():  # noqa: ASYNC110 - what removes it tells nobody
                await trio.sleep(0.005)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_in_order, store, 0.01)
            await released("a" * 64)
            await released("b" * 64)
            # what fails once is tried again
            (store.root / "trash").rename(store.root / "elsewhere")
            while "keeping the store in order: " not in caplog.text:  # noqa: ASYNC110 - a log
                await trio.sleep(0.005)
            (store.root / "elsewhere").rename(store.root / "trash")
            await released("c" * 64)
            nursery.cancel_scope.cancel()

    in_store(tmp_path / "root", work)


def test_what_is_worked_on_is_no_orphan(tmp_path: Path) -> None:
    builder = weights(CHUNK)
    model = read_model(builder.manifest())
    [layer] = model.layers

    async def work(store: Store) -> None:
        with store.held(model, EVERYTHING):
            path = store.blob_path(layer.descriptor.digest)
            path.parent.mkdir()
            path.write_bytes(b"on its way")
            await store.orphans.reconcile()
            assert path.exists()
        await store.orphans.reconcile()
        assert not path.exists()
        assert content_name(layer.descriptor.digest) not in {
            holding.name for holding in store.space.holdings.below("blobs")
        }

    in_store(tmp_path / "root", work)


def test_a_tree_of_a_build_that_was_killed_is_built_again(tmp_path: Path) -> None:
    builder = weights(CHUNK)
    model = read_model(builder.manifest())

    async def work(store: Store) -> None:
        with store.held(model, EVERYTHING):
            await store.reserve("r/m:v1", model, EVERYTHING)
            [layer] = model.layers
            put_content(store, layer, builder.blobs[layer.descriptor.digest])
            tree = store.build(model, EVERYTHING, store.plan(model, EVERYTHING), threading.Event())
        # killed before its record was written, and no volume shows it
        await store.orphans.reconcile()
        assert not tree.path.exists()
        with store.held(model, EVERYTHING):
            await store.reserve("r/m:v1", model, EVERYTHING)
            assert build(store, model).path.exists()
        await store.orphans.reconcile()
        assert tree.path.exists()
        assert store.space.usage().used == disk_bytes(store.root)

    in_store(tmp_path / "root", work)


def test_what_somebody_removed_by_hand_is_forgotten(tmp_path: Path) -> None:
    builder = weights(2 * MIB)

    async def work(store: Store) -> None:
        tree = await put_model(store, builder)
        (tree.path / "model-0.safetensors").unlink()
        tree.path.rmdir()
        store.blob_path(read_model(builder.manifest()).layers[0].descriptor.digest).unlink()
        await store.orphans.reconcile()
        assert store.space.usage().used == disk_bytes(store.root)
        assert store.tree(builder.digest, EVERYTHING) is None
        assert (await put_model(store, builder)).path.is_dir()

    in_store(tmp_path / "root", work)


def test_two_pulls_of_one_packed_layer_have_its_spare_room_once(tmp_path: Path) -> None:
    data = Member("a", b"x" * (2 * MIB))
    model = read_model(
        ModelBuilder().add_tar([data], Packing.TAR_ZSTD).add_raw("b", b"b").manifest()
    )
    other = Selection(exclude_patterns=("b",))
    [packed, _] = model.layers
    size = packed.descriptor.size

    async def work(store: Store) -> None:
        with store.held(model, EVERYTHING):
            await store.reserve("r/m:v1", model, EVERYTHING)
            room = store.room(packed.descriptor.digest)
            await run_stoppable(lambda _: room.grow(size))
            before = store.space.usage().reserved
            with store.held(model, other):
                await store.reserve("r/m:v1", model, other)
                tree = store.space.usage().reserved - before
                await run_stoppable(lambda _: room.grow(2 * MIB))
                assert store.space.usage().reserved >= before + tree + 2 * MIB - 8192

    in_store(tmp_path / "root", work)


@pytest.mark.parametrize("is_recorded", [True, False])
def test_what_a_layer_was_unpacked_from_goes_after_a_kill(
    tmp_path: Path, is_recorded: bool
) -> None:
    builder = ModelBuilder().add_tar([Member("a", b"x" * MIB)], Packing.TAR_ZSTD)
    model = read_model(builder.manifest())
    [layer] = model.layers
    digest = layer.descriptor.digest

    async def killed(store: Store) -> None:
        with store.held(model, EVERYTHING):
            await store.reserve("r/m:v1", model, EVERYTHING)
            put_content(store, layer, builder.blobs[digest])
            store.lay_out(layer, UnpackLimits(max_bytes=2 * MIB), STILL)
            if not is_recorded:
                # the removal had begun
                store.catalog.remove_blob(digest)

    async def started_again(store: Store) -> None:
        assert store.blob_path(digest).exists()
        assert store.has_content(layer)
        assert not store.blob_path(digest).exists()
        build(store, model)

    in_store(tmp_path / "root", killed)
    in_store(tmp_path / "root", started_again)


def test_an_error_is_for_the_user(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        with pytest.raises(ModelError) as caught:
            await put_model(store, weights(18 * MIB), name="r.example.org/acme/m:v1")
        assert caught.value.message.startswith("r.example.org/acme/m:v1 can never fit: it takes 18")

    in_store(tmp_path / "root", work, CAP)
