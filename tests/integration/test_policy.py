"""Which models the shipped driver and the command line pull at all. Needs root."""

from __future__ import annotations

import os
import sqlite3
from typing import TYPE_CHECKING

import grpc
import pytest

from csi.mount_table import mount_at
from tests.support.commands import ModelCsi
from tests.support.csi_client import CsiClient
from tests.support.driver import Driver, serve_driver
from tests.support.faulty_registry import FaultyRegistry, serve_faulty
from tests.support.models import ModelBuilder
from tests.support.mounts import detach_below
from tests.support.proxy import Faults, serve_proxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.driver import DriverProcess
    from tests.support.registry import RegistryServer

MIB = 1024 * 1024
REFERENCE = "model.csi.example.org/reference"


@pytest.fixture
def listener(registry: RegistryServer) -> Iterator[FaultyRegistry]:
    """A registry that nobody is to talk to."""
    with serve_faulty(registry) as running:
        yield running


def attributes(reference: str) -> dict[str, str]:
    return {REFERENCE: reference}


def push(registry: RegistryServer, repository: str, size: int = 1000) -> ModelBuilder:
    builder = ModelBuilder().add_raw("model.safetensors", os.urandom(size))
    builder.push(registry, repository, "v1")
    return builder


def refused(kubelet: CsiClient, target: Path, reference: str) -> str:
    """Publish, which the policy refuses; the message."""
    with pytest.raises(grpc.RpcError) as caught:
        kubelet.publish_inline("csi-refused", target, attributes(reference))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED, caught.value.details()
    assert not target.exists()
    return str(caught.value.details())


def recorded(running: DriverProcess) -> set[str]:
    """Volumes, claims and whatever a registry was asked for, as the records have it."""
    with sqlite3.connect(f"file:{running.root}/state.db?mode=ro", uri=True) as database:
        return {
            str(name)
            for query in (
                "SELECT reference FROM volumes",
                "SELECT name FROM claims",
                "SELECT reference FROM tags",
            )
            for (name,) in database.execute(query)
        }


def test_only_allowed_models_are_pulled(
    tmp_path: Path, registry: RegistryServer, listener: FaultyRegistry
) -> None:
    push(registry, "allowed/model")
    push(registry, "allowed-not/model")
    allowed = ("--allowed-models", f"{registry.address}/allowed/*", "--allowed-models", "ghcr.io")
    with (
        serve_driver(tmp_path / "node", *allowed) as running,
        CsiClient(running.socket) as kubelet,
    ):
        target = running.target("one")
        for reference in (
            listener.reference("allowed/model", "v1"),
            registry.reference("allowed-not/model", "v1"),
            "ghcr.io.evil.org/acme/model:v1",
        ):
            message = refused(kubelet, target, reference)
            assert message.startswith(f"{reference} is refused by this node's policy")
            assert f"setting allowed-models: {registry.address}/allowed/*, ghcr.io" in message
            with pytest.raises(grpc.RpcError) as caught:
                kubelet.create("claim", attributes(reference))
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert listener.requests == []
        assert recorded(running) == set()
        reference = registry.reference("allowed/model", "v1")
        kubelet.publish_inline("csi-one", target, attributes(reference))
        assert (target / "model.safetensors").stat().st_size == 1000
        kubelet.create("claim", attributes(reference))
        kubelet.unpublish("csi-one", target)


def test_a_digest_may_be_required(
    tmp_path: Path, registry: RegistryServer, listener: FaultyRegistry
) -> None:
    builder = push(registry, "pinned/model")
    name = registry.reference("pinned/model", "v1")
    with (
        serve_driver(tmp_path / "node", "--require-digest", "true") as running,
        CsiClient(running.socket) as kubelet,
    ):
        target = running.target("one")
        message = refused(kubelet, target, listener.reference("pinned/model", "v1"))
        assert "setting require-digest" in message
        with pytest.raises(grpc.RpcError) as caught:
            kubelet.create("claim", attributes(name))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert listener.requests == []
        assert recorded(running) == set()
        for number, reference in enumerate(
            (f"{name}@{builder.digest}", _without_tag(builder, name))
        ):
            kubelet.publish_inline(f"csi-{number}", target, attributes(reference))
            kubelet.unpublish(f"csi-{number}", target)
            claim = kubelet.create(f"claim-{number}", attributes(reference))
            # and what the claim's pods get is what the node lets pass
            context = dict(claim.volume_context)
            kubelet.publish(claim.volume_id, target, context)
            kubelet.unpublish(claim.volume_id, target)


def _without_tag(builder: ModelBuilder, name: str) -> str:
    return f"{name.removesuffix(':v1')}@{builder.digest}"


@pytest.mark.parametrize("served", [True, False])
def test_commands_keep_to_the_policy(
    served: bool, tmp_path: Path, registry: RegistryServer, listener: FaultyRegistry
) -> None:
    push(registry, "commands/model")
    node = Driver(tmp_path / "node", "--allowed-models", f"{registry.address}/commands/**")
    (tmp_path / "mnt").mkdir()
    environment = {} if served else {"MODEL_CSI_ALLOWED_MODELS": f"{registry.address}/commands/**"}
    cli = ModelCsi(tmp_path / "node/root", tmp_path, environment)
    try:
        if served:
            node.start()
        reference = listener.reference("commands/model", "v1")
        for command in (("pull", reference), ("mount", reference, str(tmp_path / "mnt"))):
            done = cli.run(*command)
            assert done.status != 0
            assert "setting allowed-models" in done.errors
        assert listener.requests == []
        assert mount_at(tmp_path / "mnt") is None
        assert cli.run("pull", registry.reference("commands/model", "v1")).status == 0
    finally:
        cli.stop()
        node.clear()
        detach_below(tmp_path)


def test_a_stricter_policy_leaves_what_is_published(
    tmp_path: Path, registry: RegistryServer
) -> None:
    """And refuses what was only on its way, though its digest is known by now."""
    data = os.urandom(8 * MIB)
    ModelBuilder().add_raw("model.safetensors", data).push(registry, "stricter/model", "v1")
    before = Driver(tmp_path / "node")
    after = Driver(tmp_path / "node", "--require-digest", "true", "--allowed-models", "ghcr.io")
    with serve_proxy(registry.address) as proxy:
        context = attributes(f"{proxy.address}/stricter/model:v1")
        try:
            running = before.start()
            shown, coming = running.target("shown"), running.target("coming")
            with CsiClient(running.socket) as kubelet:
                other = registry.reference("stricter/other", "v1")
                push(registry, "stricter/other")
                kubelet.publish_inline("csi-shown", shown, attributes(other))
                proxy.faults = Faults(bytes_per_second=4 * MIB)
                with pytest.raises(grpc.RpcError) as caught:
                    kubelet.publish_inline("csi-coming", coming, context, timeout=0.5)
                assert caught.value.code() is grpc.StatusCode.ABORTED
            mount = mount_at(shown)
            before.end()
            asked = len(proxy.counts.requests)
            running = after.start()
            with CsiClient(running.socket) as kubelet:
                assert mount_at(shown) == mount
                # kubelet asks again for a volume that a pod has, as after its own restart
                kubelet.publish_inline("csi-shown", shown, attributes(other))
                assert not kubelet.stats("csi-shown", shown).abnormal
                with pytest.raises(grpc.RpcError) as caught:
                    kubelet.publish_inline("csi-coming", coming, context)
                assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
                assert len(proxy.counts.requests) == asked
                kubelet.unpublish("csi-coming", coming)
                kubelet.unpublish("csi-shown", shown)
        finally:
            before.clear()
            after.clear()


def test_the_reference_decides_and_not_the_mirror(
    tmp_path: Path, registry: RegistryServer, listener: FaultyRegistry
) -> None:
    push(registry, "mirrored/model")
    hosts = tmp_path / "certs.d" / registry.address
    hosts.mkdir(parents=True)
    (hosts / "hosts.toml").write_text(
        f'server = "http://{registry.address}"\n[host."http://{listener.address}"]\n'
        'capabilities = ["pull"]\n'
    )
    flags = ("--hosts-dir", str(tmp_path / "certs.d"), "--allowed-models", registry.address)
    with (
        serve_driver(tmp_path / "node", *flags) as running,
        CsiClient(running.socket) as kubelet,
    ):
        target = running.target("one")
        refused(kubelet, target, listener.reference("mirrored/model", "v1"))
        assert listener.requests == []
        reference = registry.reference("mirrored/model", "v1")
        kubelet.publish_inline("csi-one", target, attributes(reference))
        assert listener.asked("/blobs/")
        kubelet.unpublish("csi-one", target)


def test_a_pattern_that_is_none_ends_the_start(tmp_path: Path) -> None:
    done = ModelCsi(tmp_path / "root", tmp_path).run("serve", "--allowed-models", "acme/*")
    assert done.status != 0
    assert "--allowed-models" in done.errors
    assert "does not begin with a registry's host" in done.errors
