"""What the node takes for a volume, and what it refuses before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from csi.node.requests import (
    read_publish,
    read_stats,
    read_target,
    read_unpublish,
    waiting_time,
)
from fetcher.credentials import Anonymous, Credentials
from fetcher.errors import InvalidRequest, NotFound
from proto import csi_pb2

DRIVER = "model.csi.example.org"
REFERENCE = f"{DRIVER}/reference"
AccessMode = csi_pb2.VolumeCapability.AccessMode
SECRET = "correct horse battery staple"


class NodeConfig:
    """A node that has credentials for every registry."""

    async def lookup(self, registry: str, repository: str) -> Credentials | None:
        return Credentials("node", "node")


def capability(mode: Any = AccessMode.SINGLE_NODE_WRITER, **kind: Any) -> csi_pb2.VolumeCapability:
    access = kind or {"mount": csi_pb2.VolumeCapability.MountVolume()}
    return csi_pb2.VolumeCapability(access_mode=AccessMode(mode=mode), **access)


def publish(**changes: Any) -> csi_pb2.NodePublishVolumeRequest:
    fields: dict[str, Any] = {
        "volume_id": "csi-1",
        "target_path": "/var/lib/kubelet/pods/1/mount",
        "volume_capability": capability(),
        "volume_context": {REFERENCE: "ghcr.io/acme/qwen3-8b:v1"},
    }
    return csi_pb2.NodePublishVolumeRequest(**{**fields, **changes})


def credentials(secrets: dict[str, str], registry: str = "ghcr.io") -> Credentials | None:
    request = read_publish(publish(secrets=secrets), DRIVER, NodeConfig())
    return trio.run(request.keychain.lookup, registry, "acme/qwen3-8b")


def test_a_request_becomes_values() -> None:
    context = {
        REFERENCE: "ghcr.io/acme/qwen3-8b:v1",
        "csi.storage.k8s.io/pod.name": "server-0",
        "csi.storage.k8s.io/pod.namespace": "team",
        "csi.storage.k8s.io/ephemeral": "true",
    }

    request = read_publish(publish(volume_context=context), DRIVER, Anonymous())

    assert request.volume_id == "csi-1"
    assert request.target == Path("/var/lib/kubelet/pods/1/mount")
    assert str(request.attributes.reference) == "ghcr.io/acme/qwen3-8b:v1"
    assert request.pod == "team/server-0"


@pytest.mark.parametrize(
    "volume_id",
    ["", ".", "..", "a/b", "../x", "a\0b", "a\nb", "a\x1bb", "x" * 129, "ü" * 65, "a\u2028b"],
)
def test_volume_ids_that_try_to_leave_their_place(volume_id: str) -> None:
    with pytest.raises(InvalidRequest, match="volume id"):
        read_publish(publish(volume_id=volume_id), DRIVER, Anonymous())
    with pytest.raises(InvalidRequest, match="volume id"):
        read_unpublish(
            csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path="/var/t")
        )
    with pytest.raises(InvalidRequest, match="volume id"):
        read_stats(csi_pb2.NodeGetVolumeStatsRequest(volume_id=volume_id, volume_path="/var/t"))


@pytest.mark.parametrize(
    "volume_id", ["x" * 128, "csi-" + "0" * 64, "pvc-6e8ad0ad-8e1c", "...", "a b", "fake-vol-id"]
)
def test_volume_ids_that_are_taken(volume_id: str) -> None:
    assert read_publish(publish(volume_id=volume_id), DRIVER, Anonymous()).volume_id == volume_id


@pytest.mark.parametrize(
    "target",
    [
        "",
        "relative/path",
        "/",
        "//var/lib",
        "/var//lib",
        "/var/./lib",
        "/var/lib/..",
        "/var/../lib",
        "/..",
        "/var/lib\0/x",
        "/var/lib\n/x",
        "/var/" + "x" * 256,
        "/var" + "/x" * 2046,
    ],
)
def test_targets_that_do_not_mean_what_they_say(target: str) -> None:
    with pytest.raises(InvalidRequest, match="target path"):
        read_publish(publish(target_path=target), DRIVER, Anonymous())
    with pytest.raises(InvalidRequest, match="target path"):
        read_unpublish(csi_pb2.NodeUnpublishVolumeRequest(volume_id="csi-1", target_path=target))


@given(st.text(alphabet="/.ax\0\n~", max_size=30))
def test_a_target_that_is_taken_is_normal(text: str) -> None:
    try:
        target = read_target(text)
    except InvalidRequest:
        return
    assert target.is_absolute()
    assert str(target) == text.removesuffix("/")
    assert ".." not in target.parts
    assert target.name


@pytest.mark.parametrize(
    "mode",
    [
        AccessMode.SINGLE_NODE_WRITER,
        AccessMode.SINGLE_NODE_READER_ONLY,
        AccessMode.MULTI_NODE_READER_ONLY,
    ],
)
def test_access_modes_that_a_model_has(mode: Any) -> None:
    read_publish(publish(volume_capability=capability(mode)), DRIVER, Anonymous())


@pytest.mark.parametrize(
    "mode",
    [
        AccessMode.UNKNOWN,
        AccessMode.MULTI_NODE_SINGLE_WRITER,
        AccessMode.MULTI_NODE_MULTI_WRITER,
        AccessMode.SINGLE_NODE_SINGLE_WRITER,
        AccessMode.SINGLE_NODE_MULTI_WRITER,
        99,
    ],
)
def test_other_access_modes_are_told_what_to_use(mode: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"use SINGLE_NODE_WRITER.*ReadOnlyMany"):
        read_publish(publish(volume_capability=capability(mode)), DRIVER, Anonymous())


def test_block_volumes_and_capabilities_of_no_kind() -> None:
    block = capability(block=csi_pb2.VolumeCapability.BlockVolume())
    with pytest.raises(InvalidRequest, match="block volume"):
        read_publish(publish(volume_capability=block), DRIVER, Anonymous())
    neither = csi_pb2.VolumeCapability(access_mode=AccessMode(mode=AccessMode.SINGLE_NODE_WRITER))
    with pytest.raises(InvalidRequest, match="access type"):
        read_publish(publish(volume_capability=neither), DRIVER, Anonymous())
    with pytest.raises(InvalidRequest, match="capability is missing"):
        read_publish(publish(volume_capability=None), DRIVER, Anonymous())


@pytest.mark.parametrize(
    "context",
    [
        {},
        {"csi.storage.k8s.io/pod.name": "x"},
        {REFERENCE: ""},
        {REFERENCE: "https://ghcr.io/acme/m"},
        {REFERENCE: "ghcr.io/acme/m", f"{DRIVER}/exclude-file-pattern": "[]"},
    ],
)
def test_contexts_without_a_model(context: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        read_publish(publish(volume_context=context), DRIVER, Anonymous())


def test_the_volumes_secrets_come_before_the_nodes() -> None:
    own = credentials({"username": "volume", "password": SECRET})
    assert own is not None
    assert own.username == "volume"
    node = credentials({})
    assert node is not None
    assert node.username == "node"
    # a user name and a password are for the reference's own registry
    elsewhere = credentials({"username": "volume", "password": SECRET}, "other.example.org")
    assert elsewhere is not None
    assert elsewhere.username == "node"


def test_malformed_secrets_are_not_quoted() -> None:
    for secrets in ({".dockerconfigjson": SECRET}, {"token": SECRET}, {"username": SECRET}):
        with pytest.raises(InvalidRequest) as caught:
            read_publish(publish(secrets=secrets), DRIVER, Anonymous())
        assert SECRET not in str(caught.value)


def test_a_request_shows_no_secrets() -> None:
    secrets = {"username": "volume", "password": SECRET}
    assert SECRET not in repr(read_publish(publish(secrets=secrets), DRIVER, Anonymous()))


def test_stats_of_a_path_where_nothing_can_be() -> None:
    for path in ("some/path", "/a/../b", "/x\0y"):
        with pytest.raises(NotFound):
            read_stats(csi_pb2.NodeGetVolumeStatsRequest(volume_id="csi-1", volume_path=path))
    with pytest.raises(InvalidRequest, match="path is missing"):
        read_stats(csi_pb2.NodeGetVolumeStatsRequest(volume_id="csi-1"))


def test_a_publish_waits_until_shortly_before_its_deadline() -> None:
    assert waiting_time(None, 5) is None
    assert waiting_time(120, 5) == 115
    assert waiting_time(5, 5) == 4
    assert waiting_time(0, 5) == 0


@given(st.floats(0, 1e6), st.floats(0.1, 60))
def test_a_wait_ends_before_the_deadline(remaining: float, margin: float) -> None:
    wait = waiting_time(remaining, margin)
    assert wait is not None
    assert 0.8 * remaining <= wait <= remaining


def test_names_of_pods_cannot_forge_log_lines() -> None:
    context = {REFERENCE: "ghcr.io/a/b", "csi.storage.k8s.io/pod.name": "x\nERROR" + "y" * 1000}
    pod = read_publish(publish(volume_context=context), DRIVER, Anonymous()).pod
    assert pod is not None
    assert pod.isprintable()
    assert len(pod) <= 320
