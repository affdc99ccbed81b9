"""Processes that serve lazy volumes, for tests: which there are, and how they are ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from csi.worker_locks import holder, locks
from fetcher.lazy_plan import LAZY, LazyPlan, encode_plan, plan_path
from fetcher.modelpack import Selection
from tests.support.mounts import detach_below

if TYPE_CHECKING:
    from tests.support.models import ModelBuilder

END_SECONDS = 10


def worker_pids(root: Path) -> list[int]:
    """The processes that serve models of the store at ``root``."""
    pids = []
    for lock in locks(root / LAZY):
        found = holder(lock)
        if found is not None:
            os.close(found.descriptor)
            pids.append(found.pid)
    return pids


def spare_worker(driver: int) -> int | None:
    """The process that waits to serve a model for the process ``driver``, if there is one."""
    for children in Path(f"/proc/{driver}/task").glob("*/children"):
        for pid in children.read_text().split():
            if called(int(pid)) == "model-csi spare":
                return int(pid)
    return None


def called(pid: int) -> str | None:
    """What a process calls itself; None once it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    name, _, rest = stat.partition("(")[2].rpartition(")")
    return None if rest.split()[0] in "ZX" else name


def end_workers(root: Path) -> None:
    """Kill them, and take their mounts away."""
    for lock in locks(root / LAZY):
        found = holder(lock)
        if found is None:
            continue
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(found.descriptor, signal.SIGKILL)
        poll = select.poll()
        poll.register(found.descriptor, select.POLLIN)
        assert poll.poll(END_SECONDS * 1000), f"process {found.pid} cannot be killed"
        os.close(found.descriptor)
    detach_below(root / LAZY)


def write_plan(root: Path, model: ModelBuilder, selection: Selection | None = None) -> None:
    """What the worker of ``model`` needs to begin."""
    selection = selection or Selection()
    plan = LazyPlan(
        model.digest,
        model.body,
        model.document["mediaType"],
        selection.exclude_weights,
        selection.exclude_patterns,
        "all",
    )
    path = plan_path(root, model.digest, selection.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_plan(plan))
