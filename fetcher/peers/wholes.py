"""Which members have said that they have the whole of a blob, for whoever waits for one of them."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from fetcher.oci import Digest

_MAX_BLOBS: Final = 1024
_MAX_MEMBERS: Final = 16
"""Of one blob: more are not needed."""


class Wholes:
    """What was said lately. Belongs to the trio thread."""

    def __init__(self) -> None:
        self._members: OrderedDict[Digest, dict[str, None]] = OrderedDict()
        self._more = trio.Event()
        self._sought: list[tuple[Collection[Digest], Collection[str]]] = []

    def note(self, blob: Digest, member: str) -> None:
        """A member has said that it has all of a blob."""
        known = self._members.setdefault(blob, {})
        if member in known or len(known) >= _MAX_MEMBERS:
            return
        known[member] = None
        self._members.move_to_end(blob)
        if len(self._members) > _MAX_BLOBS:
            self._members.popitem(last=False)
        self._more.set()
        self._more = trio.Event()

    async def another(self, blobs: Collection[Digest], excepted: Collection[str]) -> str:
        """A member that has one of these blobs; waits until one says so."""
        while True:
            for blob in blobs:
                for member in self._members.get(blob, ()):
                    if member not in excepted:
                        await trio.lowlevel.checkpoint()
                        return member
            await self._more.wait()

    @contextlib.contextmanager
    def seeking(self, blobs: Collection[Digest], in_vain: Collection[str]) -> Iterator[None]:
        """Inside the block members are asked for lists of these blobs; ``in_vain``, which may grow,
        are those that had none.
        """
        sought = blobs, in_vain
        self._sought.append(sought)
        try:
            yield
        finally:
            self._sought = [one for one in self._sought if one is not sought]

    def is_sought(self, blob: Digest, member: str) -> bool:
        """Whether a list of the blob is looked for, and this member may have one."""
        return any(blob in blobs and member not in in_vain for blobs, in_vain in self._sought)
