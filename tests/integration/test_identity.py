"""The Identity service through a socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
import trio

from csi.config import Config
from csi.identity import IdentityService
from fetcher.errors import InProgress, ModelError, NoSpace, Unavailable
from proto import csi_pb2
from tests.support.csi_client import CsiClient
from tests.support.edge import in_thread, refusal, serving

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Literal, TypeAlias

    Mode: TypeAlias = Literal["node", "controller", "all"]


class Health:
    """Says what it was told to say."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.problem = problem

    async def check(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.problem is not None:
            raise self.problem


def service(mode: Mode = "node", health: Health | None = None) -> IdentityService:
    config = Config(mode=mode, driver_name="model.csi.modelpack.org")
    return IdentityService(config, "1.2.3", health or Health())


def test_it_says_who_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path / "s", [service()]):
            with CsiClient(tmp_path / "s") as client:
                request = csi_pb2.GetPluginInfoRequest()
                info = await in_thread(lambda: client.identity.GetPluginInfo(request, timeout=10))
        assert (info.name, info.vendor_version) == ("model.csi.modelpack.org", "1.2.3")

    trio.run(main)


@pytest.mark.parametrize(
    ("mode", "controls"), [("node", False), ("controller", True), ("all", True)]
)
def test_it_offers_what_its_mode_serves(tmp_path: Path, mode: Mode, controls: bool) -> None:
    async def main() -> None:
        async with serving(tmp_path / "s", [service(mode)]):
            with CsiClient(tmp_path / "s") as client:
                request = csi_pb2.GetPluginCapabilitiesRequest()
                answer = await in_thread(
                    lambda: client.identity.GetPluginCapabilities(request, timeout=10)
                )
        types = [capability.service.type for capability in answer.capabilities]
        assert types == [csi_pb2.PluginCapability.Service.CONTROLLER_SERVICE] * controls

    trio.run(main)


def test_the_probe_is_truthful(tmp_path: Path) -> None:
    async def main() -> None:
        health = Health()
        async with serving(tmp_path / "s", [service(health=health)]):
            with CsiClient(tmp_path / "s") as client:

                def probe() -> csi_pb2.ProbeResponse:
                    return client.identity.Probe(csi_pb2.ProbeRequest(), timeout=10)

                assert (await in_thread(probe)).ready.value
                health.problem = InProgress("volumes are being reconciled")
                answer = await in_thread(probe)
                assert answer.HasField("ready")
                assert not answer.ready.value
                for problem in (
                    NoSpace("the disk is full"),
                    Unavailable("the disk does not answer"),
                    ModelError("records fail"),
                ):
                    health.problem = problem
                    code, details = await refusal(probe)
                    assert code is grpc.StatusCode.FAILED_PRECONDITION
                    assert problem.message in details
                health.problem = None
                assert (await in_thread(probe)).ready.value

    trio.run(main)


def test_a_client_waits_until_the_driver_is_ready(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path / "s", [service()]):
            with CsiClient(tmp_path / "s") as client:
                await in_thread(lambda: client.wait_until_ready(10))

    trio.run(main)
