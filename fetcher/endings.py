"""How an attempt at fetching a blob ended, for who decides what comes next."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Ending(enum.Enum):
    """What became of the bytes."""

    COMPLETE = enum.auto()
    """They are right."""
    MISREAD = enum.auto()
    """The headers of an archive were wrong: nobody has seen what is in it, and it begins anew."""
    RECUT = enum.auto()
    """Next to none were there when the digests of other chunks came: it begins anew in these."""
    DOUBTED = enum.auto()
    """They are wrong, and nobody is here who may say which: only what was shown has stayed."""
    WRONG = enum.auto()
    """They are wrong, and nobody has seen them."""
    SPOILED = enum.auto()
    """They are wrong, and readers have them in their memory."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one attempt."""

    ending: Ending
    others: bool = False
    """Whether some came from who is not asked any more, so that the next attempt may go better."""
