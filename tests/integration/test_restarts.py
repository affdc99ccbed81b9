"""The shipped driver ends, is killed, and starts again, with and without a network. Needs root."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import pytest

from csi.mount_table import mount_at
from tests.support.at_once import at_once
from tests.support.commands import ModelCsi, wait_until
from tests.support.csi_client import CsiClient
from tests.support.driver import Driver, DriverProcess
from tests.support.models import ModelBuilder
from tests.support.mounts import detach_below, mounts_below, umount
from tests.support.proxy import Faults, serve_proxy
from tests.support.readers import reading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.registry import RegistryServer

MIB = 1024 * 1024
REFERENCE = "model.csi.example.org/reference"
POLICY = "model.csi.example.org/pull-policy"
OFFLINE = ("unshare", "--net")
"""A network without any interface that is up: no registry, no DNS."""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    # a kill loses the chunks that are on their way: small ones, as the models are small
    driver = Driver(tmp_path / "node", "--stall-timeout", "5s", "--chunk-size", "128KiB")
    try:
        yield driver
    finally:
        driver.clear()


@contextmanager
def kubelet_of(running: DriverProcess) -> Iterator[CsiClient]:
    with CsiClient(running.socket) as client:
        client.wait_until_ready(20)
        yield client


def attributes(reference: str, policy: str = "IfNotPresent") -> dict[str, str]:
    return {REFERENCE: reference, POLICY: policy}


def push(registry: RegistryServer, repository: str, size: int = MIB) -> tuple[str, bytes]:
    data = os.urandom(size)
    return ModelBuilder().add_raw("model.safetensors", data).push(registry, repository, "v1"), data


def volume_states(running: DriverProcess) -> dict[str, str]:
    """What the records say, by volume."""
    with sqlite3.connect(f"file:{running.root}/state.db?mode=ro", uri=True) as database:
        return dict(database.execute("SELECT volume_id, state FROM volumes"))


ENDS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL]


def test_pods_read_on_whatever_happens_to_the_driver(
    driver: Driver, registry: RegistryServer
) -> None:
    reference, data = push(registry, "restarts/reading", 4 * MIB)
    running = driver.start()
    targets = [running.target("one"), running.target("two")]
    with kubelet_of(running) as kubelet:
        for number, target in enumerate(targets):
            kubelet.publish_inline(f"csi-{number}", target, attributes(reference))
    mounts = [mount_at(target) for target in targets]
    with reading(*targets, digest=hashlib.sha256(data).hexdigest()) as readers:
        for number in ENDS:
            driver.end(number)
            for reader in readers:
                reader.goes_on()
            running = driver.start()
            for reader in readers:
                reader.goes_on()
            assert [mount_at(target) for target in targets] == mounts
            assert volume_states(running) == {"csi-0": "published", "csi-1": "published"}
    with kubelet_of(running) as kubelet:
        for number, target in enumerate(targets):
            kubelet.unpublish(f"csi-{number}", target)
    assert mounts_below(running.kubelet_dir) == []


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
def test_a_driver_that_ends_in_mid_pull_goes_on(
    driver: Driver, registry: RegistryServer, number: signal.Signals
) -> None:
    reference, data = push(registry, f"restarts/{number.name.lower()}", 16 * MIB)
    with serve_proxy(registry.address) as proxy:
        proxy.faults = Faults(bytes_per_second=8 * MIB)
        running = driver.start()
        target = running.target("one")
        context = attributes(reference.replace(registry.address, proxy.address))
        with kubelet_of(running) as kubelet:
            with pytest.raises(grpc.RpcError) as caught:
                kubelet.publish_inline("csi-one", target, context, timeout=1)
            assert caught.value.code() is grpc.StatusCode.ABORTED
        driver.end(number)
        proxy.faults = Faults()
        assert mounts_below(running.kubelet_dir) == []
        running = driver.start()
        with kubelet_of(running) as kubelet:
            kubelet.publish_inline("csi-one", target, context)
            assert (target / "model.safetensors").read_bytes() == data
            kubelet.unpublish("csi-one", target)
        assert proxy.counts.total <= 1.15 * len(data)


def test_without_a_network_it_starts_and_has_what_it_had(
    driver: Driver, registry: RegistryServer
) -> None:
    reference, data = push(registry, "restarts/offline")
    running = driver.start()
    with kubelet_of(running) as kubelet:
        for pod in ("one", "two"):
            kubelet.publish_inline(f"csi-{pod}", running.target(pod), attributes(reference))
        # the node will have been told to take this one away, and will have lost another
        kubelet.publish_inline("csi-gone", running.target("gone"), attributes(reference))
    mounts = [mount_at(running.target(pod)) for pod in ("one", "two")]
    driver.end()
    umount(running.target("gone"))
    running = driver.start(*OFFLINE)
    with kubelet_of(running) as kubelet:
        assert [mount_at(running.target(pod)) for pod in ("one", "two")] == mounts
        assert volume_states(running) == {"csi-one": "published", "csi-two": "published"}
        assert not kubelet.stats("csi-one", running.target("one")).abnormal
        # what it has is published, for the same credentials
        for pod, policy in (("three", "IfNotPresent"), ("four", "Never")):
            target = running.target(pod)
            kubelet.publish_inline(f"csi-{pod}", target, attributes(reference, policy), timeout=30)
            assert (target / "model.safetensors").read_bytes() == data

        def refused(pod: str, context: dict[str, str], secrets: dict[str, str] | None) -> None:
            with pytest.raises(grpc.RpcError) as caught:
                kubelet.publish_inline(
                    f"csi-{pod}", running.target(pod), context, secrets=secrets, timeout=100
                )
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, caught.value.details()
            assert mount_at(running.target(pod)) is None

        other = {"username": "other", "password": "credentials"}
        at_once(
            lambda: refused("five", attributes(reference, "Always"), None),
            lambda: refused("six", attributes(reference), other),
            lambda: refused("seven", attributes("registry.example.org/acme/model:v1"), None),
        )
        for pod in ("one", "two", "three", "four"):
            kubelet.unpublish(f"csi-{pod}", running.target(pod))
    assert mounts_below(running.kubelet_dir) == []


def test_a_registry_that_never_answers_costs_a_bounded_time(
    driver: Driver, fresh_registry: RegistryServer
) -> None:
    reference, data = push(fresh_registry, "restarts/silent")
    running = driver.start()
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-one", running.target("one"), attributes(reference))
        os.kill(fresh_registry.pid, signal.SIGSTOP)
        try:
            # its kernel takes the connection, and then nothing comes
            target = running.target("two")
            kubelet.publish_inline("csi-two", target, attributes(reference), timeout=25)
        finally:
            os.kill(fresh_registry.pid, signal.SIGCONT)
        assert (target / "model.safetensors").read_bytes() == data
        for pod in ("one", "two"):
            kubelet.unpublish(f"csi-{pod}", running.target(pod))


def test_mounts_of_a_lost_state_are_told_and_stay(
    driver: Driver, registry: RegistryServer, tmp_path: Path
) -> None:
    reference, data = push(registry, "restarts/lost")
    running = driver.start()
    target = running.target("one")
    with kubelet_of(running) as kubelet:
        kubelet.publish_inline("csi-one", target, attributes(reference))
    mount = mount_at(target)
    driver.end()
    for file in running.root.glob("state.db*"):
        file.unlink()
    with reading(target, digest=hashlib.sha256(data).hexdigest()) as (reader,):
        running = driver.start()
        assert f"at {target}: it stays" in running.log.read_text()
        status = ModelCsi(running.root, tmp_path).run("--json", "status").json
        (told,) = status["unknown_mounts"]
        assert told["target"] == str(target)
        assert ModelCsi(running.root, tmp_path).run("status").output.count(str(target)) == 1
        with kubelet_of(running) as kubelet:
            kubelet.publish_inline("csi-one", target, attributes(reference))
            reader.goes_on()
            assert mount_at(target) == mount
        assert ModelCsi(running.root, tmp_path).run("--json", "status").json["unknown_mounts"] == []
    with kubelet_of(running) as kubelet:
        kubelet.unpublish("csi-one", target)
    assert mounts_below(running.kubelet_dir) == []


def test_a_node_that_restarted_has_no_volumes(driver: Driver, registry: RegistryServer) -> None:
    reference, data = push(registry, "restarts/node")
    running = driver.start()
    pods = [f"pod-{number}" for number in range(20)]
    with kubelet_of(running) as kubelet:
        for pod in pods:
            kubelet.publish_inline(f"csi-{pod}", running.target(pod), attributes(reference))
    driver.end(signal.SIGKILL)
    detach_below(running.kubelet_dir)
    # pods that were deleted meanwhile have no folder any more
    for pod in pods[:10]:
        running.target(pod).rmdir()
        running.target(pod).parent.rmdir()
    running = driver.start(*OFFLINE)
    wait_until(lambda: volume_states(running) == {}, "volumes forgotten")
    with kubelet_of(running) as kubelet:
        target = running.target(pods[-1])
        kubelet.publish_inline(f"csi-{pods[-1]}", target, attributes(reference), timeout=30)
        assert (target / "model.safetensors").read_bytes() == data
        kubelet.unpublish(f"csi-{pods[-1]}", target)
