"""A part that is sent while it arrives, as the worker thread that sends it sees it.

One thread sends a part from its begin to its end. It looks by itself what has come, as telling it
would cost more: what comes in many small pieces, for a dozen peers, would wake a dozen threads with
each of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fetcher.ranges import Range
from fetcher.threads import Stopped

if TYPE_CHECKING:
    import threading

    from fetcher.peers.bodies import Body

_QUIET_SECONDS: Final = 1.0
"""How long a thread waits for the next byte, before it is left to others."""
_GATHERED_BYTES: Final = 128 * 1024
_LEAST_PAUSE: Final = 0.04
_LONGEST_PAUSE: Final = 0.3
"""How long more is waited for, until so much has come: a thread that sends a packet costs as much
as one that sends many.
"""


class Following:
    """The sending of one part; used by one thread at a time."""

    def __init__(self, body: Body, part: Range) -> None:
        self.body = body
        self.left = part
        """What has not been sent."""
        self.sent = 0
        """Bytes that were."""
        self._pause = _LEAST_PAUSE
        self._gathered = 0
        """Bytes that were sent since the last pause."""

    def next(self, stop: threading.Event) -> Range:
        """What is there of what is left, from its first byte on, once something is.

        Nothing where nothing comes for a while, or the body is over: then somebody else has to see
        what there is. Raises :class:`fetcher.threads.Stopped`.
        """
        waited = 0.0
        while not self.body.is_over:
            there = self.body.there(self.left)
            if there > self.left.start:
                return Range(self.left.start, there)
            if waited >= _QUIET_SECONDS:
                break
            waited += self._wait(stop)
        return Range(self.left.start, self.left.start)

    def _wait(self, stop: threading.Event) -> float:
        """Let more come, for longer where little did; how long, in seconds."""
        slower = self._pause * 2 if self._gathered < _GATHERED_BYTES else self._pause / 2
        self._pause = min(max(slower, _LEAST_PAUSE), _LONGEST_PAUSE)
        self._gathered = 0
        if stop.wait(self._pause):
            raise Stopped
        return self._pause

    def took(self, count: int) -> None:
        """So many of the next bytes were sent."""
        self.sent += count
        self._gathered += count
        self.left = Range(self.left.start + count, self.left.stop)
