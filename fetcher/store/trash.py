"""``<root>/trash``: what was evicted, until a thread has removed it.

Things get here by a rename, so that they are gone from their place at once, and stand in the
records with their bytes until they are gone from the disk.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Final

from fetcher.store.disk import disk_error
from fetcher.store.footprint import TRASH, listing, remove
from fetcher.threads import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fetcher.errors import ModelError

_STOP_SECONDS: Final = 0.2


class Trash:
    """The folder. Its methods are for worker threads; one of them empties at a time."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()

    def empty(self, wanted: Callable[[str], bool], stop: threading.Event) -> dict[str, ModelError]:
        """Remove what has a name that is ``wanted``; gives what cannot be removed, and why.

        When it returns, all else of that is gone, whoever removed it. Raises :class:`ModelError`
        when the folder cannot be read, and :class:`fetcher.threads.Stopped`.
        """
        failures: dict[str, ModelError] = {}
        with self._turn(stop):
            try:
                listed = listing(self._root, TRASH)
            except OSError as error:
                raise disk_error(error, self._root / TRASH) from error
            for name, found in listed.items():
                for suffix in found if wanted(name) else ():
                    if stop.is_set():
                        raise Stopped
                    path = self._root / f"{name}{suffix}"
                    try:
                        remove(path)
                    except OSError as error:
                        failures[name] = disk_error(error, path)
        return failures

    @contextlib.contextmanager
    def _turn(self, stop: threading.Event) -> Iterator[None]:
        while not self._lock.acquire(timeout=_STOP_SECONDS):
            if stop.is_set():
                raise Stopped
        try:
            yield
        finally:
            self._lock.release()
