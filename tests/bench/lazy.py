"""``make bench-lazy``: reading a lazily mounted model, against a bind mount and the file beneath.

One complete raw layer, read by ``fio`` through the worker's mount, through a read-only bind mount
of the same file, and as it is. *Cold*: nothing of it is in the page cache. *In the store*: the
store's pages are there, the mount's are not, as when the agent has just fetched it. *Warm*: the
reader's own pages are there. Rows of a table in Markdown are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fetcher.oci import Digest
from tests.bench.measure import MIB, processor_seconds
from tests.support.lazy_worker import worker
from tests.support.models import ModelBuilder
from tests.support.mounts import umount

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.support.lazy_worker import Worker

_SECONDS: Final = 5
"""Of reads here and there."""
_STATES: Final = ("cold", "in the store", "warm")


@dataclass(frozen=True)
class Load:
    """How the file is read."""

    name: str
    options: tuple[str, ...]
    readers: int = 1

    @property
    def small(self) -> bool:
        """Whether reads are counted, and not their bytes."""
        return "--bs=4k" in self.options

    def command(self, path: Path, size: int) -> list[str]:
        share = size // self.readers // MIB * MIB
        return [
            *("fio", "--name=read", f"--filename={path}", "--readonly", "--invalidate=0"),
            *("--output-format=json", "--group_reporting", "--thread"),
            *(f"--numjobs={self.readers}", f"--size={share}", f"--offset_increment={share}"),
            *self.options,
        ]


_RANDOM: Final = ("--rw=randread", "--time_based", f"--runtime={_SECONDS}")
_LOADS: Final = (
    Load("in order, 1 MiB", ("--rw=read", "--bs=1M")),
    Load("in order, 128 KiB", ("--rw=read", "--bs=128k")),
    Load("in order, 4 readers", ("--rw=read", "--bs=1M"), 4),
    Load("in order, 16 readers", ("--rw=read", "--bs=1M"), 16),
    Load("mapped, in order", ("--rw=read", "--bs=1M", "--ioengine=mmap")),
    Load("mapped, 4 readers", ("--rw=read", "--bs=1M", "--ioengine=mmap"), 4),
    Load("here and there, 1 MiB", ("--rw=randread", "--bs=1M")),
    Load("here and there, 4 KiB", (*_RANDOM, "--bs=4k")),
    Load("here and there, 4 KiB, 16 readers", (*_RANDOM, "--bs=4k"), 16),
)


@dataclass(frozen=True)
class Result:
    """What came of a load."""

    rate: float
    """MB/s."""
    requests: float
    """Reads a second."""
    worker: float
    """The part of one processor that the worker used."""
    small: bool

    def __str__(self) -> str:
        """MB/s, or thousands of small reads a second."""
        return f"{self.requests / 1000:.1f} k/s" if self.small else f"{self.rate:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the model")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="where it lies")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder, prefix="bench-lazy-") as root,
        _mounted(Path(root), arguments.mib * MIB) as (one, blob, bound),
    ):
        lazy = one.mount / "model.safetensors"
        head = ["", *(f"lazy {state}" for state in _STATES), "worker"]
        head += [f"{what} {state}" for what in ("bind", "file") for state in ("cold", "warm")]
        _row(head)
        _row(["---"] * len(head))
        for load in _LOADS:
            results = [_measure(load, lazy, blob, state, one) for state in _STATES]
            others = [
                _measure(load, path, blob, state, one)
                for path in (bound, blob)
                for state in ("cold", "warm")
            ]
            busy = f"{results[1].worker:.0%}"
            _row([load.name, *map(str, results), busy, *map(str, others)])
        print(f"\nthe worker had {one.resident() / MIB:.0f} MiB at most")


def _row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


@contextlib.contextmanager
def _mounted(root: Path, size: int) -> Iterator[tuple[Worker, Path, Path]]:
    """A worker with a complete model, its blob, and a bind mount of that."""
    name = Digest.of(b"a model to be measured")
    builder = ModelBuilder()
    builder.layers.append(
        {
            "mediaType": "application/vnd.cncf.model.weight.v1.raw",
            "digest": str(name),
            "size": size,
            "annotations": {"org.cncf.model.filepath": "model.safetensors"},
        }
    )
    blob = root / "blobs" / name.algorithm / name.hex
    blob.parent.mkdir(parents=True)
    with blob.open("wb") as file:
        for _ in range(0, size, MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())
    bound = root / "bound"
    bound.touch()
    with worker(root, builder.body) as one:
        subprocess.run(["mount", "--bind", "-o", "ro", blob, bound], check=True)
        try:
            yield one, blob, bound
        finally:
            umount(bound)


def _measure(load: Load, path: Path, blob: Path, state: str, one: Worker) -> Result:
    """Bring the page cache into ``state``, and read."""
    size = blob.stat().st_size
    for file in (path, blob):
        _forget(file)
    if state == "in the store":
        _remember(blob)
    elif state == "warm":
        _remember(path)
    before = processor_seconds(one.process.pid)
    done = subprocess.run(load.command(path, size), stdout=subprocess.PIPE, text=True, check=True)
    used = processor_seconds(one.process.pid) - before
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    seconds = job["read"]["runtime"] / 1000
    rate = job["read"]["io_bytes"] / seconds / 1e6
    return Result(rate, job["read"]["total_ios"] / seconds, used / seconds, load.small)


def _forget(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _remember(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass


if __name__ == "__main__":
    main()
