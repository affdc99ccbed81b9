"""``make bench-pull``: a cold pull against ``skopeo copy`` to a directory, from one local registry.

Both are timed as whole commands, alternating, in one run; medians and the ratio are printed.
Ours also synchronises the data to the disk and builds the tree that volumes bind.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.models import ModelBuilder
from tests.support.registry import RegistryServer, serve_registry

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 1024 * 1024


@dataclass(frozen=True)
class Run:
    """One finished command: seconds."""

    wall: float
    user: float
    system: float
    registry: float
    """Processor time of the registry meanwhile."""
    peak_mib: float

    @property
    def busy(self) -> float:
        """The part of the machine's processors that was used."""
        used = self.user + self.system + self.registry
        return used / (self.wall * (os.cpu_count() or 1))


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _timed(command: Sequence[str], registry: RegistryServer) -> Run:
    os.sync()
    before = _processor_seconds(registry.pid)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with status {process.returncode}")
    after = _processor_seconds(registry.pid)
    return Run(wall, usage.ru_utime, usage.ru_stime, after - before, usage.ru_maxrss / 1024)


def _ours(root: Path, reference: str) -> list[str]:
    return [sys.executable, "-m", "csi", "--json", "--root", str(root), "pull", reference]


def _theirs(copy: Path, reference: str) -> list[str]:
    command = ["skopeo", "copy", "--quiet", "--src-tls-verify=false"]
    return [*command, f"docker://{reference}", f"dir:{copy}"]


def _push_model(registry: RegistryServer, layers: int, layer_mib: int) -> None:
    builder = ModelBuilder()
    for number in range(layers):
        name = f"model-{number + 1:05}-of-{layers:05}.safetensors"
        builder.add_raw(name, os.urandom(layer_mib * MIB))
    builder.push(registry, "bench/model", "v1")


def _push_apart(registry: RegistryServer, layers: int, layer_mib: int) -> str:
    """Push in a process of its own: this one's memory is counted for the commands it starts."""
    process = multiprocessing.get_context("fork").Process(
        target=_push_model, args=(registry, layers, layer_mib)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the model could not be pushed")
    return registry.reference("bench/model", "v1")


def _hash_seconds(size: int) -> float:
    data = os.urandom(64 * MIB)
    started = time.perf_counter()
    hashlib.sha256(data).digest()
    return (time.perf_counter() - started) * size / len(data)


def _write_seconds(folder: Path, size: int) -> float:
    """Writing and synchronising as many bytes, alone."""
    data = os.urandom(8 * MIB)
    started = time.perf_counter()
    with (folder / "written").open("wb", buffering=0) as file:
        for _ in range(size // len(data)):
            file.write(data)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    (folder / "written").unlink()
    return seconds


def _row(name: str, runs: list[Run], size: int) -> str:
    def median(key: str) -> float:
        return statistics.median(float(getattr(run, key)) for run in runs)

    wall = median("wall")
    return (
        f"{name:<12} {wall:7.2f} s {size / wall / MIB:8.0f} MiB/s   user {median('user'):5.2f}  "
        f"system {median('system'):5.2f}  registry {median('registry'):5.2f}  "
        f"processors {median('busy'):4.0%}  peak {median('peak_mib'):4.0f} MiB  "
        f"({min(run.wall for run in runs):.2f} to {max(run.wall for run in runs):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--layer-mib", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    size = arguments.layers * arguments.layer_mib * MIB
    with tempfile.TemporaryDirectory(prefix="bench-pull-") as name:
        folder = Path(name)
        with serve_registry(folder / "registry") as registry:
            reference = _push_apart(registry, arguments.layers, arguments.layer_mib)
            our_runs, their_runs = [], []
            # every run has a folder of its own, all removed at the end: the disk would still be
            # busy with the removal of one run's files in the next
            for number in range(arguments.runs):
                root, copy = folder / f"root-{number}", folder / f"copy-{number}"
                our_runs.append(_timed(_ours(root, reference), registry))
                their_runs.append(_timed(_theirs(copy, reference), registry))
        print(
            f"\n{arguments.layers} raw layers of {arguments.layer_mib} MiB, cold, whole commands,"
        )
        print(f"medians of {arguments.runs} alternating runs on {os.cpu_count()} processors:\n")
        print(_row("model-csi", our_runs, size))
        print(_row("skopeo copy", their_runs, size))
        ratios = [
            theirs_run.wall / ours_run.wall
            for ours_run, theirs_run in zip(our_runs, their_runs, strict=True)
        ]
        print(
            f"\nskopeo / model-csi: {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
        print(
            f"alone: hashing {_hash_seconds(size):.2f} s on one processor, writing with fsync "
            f"{_write_seconds(folder, size):.2f} s"
        )


if __name__ == "__main__":
    main()
