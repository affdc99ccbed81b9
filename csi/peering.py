"""The node among its peers, as configured: asking others, and finding them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fetcher.peers.client import PeerClient, PeerClientSettings
from fetcher.peers.discovery import Discovery, Gathering, StaticPeers
from fetcher.peers.members import Members
from fetcher.peers.trust import PeerToken
from fetcher.trust import Trust

if TYPE_CHECKING:
    import trio

    from csi.config import Config
    from fetcher.transport import TransferSettings


def has_peers(config: Config) -> bool:
    """Whether there is a way to find peers."""
    return bool(config.peers or config.peer_dns or config.peer_service)


def peer_client(config: Config, transfer: TransferSettings) -> PeerClient | None:
    """What asks other nodes, if there is a way to find them.

    Raises :class:`fetcher.errors.InvalidRequest` for files that cannot be used.
    """
    if not has_peers(config):
        return None
    members = Members(config.peer_name or config.node_id, config.peer_zone or "")
    token = None if config.peer_token_file is None else PeerToken(config.peer_token_file)
    return PeerClient(members, token, PeerClientSettings(trust=_trust(config)), transfer)


def find_peers(config: Config, members: Members, nursery: trio.Nursery) -> None:
    """Look for members in ``nursery`` from now on."""
    port = None
    if config.peer_listen is not None:
        port = int(config.peer_listen.rpartition(":")[2])
    gathering = Gathering(members, port)
    for way in _ways(config):
        nursery.start_soon(gathering.run, way, name=f"discovery {type(way).__name__}")


def _ways(config: Config) -> list[Discovery]:
    found: list[Discovery] = []
    if config.peers:
        found.append(StaticPeers(config.peers))
    if config.peer_dns is not None:
        # here and below, as most commands need neither and would start slower
        from fetcher.peers.dns_peers import DnsPeers

        found.append(DnsPeers(config.peer_dns))
    if config.peer_service is not None:
        from fetcher.peers.kubernetes_peers import KubernetesPeers

        found.append(KubernetesPeers(config.peer_service))
    return found


def _trust(config: Config) -> Trust | None:
    """For TLS with peers, where nodes speak it."""
    if config.peer_cert is None or config.peer_key is None:
        return None
    authorities = (str(config.peer_ca),) if config.peer_ca else ()
    # who has authorities of its own for peers trusts no others with them
    pair = str(config.peer_cert), str(config.peer_key)
    return Trust(ca_files=authorities, system=not authorities, client=pair)
