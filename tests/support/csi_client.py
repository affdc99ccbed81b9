"""The calls of kubelet and of the provisioner, with their deadlines, over the driver's socket."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import grpc

from proto import csi_pb2, csi_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Mode: TypeAlias = csi_pb2.VolumeCapability.AccessMode.Mode.ValueType

CALL_SECONDS: Final = 120.0
"""kubelet's own deadline of a call."""

SINGLE_NODE_WRITER: Final = csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
MULTI_NODE_READER_ONLY: Final = csi_pb2.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY


@dataclass(frozen=True)
class Usage:
    """What NodeGetVolumeStats says."""

    bytes_used: int
    inodes_used: int
    abnormal: bool
    message: str


def capability(mode: Mode = SINGLE_NODE_WRITER) -> csi_pb2.VolumeCapability:
    """A mounted volume in ``mode``; kubelet sends the default for inline volumes."""
    return csi_pb2.VolumeCapability(
        mount=csi_pb2.VolumeCapability.MountVolume(),
        access_mode=csi_pb2.VolumeCapability.AccessMode(mode=mode),
    )


def inline_volume_id(namespace: str, pod_uid: str, volume: str) -> str:
    """The id that kubelet makes for an inline volume."""
    return f"csi-{hashlib.sha256(f'{namespace}{pod_uid}{volume}'.encode()).hexdigest()}"


class CsiClient:
    """A connection to a driver. A context manager; a failed call raises :class:`grpc.RpcError`."""

    def __init__(self, socket: Path, timeout: float = CALL_SECONDS) -> None:
        # a machine's proxy settings say nothing about sockets
        options = (("grpc.enable_http_proxy", 0),)
        self._channel = grpc.insecure_channel(f"unix://{socket}", options=options)
        self._timeout = timeout
        self.identity = csi_pb2_grpc.IdentityStub(self._channel)
        self.node = csi_pb2_grpc.NodeStub(self._channel)
        self.controller = csi_pb2_grpc.ControllerStub(self._channel)

    def __enter__(self) -> CsiClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    # -- identity ----------------------------------------------------------------------------------

    def wait_until_ready(self, timeout: float) -> None:
        """Wait for a driver that listens and says that it is ready."""
        request = csi_pb2.ProbeRequest()
        answer = self.identity.Probe(request, timeout=timeout, wait_for_ready=True)
        if answer.HasField("ready") and not answer.ready.value:
            raise RuntimeError("the driver listens and is not ready")

    # -- node --------------------------------------------------------------------------------------

    def publish(
        self,
        volume_id: str,
        target: Path,
        context: Mapping[str, str],
        *,
        secrets: Mapping[str, str] | None = None,
        mode: Mode = SINGLE_NODE_WRITER,
        timeout: float | None = None,
    ) -> None:
        """NodePublishVolume; the target's folder is made first, as kubelet does."""
        target.parent.mkdir(parents=True, exist_ok=True)
        request = csi_pb2.NodePublishVolumeRequest(
            volume_id=volume_id,
            target_path=str(target),
            volume_capability=capability(mode),
            readonly=True,
            secrets=secrets,
            volume_context=context,
        )
        self.node.NodePublishVolume(request, timeout=timeout or self._timeout)

    def publish_inline(
        self,
        volume_id: str,
        target: Path,
        attributes: Mapping[str, str],
        *,
        pod: tuple[str, str] = ("default", "server"),
        secrets: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> None:
        """NodePublishVolume for an inline volume of ``pod``: (namespace, name)."""
        context = {**attributes, **_pod_context(*pod)}
        self.publish(volume_id, target, context, secrets=secrets, timeout=timeout)

    def unpublish(self, volume_id: str, target: Path, *, timeout: float | None = None) -> None:
        request = csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path=str(target))
        self.node.NodeUnpublishVolume(request, timeout=timeout or self._timeout)

    def stats(self, volume_id: str, path: Path, *, timeout: float | None = None) -> Usage:
        request = csi_pb2.NodeGetVolumeStatsRequest(volume_id=volume_id, volume_path=str(path))
        answer = self.node.NodeGetVolumeStats(request, timeout=timeout or self._timeout)
        used = {usage.unit: usage.used for usage in answer.usage}
        return Usage(
            bytes_used=used[csi_pb2.VolumeUsage.BYTES],
            inodes_used=used[csi_pb2.VolumeUsage.INODES],
            abnormal=answer.volume_condition.abnormal,
            message=answer.volume_condition.message,
        )

    # -- controller --------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        parameters: Mapping[str, str],
        *,
        required: int = 0,
        limit: int = 0,
        modes: Sequence[Mode] = (MULTI_NODE_READER_ONLY,),
        secrets: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> csi_pb2.Volume:
        """CreateVolume, as the provisioner makes it for a claim."""
        request = csi_pb2.CreateVolumeRequest(
            name=name,
            parameters=parameters,
            secrets=secrets,
            volume_capabilities=[capability(mode) for mode in modes],
        )
        if required or limit:
            request.capacity_range.required_bytes = required
            request.capacity_range.limit_bytes = limit
        return self.controller.CreateVolume(request, timeout=timeout or self._timeout).volume

    def delete(self, volume_id: str, *, timeout: float | None = None) -> None:
        request = csi_pb2.DeleteVolumeRequest(volume_id=volume_id)
        self.controller.DeleteVolume(request, timeout=timeout or self._timeout)


def _pod_context(namespace: str, name: str) -> dict[str, str]:
    """What a CSIDriver with ``podInfoOnMount`` is told."""
    prefix = "csi.storage.k8s.io"
    return {
        f"{prefix}/pod.name": name,
        f"{prefix}/pod.namespace": namespace,
        f"{prefix}/pod.uid": "6e8ad0ad-8e1c-4f0d-8f5e-2f4f9b1f9a3e",
        f"{prefix}/serviceAccount.name": "default",
        f"{prefix}/ephemeral": "true",
    }
