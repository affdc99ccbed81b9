"""Identity, CSI 1.12: GetPluginInfo, GetPluginCapabilities, Probe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from google.protobuf.wrappers_pb2 import BoolValue

from fetcher.errors import InProgress, ModelError, Unsupported
from proto import csi_pb2

if TYPE_CHECKING:
    from csi.bridge import Call
    from csi.config import Config


class Readiness(Protocol):
    """What knows whether the driver can do its work."""

    async def check(self) -> None:
        """Return when it can, quickly. Raise :class:`InProgress` while it starts, any other
        :class:`ModelError` when something is wrong that a restart may mend.
        """


class IdentityService:
    """Answers for every mode of the driver."""

    descriptor = csi_pb2.DESCRIPTOR.services_by_name["Identity"]

    def __init__(self, config: Config, version: str, readiness: Readiness) -> None:
        self._name = config.driver_name
        self._version = version
        self._controls = config.mode in ("controller", "all")
        self._readiness = readiness

    async def GetPluginInfo(
        self, request: csi_pb2.GetPluginInfoRequest, call: Call
    ) -> csi_pb2.GetPluginInfoResponse:
        """The driver's name and version."""
        return csi_pb2.GetPluginInfoResponse(name=self._name, vendor_version=self._version)

    async def GetPluginCapabilities(
        self, request: csi_pb2.GetPluginCapabilitiesRequest, call: Call
    ) -> csi_pb2.GetPluginCapabilitiesResponse:
        """The controller service where it is served. Every volume can be had on every node."""
        service = csi_pb2.PluginCapability.Service
        types = [service.CONTROLLER_SERVICE] if self._controls else []
        return csi_pb2.GetPluginCapabilitiesResponse(
            capabilities=[csi_pb2.PluginCapability(service=service(type=one)) for one in types]
        )

    async def Probe(self, request: csi_pb2.ProbeRequest, call: Call) -> csi_pb2.ProbeResponse:
        """Ready, not ready yet, or ``FAILED_PRECONDITION``: unhealthy, and restarting may help."""
        try:
            await self._readiness.check()
        except InProgress:
            return csi_pb2.ProbeResponse(ready=BoolValue(value=False))
        except ModelError as error:
            raise Unsupported(f"the driver is not healthy: {error.message}") from error
        return csi_pb2.ProbeResponse(ready=BoolValue(value=True))
