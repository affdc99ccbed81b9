"""The CSI calls that kubelet makes for a pod's inline volume, made as kubelet makes them."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from proto import csi_pb2, csi_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CALL_SECONDS = 120.0
"""kubelet's own deadline of a call."""
VOLUME = "model"


@dataclass(frozen=True)
class Pod:
    """What kubelet knows of a pod with one inline volume."""

    name: str
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    namespace: str = "demo"

    @property
    def volume_id(self) -> str:
        """kubelet makes an id of its own for an inline volume: ``csi-`` and a digest."""
        text = f"{self.namespace}{self.uid}{VOLUME}"
        return f"csi-{hashlib.sha256(text.encode()).hexdigest()}"

    def target(self, kubelet_dir: Path) -> Path:
        return kubelet_dir / "pods" / self.uid / "volumes/kubernetes.io~csi" / VOLUME / "mount"


class Kubelet:
    """kubelet's side of the driver's socket. A context manager: leaving it closes the channel."""

    def __init__(self, endpoint: str, kubelet_dir: Path) -> None:
        self._kubelet_dir = kubelet_dir
        self._channel = grpc.insecure_channel(endpoint)
        self._identity = csi_pb2_grpc.IdentityStub(self._channel)
        self._node = csi_pb2_grpc.NodeStub(self._channel)

    def __enter__(self) -> Kubelet:
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    def register(self) -> tuple[str, str, str]:
        """What the registrar asks when a driver's socket appears: name, version, node id."""
        info = self._identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=CALL_SECONDS)
        node = self._node.NodeGetInfo(csi_pb2.NodeGetInfoRequest(), timeout=CALL_SECONDS)
        return info.name, info.vendor_version, node.node_id

    def publish(self, pod: Pod, attributes: Mapping[str, str]) -> Path:
        """Have the pod's volume mounted; asks again while a download goes on, as kubelet does."""
        target = pod.target(self._kubelet_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        request = csi_pb2.NodePublishVolumeRequest(
            volume_id=pod.volume_id,
            target_path=str(target),
            volume_capability=csi_pb2.VolumeCapability(
                mount=csi_pb2.VolumeCapability.MountVolume(),
                access_mode=csi_pb2.VolumeCapability.AccessMode(
                    mode=csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
                ),
            ),
            readonly=True,
            volume_context={**attributes, **_pod_info(pod)},
        )
        while True:
            try:
                self._node.NodePublishVolume(request, timeout=CALL_SECONDS)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.ABORTED:
                    raise
                print(f"    {error.details()}")
                time.sleep(1)  # kubelet's back-off, which is longer
            else:
                return target

    def stats(self, pod: Pod) -> tuple[int, int]:
        """Bytes and inodes of the pod's volume."""
        answer = self._node.NodeGetVolumeStats(
            csi_pb2.NodeGetVolumeStatsRequest(
                volume_id=pod.volume_id, volume_path=str(pod.target(self._kubelet_dir))
            ),
            timeout=CALL_SECONDS,
        )
        used = {usage.unit: usage.used for usage in answer.usage}
        return used[csi_pb2.VolumeUsage.BYTES], used[csi_pb2.VolumeUsage.INODES]

    def unpublish(self, pod: Pod) -> None:
        target = pod.target(self._kubelet_dir)
        self._node.NodeUnpublishVolume(
            csi_pb2.NodeUnpublishVolumeRequest(volume_id=pod.volume_id, target_path=str(target)),
            timeout=CALL_SECONDS,
        )
        # kubelet removes what it made; what is in the way here was left by the driver
        os.removedirs(target.parent)


def _pod_info(pod: Pod) -> dict[str, str]:
    """What a CSIDriver with ``podInfoOnMount`` is told."""
    prefix = "csi.storage.k8s.io"
    return {
        f"{prefix}/pod.name": pod.name,
        f"{prefix}/pod.namespace": pod.namespace,
        f"{prefix}/pod.uid": pod.uid,
        f"{prefix}/serviceAccount.name": "default",
        f"{prefix}/ephemeral": "true",
    }
