"""The files of a tar layer on its way, open while they are written to."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MOST_IDLE: Final = 4
"""Opening and closing a file for each write took a twentieth of a pull."""


@dataclass(slots=True)
class _Part:
    file: int
    users: int = 0


class Parts:
    """Numbered files in one folder, made when they are first used; for several threads."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is there, and may be renamed. Raises :class:`OSError`."""
        self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._open: dict[int, _Part] = {}
        """In the order in which they were used last."""

    @contextlib.contextmanager
    def use(self, number: int) -> Iterator[int]:
        """The descriptor of a file, until the block is left. Raises :class:`OSError`."""
        with self._lock:
            part = self._open.pop(number, None) or _Part(open_writable(str(number), self._folder))
            self._open[number] = part
            part.users += 1
        try:
            yield part.file
        finally:
            with self._lock:
                part.users -= 1
                self._close_idle(_MOST_IDLE)

    def close(self) -> None:
        """Close all; nobody uses one, or will."""
        with self._lock:
            self._close_idle(0)
            os.close(self._folder)

    def _close_idle(self, most: int) -> None:
        if len(self._open) <= most:
            return
        idle = [number for number, part in self._open.items() if not part.users]
        for number in idle[: len(self._open) - most]:
            os.close(self._open.pop(number).file)


def open_writable(path: str | Path, folder: int | None = None) -> int:
    """An open file, made if need be; one in ``folder``, an open one, if there is such.

    Raises :class:`OSError`.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o644, dir_fd=folder)
    except PermissionError:
        # ours, and made read-only by a process that was killed before it could record it
        os.chmod(path, 0o644, dir_fd=folder)
        return os.open(path, flags, 0o644, dir_fd=folder)
