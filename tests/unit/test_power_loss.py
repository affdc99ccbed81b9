"""What is left of the store's records when the power is lost, and when the process is killed."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from fetcher.modelpack import read_model
from fetcher.store import catalog as catalog_module
from fetcher.store import chunks as chunks_module
from fetcher.store.chunks import ChunkMap
from fetcher.store.database import Database
from fetcher.store.store import Store
from tests.support.stores import (
    CHUNK,
    EVERYTHING,
    MIB,
    NO_FLOOR,
    STILL,
    after_power_loss,
    flushes,
    in_store,
    killed_at,
    put_content,
    put_model,
    small_disk,
    weights,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fetcher.modelpack import Layer
    from tests.support.models import ModelBuilder
    from tests.support.stores import Tell

NAME = "registry.example/some/model"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 24 * MIB) as folder:
        yield folder


def noted(database: Database) -> list[int]:
    rows = database.connection.execute("SELECT number FROM notes ORDER BY number")
    return [number for (number,) in rows]


def test_a_power_loss_takes_the_last_quick_transactions_and_no_others(
    disk: Path, tmp_path: Path
) -> None:
    database = Database(disk / "state.db")
    with database.transaction() as connection:
        connection.execute("CREATE TABLE notes (number INTEGER)")
    durable = -1
    for number, is_durable in enumerate([False, True, False, False, True, True, False, True]):
        begin = database.transaction if is_durable else database.quick_transaction
        before = flushes(disk)
        with begin() as connection:
            connection.execute("INSERT INTO notes VALUES (?)", (number,))
        assert (flushes(disk) > before) == is_durable
        durable = number if is_durable else durable
        with after_power_loss(disk, tmp_path / "left") as left:
            found = Database(left / "state.db")
            assert noted(found) in [list(range(end)) for end in range(durable + 1, number + 2)]
            found.close()
    database.close()


def test_a_log_that_is_begun_anew_by_quick_transactions_keeps_their_order(
    disk: Path, tmp_path: Path
) -> None:
    database = Database(disk / "state.db")
    with database.transaction() as connection:
        connection.execute("CREATE TABLE notes (number INTEGER, more BLOB)")
    for number in range(100):
        with database.quick_transaction() as connection:
            connection.execute("INSERT INTO notes VALUES (?, zeroblob(9000))", (number,))
        if number % 20 == 19:
            with after_power_loss(disk, tmp_path / "left") as left:
                found = Database(left / "state.db")
                there = noted(found)
                assert there == list(range(len(there)))
                assert len(there) <= number + 1
                found.close()
    database.close()


def layers_of(builder: ModelBuilder) -> tuple[Layer, ...]:
    return read_model(builder.manifest()).layers


def test_what_a_power_loss_takes_of_small_blobs_is_bounded_and_comes_again(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog_module, "RISKED_BYTES", 3 * CHUNK)
    builder = weights(*[CHUNK] * 8)
    layers = layers_of(builder)

    async def fetch(store: Store) -> None:
        for layer in layers:
            put_content(store, layer, builder.blobs[layer.descriptor.digest], NAME)

    async def fetch_again(store: Store) -> None:
        there = [store.has_blob(layer.descriptor) for layer in layers]
        # the third and the sixth were durable
        assert there in [[number < count for number in range(8)] for count in (6, 7, 8)]
        for layer, is_there in zip(layers, there, strict=True):
            digest = layer.descriptor.digest
            assert store.catalog.is_proven(NAME, digest) == is_there
            if not is_there:
                put_content(store, layer, builder.blobs[digest])
            assert store.blob_path(digest).read_bytes() == builder.blobs[digest]

    async def fetch_and_fail(store: Store) -> None:
        await fetch(store)
        with after_power_loss(disk, tmp_path / "left") as left, monkeypatch.context() as patch:
            patch.setattr(chunks_module, "boot_id", lambda: b"0" * 36)
            again = Store.open(left / "root", CHUNK, NO_FLOOR)
            await fetch_again(again)
            again.close()

    in_store(disk / "root", fetch_and_fail)


def test_a_model_that_was_recorded_is_whole_after_a_power_loss(disk: Path, tmp_path: Path) -> None:
    builder = weights(*[CHUNK] * 5)
    builder.add_tar({"a": b"b" * 1000, "c/d": b"e" * 5000})

    async def work(store: Store) -> None:
        tree = await put_model(store, builder)
        with after_power_loss(disk, tmp_path / "left") as left:
            again = Store.open(left / "root", CHUNK, NO_FLOOR)
            found = again.tree(tree.digest, EVERYTHING)
            assert found is not None
            assert all(again.has_content(layer) for layer in layers_of(builder))
            for layer in layers_of(builder):
                stored = again.stored(layer.descriptor.digest)
                assert stored is not None
                assert stored.matches(layer.descriptor.digest, STILL)
            again.close()

    in_store(disk / "root", work)


def test_a_kill_takes_no_complete_blob(tmp_path: Path) -> None:
    builder = weights(*[CHUNK] * 3)
    layers = layers_of(builder)
    for step in itertools.count(1):
        root, told = tmp_path / str(step), tmp_path / f"{step}.told"
        told.touch()

        def fetch(tell: Tell, root: Path = root, told: Path = told) -> None:
            async def work(store: Store) -> None:
                for layer in layers:
                    put_content(store, layer, builder.blobs[layer.descriptor.digest], NAME)
                    with told.open("a") as file:
                        file.write("+")
                    tell(layer)

            in_store(root, work)

        async def look(store: Store, told: Path = told) -> None:
            count = len(told.read_text())  # noqa: ASYNC240 - nothing else runs
            for layer in layers[:count]:
                assert store.has_blob(layer.descriptor)
                assert store.catalog.is_proven(NAME, layer.descriptor.digest)

        if not killed_at(step, fetch):
            break
        in_store(root, look)


def test_a_new_map_waits_for_no_disk_and_one_in_which_something_is_trusted_does(
    disk: Path, tmp_path: Path
) -> None:
    before = flushes(disk)
    chunks = ChunkMap(disk / "map", 4 * CHUNK, CHUNK)
    chunks.trust("one")
    assert flushes(disk) == before
    chunks.mark(0, trusted=True)
    chunks.set_fill(1, 5, framed=False, trusted=True)
    chunks.mark_synced([0])
    with after_power_loss(disk, tmp_path / "left") as left:
        found = ChunkMap(left / "map", 4 * CHUNK, CHUNK)
        assert found.is_for("one")
        assert found.is_trusted(0)
        found.close()
    before = flushes(disk)
    chunks.trust("two")
    assert flushes(disk) > before
    with after_power_loss(disk, tmp_path / "left") as left:
        found = ChunkMap(left / "map", 4 * CHUNK, CHUNK)
        # the name may be lost, and not what had to come before it
        assert not found.is_any_trusted()
        assert not found.is_fill_trusted(1)
        found.close()
    chunks.close()


def test_what_is_trusted_in_a_map_without_a_name_is_not_trusted_by_the_first_one(
    tmp_path: Path,
) -> None:
    chunks = ChunkMap(tmp_path / "map", 4 * CHUNK, CHUNK)
    chunks.mark(0, trusted=True)
    chunks.trust("one")
    assert not chunks.is_any_trusted()
    chunks.close()
