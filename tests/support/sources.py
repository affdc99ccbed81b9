"""A node that pulls from a registry and its mirrors: the parts as the driver composes them."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import trio

from fetcher.credentials import Anonymous
from fetcher.download import DownloadSettings
from fetcher.modelpack import Selection
from fetcher.oci import Reference
from fetcher.policy import PullPolicy
from fetcher.pull import Pulls, PullSettings
from fetcher.store.store import NO_CAP
from fetcher.transport import TransferSettings
from tests.support.models import ModelBuilder
from tests.support.stores import node_parts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from fetcher.credentials import Keychain
    from fetcher.registry import Registry, RegistrySettings
    from fetcher.store import ModelTree

CHUNK = 64 * 1024
PIECE = 8 * CHUNK
"""What one request asks for."""
NOBODY = Anonymous()
QUICK = DownloadSettings(
    connections=3,
    first_backoff=0.01,
    longest_backoff=0.05,
    transfer=TransferSettings(connect_timeout=2, stall_timeout=1),
)
PATIENT = replace(QUICK, transfer=TransferSettings(connect_timeout=2, stall_timeout=60))
"""With as much time for mirrors as they ever get."""


@dataclass(frozen=True)
class Node:
    """A running node."""

    pulls: Pulls
    registry: Registry

    async def pull(self, reference: str, keychain: Keychain = NOBODY) -> ModelTree:
        resolved = await self.pulls.resolve(
            Reference.parse(reference), keychain, PullPolicy.IF_NOT_PRESENT
        )
        with self.pulls.join(resolved, Selection()) as joined:
            return await joined.wait()


@contextlib.asynccontextmanager
async def open_node(
    root: Path, settings: RegistrySettings, downloads: DownloadSettings = QUICK
) -> AsyncIterator[Node]:
    transfer = replace(downloads.transfer, ca_file=settings.ca_file)
    used = replace(downloads, transfer=transfer)
    async with node_parts(root, NO_CAP, registries=settings, downloads=used) as node:
        pulls = Pulls(node.store, node.registry, node.jobs, PullSettings(), node.nursery)
        yield Node(pulls, node.registry)


def in_node(
    root: Path, settings: RegistrySettings, work: Callable[[Node], Awaitable[None]]
) -> None:
    """Run ``work`` in a node of its own."""

    async def main() -> None:
        with trio.fail_after(90):
            async with open_node(root, settings) as node:
                await work(node)

    trio.run(main)


def weights(*sizes: int) -> tuple[ModelBuilder, dict[str, bytes]]:
    """A model of files of these sizes."""
    files = {f"model-{number}.safetensors": os.urandom(size) for number, size in enumerate(sizes)}
    builder = ModelBuilder()
    for name, data in files.items():
        builder.add_raw(name, data)
    return builder, files


def shown(tree: ModelTree) -> dict[str, bytes]:
    """The files of a tree."""
    return {
        str(path.relative_to(tree.path)): path.read_bytes()
        for path in sorted(tree.path.rglob("*"))
        if path.is_file()
    }


def write_hosts(root: Path, registry: str, text: str) -> Path:
    """A ``hosts.toml`` for ``registry``; the folder of all of them is ``root``."""
    host, _, port = registry.partition(":")
    folder = root / f"{host}_{port}_"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hosts.toml").write_text(text)
    return folder


def mirrors_toml(*addresses: str, capabilities: str = '"pull"') -> str:
    """A ``hosts.toml`` with mirrors without TLS, in this order."""
    return "".join(
        f'[host."http://{address}"]\ncapabilities = [{capabilities}]\n' for address in addresses
    )
