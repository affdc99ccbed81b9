"""Controller, CSI 1.12: requests to values, values to :class:`csi.claims.Claims`, the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from csi import fields
from csi.controller import requests
from proto import csi_pb2

if TYPE_CHECKING:
    from csi.bridge import Call
    from csi.claims import Claim, Claims
    from csi.config import Config
    from fetcher.credentials import Keychain

Capability = csi_pb2.ControllerServiceCapability

CAPABILITIES: Final = (
    Capability.RPC.CREATE_DELETE_VOLUME,
    Capability.RPC.LIST_VOLUMES,
    Capability.RPC.GET_VOLUME,
)

MAX_PAGE_BYTES: Final = 2 * 1024 * 1024
"""Of one ListVolumes answer: half of what a client reads."""


class ControllerService:
    """The calls of the provisioner."""

    descriptor = csi_pb2.DESCRIPTOR.services_by_name["Controller"]

    def __init__(self, config: Config, claims: Claims, node_keychain: Keychain) -> None:
        """``node_keychain`` is what volumes without secrets of their own are resolved with."""
        self._driver_name = config.driver_name
        self._claims = claims
        self._node_keychain = node_keychain

    async def CreateVolume(
        self, request: csi_pb2.CreateVolumeRequest, call: Call
    ) -> csi_pb2.CreateVolumeResponse:
        """Resolve a model once and keep its digest under the volume's name."""
        claim = requests.read_create(request, self._driver_name, self._node_keychain)
        created = await self._claims.create(claim)
        return csi_pb2.CreateVolumeResponse(volume=_volume(created))

    async def DeleteVolume(
        self, request: csi_pb2.DeleteVolumeRequest, call: Call
    ) -> csi_pb2.DeleteVolumeResponse:
        """Forget a volume. The nodes' stores are their own."""
        self._claims.delete(fields.volume_id(request.volume_id))
        return csi_pb2.DeleteVolumeResponse()

    async def ValidateVolumeCapabilities(
        self, request: csi_pb2.ValidateVolumeCapabilitiesRequest, call: Call
    ) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
        """Confirm all of what is asked about, or say what of it the volume has not."""
        claim = self._claims.get(fields.volume_id(request.volume_id))
        reason = requests.unconfirmed(request, claim, self._driver_name)
        if reason is not None:
            return csi_pb2.ValidateVolumeCapabilitiesResponse(message=reason)
        return csi_pb2.ValidateVolumeCapabilitiesResponse(
            confirmed=csi_pb2.ValidateVolumeCapabilitiesResponse.Confirmed(
                volume_context=request.volume_context,
                volume_capabilities=request.volume_capabilities,
                parameters=request.parameters,
            )
        )

    async def ListVolumes(
        self, request: csi_pb2.ListVolumesRequest, call: Call
    ) -> csi_pb2.ListVolumesResponse:
        """A page of volumes, oldest first. Its token stays good though volumes are deleted."""
        number, count = requests.read_page(request)
        claims = self._claims.after(number, count + 1)
        response = csi_pb2.ListVolumesResponse()
        for claim in claims[:count]:
            if response.ByteSize() > MAX_PAGE_BYTES:
                break
            response.entries.add(volume=_volume(claim))
        shown = len(response.entries)
        if shown < len(claims):
            response.next_token = str(claims[shown - 1].number)
        return response

    async def ControllerGetVolume(
        self, request: csi_pb2.ControllerGetVolumeRequest, call: Call
    ) -> csi_pb2.ControllerGetVolumeResponse:
        """One volume."""
        claim = self._claims.get(fields.volume_id(request.volume_id))
        return csi_pb2.ControllerGetVolumeResponse(
            volume=_volume(claim), status=csi_pb2.ControllerGetVolumeResponse.VolumeStatus()
        )

    async def ControllerGetCapabilities(
        self, request: csi_pb2.ControllerGetCapabilitiesRequest, call: Call
    ) -> csi_pb2.ControllerGetCapabilitiesResponse:
        """What is implemented here; a volume is published on a node without the controller."""
        return csi_pb2.ControllerGetCapabilitiesResponse(
            capabilities=[
                Capability(rpc=Capability.RPC(type=capability)) for capability in CAPABILITIES
            ]
        )


def _volume(claim: Claim) -> csi_pb2.Volume:
    return csi_pb2.Volume(
        volume_id=claim.volume_id, capacity_bytes=claim.capacity, volume_context=claim.context
    )
