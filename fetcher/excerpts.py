"""A few bytes of a blob as its registry itself has them, to compare others' with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from fetcher.answers import Piece
from fetcher.errors import ModelError

if TYPE_CHECKING:
    from fetcher.download import Source
    from fetcher.oci import Descriptor
    from fetcher.ranges import Range
    from fetcher.registry import Registry
    from fetcher.transfers import Slot, Transfers

EXCERPT_BYTES: Final = 64 * 1024
"""Enough to find out who changes a bit here and there, and next to nothing for a registry."""
_SECONDS: Final = 2.0
"""For one of them: whoever waits for it has bytes to use."""


class _Excerpt:
    """The sink of some bytes that stay in memory; see :class:`fetcher.answers.Sink`."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.data = b""

    def __call__(self, data: memoryview) -> bool:
        self.data += bytes(data)
        return len(self.data) <= self._count

    def whole(self) -> bool:
        """A whole blob will not do."""
        return False


async def excerpt(
    registry: Registry, transfers: Transfers, source: Source, blob: Descriptor, wanted: Range
) -> bytes | None:
    """What the registry of ``source`` has at ``wanted``; None where it does not say so soon.

    Of use for few bytes only: they are asked for once, and come whole or not at all.
    """
    with trio.move_on_after(_SECONDS):
        try:
            return await _asked(registry, transfers, source, blob, wanted)
        except ModelError:
            return None
    return None


async def _asked(
    registry: Registry, transfers: Transfers, source: Source, blob: Descriptor, wanted: Range
) -> bytes | None:
    host = (await registry.hosts(source.reference)).server
    now = trio.current_time()
    if registry.health.is_away(host.base, now) or not registry.health.knows_ranges(host.base, now):
        return None
    access = await registry.blob_access(source.reference, blob.digest, source.keychain, host=host)
    sink = _Excerpt(len(wanted))

    async def transfer(slot: Slot) -> None:
        await slot.fetch(access, Piece(blob.digest, blob.size, wanted), sink)

    await transfers.run(f"{source.reference.registry} {host.base}", transfer)
    return sink.data if len(sink.data) == len(wanted) else None
