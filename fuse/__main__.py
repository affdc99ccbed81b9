"""The worker of one lazily mounted model: ``python -m fuse --root … --model sha256:…``.

Without ``--model`` it waits to be told which, with behind it what takes long to start. Begins with
what lies in the store and nobody's network, and serves as long as the mount is there: signals that
end programs in an orderly way do not end it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from fetcher import logs
from fetcher.errors import InvalidArtifact, ModelError
from fetcher.lazy_plan import decode_plan, lock_path, mountpoint, plan_path
from fetcher.lazy_protocol import AttachParams
from fetcher.oci import Digest, Reference
from fetcher.worker_protocol import Ready, receive_order, send_ready
from fuse import session
from fuse.filesystem import FileSystem
from fuse.mountpoint import Mounted, is_mounted, locked, mounted, tune
from fuse.tree import Inodes
from fuse.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("fuse")

SPARE: Final = "model-csi spare"
"""What a process is called that waits for its model; the kernel keeps 15 characters."""

_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)


class _Starter:
    """Whoever started the worker waits for one answer."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def tell(self, answer: Ready) -> None:
        if self._descriptor is None:
            return
        send_ready(self._descriptor, answer)
        os.close(self._descriptor)
        self._descriptor = None


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuse", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="the store's folder")
    parser.add_argument("--model", help="digest of the model's manifest")
    parser.add_argument("--selection", default="", help="key of what is left out")
    parser.add_argument("--read-timeout", type=float, default=60.0, help="seconds")
    parser.add_argument(
        "--ready-fd", type=int, help="where to say that it is mounted, and to be told of the model"
    )
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument("--log-level", default="info")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Serve until the mount is gone; the exit status."""
    arguments = _arguments(words)
    if arguments.model is None and not _await_order(arguments):
        return 0
    ready = _Starter(arguments.ready_fd)
    with logs.configured(arguments.log_level, arguments.log_format, sys.stderr):
        try:
            return _work(arguments, ready)
        except ModelError as error:
            logger.error("the model %s cannot be shown: %s", arguments.model, error.message)
            ready.tell(Ready(error=error.message, code=type(error).__name__))
            return 1
        except Exception:
            logger.exception("fault of this program in the worker of %s", arguments.model)
            ready.tell(Ready(error="internal error of the worker; the log says more"))
            return 1


def _await_order(arguments: argparse.Namespace) -> bool:
    """Wait to be told what to serve; False when whoever would say so has ended."""
    arguments.root = arguments.root.absolute()
    os.chdir("/")
    gc.collect()
    gc.freeze()
    _be_called(SPARE)
    with socket.socket(fileno=os.dup(arguments.ready_fd)) as line:
        received = receive_order(line)
    if received is None:
        return False
    order, log = received
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    arguments.model, arguments.selection = order.model, order.selection
    return True


def _be_called(name: str) -> None:
    """What ``ps`` and ``top`` call this process, as its command line does not name its model."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def _work(arguments: argparse.Namespace, ready: _Starter) -> int:
    root = arguments.root.absolute()
    try:
        model = Digest.parse(arguments.model)
    except InvalidArtifact as error:
        raise ModelError(error.message) from error
    _be_called(f"model {model.hex}")
    key = arguments.selection
    try:
        plan = decode_plan(plan_path(root, model, key).read_bytes())
    except OSError as error:
        raise ModelError(f"there is no plan of {model}: {error.strerror}") from error
    manifest = plan.read_model()
    params = AttachParams(model=str(model), selection=key, pid=os.getpid())
    inodes = Inodes(manifest, plan.selection)
    registry = Reference.parse(plan.reference).name if plan.reference else ""
    files = FileSystem(root, params, manifest, inodes, arguments.read_timeout, registry)
    _take_descriptors()
    with (
        locked(lock_path(root, model, key)),
        mounted(mountpoint(root, model, key)) as (device, mount),
    ):
        # it holds on to no folder of whoever started it
        os.chdir("/")
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        gc.freeze()
        trio.run(_serve, files, device, mount, ready)
        if is_mounted(mount):
            logger.error("the connection of %s was aborted while it is mounted", mount.path)
            return 1
    logger.info("%s is not mounted any more", mount.path)
    return 0


async def _serve(files: FileSystem, device: int, mount: Mounted, ready: _Starter) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.run, session.forget)
        nursery.start_soon(_announce, mount, ready)
        nursery.start_soon(Watchdog(mount.path).run)
        await session.serve(files, device)
        nursery.cancel_scope.cancel()


async def _announce(mount: Mounted, ready: _Starter) -> None:
    """Say that the mount works, once the kernel got an answer from it."""
    begun = time.monotonic()
    await trio.to_thread.run_sync(os.stat, mount.path, abandon_on_cancel=True)
    tune(mount)
    logger.info("serving %s after %.3f s", mount.path, time.monotonic() - begun)
    ready.tell(Ready(ready=True))


def _take_descriptors() -> None:
    """As many as may be had: each open file takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
