"""A store with something in its trash that cannot be removed. Needs root."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from fetcher.errors import NoSpace
from fetcher.modelpack import read_model
from fetcher.store import Limits, Store
from fetcher.store.collection import EVERYTHING as ALL
from fetcher.threads import run_stoppable
from tests.support.stores import CHUNK, EVERYTHING, MIB, disk_bytes, in_store, put_model, weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CAP = Limits(max_size=17 * MIB, min_free=0)


@contextmanager
def in_the_way(folder: Path) -> Iterator[None]:
    """Something is mounted on ``folder``: it cannot be removed."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def stuck(store: Store, size: int) -> Path:
    """Give the trash a folder that takes so many bytes, by the records."""
    known = store.garbage.trash()
    store.garbage.throw_away(f"blobs/sha256/{'0' * 64}", size, [])
    [name] = store.garbage.trash() - known
    return store.root / name


def test_what_cannot_be_removed_takes_room_and_stops_no_pull(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(store: Store) -> None:
        with in_the_way(stuck(store, 6 * MIB)):
            tree = await put_model(store, weights(6 * MIB))
            assert "what was evicted cannot be removed: " in caplog.text
            caplog.clear()
            # it is there: what is evicted for the next model is what stands in its way
            await put_model(store, weights(8 * MIB))
            assert not tree.path.exists()
            with pytest.raises(NoSpace, match=r"evicting all that is not in use would give 8\.\d"):
                await put_model(store, weights(11 * MIB))
            assert store.space.usage().trash == 6 * MIB
            assert "cannot be removed" not in caplog.text
            await store.orphans.reconcile()
        await store.garbage.empty_trash()
        await put_model(store, weights(11 * MIB))
        assert store.space.usage().trash == 0
        assert store.space.usage().used == disk_bytes(store.root)

    in_store(tmp_path / "root", work, CAP)


def test_more_is_evicted_where_what_was_counted_on_stays(tmp_path: Path) -> None:
    async def work(store: Store) -> None:
        first, second = [await put_model(store, weights(5 * MIB)) for _ in range(2)]
        with in_the_way(stuck(store, 4 * MIB)):
            # 5 and 4 would fit beside the first two, were it not for what stays
            await put_model(store, weights(5 * MIB))
            assert [tree.path.exists() for tree in (first, second)].count(True) == 1

    in_store(tmp_path / "root", work, CAP)


def test_a_room_evicts_more_where_what_was_counted_on_stays(tmp_path: Path) -> None:
    model = read_model(weights(CHUNK).manifest())

    async def work(store: Store) -> None:
        old = await put_model(store, weights(8 * MIB))
        with store.held(model, EVERYTHING):
            await store.reserve("r/m:v1", model, EVERYTHING)
            room = store.room(model.layers[0].descriptor.digest)
            with in_the_way(stuck(store, 6 * MIB)):
                await run_stoppable(lambda _: room.grow(5 * MIB))
                assert not old.path.exists()
                with pytest.raises(NoSpace):
                    await run_stoppable(lambda _: room.grow(8 * MIB))

    in_store(tmp_path / "root", work, CAP)


def test_what_a_kill_left_in_the_trash_and_cannot_be_removed_gets_a_record(
    tmp_path: Path,
) -> None:
    async def work(store: Store) -> None:
        left = store.root / "trash/left"
        with in_the_way(left):
            (left / "data").write_bytes(b"x" * MIB)
            with (left / "open").open("wb"):
                await store.orphans.reconcile()
            store.garbage.evict(store.garbage.plan(ALL))
            assert await store.orphans.bytes() == 0
            assert store.garbage.trash() == {"trash/left"}
        await store.garbage.empty_trash()
        assert store.garbage.trash() == frozenset()
        assert not left.exists()

    in_store(tmp_path / "root", work, CAP)
