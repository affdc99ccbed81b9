"""How far a pull or a push is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final, Protocol, TextIO

from fetcher.quantities import bytes_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LINE_SECONDS: Final = 5.0


class Show(Protocol):
    """What is told how far something is."""

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes are there."""


@contextlib.contextmanager
def shown(title: str, stream: TextIO, *, quiet: bool) -> Iterator[Show]:
    """Show progress on ``stream`` for the time of the block, in the way that suits it."""
    if quiet:
        yield _nothing
    elif stream.isatty():
        # here, as what it imports would make every other command start slower
        from csi.progress_bar import bar

        with bar(title, stream) as show:
            yield show
    else:
        yield PlainLines(title, stream)


def _nothing(done: int, total: int) -> None:
    """Show nothing."""


class PlainLines:
    """A line at the start, every five seconds, and at the end."""

    def __init__(
        self, title: str, stream: TextIO, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title = title
        self._stream = stream
        self._clock = clock
        self._begun: tuple[float, int] | None = None
        self._next = 0.0
        self._complete = False

    def __call__(self, done: int, total: int) -> None:
        now = self._clock()
        if self._begun is None:
            self._begun = now, done
        complete = total > 0 and done >= total
        if now < self._next and (not complete or self._complete):
            return
        self._complete = complete
        self._next = now + _LINE_SECONDS
        self._write(f"{self._title}: {self._text(now, done, total)}")

    def _text(self, now: float, done: int, total: int) -> str:
        begin, first = self._begun or (now, done)
        percent = 100 * done // total if total else 100
        rate = f", {bytes_text((done - first) / (now - begin))}/s" if now - begin > 0.2 else ""
        return f"{percent} % ({bytes_text(done)} of {bytes_text(total)}{rate})"

    def _write(self, line: str) -> None:
        # a reader that went away is told nothing more, and the work goes on
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self._stream, flush=True)
