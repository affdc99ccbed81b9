"""The driver as a process of its own, as it runs on a node."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.support.mounts import detach_below

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

READY_SECONDS = 30.0
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class DriverProcess:
    """A running ``model-csi serve --mode all``."""

    socket: Path
    root: Path
    kubelet_dir: Path
    log: Path
    pid: int

    @property
    def endpoint(self) -> str:
        return f"unix://{self.socket}"


@contextlib.contextmanager
def serve_driver(folder: Path, *flags: str) -> Iterator[DriverProcess]:
    """Run the driver with everything of its below ``folder``; nothing of it is left afterwards.

    Volumes that are still published when the block is left are detached: the driver itself leaves
    the mounts of running pods alone when it stops.
    """
    kubelet_dir, root, log = folder / "kubelet", folder / "root", folder / "driver.log"
    (kubelet_dir / "pods").mkdir(parents=True)
    driver_socket = folder / "csi.sock"
    command = (
        *(sys.executable, "-m", "csi", "serve", "--mode", "all", "--node-id", "node-1"),
        *("--endpoint", f"unix://{driver_socket}", "--root", str(root)),
        *("--kubelet-dir", str(kubelet_dir), *flags),
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder)},
            # an interrupt at the terminal is for the caller, who stops the driver in order
            start_new_session=True,
        )
    try:
        _wait_until_ready(process, driver_socket, log)
        yield DriverProcess(driver_socket, root, kubelet_dir, log, process.pid)
    finally:
        _stop(process)
        detach_below(kubelet_dir)


def _wait_until_ready(process: subprocess.Popen[bytes], driver_socket: Path, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if _accepts(driver_socket):
            return
        time.sleep(0.02)  # a process starts: there is nothing to wait on
    tail = log.read_text(errors="replace")[-4000:]
    raise RuntimeError(f"the driver did not become ready; the end of its log:\n{tail}")


def _accepts(driver_socket: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(driver_socket))
        except OSError:
            return False
        return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
