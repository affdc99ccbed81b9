"""What rots in a real store is found, dropped, fetched again, and put right under its readers."""

from __future__ import annotations

import mmap
import os
import shutil
from typing import TYPE_CHECKING

import pytest

from fetcher.errors import Unavailable
from fetcher.modelpack import Packing, Selection
from fetcher.oci import Digest
from fetcher.store.footprint import content_name, tree_name
from fetcher.verification import Finding, Verifier
from tests.integration.test_pull import CHUNK, NOBODY, in_node, pull, push
from tests.support.models import Member, ModelBuilder, hard_link, symlink
from tests.support.proxy import Faults, Proxy

if TYPE_CHECKING:
    from pathlib import Path

    from fetcher.pull import Pulls
    from fetcher.store import ModelTree, Store
    from tests.support.registry import RegistryServer

PACKINGS = [Packing.RAW, Packing.TAR, Packing.TAR_GZIP]
EVERYTHING = Selection()
NAME = "model.safetensors"
DATA = os.urandom(5 * CHUNK + 77)
"""Of the file that rots."""


def model(packing: Packing) -> ModelBuilder:
    builder = ModelBuilder()
    builder.add_raw("README.md", b"# a model\n" + os.urandom(8))
    if packing is Packing.RAW:
        builder.add_raw(NAME, DATA)
        return builder
    members = [Member(NAME, DATA), Member("empty"), hard_link("again", NAME), symlink("link", NAME)]
    builder.add_tar(members, packing)
    return builder


def rot(tree: ModelTree) -> None:
    """Change one byte of the file, wherever it is linked to."""
    with (tree.path / NAME).open("r+b") as file:
        file.seek(len(DATA) // 2)
        file.write(bytes([DATA[len(DATA) // 2] ^ 1]))


def pin(store: Store, *trees: ModelTree) -> None:
    """Let these trees be mounted."""
    store.garbage.pin(lambda: {(tree.digest, "") for tree in trees})


async def verify(store: Store, pulls: Pulls, *, repair: bool) -> list[Finding]:
    return await Verifier(store, pulls, NOBODY).verify(None, repair=repair)


@pytest.mark.parametrize("packing", PACKINGS)
def test_what_rotted_is_told_and_left_alone_if_asked_so(
    tmp_path: Path, registry: RegistryServer, packing: Packing
) -> None:
    push(registry, model(packing), f"told-{packing.value.replace('+', '-')}")
    reference = f"{registry.address}/told-{packing.value.replace('+', '-')}:v1"

    async def work(pulls: Pulls, store: Store) -> None:
        tree = await pull(pulls, reference)
        verifier = Verifier(store, pulls, NOBODY)
        assert await verifier.verify(None, repair=False) == []
        progress = verifier.progress()
        assert progress.done == progress.total > len(DATA)
        rot(tree)
        content, shown = await verify(store, pulls, repair=False)
        assert content.name.startswith("blobs/sha256/")
        assert "another digest" in content.problem
        assert shown.name == tree_name(tree.digest, "")
        assert not content.repaired
        assert not shown.repaired
        assert (tree.path / NAME).stat().st_size == len(DATA)

    in_node(tmp_path / "root", work)


@pytest.mark.parametrize("packing", PACKINGS)
def test_what_rotted_unused_is_dropped_and_only_that_is_fetched_again(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy, packing: Packing
) -> None:
    repository = f"dropped-{packing.value.replace('+', '-')}"
    size = push(registry, model(packing), repository)

    async def work(pulls: Pulls, store: Store) -> None:
        tree = await pull(pulls, f"{proxy.address}/{repository}:v1")
        assert proxy.counts.total == size
        rot(tree)
        findings = await verify(store, pulls, repair=True)
        assert all(finding.repaired for finding in findings)
        assert not tree.path.exists()
        assert await verify(store, pulls, repair=True) == []
        tree = await pull(pulls, f"{proxy.address}/{repository}:v1")
        assert (tree.path / NAME).read_bytes() == DATA
        # not the README, and nothing twice
        assert proxy.counts.total == size + size - 18

    in_node(tmp_path / "root", work)


@pytest.mark.parametrize("packing", PACKINGS)
def test_what_rotted_under_a_reader_is_put_right_under_it(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy, packing: Packing
) -> None:
    repository = f"healed-{packing.value.replace('+', '-')}"
    push(registry, model(packing), repository)

    async def work(pulls: Pulls, store: Store) -> None:
        tree = await pull(pulls, f"{proxy.address}/{repository}:v1")
        pin(store, tree)
        with (tree.path / NAME).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        inode = (tree.path / NAME).stat().st_ino
        rot(tree)
        assert mapped[:] != DATA
        findings = await verify(store, pulls, repair=True)
        assert [finding.repaired for finding in findings] == [True, True]
        assert mapped[:] == DATA
        assert (tree.path / NAME).stat().st_ino == inode
        assert await verify(store, pulls, repair=True) == []
        # it lies on the disk once: the fetched copy made way for the one that is mounted
        assert (tree.path / NAME).stat().st_nlink >= 2
        await store.orphans.reconcile()
        assert sum(store.space.holdings.total()) < 3 * len(DATA)
        mapped.close()

    in_node(tmp_path / "root", work)


def test_what_cannot_be_fetched_again_is_shown_to_no_other_volume_until_it_is_right(
    tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    push(registry, model(Packing.RAW), "later")
    reference = f"{proxy.address}/later:v1"
    trees: list[ModelTree] = []

    async def rotten(pulls: Pulls, store: Store) -> None:
        trees.append(await pull(pulls, reference))
        pin(store, *trees)
        rot(trees[0])
        proxy.faults = Faults(statuses=[503] * 100)
        findings = await verify(store, pulls, repair=True)
        assert [finding.repaired for finding in findings] == [True, False]
        assert "not put right" in findings[1].outcome

    async def still_rotten(pulls: Pulls, store: Store) -> None:
        # after a restart, too: the records know it
        pin(store, *trees)
        assert store.tree(trees[0].digest, EVERYTHING) is None
        with pytest.raises(Unavailable):
            await pull(pulls, reference)
        proxy.faults = Faults()
        inode = (trees[0].path / NAME).stat().st_ino
        tree = await pull(pulls, reference)
        assert (tree.path / NAME).read_bytes() == DATA
        assert (tree.path / NAME).stat().st_ino == inode
        assert await verify(store, pulls, repair=True) == []

    in_node(tmp_path / "root", rotten)
    in_node(tmp_path / "root", still_rotten)


def test_every_tree_that_shows_a_damaged_blob_is_damaged(
    tmp_path: Path, registry: RegistryServer
) -> None:
    """Also that of a model that was not asked for, and though somebody works on the blob."""
    first = ModelBuilder().add_raw(NAME, DATA)
    second = ModelBuilder().add_raw("other.safetensors", DATA).add_raw("b.json", b"{}")
    push(registry, first, "damage/first")
    push(registry, second, "damage/second")

    async def work(pulls: Pulls, store: Store) -> None:
        tree = await pull(pulls, registry.reference("damage/first", "v1"))
        other = await pull(pulls, registry.reference("damage/second", "v1"))
        rot(tree)
        verifier = Verifier(store, pulls, NOBODY)
        with store.held_content(Digest.of(DATA)):
            findings = await verifier.verify({tree.digest}, repair=True)
        assert {finding.name for finding in findings} == {
            content_name(Digest.of(DATA)),
            tree_name(tree.digest, ""),
            tree_name(other.digest, ""),
        }
        assert store.tree(other.digest, EVERYTHING) is None
        other = await pull(pulls, registry.reference("damage/second", "v1"))
        assert (other.path / "other.safetensors").read_bytes() == DATA

    in_node(tmp_path / "root", work)


@pytest.mark.parametrize("packing", PACKINGS)
def test_files_that_are_gone_or_changed_in_a_tree_are_found(
    tmp_path: Path, registry: RegistryServer, packing: Packing
) -> None:
    repository = f"gone-{packing.value.replace('+', '-')}"
    push(registry, model(packing), repository)
    reference = f"{registry.address}/{repository}:v1"

    async def work(pulls: Pulls, store: Store) -> None:
        tree = await pull(pulls, reference)
        (tree.path / "README.md").unlink()
        [finding] = await verify(store, pulls, repair=False)
        assert "README.md is missing" in finding.problem
        (tree.path / "README.md").write_bytes(b"another")
        [finding] = await verify(store, pulls, repair=False)
        assert "README.md has other bytes" in finding.problem
        pin(store, tree)
        [finding] = await verify(store, pulls, repair=True)
        assert finding.repaired
        (tree.path / "stray").write_bytes(b"")
        [finding] = await verify(store, pulls, repair=True)
        assert not finding.repaired
        assert "stray is not in the model" in finding.problem

    in_node(tmp_path / "root", work)


@pytest.mark.parametrize("packing", PACKINGS)
def test_contents_whose_files_are_gone_are_found(
    tmp_path: Path, registry: RegistryServer, packing: Packing
) -> None:
    repository = f"lost-{packing.value.replace('+', '-')}"
    push(registry, model(packing), repository)
    reference = f"{registry.address}/{repository}:v1"

    async def work(pulls: Pulls, store: Store) -> None:
        tree = await pull(pulls, reference)
        for path in (tmp_path / "root/blobs/sha256").iterdir():
            if path.is_dir():
                (path / "0").unlink()
            else:
                path.unlink()
        findings = await verify(store, pulls, repair=True)
        assert len(findings) == 3 if packing is Packing.RAW else 2
        assert not tree.path.exists()
        tree = await pull(pulls, reference)
        assert (tree.path / NAME).read_bytes() == DATA
        assert await verify(store, pulls, repair=True) == []
        shutil.rmtree(tmp_path / "root/blobs/sha256")
        assert await verify(store, pulls, repair=True) != []

    in_node(tmp_path / "root", work)
