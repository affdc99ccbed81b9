"""Tar layers in a real store: on the disk once, whatever happens, and still there byte for byte."""

from __future__ import annotations

import itertools
import os
import threading
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher import jobs as jobs_module
from fetcher.credentials import Anonymous
from fetcher.modelpack import Packing
from fetcher.oci import Digest, Reference
from fetcher.policy import PullPolicy
from fetcher.store import chunks as chunks_module
from fetcher.store.chunks import SYNCED, THERE, TRUSTED
from tests.integration.test_pull import CHUNK, EVERYTHING, arrived, in_node, pull, push
from tests.support.models import ModelBuilder
from tests.support.proxy import Faults, Proxy
from tests.support.sources import shown

if TYPE_CHECKING:
    from pathlib import Path

    from fetcher.pull import Pulls
    from fetcher.store import Store
    from tests.support.registry import RegistryServer

MIB = 1024 * 1024


def packed(*sizes: int) -> tuple[ModelBuilder, dict[str, bytes], Digest]:
    files = {f"part-{number}.safetensors": os.urandom(size) for number, size in enumerate(sizes)}
    builder = ModelBuilder().add_tar(files)
    return builder, files, Digest.parse(builder.layers[0]["digest"])


def taken(root: Path) -> int:
    """Bytes that all blobs and trees take on the disk, every inode once.

    Looked at twice, as bytes move from file to file meanwhile: what moved counts where it was less.
    """
    first, second = _taken(root), _taken(root)
    return sum(min(size, second.get(inode, 0)) for inode, size in first.items())


def _taken(root: Path) -> dict[int, int]:
    found: dict[int, int] = {}
    walks = (os.walk(root / name) for name in ("blobs", "models"))
    for folder, _, names in itertools.chain(*walks):
        for name in [".", *names]:
            try:
                status = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:
                continue
            found[status.st_ino] = status.st_blocks * 512
    return found


@pytest.mark.parametrize("chunk_size", [CHUNK, 4 * MIB])
def test_a_tar_layer_never_takes_its_size_twice(
    tmp_path: Path, registry: RegistryServer, chunk_size: int
) -> None:
    builder, files, digest = packed(40 * MIB, 24 * MIB, 9, 3 * MIB)
    size = push(registry, builder, "tar/once")
    root = tmp_path / "root"
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.is_set():
            peak = max(peak, taken(root))

    async def work(pulls: Pulls, store: Store) -> None:
        tree = await pull(pulls, registry.reference("tar/once", "v1"))
        assert shown(tree) == files
        stored = store.stored(digest)
        assert stored is not None
        assert stored.size == size
        assert stored.matches(digest, threading.Event())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        in_node(root, work, chunk_size=chunk_size)
    finally:
        ended.set()
        watching.join()
    assert 0.9 * size < peak <= 1.02 * size
    assert taken(root) <= 1.02 * size


@pytest.mark.parametrize("first", [Packing.RAW, Packing.TAR])
def test_one_blob_as_a_file_and_as_a_tar_is_fetched_once(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy, first: Packing
) -> None:
    archived, files, digest = packed(5 * CHUNK + 3, 17)
    [archive] = [data for data in archived.blobs.values() if Digest.of(data) == digest]
    raw = ModelBuilder().add_raw("archive.tar", archive)
    push(registry, archived, "tar/both-tar")
    push(registry, raw, "tar/both-raw")

    async def work(pulls: Pulls, store: Store) -> None:
        for name in ("raw", "tar") if first is Packing.RAW else ("tar", "raw"):
            tree = await pull(pulls, f"{proxy.address}/tar/both-{name}:v1")
            assert shown(tree) == (files if name == "tar" else {"archive.tar": archive})
        assert proxy.counts.total == len(archive)

    in_node(tmp_path / "root", work)


@pytest.mark.parametrize("packing", [Packing.RAW, Packing.TAR, Packing.TAR_ZSTD])
def test_after_a_power_loss_a_pull_goes_on_from_its_checkpoint(
    tmp_path: Path,
    registry: RegistryServer,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    packing: Packing,
) -> None:
    builder, files, _ = packed(64 * CHUNK)
    if packing is not Packing.TAR:
        builder = ModelBuilder()
        if packing is Packing.RAW:
            [(name, data)] = files.items()
            builder.add_raw(name, data)
        else:
            builder.add_tar(files, packing)
    repository = f"power/{packing.value.replace('+', '-')}"
    size = push(registry, builder, repository)
    reference = f"{proxy.address}/{repository}:v1"
    proxy.faults = Faults(bytes_per_second=32 * CHUNK)
    monkeypatch.setattr(jobs_module, "_CHECKPOINT_SECONDS", 0.02)

    async def leave_at_half(pulls: Pulls, store: Store) -> None:
        resolved = await pulls.resolve(Reference.parse(reference), Anonymous(), PullPolicy.ALWAYS)
        with pulls.join(resolved, EVERYTHING) as joined:
            await arrived(joined, size // 2)
            [chunk_map] = (store.root / "blobs/sha256").glob("*.chunks")
            saved = THERE | SYNCED | TRUSTED
            with trio.fail_after(30):
                # half of it and more is on the disk, and the map says so
                while chunk_map.read_bytes()[64:128].count(saved) < 30:  # noqa: ASYNC110
                    await trio.sleep(0.01)

    async def finish(pulls: Pulls, store: Store) -> None:
        proxy.faults = Faults()
        assert shown(await pull(pulls, reference)) == files

    in_node(tmp_path / "root", leave_at_half)
    before = proxy.counts.total
    monkeypatch.setattr(chunks_module, "boot_id", lambda: b"0" * 36)
    in_node(tmp_path / "root", finish)
    # what the proxy was still sending when its client left counts as well: a piece per connection
    assert proxy.counts.total - before <= size - 30 * CHUNK + 4 * CHUNK


def test_a_killed_finish_leaves_nothing_behind(tmp_path: Path, registry: RegistryServer) -> None:
    builder, files, digest = packed(3 * CHUNK)
    push(registry, builder, "tar/killed")

    async def work(pulls: Pulls, store: Store) -> None:
        reference = registry.reference("tar/killed", "v1")
        tree = await pull(pulls, reference)
        # as a kill leaves it right before the last step
        store.blob_path(digest).write_bytes(b"frame")
        store.blob_path(digest).with_name(f"{digest.hex}.chunks").write_bytes(b"map")
        store.catalog.remove_model(tree.digest, "")
        tree = await pull(pulls, reference)
        assert shown(tree) == files
        names = [path.name for path in store.blob_path(digest).parent.iterdir()]
        assert names == [f"{digest.hex}.files"]

    in_node(tmp_path / "root", work)
