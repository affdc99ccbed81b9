"""Pulls that always converge: many volumes, pods that go, a driver that is killed. Needs root."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest

from csi.mount_table import mount_at
from fetcher.modelpack import Kind, Packing
from tests.support.commands import ModelCsi, wait_until
from tests.support.csi_client import CsiClient
from tests.support.driver import Driver, DriverProcess
from tests.support.models import ModelBuilder
from tests.support.proxy import Faults, Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.registry import RegistryServer

MIB = 1024 * 1024
PREFIX = "model.csi.example.org"
KILLS = 20


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(tmp_path / "node", "--pull-grace", "500ms")
    try:
        yield driver
    finally:
        driver.clear()


def attributes(proxy: Proxy, repository: str, **others: str) -> dict[str, str]:
    named = {name.replace("_", "-"): value for name, value in others.items()}
    return {
        f"{PREFIX}/{name}": value
        for name, value in {"reference": f"{proxy.address}/{repository}:v1", **named}.items()
    }


def layer_bytes(builder: ModelBuilder) -> int:
    return sum({layer["digest"]: layer["size"] for layer in builder.layers}.values())


def running_pulls(running: DriverProcess, home: Path) -> list[object]:
    pulls: list[object] = ModelCsi(running.root, home).run("--json", "status").json["pulls"]
    return pulls


def test_twelve_volumes_at_once_whole_and_in_part(
    driver: Driver, registry: RegistryServer, proxy: Proxy
) -> None:
    weights, extra = os.urandom(12 * MIB), os.urandom(2 * MIB)
    builder = (
        ModelBuilder()
        .add_raw("model.safetensors", weights)
        .add_raw("extra/model.bin", extra)
        .add_raw("config.json", b'{"model_type": "bert"}', Kind.WEIGHT_CONFIG)
        .add_tar({"code/model.py": os.urandom(MIB)}, Packing.TAR, Kind.CODE)
        .add_tar({"README.md": b"# Read\n" * 1000}, Packing.TAR_GZIP, Kind.DOC)
    )
    builder.push(registry, "twelve", "v1")
    proxy.faults = Faults(bytes_per_second=16 * MIB)
    selections: tuple[tuple[dict[str, str], set[str]], ...] = (
        ({}, {"model.safetensors", "extra", "config.json", "code", "README.md"}),
        ({"exclude_model_weights": "true"}, {"config.json", "code", "README.md"}),
        (
            {"exclude_file_patterns": json.dumps(["*.bin", "README.md"])},
            {"model.safetensors", "config.json", "code"},
        ),
    )
    running = driver.start()

    def publish(number: int) -> None:
        with CsiClient(running.socket) as kubelet:
            others, expected = selections[number % 3]
            target = running.target(f"pod-{number}")
            context = attributes(proxy, "twelve", **others)
            kubelet.publish_inline(f"csi-{number}", target, context)
            assert {path.name for path in target.iterdir() if path.name != "extra"} == (
                expected - {"extra"}
            )
            if "model.safetensors" in expected:
                assert (target / "model.safetensors").read_bytes() == weights
            assert (target / "extra/model.bin").exists() is ("extra" in expected)

    with ThreadPoolExecutor(12) as pods:
        list(pods.map(publish, range(12)))
    assert proxy.counts.total == layer_bytes(builder)
    with CsiClient(running.socket) as kubelet:
        for number in range(12):
            kubelet.unpublish(f"csi-{number}", running.target(f"pod-{number}"))


def test_a_part_fetches_no_more_than_the_part(
    driver: Driver, registry: RegistryServer, proxy: Proxy
) -> None:
    config = b'{"model_type": "bert"}'
    builder = ModelBuilder().add_raw("model.safetensors", os.urandom(4 * MIB))
    builder.add_raw("config.json", config, Kind.WEIGHT_CONFIG).push(registry, "part", "v1")
    running = driver.start()
    with CsiClient(running.socket) as kubelet:
        target = running.target("one")
        context = attributes(proxy, "part", exclude_model_weights="true")
        kubelet.publish_inline("csi-one", target, context)
        assert [path.name for path in target.iterdir()] == ["config.json"]
        assert proxy.counts.total == len(config)
        # and the whole model later only the rest
        kubelet.publish_inline("csi-two", running.target("two"), attributes(proxy, "part"))
        assert proxy.counts.total == layer_bytes(builder)
        kubelet.unpublish("csi-one", target)
        kubelet.unpublish("csi-two", running.target("two"))


def test_a_pod_that_is_deleted_at_half_leaves_half_to_fetch(
    driver: Driver, registry: RegistryServer, proxy: Proxy, tmp_path: Path
) -> None:
    data = os.urandom(24 * MIB)
    ModelBuilder().add_raw("model.safetensors", data).push(registry, "half", "v1")
    proxy.faults = Faults(bytes_per_second=8 * MIB)
    running = driver.start()
    context = attributes(proxy, "half")
    with CsiClient(running.socket) as kubelet:
        target = running.target("one")
        while proxy.counts.total < len(data) / 2:
            with pytest.raises(grpc.RpcError) as caught:
                kubelet.publish_inline("csi-one", target, context, timeout=0.5)
            assert caught.value.code() is grpc.StatusCode.ABORTED
        kubelet.unpublish("csi-one", target)
        wait_until(lambda: not running_pulls(running, tmp_path), "the pull stops", 30)
        stopped = proxy.counts.total
        assert stopped < len(data)
        proxy.faults = Faults()
        second = running.target("two")
        kubelet.publish_inline("csi-two", second, context)
        assert (second / "model.safetensors").read_bytes() == data
        # what was on its way when it stopped is all that comes twice
        assert proxy.counts.total <= 1.05 * len(data)
        kubelet.unpublish("csi-two", second)


def test_a_pull_that_kubelet_comes_back_for_goes_on_between_its_calls(
    driver: Driver, registry: RegistryServer, proxy: Proxy
) -> None:
    """Though its pause is longer than the grace period."""
    data = os.urandom(8 * MIB)
    ModelBuilder().add_raw("model.safetensors", data).push(registry, "pause", "v1")
    proxy.faults = Faults(bytes_per_second=4 * MIB)
    running = driver.start()
    context = attributes(proxy, "pause")
    with CsiClient(running.socket) as kubelet:
        target = running.target("one")
        with pytest.raises(grpc.RpcError):
            kubelet.publish_inline("csi-one", target, context, timeout=0.3)
        wait_until(lambda: proxy.counts.total >= len(data), "everything is fetched", 30)
        kubelet.publish_inline("csi-one", target, context)
        assert proxy.counts.total == len(data)
        kubelet.unpublish("csi-one", target)


@pytest.mark.parametrize("packing", [Packing.RAW, Packing.TAR])
def test_a_line_that_breaks_every_second_only_delays(
    driver: Driver, registry: RegistryServer, proxy: Proxy, packing: Packing
) -> None:
    data = os.urandom(48 * MIB)
    builder = ModelBuilder()
    if packing is Packing.RAW:
        builder.add_raw("model.safetensors", data)
    else:
        builder.add_tar({"model.safetensors": data})
    builder.push(registry, f"breaks/{packing.value}", "v1")
    proxy.faults = Faults(bytes_per_second=16 * MIB, cut_every=1)
    running = driver.start()
    with CsiClient(running.socket) as kubelet:
        target = running.target("one")
        context = attributes(proxy, f"breaks/{packing.value}")
        kubelet.publish_inline("csi-one", target, context, timeout=60)
        assert (target / "model.safetensors").read_bytes() == data
        assert proxy.counts.total <= 1.2 * len(data)
        assert proxy.counts.blob_requests() >= 6
        kubelet.unpublish("csi-one", target)


def test_a_driver_that_is_killed_again_and_again_converges(
    driver: Driver, registry: RegistryServer, proxy: Proxy
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)  # noqa: S311 (the same again, given the seed)
    files = {f"model-{number}.safetensors": os.urandom(50 * MIB) for number in range(3)}
    code = os.urandom(4 * MIB)
    builder = ModelBuilder().add_tar({"code/model.py": code}, Packing.TAR, Kind.CODE)
    for name, data in files.items():
        builder.add_raw(name, data)
    builder.push(registry, "killed", "v1")
    total = layer_bytes(builder)
    # anywhere in the pull: also before its first byte and after its last
    goals = sorted(moments.uniform(0, 1.05) * total for _ in range(KILLS))
    context = attributes(proxy, "killed")
    proxy.faults = Faults(bytes_per_second=48 * MIB)
    target = driver.start().target("one")
    driver.end()
    for goal in goals:
        running = driver.start()
        with CsiClient(running.socket) as kubelet, ThreadPoolExecutor(1) as pod:
            call = pod.submit(kubelet.publish_inline, "csi-one", target, context)
            wait_until(lambda: proxy.counts.total >= goal or call.done(), "so many bytes", 60)  # noqa: B023
            time.sleep(moments.uniform(0, 0.02))  # anywhere in what is done with them
            driver.end(signal.SIGKILL)
            with contextlib.suppress(grpc.RpcError):
                call.result()
    proxy.faults = Faults()
    running = driver.start()
    with CsiClient(running.socket) as kubelet:
        kubelet.publish_inline("csi-one", target, context)
        print(f"fetched {proxy.counts.total / total:.3f} times")
        assert proxy.counts.total <= 1.15 * total
        assert (target / "code/model.py").read_bytes() == code
        for name, data in files.items():
            assert (target / name).read_bytes() == data
        mount = mount_at(target)
        assert mount is not None
        assert mount.locked
        assert_only_complete_content(running, builder)
        kubelet.unpublish("csi-one", target)
    assert mount_at(target) is None


def assert_only_complete_content(running: DriverProcess, builder: ModelBuilder) -> None:
    """Every name in the store is that of this model's content, and none is of work in progress."""
    blobs = {layer["digest"].partition(":")[2] for layer in builder.layers}
    wait_until(
        lambda: (
            {path.name.partition(".")[0] for path in (running.root / "blobs/sha256").iterdir()}
            == blobs
        ),
        "nothing but content",
    )
    unfinished = [
        str(path)
        for path in running.root.rglob("*")
        if path.name.endswith((".chunks", ".parts", ".new"))
    ]
    assert unfinished == []
    assert [path.name for path in (running.root / "models/sha256").iterdir()] == [
        builder.digest.hex
    ]
