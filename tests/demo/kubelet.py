"""What kubelet does for a pod's inline volume."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from proto import csi_pb2
from tests.support.csi_client import CALL_SECONDS, CsiClient, Usage, inline_volume_id

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.support.driver import DriverProcess

VOLUME = "model"
NAMESPACE = "demo"


@dataclass(frozen=True)
class Pod:
    """A pod with one inline volume."""

    name: str
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def volume_id(self) -> str:
        return inline_volume_id(NAMESPACE, self.uid, VOLUME)


class Kubelet:
    """kubelet's side of a driver's socket. A context manager: leaving it closes the connection."""

    def __init__(self, driver: DriverProcess) -> None:
        self._pods = driver.kubelet_dir / "pods"
        self._client = CsiClient(driver.socket)

    def __enter__(self) -> Kubelet:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.__exit__(*exception)

    def register(self) -> tuple[str, str, str]:
        """What is asked when a driver's socket appears: its name, its version, the node's id."""
        identity, node = self._client.identity, self._client.node
        info = identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=CALL_SECONDS)
        where = node.NodeGetInfo(csi_pb2.NodeGetInfoRequest(), timeout=CALL_SECONDS)
        return info.name, info.vendor_version, where.node_id

    def target(self, pod: Pod) -> Path:
        return self._pods / pod.uid / "volumes/kubernetes.io~csi" / VOLUME / "mount"

    def publish(self, pod: Pod, attributes: Mapping[str, str]) -> Path:
        """Have the pod's volume mounted; while a download goes on, ask again as kubelet does."""
        target = self.target(pod)
        while True:
            try:
                self._client.publish_inline(
                    pod.volume_id, target, attributes, pod=(NAMESPACE, pod.name)
                )
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.ABORTED:
                    raise
                print(f"    {error.details()}")
                time.sleep(1)  # kubelet's own pause is longer
            else:
                return target

    def stats(self, pod: Pod) -> Usage:
        return self._client.stats(pod.volume_id, self.target(pod))

    def unpublish(self, pod: Pod) -> None:
        target = self.target(pod)
        self._client.unpublish(pod.volume_id, target)
        # kubelet removes what it made; it could not if the driver had left something
        os.removedirs(target.parent)
