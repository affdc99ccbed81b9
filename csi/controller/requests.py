"""Requests to the controller, checked and turned into values. No I/O.

Specification: CSI 1.12, CreateVolume, ValidateVolumeCapabilities, ListVolumes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from csi import fields
from csi.attributes import ATTRIBUTES, VolumeAttributes
from csi.claims import Capacity, ClaimRequest
from csi.keychains import volume_keychain
from fetcher.errors import InProgress, InvalidRequest, ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from csi.claims import Claim
    from fetcher.credentials import Keychain
    from proto import csi_pb2

FOREIGN_PREFIX: Final = "csi.storage.k8s.io/"
"""Of what the provisioner adds to parameters: names of the claim and of its secrets."""

MAX_PAGE: Final = 500
"""Entries of one answer, asked for or not; the token leads to the others."""

_TOKEN: Final = re.compile(r"[0-9]{1,18}")


def read_create(
    request: csi_pb2.CreateVolumeRequest, driver_name: str, node_keychain: Keychain
) -> ClaimRequest:
    """Read a CreateVolume request. Raises :class:`InvalidRequest`."""
    name = fields.volume_name(request.name)
    modes = fields.access_modes(request.volume_capabilities)
    _refuse_unsupported(request)
    attributes = read_parameters(request.parameters, driver_name)
    return ClaimRequest(
        name=name,
        attributes=attributes,
        modes=modes,
        capacity=_read_capacity(request.capacity_range),
        keychain=volume_keychain(request.secrets, attributes.reference, node_keychain),
    )


def read_parameters(parameters: Mapping[str, str], driver_name: str) -> VolumeAttributes:
    """The volume attributes of a StorageClass: every parameter that is not the provisioner's."""
    own = {key: value for key, value in parameters.items() if not key.startswith(FOREIGN_PREFIX)}
    for key in own:
        if not key.startswith(f"{driver_name}/"):
            raise InvalidRequest(
                f"the parameter {key[:100]!r} is not known; known are {', '.join(ATTRIBUTES)}, "
                f"each after {driver_name}/"
            )
    return VolumeAttributes.parse(own, driver_name)


def read_page(request: csi_pb2.ListVolumesRequest) -> tuple[int, int]:
    """The number after which a page of claims begins, and how many entries it may have.

    Raises :class:`InProgress` for a token that is none of ours: the specification has ``ABORTED``
    for it, and that the caller begins again without one.
    """
    if request.max_entries < 0:
        raise InvalidRequest("max_entries is negative")
    count = min(request.max_entries or MAX_PAGE, MAX_PAGE)
    if not request.starting_token:
        return 0, count
    if not _TOKEN.fullmatch(request.starting_token):
        raise InProgress("the starting token is not one of this driver: list from the beginning")
    return int(request.starting_token), count


def unconfirmed(
    request: csi_pb2.ValidateVolumeCapabilitiesRequest, claim: Claim, driver_name: str
) -> str | None:
    """Why ``claim`` has not what is asked about; None if it has all of it.

    Raises :class:`InvalidRequest` where capabilities are missing.
    """
    if not request.volume_capabilities:
        raise InvalidRequest("the volume capabilities are missing")
    if request.mutable_parameters:
        return "volumes of this driver have no mutable parameters"
    if request.volume_context and dict(request.volume_context) != claim.context:
        return "the volume's context is another"
    try:
        fields.access_modes(request.volume_capabilities)
        if request.parameters:
            asked = read_parameters(request.parameters, driver_name)
            if asked.fingerprint() != claim.fingerprint:
                return "the volume was created with other parameters"
    except ModelError as error:
        return error.message
    return None


def _refuse_unsupported(request: csi_pb2.CreateVolumeRequest) -> None:
    if request.HasField("volume_content_source"):
        raise InvalidRequest("a volume cannot be made from a snapshot or from another volume")
    if request.HasField("accessibility_requirements"):
        raise InvalidRequest("a volume cannot be bound to a topology: every node can have it")
    if request.mutable_parameters:
        raise InvalidRequest("volumes of this driver have no mutable parameters")


def _read_capacity(capacity: csi_pb2.CapacityRange) -> Capacity:
    """An absent range reads as zeros, which say nothing."""
    if capacity.required_bytes < 0 or capacity.limit_bytes < 0:
        raise InvalidRequest("the capacity's required or limit bytes are negative")
    return Capacity(capacity.required_bytes, capacity.limit_bytes)
