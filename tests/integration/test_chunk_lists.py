"""How a node finds the list of a model's chunk digests, and what it makes of a bad one."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
import trio

from fetcher.chunk_digests import CHUNK_SIZE_KEY, LIST_TYPE
from fetcher.chunk_lists import ChunkLists, KnownList
from fetcher.indexing import Indexing
from fetcher.modelpack import read_model
from fetcher.oci import IMAGE_INDEX, Digest, Reference
from fetcher.publishing import publish
from fetcher.referrers import referrers_tag
from fetcher.store import Store
from tests.support.faulty_registry import FaultyRegistry, Reply
from tests.support.registry import OCI_MANIFEST
from tests.support.registry_calls import NOBODY, QUICK, opened
from tests.support.steps import cancelled_at
from tests.support.stores import CHUNK, NO_FLOOR, pull, pulling, weights

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from tests.support.models import ModelBuilder
    from tests.support.registry import RegistryServer


@contextlib.asynccontextmanager
async def looking(root: Path, patience: float = 10.0) -> AsyncIterator[tuple[ChunkLists, Store]]:
    store = Store.open(root, CHUNK, NO_FLOOR)
    try:
        async with opened() as registry:
            yield ChunkLists(store, registry, CHUNK, patience), store
    finally:
        store.close()


def run(root: Path, work: Callable[[ChunkLists, Store], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        with trio.fail_after(30):
            async with looking(root, **options) as (lists, store):
                return await work(lists, store)

    return trio.run(main)


def index(reference: str, builder: ModelBuilder, chunk_size: int = CHUNK) -> bytes:
    """Publish a list, and give it."""

    async def main() -> bytes:
        parsed = Reference.parse(reference).with_digest(builder.digest)
        async with opened() as registry:
            indexing = Indexing(registry, parsed, NOBODY)
            made = await indexing.make(read_model(builder.manifest()), chunk_size)
        await publish(made.encode(), made.chunk_size, parsed, NOBODY, QUICK)
        return made.encode()

    return trio.run(main)


def push_list(
    registry: RegistryServer,
    repository: str,
    builder: ModelBuilder,
    body: bytes,
    *,
    subject: Digest | None = None,
    artifact_type: str = LIST_TYPE,
    layers: int = 1,
) -> None:
    """Push something as a list, as whoever may push to the repository can."""
    blob = registry.push_blob(repository, body)
    registry.push_blob(repository, b"{}")
    layer = {"mediaType": LIST_TYPE, "digest": str(blob), "size": len(body)}
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": artifact_type,
        "config": {
            "mediaType": "application/vnd.oci.empty.v1+json",
            "digest": str(Digest.of(b"{}")),
            "size": 2,
        },
        "layers": [layer] * layers,
        "subject": {
            "mediaType": OCI_MANIFEST,
            "digest": str(subject or builder.digest),
            "size": len(builder.body),
        },
    }
    manifest = json.dumps(document).encode()
    digest = registry.push_manifest(repository, str(Digest.of(manifest)), manifest)
    row = {
        "mediaType": OCI_MANIFEST,
        "digest": str(digest),
        "size": len(manifest),
        "artifactType": LIST_TYPE,
        "annotations": {CHUNK_SIZE_KEY: str(CHUNK)},
    }
    index = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": [row]}
    tag = referrers_tag(builder.digest)
    registry.push_manifest(repository, tag, json.dumps(index).encode(), IMAGE_INDEX)


def find(reference: str, builder: ModelBuilder) -> Callable[[ChunkLists, Store], Awaitable[Any]]:
    async def work(lists: ChunkLists, store: Store) -> KnownList | None:
        model = read_model(builder.manifest())
        return await lists.find(Reference.parse(reference), model, NOBODY)

    return work


def test_a_list_is_found_once_and_kept(
    registry: RegistryServer, faulty: FaultyRegistry, tmp_path: Path
) -> None:
    builder = weights(5 * CHUNK)
    builder.push(registry, "lists/kept", "v1")
    reference = faulty.reference("lists/kept", "v1")
    body = index(reference, builder)

    async def twice(lists: ChunkLists, store: Store) -> None:
        faulty.requests.clear()
        found = await find(reference, builder)(lists, store)
        assert found.digests.encode() == body
        assert found.name == Reference.parse(reference).name
        asked = len(faulty.requests)
        assert asked == 4
        again = await find(reference, builder)(lists, store)
        assert again == found
        assert lists.known(Reference.parse(reference), read_model(builder.manifest())) == again
        # another name's list is its own: nobody has said that those who push there are believed
        other = faulty.reference("lists/other", "v1")
        assert await find(other, builder)(lists, store) is None

    run(tmp_path, twice)
    faulty.requests.clear()
    # a restart asks nobody, and needs no network
    assert run(tmp_path, find(reference, builder)).digests.encode() == body
    assert not faulty.requests


def test_that_there_is_none_is_remembered(
    registry: RegistryServer, faulty: FaultyRegistry, tmp_path: Path
) -> None:
    builder = weights(2 * CHUNK)
    builder.push(registry, "lists/none", "v1")
    reference = faulty.reference("lists/none", "v1")
    assert run(tmp_path, find(reference, builder)) is None
    assert len(faulty.requests) == 2
    index(reference, builder)
    faulty.requests.clear()
    assert run(tmp_path, find(reference, builder)) is None
    assert not faulty.requests


def test_small_blobs_are_no_reason_to_ask(
    registry: RegistryServer, faulty: FaultyRegistry, tmp_path: Path
) -> None:
    builder = weights(CHUNK, 100)
    assert run(tmp_path, find(faulty.reference("lists/small"), builder)) is None
    assert not faulty.requests


def test_of_several_lists_the_one_with_the_nodes_chunks_is_taken(
    registry: RegistryServer, tmp_path: Path
) -> None:
    builder = weights(5 * CHUNK)
    reference = builder.push(registry, "lists/several", "v1")
    index(reference, builder, 2 * CHUNK)
    assert run(tmp_path / "one", find(reference, builder)).digests.chunk_size == 2 * CHUNK
    index(reference, builder, CHUNK)
    assert run(tmp_path / "two", find(reference, builder)).digests.chunk_size == CHUNK


def test_a_bad_list_is_none(
    registry: RegistryServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = weights(3 * CHUNK)
    reference = builder.push(registry, "lists/bad", "v1")
    good = json.loads(index(reference, builder))
    sizes = json.loads(json.dumps(good))
    for blob in sizes["blobs"].values():
        blob["size"] += 1
    bad: list[tuple[str, dict[str, Any]]] = [
        ("cannot be read", {"body": b"{"}),
        ("gives blob", {"body": json.dumps(sizes).encode()}),
        ("about another model", {"body": b"{}", "subject": Digest.of(b"x")}),
        ("no manifest of a list", {"body": b"{}", "artifact_type": "application/x"}),
        ("not one list", {"body": b"{}", "layers": 2}),
        ("not one list", {"body": b" " * (4 * 1024 * 1024 + 1)}),
    ]
    for number, (match, options) in enumerate(bad):
        push_list(registry, "lists/bad", builder, **options)
        assert run(tmp_path / str(number), find(reference, builder)) is None
        assert match in caplog.text
        caplog.clear()


@pytest.mark.parametrize("reply", [Reply(503), Reply(500), Reply(403), Reply(401)])
def test_a_registry_that_gives_no_answer_costs_little_and_is_left_alone_for_a_while(
    registry: RegistryServer, faulty: FaultyRegistry, tmp_path: Path, reply: Reply
) -> None:
    builder = weights(2 * CHUNK)
    reference = builder.push(registry, "lists/refused", "v1")
    reference = faulty.reference("lists/refused", "v1")
    faulty.add("/referrers/", reply)

    async def work(lists: ChunkLists, store: Store) -> None:
        assert await find(reference, builder)(lists, store) is None
        asked = len(faulty.requests)
        assert await find(reference, builder)(lists, store) is None
        assert len(faulty.requests) == asked

    run(tmp_path, work)
    # it did not say that there is none
    faulty.faults.clear()
    index(reference, builder)
    assert run(tmp_path, find(reference, builder)) is not None


def test_a_registry_that_is_silent_is_waited_for_as_long_as_was_said(
    registry: RegistryServer, faulty: FaultyRegistry, tmp_path: Path
) -> None:
    builder = weights(2 * CHUNK)
    faulty.add("/referrers/", Reply(200, {}, endless=True))

    async def work(lists: ChunkLists, store: Store) -> None:
        with trio.fail_after(5):
            assert await find(faulty.reference("lists/silent"), builder)(lists, store) is None

    run(tmp_path, work, patience=0.3)


def test_what_is_known_of_a_model_goes_with_it(registry: RegistryServer, tmp_path: Path) -> None:
    builder = weights(2 * CHUNK)
    reference = builder.push(registry, "lists/gone", "v1")
    index(reference, builder)

    async def main() -> None:
        async with pulling(tmp_path, NO_FLOOR) as (pulls, store), opened() as registry:
            await pull(pulls, reference)
            lists = ChunkLists(store, registry, CHUNK)
            model = read_model(builder.manifest())
            parsed = Reference.parse(reference)
            assert await lists.find(parsed, model, NOBODY) is not None
            store.garbage.evict(store.garbage.plan_removal(builder.digest))
            assert lists.known(parsed, model) is None
            assert store.lists.get(parsed.name, model.digest) is None

    trio.run(main)


def test_a_list_that_the_registry_contradicts_is_not_looked_for_again(
    registry: RegistryServer, tmp_path: Path
) -> None:
    builder = weights(2 * CHUNK)
    reference = builder.push(registry, "lists/contradicted", "v1")
    index(reference, builder)

    async def work(lists: ChunkLists, store: Store) -> None:
        assert await find(reference, builder)(lists, store) is not None
        known = lists.known(Reference.parse(reference), read_model(builder.manifest()))
        assert known is not None
        known.contradicted()
        assert await find(reference, builder)(lists, store) is None

    run(tmp_path, work)


def test_looking_can_be_cancelled_at_every_step(registry: RegistryServer, tmp_path: Path) -> None:
    builder = weights(2 * CHUNK)
    reference = builder.push(registry, "lists/cancelled", "v1")
    body = index(reference, builder)

    async def work(lists: ChunkLists, store: Store) -> None:
        parsed, digest = Reference.parse(reference), builder.digest

        async def call() -> None:
            await find(reference, builder)(lists, store)

        step = 0
        while await cancelled_at(step, call):
            record = store.lists.get(parsed.name, digest)
            # found or not, and never that there is none
            assert record is None or record.body == body
            with store.database.transaction() as connection:
                store.lists.forget(connection, str(digest))
            step += 1
        assert step > 4

    run(tmp_path, work)
