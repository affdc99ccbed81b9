"""The store's space when something goes wrong, or happens at the same time."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.collector import collect
from fetcher.errors import NoSpace
from fetcher.modelpack import read_model
from fetcher.oci import Reference
from fetcher.ranges import Range
from fetcher.store import Limits, Store
from fetcher.store.collection import EVERYTHING as ALL
from fetcher.threads import run_stoppable
from tests.support.models import ModelBuilder
from tests.support.stores import (
    CHUNK,
    EVERYTHING,
    MIB,
    disk_bytes,
    in_store,
    put_model,
    weights,
)

if TYPE_CHECKING:
    from pathlib import Path

CAP = Limits(max_size=17 * MIB, min_free=0)


def test_what_is_evicted_while_it_is_measured_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = weights(4 * MIB)
    model = read_model(builder.manifest())
    [layer] = model.layers
    half = builder.blobs[layer.descriptor.digest][: 2 * MIB]

    async def work(store: Store) -> None:
        with store.held(model, EVERYTHING):
            await store.reserve("r/m:v1", model, EVERYTHING)
            partial = store.open_partial(layer)
            partial.sink(Range(0, len(half)))(half)
            partial.close()
        measured, evicted = trio.Event(), threading.Event()
        token, taken = trio.lowlevel.current_trio_token(), store.rooms.taken

        def slowly(name: str, stop: threading.Event) -> int:
            size = taken(name, stop)
            token.run_sync_soon(measured.set)
            evicted.wait()
            return size

        monkeypatch.setattr(store.rooms, "taken", slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.rooms.settle)
            await measured.wait()
            store.garbage.evict(store.garbage.plan(ALL))
            await store.garbage.empty_trash()
            evicted.set()
        assert store.space.usage().contents == 0
        assert store.space.usage().used == disk_bytes(store.root)

    in_store(tmp_path / "root", work)


def test_a_room_grows_only_when_what_was_evicted_is_gone(tmp_path: Path) -> None:
    """Somebody has evicted it, and nobody has removed it yet."""
    model = read_model(weights(CHUNK).manifest())

    async def work(store: Store) -> None:
        old = await put_model(store, weights(10 * MIB))
        with store.held(model, EVERYTHING):
            await store.reserve("r/m:v1", model, EVERYTHING)
            store.garbage.evict(store.garbage.plan(ALL))
            assert not old.path.exists()
            assert disk_bytes(store.root) > 10 * MIB
            room = store.room(model.layers[0].descriptor.digest)
            await run_stoppable(lambda _: room.grow(8 * MIB))
            assert disk_bytes(store.root) < 2 * MIB

    in_store(tmp_path / "root", work, CAP)


def test_a_manifest_fits_where_the_trash_is(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        await put_model(store, weights(14 * MIB))
        with pytest.raises(NoSpace):
            await store.rooms.check_records(2 * MIB)
        store.garbage.evict(store.garbage.plan(ALL))
        await store.rooms.check_records(2 * MIB)
        assert disk_bytes(store.root) < 2 * MIB

    in_store(tmp_path / "root", work, CAP)


# -- the records -----------------------------------------------------------------------------------


def large(number: int) -> ModelBuilder:
    """A model with a manifest of 1.8 MB."""
    builder = ModelBuilder().add_raw(f"w{number}", f"{number}".encode())
    builder.document["annotations"] = {"k": os.urandom(900_000).hex()}
    return builder


def resolve(store: Store, builder: ModelBuilder, tag: str) -> None:
    """Record a model as resolved now."""
    reference = Reference("r.example.org", "acme/m", tag)
    store.catalog.add_resolution(reference, builder.digest, builder.manifest(), "nobody")


def grow_old(store: Store) -> None:
    """Let an hour pass since anything was resolved."""
    with store.database.transaction() as connection:
        connection.execute("UPDATE tags SET resolved = resolved - 3600")
        connection.execute("UPDATE accesses SET accepted = accepted - 3600")


def test_manifests_that_lead_to_nothing_give_their_room_back(tmp_path: Path) -> None:
    limits = Limits(max_size=32 * MIB, min_free=0)

    async def work(store: Store) -> None:
        for number in range(12):
            builder = large(number)
            await store.rooms.check_records(len(builder.manifest().body))
            resolve(store, builder, f"v{number}")
        assert disk_bytes(store.root) > 20 * MIB
        with pytest.raises(NoSpace, match="can never fit"):
            await put_model(store, weights(24 * MIB))
        grow_old(store)
        await put_model(store, weights(24 * MIB))
        assert store.catalog.strays(time.time()) == []
        assert disk_bytes(store.root) < 27 * MIB
        assert store.space.usage().used == disk_bytes(store.root)

    in_store(tmp_path / "root", work, limits)


def test_manifests_that_somebody_needs_stay(tmp_path: Path) -> None:
    fresh, pinned, held, begun, built, none = (large(number) for number in range(6))
    model = read_model(begun.manifest())

    async def work(store: Store) -> None:
        for number, builder in enumerate((pinned, held, begun, built, none)):
            resolve(store, builder, f"v{number}")
        grow_old(store)
        resolve(store, fresh, "fresh")
        store.garbage.pin(lambda: {(pinned.digest, "")})
        await put_model(store, built)
        with store.held(model, EVERYTHING):
            await store.reserve("r/m:v1", model, EVERYTHING)
            store.open_partial(model.layers[0]).close()
        with store.held(read_model(held.manifest()), EVERYTHING):
            await collect(store)
        for builder in (fresh, pinned, held, begun, built):
            assert store.catalog.manifest(builder.digest) is not None
        assert store.catalog.manifest(none.digest) is None
        assert store.catalog.resolved(Reference("r.example.org", "acme/m", "v4")) is None

    in_store(tmp_path / "root", work)


def test_a_manifest_that_is_here_is_not_written_again(tmp_path: Path) -> None:
    builder = large(0)

    async def work(store: Store) -> None:
        resolve(store, builder, "v1")
        store.database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        resolve(store, builder, "v1")
        assert (store.root / "state.db-wal").stat().st_size < len(builder.manifest().body)

    in_store(tmp_path / "root", work)


def test_records_of_an_earlier_version_shrink_as_well(tmp_path: Path) -> None:
    root = tmp_path / "root"

    async def nothing(_: Store) -> None:
        pass

    in_store(root, nothing)
    with closing(sqlite3.connect(root / "state.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA auto_vacuum = NONE")
        connection.execute("VACUUM")
        assert connection.execute("PRAGMA auto_vacuum").fetchone() == (0,)

    async def work(store: Store) -> None:
        for number in range(4):
            resolve(store, large(number), f"v{number}")
        grow_old(store)
        await store.orphans.reconcile()
        assert disk_bytes(store.root) < 3 * MIB

    in_store(root, work)


# -- trees -----------------------------------------------------------------------------------------


def test_the_folders_of_a_tree_are_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        sync(descriptor)

    def renamed(source: str, target: str) -> None:
        done.append("its name")
        rename(source, target)

    async def work(store: Store) -> None:
        builder = ModelBuilder().add_raw("outer/inner/w", b"w").add_raw("other/v", b"v")
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "rename", renamed)
        tree = await put_model(store, builder)
        top = f"{tree.path.name}.new"
        [*folders, last, name, parent] = done[-6:]
        assert sorted(folders) == ["inner", "other", "outer"]
        assert folders.index("inner") < folders.index("outer")
        assert (last, name, parent) == (top, "its name", "sha256")

    in_store(tmp_path / "root", work)
