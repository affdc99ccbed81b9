"""Pulls into a real store from a real registry, with a proxy between them that does its worst."""

from __future__ import annotations

import contextlib
import stat
import subprocess
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.credentials import Anonymous, Keychain
from fetcher.errors import (
    DigestMismatch,
    InvalidArtifact,
    NoSpace,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from fetcher.modelpack import Kind, Packing, Selection, layer_type
from fetcher.oci import Digest, Reference
from fetcher.policy import PullPolicy
from fetcher.pull import JoinedPull, Pull, Pulls, PullSettings
from fetcher.store.store import NO_CAP
from tests.support.keychains import Everywhere
from tests.support.models import Member, ModelBuilder, gzip_bomb, tiny_model
from tests.support.proxy import Faults, Proxy
from tests.support.registry import serve_registry
from tests.support.sources import shown, weights
from tests.support.stores import node_parts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from fetcher.store import ModelTree, Store
    from tests.support.registry import RegistryServer

CHUNK = 64 * 1024
EVERYTHING = Selection()
DEFAULT = PullSettings()
NOBODY = Anonymous()


@contextlib.asynccontextmanager
async def pulling(
    root: Path, settings: PullSettings, chunk_size: int = CHUNK
) -> AsyncIterator[tuple[Pulls, Store]]:
    """The parts of a node that pull, without lists of chunk digests."""
    async with node_parts(root, NO_CAP, chunk_size=chunk_size) as node:
        yield Pulls(node.store, node.registry, node.jobs, settings, node.nursery), node.store


async def pull(
    pulls: Pulls,
    reference: str,
    selection: Selection = EVERYTHING,
    keychain: Keychain = NOBODY,
    policy: PullPolicy = PullPolicy.IF_NOT_PRESENT,
) -> ModelTree:
    resolved = await pulls.resolve(Reference.parse(reference), keychain, policy)
    with pulls.join(resolved, selection) as joined:
        return await joined.wait()


async def arrived(joined: Pull | JoinedPull, count: int) -> None:
    """Wait until a pull has so many bytes."""
    while joined.progress().done < count:  # noqa: ASYNC110 - threads move them, no event tells
        await trio.sleep(0.01)


def in_node(
    root: Path,
    work: Callable[[Pulls, Store], Awaitable[None]],
    settings: PullSettings = DEFAULT,
    chunk_size: int = CHUNK,
) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with pulling(root, settings, chunk_size) as (pulls, store):
                await work(pulls, store)

    trio.run(main)


def push(registry: RegistryServer, builder: ModelBuilder, repository: str) -> int:
    """Push a model and say how many bytes its layers have."""
    builder.push(registry, repository, "v1")
    return sum(layer["size"] for layer in builder.document["layers"])


def leftovers(root: Path) -> list[str]:
    """Names below the store that only work in progress has."""
    return [str(path) for path in root.rglob("*") if path.name.endswith((".chunks", ".new"))]


@pytest.mark.parametrize("vendor", ["cncf", "cnai"])
def test_every_packing_becomes_one_tree(
    tmp_path: Path, registry: RegistryServer, vendor: str
) -> None:
    tiny_model(vendor).push(registry, f"tiny/{vendor}", "v1")

    async def work(pulls: Pulls, store: Store) -> None:
        tree = await pull(pulls, registry.reference(f"tiny/{vendor}", "v1"))
        assert shown(tree) == {
            "README.md": b"# Tiny\n",
            "config.json": b'{"model_type": "bert"}',
            "model.safetensors": bytes(range(256)) * 64,
            "run.sh": b"#!/bin/sh\n",
            "tokenizer/vocab.txt": b"a\nb\n",
        }
        assert tree.files == 5
        assert stat.S_IMODE((tree.path / "run.sh").stat().st_mode) == 0o555
        assert stat.S_IMODE((tree.path / "config.json").stat().st_mode) == 0o444
        assert leftovers(store.root) == []

    in_node(tmp_path / "root", work)


def test_a_blob_of_two_models_is_fetched_and_stored_once(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    one, files = weights(5 * CHUNK + 3)
    data = files["model-0.safetensors"]
    other = ModelBuilder().add_raw("renamed.safetensors", data).add_raw("b.json", b"{}")
    size = push(registry, one, "shared/one")
    push(registry, other, "shared/other")

    async def work(pulls: Pulls, store: Store) -> None:
        first = await pull(pulls, f"{proxy.address}/shared/one:v1")
        second = await pull(pulls, f"{proxy.address}/shared/other:v1")
        inode = (first.path / "model-0.safetensors").stat().st_ino
        assert (second.path / "renamed.safetensors").stat().st_ino == inode
        assert proxy.counts.total == size + 2

    in_node(tmp_path / "root", work)


def test_twelve_pulls_at_once_fetch_every_byte_once(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder, files = weights(20 * CHUNK, 9 * CHUNK + 1, 17)
    builder.add_tar({"code/a.py": b"print()\n" * 100}, Packing.TAR_GZIP)
    size = push(registry, builder, "twelve")
    some = Selection(exclude_patterns=("*.py",))

    async def work(pulls: Pulls, store: Store) -> None:
        trees: list[ModelTree] = []

        async def one(selection: Selection) -> None:
            trees.append(await pull(pulls, f"{proxy.address}/twelve:v1", selection))

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(one, EVERYTHING if number % 2 else some)
        assert len({tree.path for tree in trees}) == 2
        for tree in trees:
            content = shown(tree)
            content.pop("code/a.py", None)
            assert content == files
        assert proxy.counts.total == size
        assert leftovers(store.root) == []

    in_node(tmp_path / "root", work)


@pytest.mark.parametrize(
    ("faults", "most"),
    [
        (Faults(cut_after=3 * CHUNK + 77), 1.2),
        (Faults(cut_after=0, cuts_left=3), 1.0),
        (Faults(statuses=[500, 502, 503, 429]), 1.0),
        (Faults(statuses=[429] * 2, extra_headers={"Retry-After": "0"}), 1.0),
        (Faults(ignore_range=True), 1.1),
    ],
)
def test_a_failing_registry_delays_a_pull(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy, faults: Faults, most: float
) -> None:
    builder, files = weights(40 * CHUNK + 5)
    size = push(registry, builder, "faulty")
    proxy.faults = faults

    async def work(pulls: Pulls, store: Store) -> None:
        tree = await pull(pulls, f"{proxy.address}/faulty:v1")
        assert shown(tree) == files
        assert proxy.counts.total <= size * most

    in_node(tmp_path / "root", work)


def test_a_corrupt_byte_is_never_shown_and_mends(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder, files = weights(4 * CHUNK)
    push(registry, builder, "corrupt")
    proxy.faults = Faults(corrupt_at=CHUNK + 1)

    async def work(pulls: Pulls, store: Store) -> None:
        with pytest.raises(DigestMismatch, match="another digest"):
            await pull(pulls, f"{proxy.address}/corrupt:v1")
        assert list(store.models_folder.rglob("*.safetensors")) == []
        assert leftovers(store.root) == []
        proxy.faults = Faults()
        assert shown(await pull(pulls, f"{proxy.address}/corrupt:v1")) == files

    in_node(tmp_path / "root", work)


def test_a_registry_that_stays_broken_is_unavailable(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder, _ = weights(CHUNK)
    push(registry, builder, "broken")
    proxy.faults = Faults(statuses=[503] * 100)

    async def work(pulls: Pulls, store: Store) -> None:
        with pytest.raises(Unavailable, match="503"):
            await pull(pulls, f"{proxy.address}/broken:v1")

    in_node(tmp_path / "root", work)


def test_a_missing_blob_names_itself(tmp_path: Path, fresh_registry: RegistryServer) -> None:
    builder, _ = weights(CHUNK)
    push(fresh_registry, builder, "gone")
    digest = Digest.parse(builder.document["layers"][0]["digest"])
    fresh_registry.blob_path(digest).unlink()

    async def work(pulls: Pulls, store: Store) -> None:
        with pytest.raises((NotFound, Unavailable), match=digest.hex):
            await pull(pulls, fresh_registry.reference("gone", "v1"))

    in_node(tmp_path / "root", work)


def test_a_pull_resumes_in_the_next_process(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder, files = weights(32 * CHUNK)
    size = push(registry, builder, "resume")
    proxy.faults = Faults(bytes_per_second=16 * CHUNK)
    reference = f"{proxy.address}/resume:v1"

    async def leave_at_half(pulls: Pulls, store: Store) -> None:
        resolved = await pulls.resolve(Reference.parse(reference), Anonymous(), PullPolicy.ALWAYS)
        with pulls.join(resolved, EVERYTHING) as joined:
            await arrived(joined, size // 2)

    async def finish(pulls: Pulls, store: Store) -> None:
        proxy.faults = Faults()
        assert shown(await pull(pulls, reference)) == files

    in_node(tmp_path / "root", leave_at_half)
    in_node(tmp_path / "root", finish)
    # what was on its way in unfinished chunks may come again: one chunk per connection at most
    assert proxy.counts.total <= size + 12 * CHUNK


def test_nobody_waiting_stops_a_pull_after_the_grace_period(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder, _ = weights(64 * CHUNK)
    push(registry, builder, "left")
    stalled = Faults(bytes_per_second=8 * CHUNK)
    proxy.faults = stalled

    async def work(pulls: Pulls, store: Store) -> None:
        reference = Reference.parse(f"{proxy.address}/left:v1")
        resolved = await pulls.resolve(reference, Anonymous(), PullPolicy.ALWAYS)
        with pulls.join(resolved, EVERYTHING) as joined:
            await arrived(joined, CHUNK)
        left = joined.pull
        assert not left.finished.is_set()
        # somebody comes back within the grace period, and it goes on
        with pulls.join(resolved, EVERYTHING) as again:
            assert again.pull is left
        await left.finished.wait()
        assert left.tree is None
        assert pulls.running() == []

    in_node(tmp_path / "root", work, PullSettings(grace=0.3))


def test_who_is_to_come_again_holds_a_pull_until_it_is_released(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder, _ = weights(64 * CHUNK)
    push(registry, builder, "held")
    proxy.faults = Faults(bytes_per_second=8 * CHUNK)

    async def work(pulls: Pulls, store: Store) -> None:
        reference = Reference.parse(f"{proxy.address}/held:v1")
        resolved = await pulls.resolve(reference, Anonymous(), PullPolicy.ALWAYS)
        with pulls.join(resolved, EVERYTHING, "first") as joined:
            await arrived(joined, CHUNK)
        with pulls.join(resolved, EVERYTHING, "second"):
            pass
        pulls.release("first")
        # far beyond the grace period: a volume is between two of its calls
        held = joined.pull
        await arrived(held, held.progress().done + 4 * CHUNK)
        assert not held.finished.is_set()
        pulls.release("second")
        await held.finished.wait()
        assert held.tree is None
        pulls.release("second")

    in_node(tmp_path / "root", work, PullSettings(grace=0.05))


def test_a_selection_fetches_only_what_it_shows(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder, _ = weights(8 * CHUNK)
    builder.add_raw("notes.md", b"# notes\n")
    push(registry, builder, "partial")
    selection = Selection(exclude_patterns=("*.safetensors",))

    async def work(pulls: Pulls, store: Store) -> None:
        tree = await pull(pulls, f"{proxy.address}/partial:v1", selection)
        assert list(shown(tree)) == ["notes.md"]
        assert proxy.counts.total == len(b"# notes\n")

    in_node(tmp_path / "root", work)


def test_one_blob_with_two_modes(tmp_path: Path, registry: RegistryServer) -> None:
    data = b"#!/bin/sh\necho\n"
    plain = ModelBuilder().add_raw("run.sh", data)
    executable = ModelBuilder().add_raw("run.sh", data, metadata={"mode": 0o755})
    plain.push(registry, "modes/plain", "v1")
    executable.push(registry, "modes/executable", "v1")

    async def work(pulls: Pulls, store: Store) -> None:
        one = await pull(pulls, registry.reference("modes/plain", "v1"))
        two = await pull(pulls, registry.reference("modes/executable", "v1"))
        assert stat.S_IMODE((one.path / "run.sh").stat().st_mode) == 0o444
        assert stat.S_IMODE((two.path / "run.sh").stat().st_mode) == 0o555
        assert (two.path / "run.sh").read_bytes() == data

    in_node(tmp_path / "root", work)


def test_a_bomb_and_a_conflict_leave_nothing(tmp_path: Path, registry: RegistryServer) -> None:
    bomb = ModelBuilder().add_layer(layer_type(Kind.CODE, Packing.TAR_GZIP), gzip_bomb(64 << 20))
    conflict = (
        ModelBuilder()
        .add_tar([Member("a", b"file")], Packing.TAR)
        .add_tar([Member("a/b", b"below a file")], Packing.TAR)
    )
    bomb.push(registry, "hostile/bomb", "v1")
    conflict.push(registry, "hostile/conflict", "v1")

    async def work(pulls: Pulls, store: Store) -> None:
        for name in ("bomb", "conflict"):
            with pytest.raises(InvalidArtifact):
                await pull(pulls, registry.reference(f"hostile/{name}", "v1"))
        assert list(store.models_folder.glob("*/*")) == []
        assert leftovers(store.root) == []

    in_node(tmp_path / "root", work)


def test_too_little_room_is_said_before_a_byte_is_fetched(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder, _ = weights(4 * CHUNK)
    push(registry, builder, "large")
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", root], check=True)
    try:

        async def work(pulls: Pulls, store: Store) -> None:
            with pytest.raises(NoSpace, match="can never fit: it takes"):
                await pull(pulls, f"{proxy.address}/large:v1")
            assert proxy.counts.total == 0

        in_node(root, work)
    finally:
        subprocess.run(["umount", root], check=True)


def test_a_cached_model_is_not_a_public_model(tmp_path: Path) -> None:
    right, wrong = Everywhere("ann", "right"), Everywhere("ann", "wrong")
    with serve_registry(tmp_path / "registry", users={"ann": "right"}) as private:
        builder, files = weights(CHUNK)
        push(private, builder, "private")
        reference = private.reference("private", "v1")

        async def online(pulls: Pulls, store: Store) -> None:
            assert shown(await pull(pulls, reference, keychain=right)) == files
            for keychain in (wrong, Anonymous()):
                with pytest.raises(Unauthenticated):
                    await pull(pulls, reference, keychain=keychain)
                with pytest.raises(NotFound):
                    await pull(pulls, reference, keychain=keychain, policy=PullPolicy.NEVER)
            await pull(pulls, reference, keychain=right, policy=PullPolicy.NEVER)

        in_node(tmp_path / "root", online)

    async def offline(pulls: Pulls, store: Store) -> None:
        assert shown(await pull(pulls, reference, keychain=right)) == files
        for keychain in (wrong, Anonymous()):
            with pytest.raises(Unavailable):
                await pull(pulls, reference, keychain=keychain)
        with pytest.raises(Unavailable):
            await pull(pulls, reference, keychain=right, policy=PullPolicy.ALWAYS)

    in_node(tmp_path / "root", offline)
    assert b"right" not in (tmp_path / "root/state.db").read_bytes()
