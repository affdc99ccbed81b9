"""``model-csi``: everything is put together here, and nowhere else."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import trio

from csi.agent import AgentServer, listening
from csi.agent_calls import AgentCalls, AgentFacts
from csi.agent_client import Patience, take_over
from csi.cli.app import main as run_command
from csi.cli.program import Program
from csi.fuse_connections import obstacle
from csi.lazy_volumes import LazyVolumes
from csi.peering import find_peers, has_peers, peer_client
from csi.pins import pinned_trees
from csi.served import Folders
from csi.state import VolumeRecords
from csi.volumes import Volumes
from csi.workers import Workers, WorkerSettings
from fetcher.chunk_lists import ChunkLists
from fetcher.collector import keep_in_order
from fetcher.credentials import DockerConfig, docker_config_path
from fetcher.download import DownloadSettings, LazySources
from fetcher.jobs import Jobs
from fetcher.lazy import LazyModels, LazySettings
from fetcher.lazy_sessions import LazySessions
from fetcher.names import look_up_apart
from fetcher.policy import ReferencePolicy
from fetcher.proxies import Proxies
from fetcher.pull import Pulls, PullSettings
from fetcher.registry import Registry, RegistrySettings
from fetcher.store import Limits, Store
from fetcher.threads import kept_threads
from fetcher.transport import TransferSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from csi.config import Config
    from csi.server import Service
    from fetcher.credentials import Keychain
    from fetcher.peers.blobs import Ownership
    from fetcher.peers.client import PeerClient
    from fetcher.peers.server import PeerServer

logger = logging.getLogger(__name__)

VERSION: Final = version("model-csi")
USER_AGENT: Final = f"model-csi/{VERSION}"
_CLOSE_SECONDS: Final = 5.0
_START_SECONDS: Final = 3.0
"""How long a lazy model's worker may take to start, before filling goes on without it."""
_BLOBS_AMONG_PEERS: Final = 32
_KEPT_THREADS: Final = 24
"""What a pull among peers has at work at one time; each takes some 15 KiB while it waits."""


@dataclass(frozen=True)
class Node:
    """The parts of a running node."""

    config: Config
    store: Store
    registry: Registry
    keychain: Keychain
    pulls: Pulls
    models: LazyModels
    volumes: Volumes
    calls: AgentCalls
    peers: PeerServer | None
    """What serves other nodes."""


@contextlib.asynccontextmanager
async def compose(config: Config, role: str) -> AsyncIterator[Node]:
    """Open the store and put a node together; downloads end with the block, and keep their data.

    Raises :class:`fetcher.errors.InProgress` while another process has the store.
    """
    with contextlib.ExitStack() as closing:
        store = Store.open(config.root, config.chunk_size, limits(config))
        closing.callback(store.close)
        async with open_registry(config) as registry, trio.open_nursery() as downloads:
            settings = download_settings(config)
            others = peer_client(config, settings.transfer) if role == "serve" else None
            if others is not None:
                closing.callback(others.close)
                find_peers(config, others.members, downloads)
            jobs = Jobs(store, registry, settings, downloads, others)
            closing.callback(jobs.close)
            lists = chunk_lists(config, store, registry, others)
            pulls = Pulls(store, registry, jobs, pull_settings(config), downloads, lists)
            records = VolumeRecords(store.database)
            folders = Folders.of(store.root)
            store.garbage.pin(lambda: pinned_trees(records, folders))
            keychain = node_keychain(config)
            models = LazyModels(
                store,
                registry,
                jobs,
                pulls.layouts,
                pulls.proofs,
                keychain,
                downloads,
                LazySettings(head_bytes=config.chunk_size, start=_START_SECONDS),
                lists,
            )
            lazy = lazy_volumes(config, role, records, models, store, downloads)
            volumes = Volumes(records, pulls, store.root, config.kubelet_dir, lazy)
            peers = peer_server(config, role, store, registry, jobs, others, downloads)
            calls = AgentCalls(
                store=store,
                registry=registry,
                pulls=pulls,
                volumes=volumes,
                keychain=keychain,
                facts=AgentFacts(role, config.mode, config.driver_name, VERSION),
                served=None if peers is None else peers.served,
                asked=others,
            )
            yield Node(config, store, registry, keychain, pulls, models, volumes, calls, peers)
            downloads.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def become(config: Config) -> AsyncIterator[AgentCalls]:
    """What a command needs to be the agent for the time of its call."""
    async with compose(config, "command") as node:
        yield node.calls


@contextlib.asynccontextmanager
async def open_registry(config: Config) -> AsyncIterator[Registry]:
    """The registries, as configured."""
    look_up_apart()
    registry = Registry(registry_settings(config))
    try:
        yield registry
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(_CLOSE_SECONDS):
            await registry.aclose()


def registry_settings(config: Config) -> RegistrySettings:
    """How registries are talked to."""
    return RegistrySettings(
        plain_http=config.plain_http,
        https=config.https,
        insecure=config.insecure_registries,
        ca_file=config.ca_file,
        hosts_dir=config.hosts_dir,
        proxies=Proxies.of_environment(os.environ),
        stall_timeout=config.stall_timeout,
        user_agent=USER_AGENT,
    )


def download_settings(config: Config) -> DownloadSettings:
    """How blobs are fetched.

    More transfers than processors to run them fetch slower: they queue for the interpreter lock.
    """
    transfer = TransferSettings(
        stall_timeout=config.stall_timeout, user_agent=USER_AGENT, ca_file=config.ca_file
    )
    connections = min(config.connections, max(len(os.sched_getaffinity(0)), 2))
    return DownloadSettings(
        connections=connections,
        transfer=transfer,
        lazy_sources=LazySources(config.lazy_sources),
        prefetch_rate=config.prefetch_rate,
    )


def pull_settings(config: Config) -> PullSettings:
    """How models are pulled, and which may be."""
    settings = PullSettings(
        grace=config.pull_grace,
        unpacked_ratio=config.max_unpacked_ratio,
        references=ReferencePolicy.parse(
            config.allowed_models, require_digest=config.require_digest
        ),
    )
    # of several owners at one time, however small the blobs are
    return replace(settings, blobs=_BLOBS_AMONG_PEERS) if has_peers(config) else settings


def lazy_volumes(
    config: Config,
    role: str,
    records: VolumeRecords,
    models: LazyModels,
    store: Store,
    nursery: trio.Nursery,
) -> LazyVolumes:
    """Volumes that are shown while their model is fetched; their workers outlive ``nursery``."""
    folders = Folders.of(store.root)
    settings = WorkerSettings(
        config.read_timeout, config.worker_cgroup, config.log_format, config.log_level
    )
    if not config.spare_worker:
        settings = replace(settings, spare=None)

    def why_not() -> str | None:
        if role != "serve":
            return (
                "a command does not stay to fetch what is read: start 'model-csi serve' with the "
                "same root"
            )
        return obstacle(config.fuse)

    workers = Workers(folders, settings, nursery)
    return LazyVolumes(records, models, workers, store, folders, why_not)


def peer_server(
    config: Config,
    role: str,
    store: Store,
    registry: Registry,
    jobs: Jobs,
    ownership: Ownership | None,
    nursery: trio.Nursery,
) -> PeerServer | None:
    """What serves other nodes, if this one does; see :func:`csi.peer_serving.make_server`."""
    if config.peer_listen is None or config.mode == "controller" or role != "serve":
        return None
    # here, as every command would start slower with it
    from csi.peer_serving import make_server

    policy = pull_settings(config).references
    return make_server(config, store, registry, jobs, policy, ownership, nursery)


def chunk_lists(
    config: Config, store: Store, registry: Registry, others: PeerClient | None
) -> ChunkLists | None:
    """Where lists of chunk digests are found, if they are used."""
    if config.chunk_digests == "ignore":
        return None
    if others is None:
        return ChunkLists(store, registry, config.chunk_size)
    # here, as every command would start slower with it
    from fetcher.peers.lists import PeerLists

    return ChunkLists(store, registry, config.chunk_size, peers=PeerLists(others, registry))


def limits(config: Config) -> Limits:
    """How much of the disk is the store's."""
    return Limits(
        config.max_size, config.min_free, config.gc_high_watermark, config.gc_low_watermark
    )


def node_keychain(config: Config) -> Keychain:
    """The node's own credentials: those of its docker config, which may come later or never."""
    return DockerConfig(config.docker_config or docker_config_path(os.environ))


async def serve(config: Config) -> None:
    """Serve CSI and the agent until cancelled; see :mod:`csi.cli.serve`.

    The volumes that pods have are put in order first, from local state alone; kubelet is listened
    to last, when everything that its calls need is there.
    """
    # here and in services(), as gRPC would make every other command start slower
    from csi.server import Server

    async with take_over(config.root, lambda: compose(config, "serve"), Patience()) as node:
        threads = 0
        if config.mode != "controller":
            await node.volumes.reconcile()
            threads = _KEPT_THREADS
        with listening(config.root) as listener, kept_threads(threads):
            async with trio.open_nursery() as nursery:
                sessions = LazySessions(node.models)
                agent = AgentServer(node.calls, hand_over=None, sessions=sessions)
                nursery.start_soon(agent.serve, listener)
                nursery.start_soon(keep_in_order, node.store)
                nursery.start_soon(node.volumes.tend)
                if node.peers is not None and config.peer_listen is not None:
                    await nursery.start(node.peers.serve_on, config.peer_listen)
                await nursery.start(Server(config.socket_path, services(node)).serve)
                logger.info(
                    "serving on %s, root %s, driver %s, mode %s, version %s",
                    config.endpoint,
                    config.root,
                    config.driver_name,
                    config.mode,
                    VERSION,
                )


def services(node: Node) -> list[Service]:
    """The gRPC services of the configured mode."""
    from csi.claims import Claims
    from csi.controller.service import ControllerService
    from csi.identity.service import IdentityService
    from csi.node.service import NodeService
    from csi.readiness import StoreReadiness

    config = node.config
    found: list[Service] = [IdentityService(config, VERSION, StoreReadiness(node.store))]
    if config.mode in ("node", "all"):
        found.append(NodeService(config, node.volumes, node.keychain))
    if config.mode in ("controller", "all"):
        claims = Claims(node.store.database, node.pulls, config.driver_name)
        found.append(ControllerService(config, claims, node.keychain))
    return found


def program() -> Program:
    """The ways in, for the command line."""
    return Program(
        version=VERSION,
        become=become,
        serve=serve,
        registry=open_registry,
        registry_settings=registry_settings,
        keychain=node_keychain,
    )


def main() -> None:
    """The console script ``model-csi``."""
    # what was imported stays to the end: looking through it for garbage would cost each command
    # 50 ms when it ends, and the collector its share in between
    gc.freeze()
    sys.exit(run_command(sys.argv[1:], program()))


if __name__ == "__main__":
    main()
