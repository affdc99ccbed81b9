"""Node, CSI 1.12: requests to values, values to :class:`csi.volumes.Volumes`, and the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

from csi import targets
from csi.node import requests
from fetcher.errors import InvalidRequest
from proto import csi_pb2

if TYPE_CHECKING:
    from pathlib import Path

    from csi.bridge import Call
    from csi.config import Config
    from csi.stats import VolumeStats
    from csi.volumes import PublishRequest
    from fetcher.credentials import Keychain

Capability = csi_pb2.NodeServiceCapability

CAPABILITIES: Final = (Capability.RPC.GET_VOLUME_STATS, Capability.RPC.VOLUME_CONDITION)


class NodeVolumes(Protocol):
    """What is needed of :class:`csi.volumes.Volumes`."""

    async def publish(self, request: PublishRequest, wait: float | None) -> None:
        """Show the model at the target."""

    async def unpublish(self, volume_id: str, target: Path) -> None:
        """Take the volume off the target."""

    async def stats(self, volume_id: str, path: Path) -> VolumeStats:
        """Bytes, files and condition of a published volume."""


class NodeService:
    """The calls of kubelet."""

    descriptor = csi_pb2.DESCRIPTOR.services_by_name["Node"]

    def __init__(self, config: Config, volumes: NodeVolumes, node_keychain: Keychain) -> None:
        """``node_keychain`` is what volumes without secrets of their own are pulled with."""
        self._config = config
        self._volumes = volumes
        self._node_keychain = node_keychain

    async def NodePublishVolume(
        self, request: csi_pb2.NodePublishVolumeRequest, call: Call
    ) -> csi_pb2.NodePublishVolumeResponse:
        """Mount a model, read-only; waits for its download until shortly before the deadline."""
        volume = requests.read_publish(request, self._config.driver_name, self._node_keychain)
        volume = replace(volume, target=await self._locate(volume.target))
        wait = requests.waiting_time(call.time_remaining, self._config.deadline_margin)
        await self._volumes.publish(volume, wait)
        return csi_pb2.NodePublishVolumeResponse()

    async def NodeUnpublishVolume(
        self, request: csi_pb2.NodeUnpublishVolumeRequest, call: Call
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        """Unmount a model, and remove the folder that publishing made."""
        volume_id, target = requests.read_unpublish(request)
        await self._volumes.unpublish(volume_id, await self._locate(target))
        return csi_pb2.NodeUnpublishVolumeResponse()

    async def NodeGetVolumeStats(
        self, request: csi_pb2.NodeGetVolumeStatsRequest, call: Call
    ) -> csi_pb2.NodeGetVolumeStatsResponse:
        """Bytes and inodes of the model that is shown, and whether the mount is as it should be."""
        volume_id, path = requests.read_stats(request)
        stats = await self._volumes.stats(volume_id, path)
        return csi_pb2.NodeGetVolumeStatsResponse(
            usage=[
                _full(csi_pb2.VolumeUsage.BYTES, stats.bytes_used),
                _full(csi_pb2.VolumeUsage.INODES, stats.files),
            ],
            volume_condition=csi_pb2.VolumeCondition(
                abnormal=stats.abnormal, message=stats.message
            ),
        )

    async def NodeGetInfo(
        self, request: csi_pb2.NodeGetInfoRequest, call: Call
    ) -> csi_pb2.NodeGetInfoResponse:
        """The node's id. No limit of volumes, no topology."""
        return csi_pb2.NodeGetInfoResponse(node_id=self._config.node_id)

    async def NodeGetCapabilities(
        self, request: csi_pb2.NodeGetCapabilitiesRequest, call: Call
    ) -> csi_pb2.NodeGetCapabilitiesResponse:
        """Statistics and condition; nothing is staged."""
        return csi_pb2.NodeGetCapabilitiesResponse(
            capabilities=[
                Capability(rpc=Capability.RPC(type=capability)) for capability in CAPABILITIES
            ]
        )

    async def _locate(self, target: Path) -> Path:
        """``target`` as the mount table spells it, where it is below kubelet's folder.

        Symlinks may be on the way (a kubelet folder that is one is common), but not out of there.
        """
        located = await targets.locate(target)
        kubelet_dir = (await targets.locate(self._config.kubelet_dir / "pods")).parent
        if not located.parent.is_relative_to(kubelet_dir):
            raise InvalidRequest(
                f"the target path {str(target)[:200]} is not below {self._config.kubelet_dir}, "
                "kubelet's folder (setting kubelet-dir)"
            )
        return located


def _full(unit: csi_pb2.VolumeUsage.Unit.ValueType, used: int) -> csi_pb2.VolumeUsage:
    """A read-only volume: all that there is is used."""
    return csi_pb2.VolumeUsage(unit=unit, total=used, used=used, available=0)
