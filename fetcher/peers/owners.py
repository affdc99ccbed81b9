"""Who owns which chunk: computed by every node for itself from the members, with no I/O.

The members come in an order of a hash of (model, name), and the chunks of its layers are dealt out
along it in turn: who gets a chunk there is its **home**, which asks mirrors and the registry. In
each other zone one member is dealt the chunk, too: it asks the home, and the others of its zone ask
it. So each chunk leaves the registry once and enters each zone once, and all shares are equal,
among the members as among those of one zone.

Whoever is dealt a chunk next, were its owner not there, stands in for it. Stand-ins differ from
chunk to chunk: those of one owner are taken over by everybody.
"""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fetcher.modelpack import Position
    from fetcher.oci import Digest


@dataclass(frozen=True, slots=True)
class Member:
    """A node that serves others."""

    name: str
    """By which it is dealt chunks: the same everywhere."""
    address: str
    """``host:port`` of its peer server."""
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Deal:
    """Along which order of the members the chunks of a blob are dealt out, and from whom on."""

    order: str
    """What the order is made of: the model's digest, or the blob's where that is not known."""
    first: int = 0
    """The place in the order, counted round and round, of who is dealt the first chunk."""

    @classmethod
    def of(cls, blob: Digest, position: Position | None) -> Deal:
        """As all do who know the blob as this layer of a model, or by itself.

        Blobs of one chunk are dealt out evenly by that, too: each goes to another member.
        """
        return cls(str(blob)) if position is None else cls(str(position.model), position.index)


def order(seed_text: str, members: Iterable[Member]) -> list[Member]:
    """The members in the order that is made of ``seed_text``."""
    seed = hashlib.sha256(seed_text.encode() + b"\0")

    def place(member: Member) -> bytes:
        hasher = seed.copy()
        hasher.update(member.name.encode())
        return hasher.digest()

    return sorted(members, key=place)


class Owners:
    """The owners along one order, as long as the members stay the same."""

    def __init__(self, seed_text: str, members: Iterable[Member]) -> None:
        """Of chunks that are dealt out along the order that is made of ``seed_text``."""
        self._order = order(seed_text, members)
        self._zones: dict[str, list[int]] = {}
        """By zone, the places of its members in the order."""
        for place, one in enumerate(self._order):
            self._zones.setdefault(one.zone, []).append(place)

    def home(self, chunk: int) -> Member | None:
        """Who asks mirrors and registry for ``chunk``; None where there are no members."""
        return self._order[chunk % len(self._order)] if self._order else None

    def line(self, chunk: int, zone: str) -> tuple[Member, ...]:
        """The owner of ``chunk`` in ``zone`` and who stands in for it; nobody in an empty zone.

        Another one stands in for each round of dealing: an owner's chunks are taken over by all.
        """
        places = self._zones.get(zone)
        if not places:
            return ()
        count, first = len(places), self._turn(chunk, zone)
        turns = [first]
        if count > 1:
            turns.append((first + 1 + chunk // count % (count - 1)) % count)
        return tuple(self._order[places[turn]] for turn in turns)

    def asked_by(self, member: Member, chunk: int) -> tuple[Member, ...]:
        """Whom ``member`` asks for ``chunk``, in turn, before mirrors and registry.

        Only those who stand before it: no two members wait for each other. ``member`` may be one
        that serves nobody.
        """
        before: list[Member] = []
        for one in self.line(chunk, member.zone):
            if one.name == member.name:
                break
            before.append(one)
        home = self.home(chunk)
        if home is None or home.zone == member.zone:
            return tuple(before)
        # across the border goes who owns the chunk here, and the others only without it
        return (*before, *self.line(chunk, home.zone))

    def fills(self, member: Member, chunk: int) -> bool:
        """Whether ``member`` fetches ``chunk`` for others when it lacks it."""
        return any(one.name == member.name for one in self.line(chunk, member.zone))

    def _turn(self, chunk: int, zone: str) -> int:
        """Which member of its zone is dealt ``chunk`` there."""
        places, count = self._zones[zone], len(self._order)
        round_, place = divmod(chunk, count)
        before = bisect.bisect_left(places, place)
        if self._order[place].zone == zone:
            return before
        # what has its home elsewhere is dealt out here in a turn of its own
        return (round_ * (count - len(places)) + place - before) % len(places)
