"""``make bench-upload``: the peer server against nginx with sendfile, the same file in one run.

Clients keep their connections, ask for one chunk after the other, and throw away what comes in the
kernel, so that the processors are there for the server. The two servers take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.bench.measure import MIB, processor_seconds
from tests.bench.models import Case, push
from tests.support.commands import wait_until
from tests.support.driver import Driver
from tests.support.registry import serve_registry

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TOKEN: Final = "a-shared-token-of-the-peers"
_DISCARD: Final = 4 * MIB
_LIBC: Final = ctypes.CDLL(None)
_PART: Final = 4 * MIB
"""What peers ask each other for."""
_CONNECTIONS: Final = (1, 8, 32)


@dataclass(frozen=True)
class Server:
    """Somebody who serves the blob."""

    name: str
    port: int
    path: str
    headers: str
    pids: tuple[int, ...]

    def processor_seconds(self) -> float:
        """What it has used so far."""
        return sum(processor_seconds(pid) for pid in self.pids)


@dataclass(frozen=True)
class Figures:
    """What one measurement found."""

    rate: float
    """Bytes per second."""
    cost: float
    """The server's processor seconds for a GiB."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the blob")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-upload-", dir="/var/tmp") as folder:
        _compare(Path(folder), arguments.mib, arguments.seconds, arguments.rounds)


def _compare(folder: Path, mib: int, seconds: float, rounds: int) -> None:
    size = mib * MIB
    with _peer(folder, mib) as (peer, blob), _nginx(folder, blob) as nginx:
        print("| parts | connections | peer server | nginx | ratio | CPU s/GiB: ours | nginx |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for part in (_PART, size):
            for connections in _CONNECTIONS:
                ours, theirs = [], []
                for _ in range(rounds):
                    ours.append(_measure(peer, size, part, connections, seconds))
                    theirs.append(_measure(nginx, size, part, connections, seconds))
                print(_row(part, connections, ours, theirs), flush=True)


def _row(part: int, connections: int, ours: Sequence[Figures], theirs: Sequence[Figures]) -> str:
    our_rate = statistics.median(one.rate for one in ours)
    their_rate = statistics.median(one.rate for one in theirs)
    our_cost = statistics.median(one.cost for one in ours)
    their_cost = statistics.median(one.cost for one in theirs)
    return (
        f"| {part // MIB} MiB | {connections} | {our_rate / 1e9:.2f} GB/s "
        f"| {their_rate / 1e9:.2f} GB/s | {our_rate / their_rate:.2f} "
        f"| {our_cost:.2f} | {their_cost:.2f} |"
    )


@contextlib.contextmanager
def _peer(folder: Path, mib: int) -> Iterator[tuple[Server, Path]]:
    """The driver with the blob in its store."""
    token, port = folder / "token", _free_port()
    token.write_text(f"{TOKEN}\n")
    flags = ("--peer-listen", f"127.0.0.1:{port}", "--peer-token-file", str(token))
    driver = Driver(folder, *flags, "--peer-uploads", "64")
    with serve_registry(folder / "registry") as registry:
        pushed = push(registry, Case(mib, 1), folder)
        try:
            running = driver.start()
            subprocess.run(
                ["model-csi", "--root", str(running.root), "pull", pushed.reference],
                check=True,
                capture_output=True,
                env={**os.environ, "PATH": f"{_bin()}:{os.environ['PATH']}"},
            )
            [layer] = pushed.layers
            path = f"/v2/{pushed.repository}/blobs/{layer.digest}?ns={registry.address}"
            headers = f"Model-CSI-Peer: {TOKEN}\r\n"
            blob = running.root / "blobs" / layer.digest.replace(":", "/")
            yield Server("peer server", port, path, headers, (running.pid,)), blob
        finally:
            driver.clear()


def _bin() -> Path:
    return Path(__file__).parents[2] / ".venv/bin"


@contextlib.contextmanager
def _nginx(folder: Path, blob: Path) -> Iterator[Server]:
    """nginx as its users configure it for large files."""
    port, config = _free_port(), folder / "nginx.conf"
    config.write_text(
        f"worker_processes auto; pid {folder}/nginx.pid; error_log {folder}/nginx.log;\n"
        "user root; events { worker_connections 1024; }\n"
        "http { access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;\n"
        f"server {{ listen 127.0.0.1:{port}; location = /blob {{ alias {blob}; }} }} }}\n"
    )
    process = subprocess.Popen(["nginx", "-c", str(config), "-g", "daemon off;"])
    try:
        wait_until(lambda: _accepts(port), "nginx listens")
        yield Server("nginx", port, "/blob", "", (process.pid, *_children(process.pid)))
    finally:
        process.terminate()
        process.wait(10)


def _children(pid: int) -> tuple[int, ...]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return tuple(map(int, text.split()))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _measure(server: Server, size: int, part: int, connections: int, seconds: float) -> Figures:
    """So many clients for so long."""
    until, received, before = time.monotonic() + seconds, [0] * connections, 0.0
    started, before = time.monotonic(), server.processor_seconds()

    def client(number: int) -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            start = number * part % size
            while time.monotonic() < until:
                received[number] += _fetch(connection, server, start, min(part, size - start))
                start = (start + connections * part) % size

    threads = [threading.Thread(target=client, args=(one,)) for one in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed, total = time.monotonic() - started, sum(received)
    used = server.processor_seconds() - before
    return Figures(total / elapsed, used / (total / (1024 * MIB)))


def _fetch(connection: socket.socket, server: Server, start: int, count: int) -> int:
    """One range, thrown away as it comes."""
    connection.sendall(
        f"GET {server.path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{server.headers}"
        f"Range: bytes={start}-{start + count - 1}\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(4096)
    if not head.startswith(b"HTTP/1.1 206"):
        raise SystemExit(f"{server.name} answered {head[:100]!r}")
    left = count - len(head.partition(b"\r\n\r\n")[2])
    while left:
        # the kernel throws the bytes away that it says to have given
        got = _LIBC.recv(connection.fileno(), None, min(left, _DISCARD), socket.MSG_TRUNC)
        if got <= 0:
            raise SystemExit(f"{server.name} closed the connection")
        left -= got
    return count


if __name__ == "__main__":
    main()
