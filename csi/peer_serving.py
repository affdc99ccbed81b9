"""The node as its peers' server, put together as configured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fetcher.peers.access import Rights
from fetcher.peers.blobs import Blobs, OwnsNothing
from fetcher.peers.fills import Fills
from fetcher.peers.manifests import Manifests
from fetcher.peers.offers import Offers
from fetcher.peers.served import Served
from fetcher.peers.server import PeerServer, PeerServerSettings
from fetcher.peers.trust import PeerFiles, PeerTls, PeerToken
from fetcher.peers.uploads import Uploads

if TYPE_CHECKING:
    import trio

    from csi.config import Config
    from fetcher.jobs import Jobs
    from fetcher.peers.blobs import Ownership
    from fetcher.policy import ReferencePolicy
    from fetcher.registry import Registry
    from fetcher.store import Store


def make_server(
    config: Config,
    store: Store,
    registry: Registry,
    jobs: Jobs,
    policy: ReferencePolicy,
    ownership: Ownership | None,
    nursery: trio.Nursery,
) -> PeerServer:
    """What serves other nodes; what it fetches for them runs in ``nursery``.

    Raises :class:`fetcher.errors.InvalidRequest` where it would serve strangers.
    """
    files = PeerFiles(
        config.peer_token_file,
        config.peer_cert,
        config.peer_key,
        config.peer_ca,
        config.peer_insecure,
    )
    files.check()
    served, rights = Served(), Rights(registry)
    uploads = Uploads(config.peer_uploads, config.peer_upload_rate)
    fills = Fills(store, jobs, nursery)
    owns = OwnsNothing() if ownership is None else ownership
    return PeerServer(
        Blobs(store, jobs, fills, rights, policy, owns, uploads, served),
        Manifests(store.catalog, registry, rights, policy),
        Offers(store, rights, policy),
        None if files.token is None else PeerToken(files.token),
        None if files.certificate is None else PeerTls(files),
        served,
        PeerServerSettings(namespace=config.peer_namespace or ""),
    )
