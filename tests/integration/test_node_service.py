"""The Node service through a socket, with real mounts and downloads made by hand. Needs root."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trio

from csi.config import Config
from csi.mount_table import mount_at
from csi.node import NodeService
from fetcher.credentials import Anonymous
from proto import csi_pb2
from tests.support.csi_client import CsiClient, capability, inline_volume_id
from tests.support.edge import in_thread, refusal, serving
from tests.support.node import MODEL, Node, running_node

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

DRIVER = "model.csi.modelpack.org"
# the volume attributes of the example pod of the driver that is named so
CONTEXT = {f"{DRIVER}/reference": f"{MODEL}:v1"}
VOLUME = inline_volume_id("default", "6e8ad0ad", "model")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path) as running:
        yield running


def run(node: Node, body: Callable[[CsiClient, Path], Awaitable[None]]) -> None:
    """Run ``body`` with a client of ``node`` and the target of a pod."""
    # kubelet's folder is a symlink on many machines
    kubelet_dir = node.folder / "kubelet"
    kubelet_dir.symlink_to(node.folder)
    config = Config(driver_name=DRIVER, node_id="node-1", kubelet_dir=kubelet_dir)
    socket = node.folder / "csi.sock"

    async def main() -> None:
        service = NodeService(config, node.volumes, Anonymous())
        async with serving(socket, [service]):
            with CsiClient(socket, timeout=20) as client:
                await body(client, kubelet_dir / "pods" / "one" / "mount")

    trio.run(main)


def test_an_inline_volume_there_and_back(node: Node) -> None:
    async def body(client: CsiClient, target: Path) -> None:
        await in_thread(lambda: client.publish_inline(VOLUME, target, CONTEXT))
        mount = mount_at(node.target())
        assert mount is not None
        assert mount.locked
        (record,) = node.volumes.list()
        assert record.pod == "default/server"
        # again, and with another deadline: the same volume
        await in_thread(lambda: client.publish_inline(VOLUME, target, CONTEXT, timeout=5))
        usage = await in_thread(lambda: client.stats(VOLUME, target))
        assert (usage.bytes_used, usage.inodes_used, usage.abnormal) == (3, 1, False)
        assert f"{MODEL}:v1" in usage.message
        for _ in range(2):
            await in_thread(lambda: client.unpublish(VOLUME, target))
        node.assert_nothing_left()

    run(node, body)


def test_a_download_that_takes_longer_is_aborted_with_progress(node: Node) -> None:
    async def body(client: CsiClient, target: Path) -> None:
        node.pulls.hold()
        code, details = await refusal(
            lambda: client.publish_inline(VOLUME, target, CONTEXT, timeout=1)
        )
        assert code is grpc.StatusCode.ABORTED
        assert "42 %" in details
        node.pulls.arrived.set()
        await in_thread(lambda: client.publish_inline(VOLUME, target, CONTEXT))
        await in_thread(lambda: client.unpublish(VOLUME, target))

    run(node, body)


def test_other_attributes_at_the_same_target_are_a_conflict(node: Node) -> None:
    async def body(client: CsiClient, target: Path) -> None:
        other = {**CONTEXT, f"{DRIVER}/exclude-model-weights": "true"}
        await in_thread(lambda: client.publish_inline(VOLUME, target, CONTEXT))
        code, details = await refusal(lambda: client.publish_inline(VOLUME, target, other))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert "exclude-model-weights" in details
        await in_thread(lambda: client.unpublish(VOLUME, target))

    run(node, body)


def test_targets_outside_of_kubelets_folder_are_refused(node: Node, tmp_path: Path) -> None:
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    (node.pods / "way-out").symlink_to(outside)

    async def body(client: CsiClient, target: Path) -> None:
        pods = target.parent.parent
        for bad in (outside / "mount", pods / "way-out" / "mount", node.folder.parent):
            code, details = await refusal(partial(client.publish, VOLUME, bad, CONTEXT))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "kubelet" in details
            code, _ = await refusal(partial(client.unpublish, VOLUME, bad))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert node.pulls.asked == []

    run(node, body)
    assert list(outside.iterdir()) == []


def test_what_is_not_published_is_not_found(node: Node) -> None:
    async def body(client: CsiClient, target: Path) -> None:
        await in_thread(lambda: client.publish_inline(VOLUME, target, CONTEXT))
        elsewhere = target.parent.parent / "two" / "mount"
        for volume, path in ((VOLUME, elsewhere), ("other", target)):
            code, _ = await refusal(partial(client.stats, volume, path))
            assert code is grpc.StatusCode.NOT_FOUND
        relative = csi_pb2.NodeGetVolumeStatsRequest(volume_id=VOLUME, volume_path="some/path")
        code, _ = await refusal(lambda: client.node.NodeGetVolumeStats(relative))
        assert code is grpc.StatusCode.NOT_FOUND
        await in_thread(lambda: client.unpublish(VOLUME, target))

    run(node, body)


def test_it_tells_its_node_and_only_what_it_can(node: Node) -> None:
    async def body(client: CsiClient, target: Path) -> None:
        info = await in_thread(lambda: client.node.NodeGetInfo(csi_pb2.NodeGetInfoRequest()))
        assert (info.node_id, info.max_volumes_per_node) == ("node-1", 0)
        assert not info.HasField("accessible_topology")
        request = csi_pb2.NodeGetCapabilitiesRequest()
        answer = await in_thread(lambda: client.node.NodeGetCapabilities(request))
        rpc = csi_pb2.NodeServiceCapability.RPC
        types = {capability.rpc.type for capability in answer.capabilities}
        assert types == {rpc.GET_VOLUME_STATS, rpc.VOLUME_CONDITION}
        calls: tuple[Callable[[], object], ...] = (
            lambda: client.node.NodeStageVolume(csi_pb2.NodeStageVolumeRequest()),
            lambda: client.node.NodeUnstageVolume(csi_pb2.NodeUnstageVolumeRequest()),
            lambda: client.node.NodeExpandVolume(csi_pb2.NodeExpandVolumeRequest()),
        )
        for call in calls:
            code, _ = await refusal(call)
            assert code is grpc.StatusCode.UNIMPLEMENTED

    run(node, body)


def test_what_is_missing_is_named(node: Node) -> None:
    async def body(client: CsiClient, target: Path) -> None:
        whole: dict[str, Any] = {
            "volume_id": VOLUME,
            "target_path": str(target),
            "volume_capability": capability(),
            "volume_context": CONTEXT,
        }
        for field, word in (
            ("volume_id", "volume id"),
            ("target_path", "target path"),
            ("volume_capability", "capability"),
            ("volume_context", f"{DRIVER}/reference"),
        ):
            request = csi_pb2.NodePublishVolumeRequest(**{**whole, field: None})
            code, details = await refusal(partial(client.node.NodePublishVolume, request))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert word in details
            assert "missing" in details

    run(node, body)
    assert node.volumes.list() == []
