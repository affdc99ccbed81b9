"""The services implement what they say they do, under the names that the contract has."""

from __future__ import annotations

import pytest

from csi.controller import ControllerService
from csi.identity import IdentityService
from csi.node import NodeService

IMPLEMENTED = {
    IdentityService: {"GetPluginInfo", "GetPluginCapabilities", "Probe"},
    NodeService: {
        "NodePublishVolume",
        "NodeUnpublishVolume",
        "NodeGetVolumeStats",
        "NodeGetInfo",
        "NodeGetCapabilities",
    },
    ControllerService: {
        "CreateVolume",
        "DeleteVolume",
        "ValidateVolumeCapabilities",
        "ListVolumes",
        "ControllerGetVolume",
        "ControllerGetCapabilities",
    },
}


@pytest.mark.parametrize("service", IMPLEMENTED, ids=lambda service: service.__name__)
def test_every_rpc_of_a_service_is_one_of_the_contract(
    service: type[IdentityService | NodeService | ControllerService],
) -> None:
    """A misspelled method would silently be an RPC that is not implemented."""
    methods = {name for name in vars(service) if name[0].isupper()}

    assert methods == IMPLEMENTED[service]
    assert methods <= {rpc.name for rpc in service.descriptor.methods}
