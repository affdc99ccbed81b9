"""Requests to the node, checked and turned into values. No I/O.

Specification: CSI 1.12, NodePublishVolume, NodeUnpublishVolume, NodeGetVolumeStats.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from csi import fields
from csi.attributes import VolumeAttributes
from csi.keychains import volume_keychain
from csi.volumes import PublishRequest
from fetcher.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fetcher.credentials import Keychain
    from proto import csi_pb2

MAX_PATH_BYTES: Final = 4096
"""With the NUL at its end, as PATH_MAX counts."""
MAX_NAME_BYTES: Final = 255

SHORT_DEADLINE_SHARE: Final = 0.8
"""Of a deadline that is shorter than a few margins, how much a call may spend waiting."""

POD_NAME: Final = "csi.storage.k8s.io/pod.name"
POD_NAMESPACE: Final = "csi.storage.k8s.io/pod.namespace"


def read_publish(
    request: csi_pb2.NodePublishVolumeRequest, driver_name: str, node_keychain: Keychain
) -> PublishRequest:
    """Read a NodePublishVolume request. Raises :class:`InvalidRequest`.

    ``readonly``, the mount flags and the file system type change nothing: the volume is read-only
    whatever was asked.
    """
    volume_id = fields.volume_id(request.volume_id)
    target = read_target(request.target_path)
    if not request.HasField("volume_capability"):
        raise InvalidRequest("the volume capability is missing")
    fields.access_mode(request.volume_capability)
    context = dict(request.volume_context)
    attributes = VolumeAttributes.parse(context, driver_name)
    return PublishRequest(
        volume_id=volume_id,
        target=target,
        attributes=attributes,
        keychain=volume_keychain(request.secrets, attributes.reference, node_keychain),
        pod=_pod(context),
    )


def read_unpublish(request: csi_pb2.NodeUnpublishVolumeRequest) -> tuple[str, Path]:
    """Volume id and target of a NodeUnpublishVolume request. Raises :class:`InvalidRequest`."""
    volume_id = fields.volume_id(request.volume_id)
    return volume_id, read_target(request.target_path)


def read_stats(request: csi_pb2.NodeGetVolumeStatsRequest) -> tuple[str, Path]:
    """Volume id and path of a NodeGetVolumeStats request.

    Raises :class:`InvalidRequest` for what is missing, :class:`NotFound` for a path at which no
    volume can be: the specification has that code for both.
    """
    volume_id = fields.volume_id(request.volume_id)
    if not request.volume_path:
        raise InvalidRequest("the volume path is missing")
    try:
        return volume_id, read_target(request.volume_path)
    except InvalidRequest as error:
        raise NotFound(f"volume {volume_id} is not published there: {error.message}") from error


def read_target(text: str) -> Path:
    """A target path that means what it says: absolute, normal, of a length that Linux takes."""
    if not text:
        raise InvalidRequest("the target path is missing")
    if len(text.encode()) >= MAX_PATH_BYTES:
        raise InvalidRequest(f"the target path has more than {MAX_PATH_BYTES - 1} bytes")
    if not text.isprintable():
        raise InvalidRequest("the target path has control characters")
    shown = text if len(text) <= 200 else f"{text[:200]}…"
    if not text.startswith("/"):
        raise InvalidRequest(f"the target path {shown} is not absolute")
    names = text[1:].removesuffix("/").split("/")
    if any(name in ("", ".", "..") for name in names):
        raise InvalidRequest(f"the target path {shown} has '.', '..' or empty parts")
    if any(len(name.encode()) > MAX_NAME_BYTES for name in names):
        raise InvalidRequest(f"the target path {shown} has a part of over {MAX_NAME_BYTES} bytes")
    return Path(text)


def waiting_time(time_remaining: float | None, margin: float) -> float | None:
    """How many seconds a publish may wait for its download; None for as long as it takes.

    Until ``margin`` before the deadline; of a short deadline, most of it.
    """
    if time_remaining is None:
        return None
    return max(time_remaining - margin, time_remaining * SHORT_DEADLINE_SHARE)


def _pod(context: Mapping[str, str]) -> str | None:
    """``namespace/name`` for log lines, where kubelet tells."""
    name = context.get(POD_NAME)
    if not name:
        return None
    text = f"{context.get(POD_NAMESPACE, '')}/{name}"
    return "".join(character if character.isprintable() else "?" for character in text[:320])
