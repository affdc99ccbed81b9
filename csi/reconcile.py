"""What a start does about the volumes that the last process left, from local state alone."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from csi import targets
from csi.conditions import Remedy, remedy
from fetcher.errors import ModelError

if TYPE_CHECKING:
    from csi.placement import Placement
    from csi.state import VolumeRecord, VolumeRecords
    from csi.turns import Turns

logger = logging.getLogger(__name__)

AT_ONCE: Final = 16
"""Volumes: one on a dead file system costs seconds, and unmounting starts a process for each."""


async def reconcile(records: VolumeRecords, placement: Placement, turns: Turns) -> None:
    """Bring records and mounts together.

    What was all but published is recorded as that; what else was being published is undone, and
    keeps its digest while its pod is there; what was being unpublished is finished; what is
    published and lost its mount (the node restarted) is forgotten. A record that resists is logged
    and passed over.
    """
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def one(record: VolumeRecord) -> None:
        try:
            async with limiter:
                with turns.take(record.volume_id, record.target):
                    await _apply(record, placement)
        except ModelError as error:
            logger.warning("volume %s is left as it is: %s", record.volume_id, error.message)
        except Exception:
            logger.exception("volume %s is left as it is", record.volume_id)

    async with trio.open_nursery() as nursery:
        for record in records.all():
            nursery.start_soon(one, record)


async def _apply(record: VolumeRecord, placement: Placement) -> None:
    has_place = await targets.parent_exists(record.target)
    match remedy(record, placement.folders, has_place=has_place):
        case Remedy.KEEP:
            pass
        case Remedy.FINISH:
            placement.finish(record)
            logger.info("volume %s was all but published: now it is", record.volume_id)
        case Remedy.UNDO:
            await placement.undo(record)
        case Remedy.FORGET:
            await placement.clear(record.volume_id, record.target)
            logger.info("forgot volume %s, which was %s", record.volume_id, record.state.value)
