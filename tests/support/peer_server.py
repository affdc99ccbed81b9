"""A node with a peer server, in the test's own process, before a real registry."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx

from fetcher.chunk_lists import ChunkLists
from fetcher.peers.access import Rights
from fetcher.peers.blobs import Blobs, OwnsNothing
from fetcher.peers.fills import Fills
from fetcher.peers.http import HttpPatience
from fetcher.peers.manifests import Manifests
from fetcher.peers.offers import Offers
from fetcher.peers.served import Served
from fetcher.peers.server import PeerServer, PeerServerSettings, listen
from fetcher.peers.trust import PeerFiles, PeerTls, PeerToken
from fetcher.peers.uploads import Uploads
from fetcher.policy import ReferencePolicy
from fetcher.pull import Pulls, PullSettings
from fetcher.registry import RegistrySettings
from tests.support.stores import CHUNK, NO_FLOOR, QUICK, node_parts

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fetcher.download import DownloadSettings
    from fetcher.jobs import Jobs
    from fetcher.oci import Digest
    from fetcher.peers.blobs import Ownership
    from fetcher.peers.owners import Deal
    from fetcher.ranges import Range
    from fetcher.store import Limits, Store

TOKEN = "a-shared-token-of-the-peers"


class OwnsAll:
    """The ownership of a node that fetches everything for others."""

    def owns(self, deal: Deal, wanted: Range, chunk_size: int) -> bool:
        return True

    def asked(self, blob: Digest) -> None:
        """Nothing follows from it."""


@dataclass
class PeerNode:
    """A node that serves others."""

    url: str
    store: Store
    pulls: Pulls
    jobs: Jobs
    served: Served
    fills: Fills
    rights: Rights
    address: tuple[str, int]
    client: httpx.AsyncClient = field(repr=False)

    def blob_url(self, repository: str, digest: Digest | str, ns: str) -> str:
        return f"/v2/{repository}/blobs/{digest}?ns={ns}"


@dataclass(frozen=True)
class Setup:
    """What a test wants to be otherwise."""

    files: PeerFiles | None = None
    ownership: Ownership = field(default_factory=OwnsNothing)
    uploads: int = 32
    rate: int | None = None
    policy: ReferencePolicy = field(default_factory=ReferencePolicy)
    server: PeerServerSettings = field(
        default_factory=lambda: PeerServerSettings(patience=HttpPatience(idle=5, head=1, stall=5))
    )
    registry: RegistrySettings = field(
        default_factory=lambda: RegistrySettings(attempts=1, retry_seconds=1)
    )
    download: DownloadSettings = QUICK
    limits: Limits = NO_FLOOR
    chunk_size: int = CHUNK
    linger: float = 30.0
    lists: bool = False
    """Whether it looks for lists of chunk digests, and makes them."""
    verify: ssl.SSLContext | bool = True
    """What the client shows and believes."""


@contextlib.asynccontextmanager
async def peer_node(root: Path, setup: Setup | None = None) -> AsyncIterator[PeerNode]:
    """A node whose peer server listens on a port of its own; a token is wanted unless said
    otherwise. The client shows it, and that it is the member ``asker``.
    """
    setup = setup or Setup()
    if setup.files is None:
        token_file = root.with_name(root.name + ".token")
        token_file.write_text(f"{TOKEN}\n")
        files = PeerFiles(token=token_file)
    else:
        files = setup.files
    files.check()
    async with node_parts(
        root,
        setup.limits,
        chunk_size=setup.chunk_size,
        registries=setup.registry,
        downloads=setup.download,
    ) as node:
        store, registry, jobs, nursery = node.store, node.registry, node.jobs, node.nursery
        served, rights = Served(), Rights(registry)
        fills = Fills(store, jobs, nursery, setup.linger)
        uploads = Uploads(setup.uploads, setup.rate)
        server = PeerServer(
            Blobs(store, jobs, fills, rights, setup.policy, setup.ownership, uploads, served),
            Manifests(store.catalog, registry, rights, setup.policy),
            Offers(store, rights, setup.policy),
            None if files.token is None else PeerToken(files.token),
            None if files.certificate is None else PeerTls(files),
            served,
            setup.server,
        )
        listeners = await listen("127.0.0.1:0")
        nursery.start_soon(server.serve, listeners)
        port = listeners[0].socket.getsockname()[1]
        url = f"{'http' if files.certificate is None else 'https'}://127.0.0.1:{port}"
        headers = {
            "Model-CSI-Peer": TOKEN,
            "Model-CSI-From": "asker",
            "Model-CSI-Chunk": str(setup.chunk_size),
        }
        async with httpx.AsyncClient(
            base_url=url, headers=headers, trust_env=False, timeout=20, verify=setup.verify
        ) as client:
            lists = ChunkLists(store, registry, setup.chunk_size) if setup.lists else None
            pulls = Pulls(store, registry, jobs, PullSettings(), nursery, lists)
            yield PeerNode(
                url, store, pulls, jobs, served, fills, rights, ("127.0.0.1", port), client
            )
