"""What is left of the store's records when the power is lost, and when the process is killed."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fetcher.modelpack import read_model
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
    from contextlib import AbstractContextManager

    from fetcher.modelpack import Layer
    from tests.support.models import ModelBuilder
    from tests.support.stores import Tell

NAME = "registry.example/some/model"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 24 * MIB) as folder:
        yield folder


def test_a_power_loss_takes_no_transaction(disk: Path, tmp_path: Path) -> None:
    with contextlib.closing(Database(disk / "state.db")) as database:
        with database.transaction() as connection:
            connection.execute("CREATE TABLE notes (number INTEGER, more BLOB)")
        # the log is begun anew on the way
        for number in range(100):
            before = flushes(disk)
            with database.transaction() as connection:
                connection.execute("INSERT INTO notes VALUES (?, zeroblob(9000))", (number,))
            assert flushes(disk) > before
            if number % 20 == 19:
                with (
                    after_power_loss(disk, tmp_path / "left") as left,
                    contextlib.closing(Database(left / "state.db")) as found,
                ):
                    rows = found.connection.execute("SELECT number FROM notes ORDER BY number")
                    assert [one for (one,) in rows] == list(range(number + 1))


def layers_of(builder: ModelBuilder) -> tuple[Layer, ...]:
    return read_model(builder.manifest()).layers


def test_a_power_loss_takes_no_complete_blob(disk: Path, tmp_path: Path) -> None:
    builder = weights(*[CHUNK] * 3)
    builder.add_tar({"a": b"b" * 1000, "c/d": b"e" * 5000})
    layers = layers_of(builder)

    async def fetch(store: Store) -> None:
        for count, layer in enumerate(layers, 1):
            put_content(store, layer, builder.blobs[layer.descriptor.digest], NAME)
            with (
                after_power_loss(disk, tmp_path / "left") as left,
                contextlib.closing(Store.open(left / "root", CHUNK, NO_FLOOR)) as again,
            ):
                for there in layers[:count]:
                    digest = there.descriptor.digest
                    assert again.catalog.is_proven(NAME, digest)
                    stored = again.stored(digest)
                    assert stored is not None
                    assert stored.matches(digest, STILL)

    in_store(disk / "root", fetch)


def test_a_model_that_was_recorded_is_whole_after_a_power_loss(disk: Path, tmp_path: Path) -> None:
    builder = weights(*[CHUNK] * 5)
    builder.add_tar({"a": b"b" * 1000, "c/d": b"e" * 5000})

    async def work(store: Store) -> None:
        tree = await put_model(store, builder)
        with (
            after_power_loss(disk, tmp_path / "left") as left,
            contextlib.closing(Store.open(left / "root", CHUNK, NO_FLOOR)) as again,
        ):
            found = again.tree(tree.digest, EVERYTHING)
            assert found is not None
            assert all(again.has_content(layer) for layer in layers_of(builder))
            for layer in layers_of(builder):
                stored = again.stored(layer.descriptor.digest)
                assert stored is not None
                assert stored.matches(layer.descriptor.digest, STILL)

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
    def left() -> AbstractContextManager[ChunkMap]:
        return map_after_power_loss(disk, tmp_path / "left")

    before = flushes(disk)
    with contextlib.closing(ChunkMap(disk / "map", 4 * CHUNK, CHUNK)) as chunks:
        chunks.trust("one")
        assert flushes(disk) == before
        chunks.mark(0, trusted=True)
        chunks.set_fill(1, 5, framed=False, trusted=True)
        chunks.mark_synced([0])
        with left() as found:
            assert found.is_for("one")
            assert found.is_trusted(0)
        before = flushes(disk)
        chunks.trust("two")
        assert flushes(disk) > before
        with left() as found:
            # the name may be lost, and not what had to come before it
            assert not found.is_any_trusted()
            assert not found.is_fill_trusted(1)


@contextlib.contextmanager
def map_after_power_loss(disk: Path, folder: Path) -> Iterator[ChunkMap]:
    with (
        after_power_loss(disk, folder) as left,
        contextlib.closing(ChunkMap(left / "map", 4 * CHUNK, CHUNK)) as found,
    ):
        yield found


def test_what_is_trusted_in_a_map_without_a_name_is_not_trusted_by_the_first_one(
    tmp_path: Path,
) -> None:
    with contextlib.closing(ChunkMap(tmp_path / "map", 4 * CHUNK, CHUNK)) as chunks:
        chunks.mark(0, trusted=True)
        chunks.trust("one")
        assert not chunks.is_any_trusted()


def test_a_failing_test_leaves_no_disk_behind(tmp_path: Path) -> None:
    def fail(leaked: contextlib.ExitStack) -> None:
        with small_disk(tmp_path / "disk", 4 * MIB) as disk:
            leaked.enter_context((disk / "open").open("wb"))
            raise AssertionError("its own")

    with contextlib.ExitStack() as leaked, pytest.raises(AssertionError, match="its own"):
        fail(leaked)
    assert not (tmp_path / "disk").exists()
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
