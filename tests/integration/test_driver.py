"""The driver as it is shipped, a real registry behind a proxy, and the calls that kubelet makes."""

from __future__ import annotations

import os
import re
import sqlite3
import tarfile
from typing import TYPE_CHECKING

import grpc
import pytest

from csi.mount_table import mount_at
from fetcher.modelpack import Kind, Packing, layer_type
from tests.support.csi_client import CsiClient
from tests.support.driver import DriverProcess, serve_driver
from tests.support.models import (
    Member,
    ModelBuilder,
    gzip_bomb,
    hard_link,
    make_tar,
    pack,
    symlink,
    tar_files,
    tiny_model,
)
from tests.support.proxy import Faults, serve_proxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.registry import RegistryServer

MIB = 1024 * 1024
DRIVER = "model.csi.example.org"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DriverProcess]:
    with serve_driver(tmp_path_factory.mktemp("driver")) as running:
        yield running


@pytest.fixture
def kubelet(driver: DriverProcess) -> Iterator[CsiClient]:
    with CsiClient(driver.socket) as client:
        yield client


def target_of(driver: DriverProcess, name: str) -> Path:
    return driver.kubelet_dir / "pods" / name / "volumes/kubernetes.io~csi/model/mount"


def attributes(reference: str) -> dict[str, str]:
    return {f"{DRIVER}/reference": reference}


def refusal(
    kubelet: CsiClient,
    volume_id: str,
    target: Path,
    context: dict[str, str],
    timeout: float | None = None,
) -> grpc.RpcError | None:
    """Publish, and say what was wrong; ``None`` after a success."""
    try:
        kubelet.publish_inline(volume_id, target, context, timeout=timeout)
    except grpc.RpcError as error:
        return error
    return None


def volume_ids(driver: DriverProcess) -> set[str]:
    """Every volume that is recorded."""
    with sqlite3.connect(f"file:{driver.root}/state.db?mode=ro", uri=True) as database:
        return {
            str(volume_id) for (volume_id,) in database.execute("SELECT volume_id FROM volumes")
        }


def disk_used(root: Path) -> int:
    """Bytes that everything below ``root`` takes on the disk, each inode once."""
    states = {}
    for folder, _, names in os.walk(root):
        for name in (".", *names):
            state = os.lstat(os.path.join(folder, name))
            states[state.st_ino] = state.st_blocks * 512
    return sum(states.values())


def test_kubelets_rhythm_ends_in_a_mount(
    driver: DriverProcess, kubelet: CsiClient, registry: RegistryServer
) -> None:
    data = os.urandom(24 * MIB)
    ModelBuilder().add_raw("model.safetensors", data).push(registry, "rhythm", "v1")
    target = target_of(driver, "rhythm")
    with serve_proxy(registry.address) as proxy:
        proxy.faults = Faults(bytes_per_second=8 * MIB)
        context = attributes(f"{proxy.address}/rhythm:v1")
        answers: list[str] = []
        while (failure := refusal(kubelet, "csi-rhythm", target, context, timeout=1)) is not None:
            assert failure.code() is grpc.StatusCode.ABORTED, failure.details()
            assert not target.exists() or not os.listdir(target)
            answers.append(str(failure.details()))
        assert answers, "the download was over before the first deadline"
        assert all("MiB" in answer for answer in answers)
        shares = [int(re.findall(r"(\d+) %", answer)[0]) for answer in answers]
        assert shares == sorted(shares)
        assert len(set(shares)) > 1
        assert proxy.counts.total <= 1.02 * len(data)
    assert (target / "model.safetensors").read_bytes() == data
    kubelet.unpublish("csi-rhythm", target)
    assert not target.exists()


def test_ten_volumes_are_one_copy(
    driver: DriverProcess, kubelet: CsiClient, registry: RegistryServer
) -> None:
    builder = ModelBuilder().add_raw("model.safetensors", os.urandom(30 * MIB))
    builder.add_tar({"code/model.py": os.urandom(10 * MIB)}, Packing.TAR, Kind.CODE)
    reference = builder.push(registry, "ten", "v1")
    before = disk_used(driver.root)
    targets = [target_of(driver, f"ten-{number}") for number in range(10)]
    for number, target in enumerate(targets):
        kubelet.publish_inline(f"csi-ten-{number}", target, attributes(reference))
    for name in ("model.safetensors", "code/model.py"):
        assert len({(target / name).stat().st_ino for target in targets}) == 1
    assert disk_used(driver.root) - before <= 1.02 * 40 * MIB
    for number, target in enumerate(targets):
        assert not kubelet.stats(f"csi-ten-{number}", target).abnormal
        with pytest.raises(OSError, match="Read-only file system"):
            (target / "model.safetensors").touch()
        kubelet.unpublish(f"csi-ten-{number}", target)


def tar_model(*members: Member, packing: Packing = Packing.TAR) -> ModelBuilder:
    return ModelBuilder().add_tar(members, packing)


def cut(packing: Packing) -> ModelBuilder:
    packed = pack(tar_files({"a.bin": os.urandom(200_000)}), packing)
    return ModelBuilder().add_layer(layer_type(Kind.WEIGHT, packing), packed[:-5000])


HOSTILE = {
    "absolute path": lambda: ModelBuilder().add_raw("/etc/passwd", b"x"),
    "parent path": lambda: ModelBuilder().add_raw("../../escape", b"x"),
    "empty path": lambda: ModelBuilder().add_raw("", b"x"),
    "NUL in path": lambda: ModelBuilder().add_raw("a\0b", b"x"),
    "long path": lambda: ModelBuilder().add_raw("a/" * 3000 + "b", b"x"),
    "duplicate path": lambda: ModelBuilder().add_raw("a", b"x").add_raw("a", b"y"),
    "file where a folder is": lambda: ModelBuilder().add_raw("a", b"x").add_raw("a/b", b"y"),
    "raw setuid": lambda: ModelBuilder().add_raw("a", b"x", metadata={"mode": 0o4755}),
    "raw size": lambda: ModelBuilder().add_raw("a", b"x", metadata={"size": 2}),
    "negative size": lambda: ModelBuilder().add_raw("a", b"x", metadata={"size": -1}),
    "tar absolute path": lambda: tar_model(Member("/etc/escape", b"x")),
    "tar parent path": lambda: tar_model(Member("a/../../escape", b"x")),
    "tar duplicate": lambda: tar_model(Member("a", b"x"), Member("a", b"y")),
    "tar file where a folder is": lambda: tar_model(Member("a", b"x"), Member("a/b", b"y")),
    "symlink out": lambda: tar_model(symlink("a", "../../escape")),
    "absolute symlink": lambda: tar_model(symlink("a", "/etc")),
    "write through symlink": lambda: tar_model(symlink("a", "."), Member("a/b", b"x")),
    "hard link out": lambda: tar_model(hard_link("a", "../../etc/passwd")),
    "hard link to nothing": lambda: tar_model(hard_link("a", "missing")),
    "character device": lambda: tar_model(Member("a", type=tarfile.CHRTYPE)),
    "block device": lambda: tar_model(Member("a", type=tarfile.BLKTYPE)),
    "fifo": lambda: tar_model(Member("a", type=tarfile.FIFOTYPE)),
    "setuid": lambda: tar_model(Member("a", b"x", mode=0o4755)),
    "truncated tar": lambda: cut(Packing.TAR),
    "truncated gzip": lambda: cut(Packing.TAR_GZIP),
    "truncated zstd": lambda: cut(Packing.TAR_ZSTD),
    "not gzip": lambda: ModelBuilder().add_layer(
        layer_type(Kind.CODE, Packing.TAR_GZIP), make_tar([Member("a", b"x")])
    ),
    "bomb": lambda: ModelBuilder().add_layer(
        layer_type(Kind.CODE, Packing.TAR_GZIP), gzip_bomb(64 * MIB)
    ),
    "unknown layer": lambda: ModelBuilder().add_layer("application/vnd.example.layer", b"x"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_model_is_refused_and_leaves_nothing(
    driver: DriverProcess, kubelet: CsiClient, registry: RegistryServer, what: str
) -> None:
    repository = f"hostile/{what.replace(' ', '-').lower()}"
    reference = HOSTILE[what]().push(registry, repository, "v1")
    target = target_of(driver, "hostile")
    with pytest.raises(grpc.RpcError) as caught:
        kubelet.publish_inline("csi-hostile", target, attributes(reference))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    assert not target.exists() or not os.listdir(target)
    outside = (driver.root.parent / "escape", driver.root / "escape", driver.root.parent / "etc")
    assert not any(path.exists() for path in outside)
    assert not list(driver.root.rglob("escape"))
    kubelet.unpublish("csi-hostile", target)
    # and the driver is as it was
    kubelet.wait_until_ready(10)


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("", grpc.StatusCode.INVALID_ARGUMENT),
        ("ghcr.io/Acme/Model", grpc.StatusCode.INVALID_ARGUMENT),
        ("https://ghcr.io/acme/model", grpc.StatusCode.INVALID_ARGUMENT),
        ("ghcr.io/" + "a" * 3000, grpc.StatusCode.INVALID_ARGUMENT),
        ("registry.invalid/acme/model:v1", grpc.StatusCode.UNAVAILABLE),
        ("169.254.169.254/latest/meta-data:v1", grpc.StatusCode.PERMISSION_DENIED),
        ("{registry}/no/such/model:v1", grpc.StatusCode.NOT_FOUND),
        ("{registry}/tiny@sha256:" + "0" * 64, grpc.StatusCode.NOT_FOUND),
    ],
)
def test_a_bad_reference_has_its_code(
    driver: DriverProcess,
    kubelet: CsiClient,
    registry: RegistryServer,
    reference: str,
    code: grpc.StatusCode,
) -> None:
    tiny_model().push(registry, "tiny", "v1")
    target = target_of(driver, "bad")
    context = attributes(reference.format(registry=registry.address))
    failure = refusal(kubelet, "csi-bad", target, context, timeout=60)
    assert failure is not None
    assert failure.code() is code, failure.details()


def test_a_corrupt_blob_is_data_loss(
    driver: DriverProcess, kubelet: CsiClient, registry: RegistryServer
) -> None:
    builder = ModelBuilder().add_raw("a.bin", os.urandom(MIB))
    builder.push(registry, "loss", "v1")
    target = target_of(driver, "loss")
    with serve_proxy(registry.address) as proxy:
        proxy.faults = Faults(corrupt_at=77)
        with pytest.raises(grpc.RpcError) as caught:
            kubelet.publish_inline("csi-loss", target, attributes(f"{proxy.address}/loss:v1"))
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        assert mount_at(target) is None
        assert not target.exists()
        model = builder.digest.hex
        assert not (driver.root / "models/sha256" / model).exists()
        assert volume_ids(driver).isdisjoint({"csi-loss"})
        proxy.faults = Faults()
        kubelet.publish_inline("csi-loss", target, attributes(f"{proxy.address}/loss:v1"))
    assert (target / "a.bin").stat().st_size == MIB
    kubelet.unpublish("csi-loss", target)
