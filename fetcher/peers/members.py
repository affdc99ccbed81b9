"""The members at present, and who this node is among them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from fetcher.peers.owners import Deal, Member, Owners

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fetcher.ranges import Range

logger = logging.getLogger(__name__)

MAX_MEMBERS: Final = 20_000
"""More than a cluster has nodes: what discovery is told must not fill the memory."""
_MAX_OWNERS: Final = 128
"""Orders that are kept; of 5,000 members each takes a few hundred KiB."""


class Members:
    """Who serves whom. Discovery says who there is. Belongs to the trio thread."""

    def __init__(self, name: str, zone: str = "") -> None:
        """``name`` is this node's among the members; ``zone`` is its zone, where that is known
        without discovery.
        """
        self.given_name = name
        """By which it goes, unless discovery knows it by another."""
        self._given_zone = zone
        self.myself = Member(name, "", zone)
        """This node, whether or not it serves others."""
        self.serves = False
        """Whether this node is one of the members, so that others ask it."""
        self.version = 0
        """Another one after each change."""
        self.nearby: list[Member] = []
        """The other members in this node's zone."""
        self._members: dict[str, Member] = {}
        self._owners: OrderedDict[str, Owners] = OrderedDict()

    def replace(self, members: Iterable[Member], me: str | None = None) -> None:
        """Take over what discovery found.

        ``me`` is the name by which it knows this node; without it, it goes by its own.
        """
        found: dict[str, Member] = {}
        for one in members:
            if len(found) >= MAX_MEMBERS:
                logger.error("there are more than %d peers: the others are not asked", MAX_MEMBERS)
                break
            found.setdefault(one.name, one)
        name = me or self.given_name
        mine = found.get(name)
        if mine is not None and self._given_zone and mine.zone != self._given_zone:
            mine = found[name] = replace(mine, zone=self._given_zone)
        if found == self._members and name == self.myself.name:
            return
        logger.info("%d peers besides this node (%s)", len(found) - (mine is not None), name)
        self._members = found
        self.serves = mine is not None
        self.myself = mine or Member(name, "", self._given_zone)
        self.nearby = [
            one
            for one in found.values()
            if one.zone == self.myself.zone and one.name != self.myself.name
        ]
        self._owners.clear()
        self.version += 1

    @property
    def any(self) -> bool:
        """Whether there is a member besides this node."""
        return self.count > 0

    @property
    def count(self) -> int:
        """How many members there are besides this node."""
        return len(self._members) - self.serves

    def find(self, name: str) -> Member | None:
        """The other member of this name, if there is one."""
        found = self._members.get(name)
        return found if found != self.myself else None

    def owners(self, order: str) -> Owners:
        """The owners of chunks that are dealt out along an order; see :class:`Deal`."""
        found = self._owners.get(order)
        if found is None:
            found = self._owners[order] = Owners(order, self._members.values())
            if len(self._owners) > _MAX_OWNERS:
                self._owners.popitem(last=False)
        else:
            self._owners.move_to_end(order)
        return found

    def owns(self, deal: Deal, wanted: Range, chunk_size: int) -> bool:
        """Whether this node fetches for others what ``wanted`` begins in, when it lacks it.

        ``deal`` and ``chunk_size`` are the asker's: chunks are dealt out by their number.
        """
        if not self.serves:
            return False
        number = deal.first + wanted.start // chunk_size
        return self.owners(deal.order).fills(self.myself, number)
