"""How much a node uploads at one time: pure decisions, with the time passed in. No I/O.

There is no queue: who would have to wait for long is told at once to ask somebody else.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fetcher.oci import Digest
    from fetcher.ranges import Range

_LONGEST_WAIT: Final = 1.0
_SLACK: Final = 0.05
"""Seconds of unused rate that are kept for a burst."""
_MAX_HANDED: Final = 8192
_NAMES: Final = 4


@dataclass(slots=True)
class Uploads:
    """The uploads of one node."""

    most: int
    """At one time."""
    rate: int | None = None
    """Bytes per second of all of them together."""
    running: int = 0
    _promised: int = 0
    """Bytes that were let in and are not sent yet; of each upload those of a second at most, as one
    that is large leaves the others their turns.
    """
    _sent_until: float = field(default=float("-inf"))

    def admit(self, size: int) -> float | None:
        """Let an upload of ``size`` bytes in; else after how many seconds to ask again."""
        if self.running >= self.most:
            return _LONGEST_WAIT
        wait = self._promised / self.rate if self.rate else 0.0
        if wait > _LONGEST_WAIT:
            return wait
        self.running += 1
        self._promised += self._counted(size)
        return None

    def _counted(self, size: int) -> int:
        return min(size, self.rate) if self.rate else size

    def pause(self, size: int, now: float) -> float:
        """How long to wait before the next ``size`` bytes are sent."""
        if not self.rate:
            return 0.0
        start = max(self._sent_until, now - _SLACK)
        self._sent_until = start + size / self.rate
        return max(start - now, 0.0)

    def sent(self, size: int, left: int) -> None:
        """So many of the bytes that were let in are on their way, and ``left`` are not."""
        self._promised -= self._counted(left + size) - self._counted(left)

    def leave(self, unsent: int) -> None:
        """An upload ended, with so many of its bytes not sent."""
        self.running -= 1
        self._promised -= self._counted(unsent)


class Handed:
    """Who was given which part of a blob lately: whom to name when this node is busy."""

    def __init__(self) -> None:
        self._members: collections.OrderedDict[tuple[Digest, Range], collections.deque[str]] = (
            collections.OrderedDict()
        )

    def note(self, blob: Digest, part: Range, member: str) -> None:
        """``member`` was sent all of ``part``."""
        members = self._members.setdefault((blob, part), collections.deque(maxlen=_NAMES))
        self._members.move_to_end((blob, part))
        if member not in members:
            members.append(member)
        if len(self._members) > _MAX_HANDED:
            self._members.popitem(last=False)

    def member(self, blob: Digest, part: Range, asker: str) -> str | None:
        """Somebody other than the asker who has exactly that part; another one each time."""
        members = self._members.get((blob, part))
        if not members:
            return None
        members.rotate()
        return next((one for one in members if one != asker), None)
