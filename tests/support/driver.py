"""The driver as a process of its own, as it runs on a node."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tests.support.mounts import detach_below
from tests.support.workers import end_workers

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

    def target(self, pod: str) -> Path:
        """Where kubelet wants the volume of a pod."""
        return self.kubelet_dir / "pods" / pod / "volumes/kubernetes.io~csi/model/mount"


class Driver:
    """The driver of one node, which may end, be killed and be started again."""

    def __init__(self, folder: Path, *flags: str) -> None:
        """Everything of it is below ``folder``."""
        self.folder = folder
        self.flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *within: str, ready: bool = True) -> DriverProcess:
        """Start it and wait until it listens, unless ``ready`` is false.

        ``within`` is a command that runs it, such as ``unshare --net``. Its log goes on.
        """
        running = DriverProcess(
            socket=self.folder / "csi.sock",
            root=self.folder / "root",
            kubelet_dir=self.folder / "kubelet",
            log=self.folder / "driver.log",
            pid=0,
        )
        (running.kubelet_dir / "pods").mkdir(parents=True, exist_ok=True)
        command = (
            *(*within, sys.executable, "-m", "csi", "serve", "--mode", "all"),
            *("--node-id", "node-1", "--endpoint", running.endpoint, "--root", str(running.root)),
            *("--kubelet-dir", str(running.kubelet_dir), *self.flags),
        )
        with running.log.open("ab") as output:
            process = self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.folder)},
                # an interrupt at the terminal is for the caller, who stops the driver in order
                start_new_session=True,
            )
        if ready:
            _wait_until_ready(process, running.socket, running.log)
        return replace(running, pid=process.pid)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end: the exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    def clear(self) -> None:
        """End it, and detach the volumes that are still published, and end what serves them."""
        if self._process is not None and self._process.poll() is None:
            self.end()
        detach_below(self.folder / "kubelet")
        end_workers(self.folder / "root")


@contextlib.contextmanager
def serve_driver(folder: Path, *flags: str) -> Iterator[DriverProcess]:
    """Run the driver with everything of its below ``folder``; nothing of it is left afterwards.

    Volumes that are still published when the block is left are detached: the driver itself leaves
    the mounts of running pods alone when it stops.
    """
    driver = Driver(folder, *flags)
    try:
        yield driver.start()
    finally:
        driver.clear()


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
