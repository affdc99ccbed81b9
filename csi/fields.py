"""Checks of what requests to the node and to the controller have in common: ids and capabilities.

Specification: CSI 1.12, "Size Limits", VolumeCapability.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fetcher.errors import InvalidRequest
from proto import csi_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

AccessMode = csi_pb2.VolumeCapability.AccessMode

MAX_ID_BYTES: Final = 128
"""Of the specification's size limits, for every string that has no other."""

ACCESS_MODES: Final = (
    # what kubelet sends for inline volumes, and for ReadWriteOnce claims; no pod can write anyway
    AccessMode.SINGLE_NODE_WRITER,
    AccessMode.SINGLE_NODE_READER_ONLY,
    AccessMode.MULTI_NODE_READER_ONLY,
)


def volume_id(value: str) -> str:
    """A volume id that can be a file's name; :class:`InvalidRequest` for any other."""
    return _identifier(value, "volume id")


def volume_name(value: str) -> str:
    """The name that a volume is created by; :class:`InvalidRequest` if it cannot be one."""
    if not value:
        raise InvalidRequest("the volume's name is missing")
    if len(value.encode()) > MAX_ID_BYTES:
        raise InvalidRequest(f"the volume's name has more than {MAX_ID_BYTES} bytes")
    if not value.isprintable():
        raise InvalidRequest("the volume's name has control characters")
    return value


def access_mode(capability: csi_pb2.VolumeCapability) -> str:
    """The name of the access mode, of a capability that every volume of this driver has.

    Raises :class:`InvalidRequest` that says what to use instead.
    """
    kind = capability.WhichOneof("access_type")
    if kind == "block":
        raise InvalidRequest(
            "a model cannot be a block volume: use volumeMode Filesystem, which mounts it"
        )
    if kind is None:
        raise InvalidRequest("the volume capability has no access type: expected mount")
    mode = capability.access_mode.mode
    if mode not in ACCESS_MODES:
        raise InvalidRequest(
            f"the access mode {_mode_name(mode)} is not supported: models are read-only; use "
            f"{', '.join(_mode_name(known) for known in ACCESS_MODES)} (in Kubernetes, "
            "ReadOnlyMany or ReadWriteOnce)"
        )
    return _mode_name(mode)


def access_modes(capabilities: Iterable[csi_pb2.VolumeCapability]) -> frozenset[str]:
    """The access modes of several capabilities, of which at least one is required."""
    modes = frozenset(access_mode(capability) for capability in capabilities)
    if not modes:
        raise InvalidRequest("the volume capabilities are missing")
    return modes


def _identifier(value: str, what: str) -> str:
    if not value:
        raise InvalidRequest(f"the {what} is missing")
    if len(value.encode()) > MAX_ID_BYTES:
        raise InvalidRequest(f"the {what} has more than {MAX_ID_BYTES} bytes")
    if value in (".", "..") or "/" in value or not value.isprintable():
        raise InvalidRequest(
            f"the {what} {value!r} is not safe: it is '.' or '..', or has '/' or control characters"
        )
    return value


def _mode_name(mode: int) -> str:
    known = AccessMode.Mode.DESCRIPTOR.values_by_number.get(mode)
    return known.name if known else str(mode)
