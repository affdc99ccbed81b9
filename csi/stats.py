"""How a published volume is: what it holds, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import trio

from csi import targets
from csi.conditions import problem
from csi.old_mounts import containers_with, replaced_devices
from csi.state import Shown
from csi.waiting import describe

if TYPE_CHECKING:
    from csi.lazy_volumes import LazyVolumes
    from csi.state import VolumeRecord

STATS_TIMEOUT: Final = 2.0
"""Seconds for each of the two questions that stats ask: together below their five."""


class Damages(Protocol):
    """What is known of trees that were read again."""

    def is_damaged(self, model: str, selection: str) -> bool:
        """Whether this tree was found to be damaged, and has not been put right since."""


@dataclass(frozen=True)
class VolumeStats:
    """What NodeGetVolumeStats answers."""

    bytes_used: int
    files: int
    abnormal: bool
    message: str


async def stats_of(record: VolumeRecord, damages: Damages, lazy: LazyVolumes | None) -> VolumeStats:
    """Bytes, files and condition of a published volume, within :data:`STATS_TIMEOUT`."""
    size, files = record.size, record.files
    message = "mounted read-only from the node's store"
    wrong = known_problem(record, lazy)
    if record.shown is Shown.LAZY and lazy is not None:
        message = lazy_state(record, lazy)
        if wrong is None:
            answer = await lazy.ask(record, STATS_TIMEOUT)
            if answer is None:
                wrong = "the process that serves the model does not answer"
            else:
                size, files = answer
                wrong = await _left_behind(record)
    elif wrong is None and not await targets.answers(record.target, STATS_TIMEOUT):
        wrong = "its file system does not answer"
    if wrong is None and damages.is_damaged(record.model, record.selection):
        wrong = "its files were found to be damaged; run 'model-csi verify' on the node"
    return VolumeStats(
        bytes_used=size,
        files=files,
        abnormal=wrong is not None,
        message=f"model {record.reference} ({record.digest}): {wrong or message}",
    )


async def _left_behind(record: VolumeRecord) -> str | None:
    """Whether containers of the volume's pod show a worker that died, as far as can be seen."""
    devices = replaced_devices(record.target)
    if not devices:
        return None
    count = 0
    with trio.move_on_after(STATS_TIMEOUT / 2):
        count = await trio.to_thread.run_sync(
            containers_with, devices, record.target, abandon_on_cancel=True
        )
    if count == 0:
        return None
    return (
        f"the process that serves the model was started again, and {count} of the pod's containers "
        "cannot see that: restart the pod; with mountPropagation: HostToContainer in its volume "
        "mount it would not be necessary"
    )


def known_problem(record: VolumeRecord, lazy: LazyVolumes | None) -> str | None:
    """What is wrong with a published volume, as far as is known without asking anybody."""
    wrong = problem(record)
    if wrong is None and record.shown is Shown.LAZY and lazy is not None:
        wrong = lazy.problem(record)
    return wrong


def lazy_state(record: VolumeRecord, lazy: LazyVolumes) -> str:
    """How far a lazily shown volume is, in words."""
    progress = lazy.progress(record)
    if progress is None:
        return "mounted read-only, served by a process of its model"
    if progress.done >= progress.total > 0:
        return "mounted read-only, all of it is in the node's store"
    return f"mounted read-only, fetched while it is read: {describe(progress, None)}"
