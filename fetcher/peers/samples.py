"""Which chunks tell who sent wrong bytes of a blob: pure policy.

That some bytes are wrong is known, and not which. One chunk of each member that sent some is
compared with the registry's: who lies about everything is found out by any of them.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    Contributors = Mapping[int, Mapping[str, bool]]
    """By chunk, the members that sent some of it, and whether they had all of the blob."""

_MOST_SENDERS: Final = 16


def samples(contributors: Contributors, is_open: Callable[[int], bool]) -> set[int]:
    """One chunk of each sender, of those that sent most; none that two have sent.

    ``is_open`` says whether it is not known if a chunk is right. Which one cannot be foreseen.
    """
    chunks: dict[str, list[int]] = {}
    for chunk, senders in contributors.items():
        if len(senders) == 1 and is_open(chunk):
            chunks.setdefault(next(iter(senders)), []).append(chunk)
    most = sorted(chunks, key=lambda name: -len(chunks[name]))[:_MOST_SENDERS]
    return {random.choice(chunks[name]) for name in most}  # noqa: S311 - no secret


def sent_by(contributors: Contributors, names: Iterable[str]) -> list[int]:
    """The chunks of which one of these has sent some."""
    wanted = set(names)
    return [chunk for chunk, senders in contributors.items() if wanted & senders.keys()]
