"""The first answer of a host for a blob: a range of it, or the whole, which shows what it knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    from fetcher.answers import Sink


class Probe:
    """A sink that finds out how a host answers ranges, and tells the trio thread."""

    def __init__(
        self, sink: Sink, answered: Callable[[], None], restart: Callable[[], None] | None
    ) -> None:
        """``answered`` is called once, in the trio thread, when the first bytes of a range arrive;
        ``restart`` has the sink take the whole blob, where nobody else writes to it meanwhile.
        """
        self._sink = sink
        self._restart = restart
        self._answered = answered
        self._token = trio.lowlevel.current_trio_token()
        self.is_whole = False
        """The blob comes from its first byte on, and would again."""
        self.took_whole = False
        """It does so though a part was asked for."""
        self._told = False

    def whole(self) -> bool:
        if self._sink.whole():
            self.is_whole = True
        elif self._restart is not None:
            self._restart()
            self.is_whole = self.took_whole = True
        return self.is_whole

    def __call__(self, data: memoryview) -> bool:
        if not self._told and not self.is_whole:
            self._told = True
            self._token.run_sync_soon(self._answered)
        return self._sink(data)
