"""The worker of one lazily mounted model: ``python -m fuse --root … --model sha256:…``.

Begins with what lies in the store and nobody's network, and serves as long as the mount is there:
signals that end programs in an orderly way do not end it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from fetcher import logs
from fetcher.errors import InvalidArtifact, ModelError
from fetcher.lazy_plan import decode_plan, lock_path, mountpoint, plan_path
from fetcher.lazy_protocol import AttachParams
from fetcher.oci import Digest, Reference
from fuse import session
from fuse.filesystem import FileSystem
from fuse.mountpoint import Mounted, is_mounted, locked, mounted, tune
from fuse.tree import Inodes
from fuse.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger("fuse")

_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)


class _Ready:
    """Whoever started the worker waits for one line."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def tell(self, message: dict[str, object]) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            os.write(self._descriptor, msgspec.json.encode(message) + b"\n")
        os.close(self._descriptor)
        self._descriptor = None


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuse", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="the store's folder")
    parser.add_argument("--model", required=True, help="digest of the model's manifest")
    parser.add_argument("--selection", default="", help="key of what is left out")
    parser.add_argument("--read-timeout", type=float, default=60.0, help="seconds")
    parser.add_argument("--ready-fd", type=int, help="where to say that it is mounted")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument("--log-level", default="info")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Serve until the mount is gone; the exit status."""
    arguments = _arguments(words)
    ready = _Ready(arguments.ready_fd)
    with logs.configured(arguments.log_level, arguments.log_format, sys.stderr):
        try:
            return _work(arguments, ready)
        except ModelError as error:
            logger.error("the model %s cannot be shown: %s", arguments.model, error.message)
            ready.tell({"error": error.message, "code": type(error).__name__})
            return 1
        except Exception:
            logger.exception("fault of this program in the worker of %s", arguments.model)
            ready.tell({"error": "internal error of the worker; the log says more"})
            return 1


def _work(arguments: argparse.Namespace, ready: _Ready) -> int:
    root = arguments.root.absolute()
    try:
        model = Digest.parse(arguments.model)
    except InvalidArtifact as error:
        raise ModelError(error.message) from error
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


async def _serve(files: FileSystem, device: int, mount: Mounted, ready: _Ready) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.run, session.forget)
        nursery.start_soon(_announce, mount, ready)
        nursery.start_soon(Watchdog(mount.path).run)
        await session.serve(files, device)
        nursery.cancel_scope.cancel()


async def _announce(mount: Mounted, ready: _Ready) -> None:
    """Say that the mount works, once the kernel got an answer from it."""
    begun = time.monotonic()
    await trio.to_thread.run_sync(os.stat, mount.path, abandon_on_cancel=True)
    tune(mount)
    logger.info("serving %s after %.3f s", mount.path, time.monotonic() - begun)
    ready.tell({"ready": True})


def _take_descriptors() -> None:
    """As many as may be had: each open file takes one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
