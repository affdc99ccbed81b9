"""What speaks for all members having just begun with a blob: then nobody is asked whether he has
what this node is to fetch for all.

A node that joins others later takes its own chunks from them, and asks one of them whether he has
any before it turns to the registry. Where many begin together that costs each a round trip, with
the others waiting for it. Pure state; no I/O, time is passed in.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

_FIRST_SECONDS: Final = 2.0
_LONGEST_SECONDS: Final = 60.0
_ASKED_SECONDS: Final = 10.0
"""How long it counts that somebody asked for a blob: who has it by then is heard of otherwise."""
_MOST_BLOBS: Final = 1024
_NEVER: Final = float("-inf")


@dataclass(slots=True)
class Beginnings:
    """What this node has seen of it. Belongs to the trio thread."""

    _early_until: float = _NEVER
    _lacks: int = 0
    """How often in a row somebody who was asked had nothing."""
    _asked: OrderedDict[str, float] = field(default_factory=OrderedDict)

    def asked(self, blob: str, now: float) -> bool:
        """A member wants of this node what it owns of a blob, and so lacks that himself; whether
        that is news.
        """
        is_news = not self._is_asked(blob, now)
        self._asked[blob] = now
        self._asked.move_to_end(blob)
        if len(self._asked) > _MOST_BLOBS:
            self._asked.popitem(last=False)
        return is_news

    def lacked(self, now: float) -> None:
        """Somebody who was asked has nothing of a blob: so it is with others too, for a while that
        is longer each time.
        """
        seconds = min(_FIRST_SECONDS * 2.0**self._lacks, _LONGEST_SECONDS)
        self._early_until = now + seconds
        self._lacks += 1

    def had(self) -> None:
        """Somebody who was asked has what this node owns."""
        self._early_until, self._lacks = _NEVER, 0

    def is_early(self, blob: str, now: float) -> bool:
        """Whether nobody has anything of the blob yet, as it seems."""
        return now < self._early_until or self._is_asked(blob, now)

    def _is_asked(self, blob: str, now: float) -> bool:
        return now < self._asked.get(blob, _NEVER) + _ASKED_SECONDS
