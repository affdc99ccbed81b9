"""Workers of lazy models as real processes, with real mounts."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fetcher.modelpack import Selection
from fetcher.oci import Digest
from tests.support.lazy_agent import write_plan
from tests.support.mounts import detach_below

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

SECONDS = 30.0
PROGRAM = ("-m", "fuse")


@dataclass
class Worker:
    """A worker that runs."""

    process: subprocess.Popen[bytes]
    mount: Path
    log: Path

    def resident(self) -> int:
        """Bytes of memory that it has, as the kernel counts them."""
        with open(f"/proc/{self.process.pid}/status") as lines:
            found = next(line for line in lines if line.startswith("VmHWM:"))
        return int(found.split()[1]) * 1024

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextlib.contextmanager
def worker(
    root: Path,
    body: bytes,
    *,
    selection: Selection | None = None,
    timeout: float = SECONDS,
    program: Sequence[str] = PROGRAM,
) -> Iterator[Worker]:
    """Mount a model for the block; the worker has to end by itself when it is unmounted."""
    root.mkdir(exist_ok=True)
    mount = write_plan(root, body, selection)
    started = start(root, body, selection=selection, timeout=timeout, program=program)
    try:
        yield Worker(started, mount, root / "worker.log")
    finally:
        detach_below(root / "lazy")
        try:
            started.wait(SECONDS)
        finally:
            started.kill()
            started.wait()


def start(
    root: Path,
    body: bytes,
    *,
    selection: Selection | None = None,
    timeout: float = SECONDS,
    program: Sequence[str] = PROGRAM,
) -> subprocess.Popen[bytes]:
    """Start a worker and wait until it serves. Raises :class:`AssertionError` with what it said."""
    reading, writing = os.pipe()
    with open(root / "worker.log", "ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, *program, "--root", str(root)),
                *("--model", str(Digest.of(body)), "--ready-fd", str(writing)),
                *("--selection", (selection or Selection()).key),
                *("--read-timeout", str(timeout)),
            ],
            pass_fds=[writing],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.readline()
    if not said or json.loads(said) != {"ready": True}:
        process.wait(SECONDS)
        raise AssertionError(f"{said!r}\n{(root / 'worker.log').read_text()}")
    return process
