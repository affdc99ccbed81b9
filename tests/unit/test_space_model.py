"""The store's space under random work and restarts, beside a simple model of it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fetcher.errors import NoSpace, NotFound
from fetcher.modelpack import read_model
from fetcher.oci import Digest
from fetcher.ranges import Range
from fetcher.store import Limits, Store
from fetcher.store.collection import EVERYTHING as ALL
from tests.support.models import ModelBuilder
from tests.support.steps import cancelled_at
from tests.support.stores import (
    CHUNK,
    EVERYTHING,
    MIB,
    disk_bytes,
    put_model,
    set_used,
    weights,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    import pytest

CAP = Limits(max_size=8 * MIB, min_free=0, high=90, low=60)
LAYERS = [bytes([number]) * size for number, size in enumerate((1, CHUNK, MIB, 2 * MIB, 3 * MIB))]
MODELS = [
    ModelBuilder().add_raw("a", LAYERS[0]).add_raw("b", LAYERS[3]),
    ModelBuilder().add_raw("b", LAYERS[3]).add_raw("c", LAYERS[2]),
    ModelBuilder().add_raw("d", LAYERS[4]),
    ModelBuilder().add_raw("c", LAYERS[2]).add_raw("e", LAYERS[1]),
]
"""Models that share layers; not all of them fit at a time."""

model_numbers = st.integers(0, len(MODELS) - 1)
works = st.one_of(
    st.tuples(st.just("put"), model_numbers),
    st.tuples(st.just("begin"), model_numbers),
    st.tuples(st.just("pin"), model_numbers),
    st.tuples(st.just("unpin"), model_numbers),
    st.tuples(st.just("remove"), model_numbers),
    st.tuples(st.just("collect"), st.just(0)),
    st.tuples(st.just("evict all"), st.just(0)),
    st.tuples(st.just("restart"), st.just(0)),
    st.tuples(st.just("kill"), model_numbers),
)


class Played:
    """A store that work is done on, and who pins what."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pins: set[tuple[Digest, str]] = set()
        self.clock = 0.0
        self.start()

    def start(self) -> None:
        self.store = Store.open(self.root, CHUNK, CAP)
        self.store.garbage.pin(lambda: self.pins)

    async def play(self, work: str, number: int) -> None:
        builder, store = MODELS[number], self.store
        match work:
            case "put":
                await self._put(builder)
            case "begin":
                await self._begin(builder)
            case "pin" if store.tree(builder.digest, EVERYTHING) is not None:
                self.pins.add((builder.digest, ""))
            case "unpin":
                self.pins.discard((builder.digest, ""))
            case "remove" if (builder.digest, "") not in self.pins:
                try:
                    store.garbage.evict(store.garbage.plan_removal(builder.digest))
                except NotFound:
                    return
                await store.garbage.empty_trash()
            case "collect":
                store.garbage.evict(store.garbage.by_watermarks())
                await store.garbage.empty_trash()
            case "evict all":
                store.garbage.evict(store.garbage.plan(ALL))
                await store.garbage.empty_trash()
            case "kill":
                # what was claimed and evicted stays as it is, in the records and on the disk
                store.space.claim({f"blobs/sha256/{Digest.of(LAYERS[number]).hex}": MIB})
                store.garbage.evict(store.garbage.plan(1))
                self._restart()
                await self.store.orphans.reconcile()
            case "restart":
                self._restart()

    def _restart(self) -> None:
        self.store.close()
        self.start()

    async def _put(self, builder: ModelBuilder) -> None:
        self.clock += 1
        try:
            tree = await put_model(self.store, builder)
        except NoSpace:
            # then what is pinned leaves too little, with all that this model needs
            pinned = {digest for digest, _ in self.pins}
            kept = [one for one in MODELS if one.digest in pinned] + [builder]
            needed = {data for one in kept for data in one.blobs.values()}
            assert sum(map(len, needed)) > 5 * MIB
            return
        set_used(self.store, tree, self.clock)

    async def _begin(self, builder: ModelBuilder) -> None:
        """Fetch some of a model and stop."""
        model = read_model(builder.manifest())
        layer = model.layers[-1]
        with self.store.held(model, EVERYTHING):
            try:
                await self.store.reserve("r/m:v1", model, EVERYTHING)
            except NoSpace:
                return
            if not self.store.has_content(layer):
                partial = self.store.open_partial(layer)
                data = builder.blobs[layer.descriptor.digest][:CHUNK]
                if len(data) == CHUNK and not partial.done:
                    partial.sink(Range(0, CHUNK))(data)
                partial.close()
        await self.store.rooms.settle()

    def check(self) -> None:
        store = self.store
        usage = store.space.usage()
        assert usage.used == disk_bytes(self.root) <= 8 * MIB
        assert usage.reserved == usage.trash == 0
        for digest, _ in self.pins:
            assert store.tree(digest, EVERYTHING) is not None
        for builder in MODELS:
            tree = store.tree(builder.digest, EVERYTHING)
            if tree is not None:
                model = read_model(builder.manifest())
                assert all(store.has_content(layer) for layer in model.layers)
                shown = {path.name: path.read_bytes() for path in tree.path.iterdir()}
                assert sorted(shown.values()) == sorted(
                    builder.blobs[layer.descriptor.digest] for layer in model.layers
                )


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(works, min_size=5, max_size=25))
def test_records_and_disk_agree_whatever_is_done(
    tmp_path_factory: pytest.TempPathFactory, done: list[tuple[str, int]]
) -> None:
    root = tmp_path_factory.mktemp("played") / "root"

    async def main() -> None:
        played = Played(root)
        try:
            for work, number in done:
                await played.play(work, number)
                played.check()
            assert await played.store.orphans.bytes() == 0
        finally:
            played.store.close()

    try:
        trio.run(main)
    finally:
        shutil.rmtree(root.parent)


def test_everything_may_be_cancelled_at_each_of_its_steps(tmp_path: Path) -> None:
    old, new = weights(2 * MIB), weights(3 * MIB)
    model = read_model(new.manifest())

    async def reserve(store: Store) -> None:
        with store.held(model, EVERYTHING):
            await store.reserve("r/m:v1", model, EVERYTHING)

    async def collect(store: Store) -> None:
        store.garbage.evict(store.garbage.plan(ALL))
        await store.garbage.empty_trash()

    async def at_each_step(call: Callable[[Store], Awaitable[None]], number: int) -> None:
        step, more = 0, True
        while more:
            root = tmp_path / f"{number}-{step}"
            store = Store.open(root, CHUNK, Limits(max_size=6 * MIB, min_free=0))
            await put_model(store, old)
            (root / "trash/left").write_bytes(b"behind")
            (root / "blobs/sha256" / ("0" * 64)).write_bytes(b"never verified")
            more = await cancelled_at(step, lambda store=store: call(store))  # type: ignore[misc]
            assert store.space.holding() == frozenset()
            await store.orphans.reconcile()
            await put_model(store, new)
            assert store.space.usage().used == disk_bytes(root)
            assert store.space.usage().reserved == store.space.usage().trash == 0
            assert await store.orphans.bytes() == 0
            store.close()
            shutil.rmtree(root)
            step += 1
        assert step > 1

    async def main() -> None:
        calls: list[Callable[[Store], Awaitable[None]]] = [
            reserve,
            collect,
            lambda store: store.orphans.reconcile(),
            lambda store: store.rooms.settle(["blobs/sha256/none"]),
        ]
        for number, call in enumerate(calls):
            await at_each_step(call, number)

    trio.run(main)
