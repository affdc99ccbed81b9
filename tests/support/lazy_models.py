"""Lazy models as the agent has them, and what a worker would show of them, without FUSE."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from fetcher.chunk_lists import ChunkLists
from fetcher.credentials import Anonymous
from fetcher.lazy import LazyModels, LazySettings
from fetcher.oci import Reference
from fetcher.policy import PullPolicy
from fetcher.pull import Pulls, PullSettings
from fetcher.schedule import Prefetch
from fetcher.store.chunks import FRAMED, TRUSTED, read_header
from fetcher.store.layers import load_layer
from tests.support.stores import (
    CHUNK,
    EVERYTHING,
    MIB,
    NO_FLOOR,
    QUICK,
    REGISTRIES,
    STILL,
    node_parts,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from fetcher.credentials import Keychain
    from fetcher.download import DownloadSettings
    from fetcher.jobs import Jobs
    from fetcher.lazy import LazyModel
    from fetcher.modelpack import Selection
    from fetcher.oci import Digest
    from fetcher.registry import Registry, RegistrySettings
    from fetcher.store import Limits, Store

NODE = Anonymous()
"""The node's own keychain, which has nothing."""


@dataclass(frozen=True)
class LazyNode:
    """The parts of an agent that lazy volumes need."""

    store: Store
    registry: Registry
    jobs: Jobs
    pulls: Pulls
    models: LazyModels

    async def open(
        self,
        reference: str,
        prefetch: Prefetch = Prefetch.NONE,
        selection: Selection = EVERYTHING,
        keychain: Keychain = NODE,
    ) -> LazyModel:
        """Publish a lazy volume of a model, so far as the agent has to do with it."""
        parsed = Reference.parse(reference)
        resolved = await self.pulls.resolve(parsed, keychain, PullPolicy.ALWAYS)
        return await self.models.open(resolved, selection, prefetch, "volume")

    def shown(self, blob: Digest, start: int, stop: int) -> bytes | None:
        """What a worker would show of a blob now; None for what it would have to ask for."""
        path = self.store.blob_path(blob)
        try:
            chunk_map = os.open(path.with_name(path.name + ".chunks"), os.O_RDONLY)
        except FileNotFoundError:
            stored = self.store.stored(blob)
            if stored is None:
                return None
            whole = b"".join(map(bytes, stored.blocks(STILL)))
            return whole[start:stop]
        try:
            content = os.pread(chunk_map, 1 << 20, 0)
            header = read_header(content)
            assert header is not None
            states = content[64:]
            numbers = range(start // header.chunk_size, -(-stop // header.chunk_size))
            if not all(states[number] & TRUSTED for number in numbers):
                return None
            assert not any(states[number] & FRAMED for number in numbers)
            with path.open("rb") as file:
                return os.pread(file.fileno(), stop - start, start)
        finally:
            os.close(chunk_map)

    def names_in(self, blob: Digest) -> list[str]:
        """The files of an archive, as a worker would list them."""
        path = self.store.blob_path(blob)
        for suffix in (".files", ".parts"):
            with contextlib.suppress(FileNotFoundError):
                files = load_layer(path.with_name(path.name + suffix)).files
                return [file.entry.path for file in files]
        raise AssertionError("no worker could list the archive")


@contextlib.asynccontextmanager
async def lazy_node(
    root: Path,
    *,
    chunk_size: int = CHUNK,
    limits: Limits = NO_FLOOR,
    downloads: DownloadSettings = QUICK,
    registries: RegistrySettings | None = None,
    keychain: Keychain = NODE,
    with_lists: bool = False,
    most_shared: int = 64 * MIB,
) -> AsyncIterator[LazyNode]:
    """An agent's parts, composed as the driver does it; leaving them is its end."""
    async with node_parts(
        root,
        limits,
        chunk_size=chunk_size,
        registries=registries or REGISTRIES,
        downloads=downloads,
    ) as node:
        store, registry, jobs, nursery = node.store, node.registry, node.jobs, node.nursery
        pulls = Pulls(store, registry, jobs, PullSettings(), nursery)
        lists = ChunkLists(store, registry, chunk_size) if with_lists else None
        models = LazyModels(
            store,
            registry,
            jobs,
            pulls.layouts,
            pulls.proofs,
            keychain,
            nursery,
            LazySettings(head_bytes=chunk_size, most_shared=most_shared),
            lists,
        )
        yield LazyNode(store, registry, jobs, pulls, models)


async def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for a condition that no event tells of."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for is on the disk, or elsewhere
            await trio.sleep(0.01)


def in_lazy_node(
    root: Path, work: Callable[[LazyNode], Awaitable[None]], **settings: object
) -> None:
    """Run ``work`` as an agent that starts and ends."""

    async def main() -> None:
        with trio.fail_after(60):
            async with lazy_node(root, **settings) as node:  # type: ignore[arg-type]
                await work(node)

    trio.run(main)
