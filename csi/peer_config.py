"""The settings of nodes that serve each other; see :mod:`csi.config`, of which they are a part."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from csi import values
from csi.values import Rule


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """The last settings, as nodes do without them."""

    peer_listen: Annotated[
        str | None,
        Rule(
            "host:port on which this node serves its peers; without it, it serves nobody",
            values.check_listen,
        ),
    ] = None
    peers: Annotated[
        tuple[str, ...],
        Rule(
            "the nodes that serve each other: name=host:port, with @zone behind it",
            values.check_peers,
            values.parse_names,
        ),
    ] = ()
    peer_dns: Annotated[
        str | None,
        Rule(
            "host:port of a name whose addresses are the nodes that serve each other",
            values.check_peer_dns,
        ),
    ] = None
    peer_service: Annotated[
        str | None,
        Rule(
            "namespace/name of the Kubernetes Service of the nodes that serve each other",
            values.check_peer_service,
        ),
    ] = None
    peer_name: Annotated[
        str | None, Rule("this node's name among its peers", values.check_peer_name)
    ] = None
    peer_zone: Annotated[
        str | None,
        Rule("this node's zone, where discovery does not say it", values.check_peer_name),
    ] = None
    peer_token_file: Annotated[
        Path | None,
        Rule("file of the tokens that peers show each other, one a line", values.check_path),
    ] = None
    peer_cert: Annotated[
        Path | None,
        Rule("PEM file of this node's certificate, for TLS with its peers", values.check_path),
    ] = None
    peer_key: Annotated[
        Path | None, Rule("PEM file of that certificate's key", values.check_path)
    ] = None
    peer_ca: Annotated[
        Path | None,
        Rule("PEM file of the authorities that sign peers' certificates", values.check_path),
    ] = None
    peer_insecure: Annotated[
        bool, Rule("whether peers are served that show neither a token nor a certificate")
    ] = False
    peer_namespace: Annotated[
        str | None,
        Rule(
            "the registry that clients mean that name none, such as skopeo", values.check_registry
        ),
    ] = None
    peer_uploads: Annotated[int, Rule("parallel uploads to peers", values.check_uploads)] = 32
    peer_upload_rate: Annotated[
        int | None,
        Rule(
            "bytes per second of all uploads to peers together",
            values.check_rate,
            values.parse_size,
        ),
    ] = None
