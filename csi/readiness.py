"""Whether the driver can do its work: what Probe answers, from the real things."""

from __future__ import annotations

import os
import sqlite3
from typing import TYPE_CHECKING, Final

import trio

from fetcher.errors import ModelError, Unavailable

if TYPE_CHECKING:
    from fetcher.store import Store

_DISK_SECONDS: Final = 4.0
"""For the disk to say how it is; liveness probes give a call about eight seconds."""


class StoreReadiness:
    """Ready as long as the store's folder is the one that was opened, and its records answer."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._opened = _identity(store)

    async def check(self) -> None:
        """Return when the store can be used. Raises :class:`ModelError` saying what is wrong."""
        try:
            self._store.database.connection.execute("SELECT 1 FROM settings").fetchone()
        except sqlite3.Error as error:
            raise ModelError(f"the records of {self._store.root} fail: {error}") from error
        with trio.move_on_after(_DISK_SECONDS) as patience:
            # a disk that hangs keeps its thread, and the answer comes all the same
            identity = await trio.to_thread.run_sync(_identity, self._store, abandon_on_cancel=True)
            if identity != self._opened:
                raise ModelError(
                    f"{self._store.root} is not the folder that was opened: it was removed or "
                    "replaced while the driver runs"
                )
        if patience.cancelled_caught:
            raise Unavailable(f"the disk of {self._store.root} does not answer")


def _identity(store: Store) -> tuple[int, int] | None:
    try:
        status = os.stat(store.root / "lock")
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
