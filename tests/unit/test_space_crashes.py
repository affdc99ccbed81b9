"""The store's space after a kill at every step, after an upgrade, and what opening it costs."""

from __future__ import annotations

import resource
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.modelpack import Selection, read_model
from fetcher.oci import Reference
from fetcher.store import Limits, Store
from fetcher.store.collection import EVERYTHING as ALL
from tests.support.stores import (
    CHUNK,
    EVERYTHING,
    MIB,
    NO_FLOOR,
    disk_bytes,
    killed_at,
    put_model,
    set_used,
    weights,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.models import ModelBuilder


def in_store(
    root: Path,
    work: Callable[[Store], Awaitable[None]],
    limits: Limits = NO_FLOOR,
    step: Callable[[object], None] | None = None,
) -> None:
    """Run ``work`` with an open store; ``step`` is told of every statement to the database."""

    async def main() -> None:
        with trio.fail_after(60):
            store = Store.open(root, CHUNK, limits)
            if step is not None:
                store.database.connection.set_trace_callback(step)
            try:
                await work(store)
            finally:
                store.close()

    trio.run(main)


async def assert_in_order(store: Store) -> None:
    """After a start everything below the root has a record, and the records are right."""
    await store.orphans.reconcile()
    assert await store.orphans.bytes() == 0
    assert list((store.root / "trash").iterdir()) == []
    assert store.garbage.trash() == frozenset()
    for digest, selection, _ in store.catalog.trees():
        assert selection == ""
        tree = store.tree(digest, EVERYTHING)
        assert tree is not None
        assert len(list(tree.path.iterdir())) == tree.files
        for file in tree.path.iterdir():
            assert file.stat().st_size == CHUNK
            assert file.stat().st_nlink == 2
    assert store.space.usage().used == disk_bytes(store.root)


def kill_at_every_step(
    tmp_path: Path,
    prepare: Callable[[Store], Awaitable[None]],
    work: Callable[[Store], Awaitable[None]],
    after: Callable[[Store], Awaitable[None]],
) -> int:
    """Kill ``work`` at each of its steps, on a copy of what ``prepare`` left; how many there were.

    ``after`` then finds what is left in order.
    """
    template, root = tmp_path / "template", tmp_path / "root"
    in_store(template, prepare)
    step = 1
    while True:
        shutil.copytree(template, root)
        _link_again(root)
        more = killed_at(step, lambda tell: in_store(root, work, step=tell))
        in_store(root, assert_in_order)
        in_store(root, after)
        shutil.rmtree(root)
        if not more:
            return step
        step += 1


def _link_again(root: Path) -> None:
    """A copy has no hard links: make a tree's files links to their blobs, as they were."""
    for file in (root / "models").glob("*/*/*"):
        content = file.read_bytes()
        for blob in (root / "blobs").glob("*/*"):
            if blob.read_bytes() == content:
                file.unlink()
                file.hardlink_to(blob)


def test_an_eviction_may_be_killed_at_each_of_its_steps(tmp_path: Path) -> None:
    old, shared, new = weights(CHUNK, CHUNK), weights(CHUNK), weights(CHUNK)

    async def prepare(store: Store) -> None:
        for used, builder in enumerate((old, shared, new)):
            set_used(store, await put_model(store, builder), float(used))

    async def evict(store: Store) -> None:
        store.garbage.pin(lambda: {(new.digest, "")})
        store.garbage.evict(store.garbage.plan(ALL))
        await store.garbage.empty_trash()

    async def after(store: Store) -> None:
        assert store.tree(new.digest, EVERYTHING) is not None
        for builder in (old, shared):
            await put_model(store, builder)
        await assert_in_order(store)

    assert kill_at_every_step(tmp_path, prepare, evict, after) > 15


def records_full_until_something_is_removed() -> None:
    """For a process of its own: no file can be written before one is removed."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))

    def audit(event: str, _: object) -> None:
        if event == "os.remove":
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    sys.addaudithook(audit)


def test_an_eviction_that_cannot_be_recorded_may_be_killed_at_each_of_its_steps(
    tmp_path: Path,
) -> None:
    old, other = weights(CHUNK, CHUNK, CHUNK), weights(CHUNK)

    async def prepare(store: Store) -> None:
        for builder in (old, other):
            await put_model(store, builder)

    async def evict(store: Store) -> None:
        records_full_until_something_is_removed()
        store.garbage.evict(store.garbage.plan(ALL))
        await store.garbage.empty_trash()

    async def after(store: Store) -> None:
        for builder in (old, other):
            await put_model(store, builder)
        await assert_in_order(store)

    assert kill_at_every_step(tmp_path, prepare, evict, after) > 25


def test_a_pull_that_makes_room_may_be_killed_at_each_of_its_steps(tmp_path: Path) -> None:
    old, new = weights(CHUNK, CHUNK), weights(CHUNK)

    async def prepare(store: Store) -> None:
        await put_model(store, old)

    async def pull(store: Store) -> None:
        store.garbage.evict(store.garbage.plan(1))
        await put_model(store, new)

    async def after(store: Store) -> None:
        for builder in (old, new):
            await put_model(store, builder)
        await assert_in_order(store)

    assert kill_at_every_step(tmp_path, prepare, pull, after) > 15


# -- version 1 -------------------------------------------------------------------------------------

_VERSION_1 = """
CREATE TABLE blobs (
    digest TEXT PRIMARY KEY, size INTEGER NOT NULL, completed REAL NOT NULL) STRICT;
CREATE TABLE models (
    digest TEXT NOT NULL, selection TEXT NOT NULL, size INTEGER NOT NULL, files INTEGER NOT NULL,
    completed REAL NOT NULL, used REAL NOT NULL, PRIMARY KEY (digest, selection)) STRICT;
CREATE TABLE manifests (
    top TEXT PRIMARY KEY, digest TEXT NOT NULL, media_type TEXT NOT NULL, body BLOB NOT NULL)
    STRICT;
CREATE TABLE tags (
    reference TEXT PRIMARY KEY, digest TEXT NOT NULL, resolved REAL NOT NULL) STRICT;
CREATE TABLE accesses (
    name TEXT NOT NULL, digest TEXT NOT NULL, fingerprint TEXT NOT NULL, accepted REAL NOT NULL,
    PRIMARY KEY (name, digest, fingerprint)) STRICT;
CREATE TABLE settings (key TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
"""


def version_1(root: Path, builders: list[ModelBuilder]) -> None:
    """Make a store be as version 1 wrote it."""

    async def put(store: Store) -> None:
        for number, builder in enumerate(builders):
            reference = Reference("r.example.org", "acme/m", f"v{number}")
            store.catalog.add_resolution(reference, builder.digest, builder.manifest(), "nobody")
            await put_model(store, builder)
        await put_model(store, builders[0], Selection(exclude_patterns=("nothing",)))

    in_store(root, put)
    shutil.rmtree(root / "trash")
    with closing(sqlite3.connect(root / "state.db")) as new:
        rows = {
            table: new.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608 (constants)
            for table in ("blobs", "models", "manifests", "tags", "accesses", "settings")
        }
    for file in root.glob("state.db*"):
        file.unlink()
    with closing(sqlite3.connect(root / "state.db", isolation_level=None)) as old:
        old.executescript(_VERSION_1)
        for table, values in rows.items():
            for value in values:
                marks = ", ".join("?" * len(value))
                old.execute(f"INSERT INTO {table} VALUES ({marks})", value)  # noqa: S608
        old.execute("PRAGMA user_version = 1")


def test_a_root_of_version_1_is_taken_over(tmp_path: Path) -> None:
    builders = [weights(2 * MIB, CHUNK), weights(MIB)]
    root = tmp_path / "root"
    version_1(root, builders)

    async def work(store: Store) -> None:
        for builder in builders:
            tree = store.tree(builder.digest, EVERYTHING)
            assert tree is not None
        assert store.space.usage().used >= 3 * MIB
        await store.orphans.reconcile()
        assert await store.orphans.bytes() == 0
        assert len(store.catalog.trees()) == 3
        assert store.space.usage().used == disk_bytes(root)
        store.garbage.evict(store.garbage.plan_removal(builders[1].digest))
        await store.garbage.empty_trash()
        store.garbage.pin(lambda: {(builders[0].digest, "")})
        store.garbage.evict(store.garbage.plan(ALL))
        await store.garbage.empty_trash()
        [layer, _] = read_model(builders[0].manifest()).layers
        assert store.has_blob(layer.descriptor)
        assert store.space.usage().used == disk_bytes(root)

    in_store(root, work)


# -- what opening costs ----------------------------------------------------------------------------

_OPEN = """
import sys
from pathlib import Path
from fetcher.store import Limits, Store
Store.open(Path(sys.argv[1]), limits=Limits(min_free=0)).close()
"""


def full_of(root: Path, count: int) -> None:
    """A store with records and folders of so many models."""

    async def put(store: Store) -> None:
        for kind in ("blobs", "models"):
            (root / kind / "sha256").mkdir(exist_ok=True)
        with store.database.transaction() as connection:
            for number in range(count):
                name = f"{number:064x}"
                (root / "blobs/sha256" / name).touch()
                (root / "models/sha256" / name).mkdir()
                connection.execute(
                    "INSERT INTO models VALUES (?, '', 1, 1, 0, 0)", (f"sha256:{name}",)
                )
                connection.execute("INSERT INTO blobs VALUES (?, 1, 0)", (f"sha256:{name}",))
                for kind in ("blobs", "models"):
                    connection.execute(
                        "INSERT INTO holdings VALUES (?, 4096, 1, 0)", (f"{kind}/sha256/{name}",)
                    )

    in_store(root, put)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace counts the system calls")
def test_opening_does_not_walk_the_store(tmp_path: Path) -> None:
    counts, totals = {}, {}
    for models in (10, 5000):
        root = tmp_path / str(models)
        full_of(root, models)
        log = tmp_path / f"{models}.log"
        subprocess.run(
            ["strace", "-f", "-o", str(log), sys.executable, "-c", _OPEN, str(root)],
            check=True,
            cwd=Path(__file__).parents[2],
        )
        lines = log.read_text().splitlines()
        counts[models] = sum(str(root) in line for line in lines)
        totals[models] = len(lines)
    # what it does below the root: a few files, the same whatever the store holds
    assert counts[5000] == counts[10] < 100
    assert totals[5000] < 1.05 * totals[10]
