"""A few bytes of a blob as its registry itself has them, to compare others' with."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

import trio

from fetcher.answers import Piece
from fetcher.errors import ModelError
from fetcher.ranges import Range
from fetcher.tasks import for_each
from fetcher.threads import run_stoppable
from fetcher.transfers import group_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from fetcher.download import Source
    from fetcher.oci import Descriptor
    from fetcher.registry import Registry
    from fetcher.store.blobs import PartialBlob
    from fetcher.transfers import Slot, Transfers

EXCERPT_BYTES: Final = 64 * 1024
"""Enough to find out who changes a bit here and there, and next to nothing for a registry."""
_SECONDS: Final = 2.0
"""For one of them: whoever waits for it has bytes to use."""
_AT_ONE_TIME: Final = 4
_LEAST_GAIN: Final = 4
"""How many times as large as an excerpt a chunk has to be, to be looked at by one."""


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


def excerpt_of(wanted: Range) -> Range:
    """A part of some bytes by which to judge them, which nobody can foresee."""
    count = min(len(wanted), EXCERPT_BYTES)
    start = random.randint(wanted.start, wanted.stop - count)  # noqa: S311 - not to be foreseen
    return Range(start, start + count)


async def differing(
    partial: PartialBlob, chunks: Iterable[int], ask: Callable[[Range], Awaitable[bytes | None]]
) -> set[int]:
    """Those of some chunks that are there of which an excerpt is another one than ``ask`` has.

    None of them where that would be little less than all of them. Raises :class:`ModelError`.
    """
    if partial.chunk_size < _LEAST_GAIN * EXCERPT_BYTES:
        return set()
    found: set[int] = set()
    is_silent = False

    async def look(chunk: int) -> None:
        nonlocal is_silent
        part = excerpt_of(partial.chunk(chunk))
        right = None if is_silent else await ask(part)
        # who did not answer once would let wait for each of the others
        is_silent |= right is None
        if right is not None and right != await run_stoppable(lambda _: _read(partial, part)):
            found.add(chunk)

    await for_each(chunks, look, _AT_ONE_TIME)
    return found


def _read(partial: PartialBlob, part: Range) -> bytes:
    buffer = bytearray(len(part))
    return bytes(buffer[: partial.read_on(part.start, memoryview(buffer))])


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

    await transfers.run(group_of(source.reference, host), transfer)
    return sink.data if len(sink.data) == len(wanted) else None
