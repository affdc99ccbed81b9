"""Starting the workers of lazily shown models again when they died, and binding them again.

From local state alone: the plan of the model is on the disk, and so are the bytes that are here.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from csi.state import Shown, VolumeState
from fetcher.errors import InProgress, ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from csi.lazy_volumes import LazyVolumes
    from csi.placement import Placement
    from csi.served import TreeKey
    from csi.state import VolumeRecord
    from csi.turns import Turns

logger = logging.getLogger(__name__)

LEAST_PAUSE: Final = 0.2
MOST_PAUSE: Final = 30.0
"""Seconds between two starts of a worker that dies again and again: twice as long each time."""
SETTLED_SECONDS: Final = 60.0
"""How long a worker has to live before its death counts as the first one again."""
TURN_PAUSE: Final = 0.2
"""Seconds until a target is looked at again that another call works on."""


class Revivals:
    """Starting workers again that died, each after a pause that grows with its deaths."""

    def __init__(self, lazy: LazyVolumes, placement: Placement, turns: Turns) -> None:
        self._lazy = lazy
        self._placement = placement
        self._turns = turns
        self._pauses: dict[TreeKey, tuple[float, float]] = {}
        """The last pause of each, and when it ended."""
        self._deaths: dict[TreeKey, int] = {}
        """Of those that are being started again, how many that has not been done for yet."""

    async def revive(self, key: TreeKey) -> None:
        """Start the worker and bind it at every target, however often that has to be tried."""
        self._deaths[key] = self._deaths.get(key, 0) + 1
        if self._deaths[key] > 1:
            return
        try:
            while self._deaths[key]:
                heard = self._deaths[key]
                if await self._try(key):
                    # it may have died again meanwhile
                    self._deaths[key] -= heard
        except Exception:
            # one model's trouble must not end what tends the others
            logger.exception("fault of this program while starting a worker again")
        finally:
            del self._deaths[key]

    async def _try(self, key: TreeKey) -> bool:
        await trio.sleep(self._pause(key))
        try:
            if not await self._lazy.revive(key):
                self._pauses.pop(key, None)
                return True
        except ModelError as error:
            logger.warning("%s; trying again", error.message)
            return False
        for record in self._lazy.shown_at(key):
            await self._bind_again(key, record)
        for target in self._lazy.unrecorded_at(key):
            await self._bind_unrecorded(key, target)
        return True

    def _pause(self, key: TreeKey) -> float:
        """Seconds to wait: none for the first death, then twice as long each time."""
        now = trio.current_time()
        last, ended = self._pauses.get(key, (0.0, -SETTLED_SECONDS))
        if now - ended >= SETTLED_SECONDS:
            pause = 0.0
        else:
            pause = min(max(2 * last, LEAST_PAUSE), MOST_PAUSE)
        self._pauses[key] = pause, now + pause
        return pause

    async def _bind_again(self, key: TreeKey, record: VolumeRecord) -> None:
        """Bind what is served now at the target of ``record``, as long as it is published."""
        while True:
            now = self._lazy.current(record)
            if now is None or now.state is not VolumeState.PUBLISHED or now.shown is Shown.BIND:
                return
            try:
                with self._turns.take(now.volume_id, now.target):
                    await self._placement.renew(self._lazy.mountpoint(key), now)
                logger.info("volume %s is served again at %s", now.volume_id, now.target)
                return
            except InProgress:
                # a call that works there ends soon, or unpublishes it
                await trio.sleep(TURN_PAUSE)
            except ModelError as error:
                logger.warning("volume %s cannot be bound again: %s", now.volume_id, error.message)
                return

    async def _bind_unrecorded(self, key: TreeKey, target: Path) -> None:
        """Bind what is served now where a pod may read it, though its record was lost."""
        try:
            with self._turns.take("without a record", target):
                await self._placement.renew_unrecorded(self._lazy.mountpoint(key), target)
        except ModelError as error:
            logger.warning("%s cannot be bound again: %s", target, error.message)
