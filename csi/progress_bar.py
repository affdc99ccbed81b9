"""A progress bar on a terminal; a module of its own, as what it is drawn with is slow to import."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from csi.progress import Show


@contextlib.contextmanager
def bar(title: str, stream: TextIO) -> Iterator[Show]:
    """Draw a bar on the terminal ``stream`` for the time of the block."""
    drawn = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(file=stream, highlight=False),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with drawn:
        yield _Bar(drawn, Text(title).plain)


class _Bar:
    """Appears with the first word of how far it is."""

    def __init__(self, drawn: Progress, title: str) -> None:
        self._drawn = drawn
        self._title = title
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._task is None:
            self._task = self._drawn.add_task(self._title, total=total)
        self._drawn.update(self._task, completed=done, total=total)
