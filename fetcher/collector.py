"""The task that keeps the store in order: orphans after a start, garbage from then on.

It works beside everything else and delays nothing: what is evicted for a pull that wants room is
decided by the pull itself.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from fetcher.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fetcher.store import Store

logger = logging.getLogger(__name__)

INTERVAL: Final = 180.0
"""Seconds after which it looks though nothing has ended: others fill disks too."""


async def keep_in_order(store: Store, interval: float = INTERVAL) -> None:
    """Until cancelled: collect whenever something ended, reconcile at first and whenever nothing
    did for ``interval``. What fails is logged, and tried again next time.
    """
    await _try(store.orphans.reconcile)
    while True:
        await _try(lambda: collect(store))
        with trio.move_on_after(interval) as pause:
            await store.garbage.asked()
        if pause.cancelled_caught:
            await _try(store.orphans.reconcile)


async def collect(store: Store) -> None:
    """Bring the store below its watermarks, as far as it can be, and tidy its records.

    Raises :class:`ModelError`.
    """
    await store.rooms.settle()
    store.garbage.evict(store.garbage.by_watermarks())
    await store.garbage.empty_trash()
    await store.garbage.tidy_records()


async def _try(work: Callable[[], Awaitable[None]]) -> None:
    try:
        await work()
    except ModelError as error:
        logger.warning("keeping the store in order: %s", error.message)
    except Exception:
        # mounted models go on without it; what it left undone shows in the log and in `status`
        logger.exception("fault of this program while keeping the store in order")
