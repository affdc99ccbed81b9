"""Fetching what nobody reads of a lazy model, in the order in which engines will read it."""

from __future__ import annotations

import collections
import logging
from typing import TYPE_CHECKING, Final, Protocol

import trio

from fetcher.errors import ModelError
from fetcher.lazy_order import Step, fill_order, read_shards, shard_index
from fetcher.ranges import Range
from fetcher.schedule import Prefetch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fetcher.lazy_blobs import LazyBlob
    from fetcher.oci import Digest
    from fetcher.store import Store

logger = logging.getLogger(__name__)

_FIRST_PAUSE: Final = 2.0
_LONGEST_PAUSE: Final = 60.0


class Filled(Protocol):
    """What is filled; :class:`fetcher.lazy_model.LazyModel` is one."""

    @property
    def prefetch(self) -> Prefetch:
        """How much of it is fetched unasked."""

    @property
    def blobs(self) -> Mapping[Digest, LazyBlob]:
        """Its layers."""

    def changed(self) -> trio.Event:
        """Set once more of it is wanted, or it may be had again."""


class Filling:
    """The fetching of a model in the background."""

    def __init__(self, model: Filled, store: Store, at_one_time: int, head_bytes: int) -> None:
        """So many blobs are fetched at one time; of a file of weights, before the rest of any of
        them, ``head_bytes``.
        """
        self._model = model
        self._store = store
        self._at_one_time = at_one_time
        self._head_bytes = head_bytes

    async def run(self) -> None:
        """Fetch what nobody asked for, as far as the volumes want that; again and again what
        fails. Until cancelled.
        """
        pause = _FIRST_PAUSE
        while True:
            while self._model.prefetch is not Prefetch.ALL:
                await self._model.changed().wait()
            before = self._done()
            await self._fill()
            pause = _FIRST_PAUSE if self._done() > before else min(2 * pause, _LONGEST_PAUSE)
            with trio.move_on_after(pause):
                await self._model.changed().wait()

    def _done(self) -> int:
        return sum(blob.done for blob in self._model.blobs.values())

    async def _fill(self) -> None:
        steps = collections.deque(enumerate(await self._steps()))
        async with trio.open_nursery() as nursery:
            for _ in range(min(self._at_one_time, len(steps))):
                nursery.start_soon(self._work, steps)

    async def _steps(self) -> list[Step]:
        layers = [blob.layer for blob in self._model.blobs.values() if not blob.complete]
        return fill_order(layers, await self._shards())

    async def _work(self, steps: collections.deque[tuple[int, Step]]) -> None:
        while steps and self._model.prefetch is Prefetch.ALL:
            order, step = steps.popleft()
            blob = self._model.blobs[step.layer.descriptor.digest]
            least = min(self._head_bytes, step.layer.descriptor.size)
            try:
                await blob.fill(order, Range(0, least) if step.head else None)
            except ModelError as error:
                logger.debug("filling a lazy model stopped at a layer: %s", error.message)
                continue
            if shard_index(step.layer):
                # only now it is known in which order the rest is read
                shards = await self._shards()
                found = _sorted([one for _, one in steps], shards)
                steps.clear()
                steps.extend(enumerate(found, order + 1))

    async def _shards(self) -> list[str]:
        """The shards in the order in which they are read, as far as that is known."""
        for blob in self._model.blobs.values():
            if blob.complete and shard_index(blob.layer):
                path = self._store.blob_path(blob.layer.descriptor.digest)
                try:
                    content = await trio.to_thread.run_sync(path.read_bytes)
                except OSError as error:
                    logger.debug("an index of shards cannot be read: %s", error)
                    continue
                return read_shards(blob.layer.path or "", content)
        return []


def _sorted(steps: Iterable[Step], shards: list[str]) -> list[Step]:
    """The same steps, where the order of shards is known better."""
    left = {(one.layer.descriptor.digest, one.head): one for one in steps}
    layers = {one.layer.descriptor.digest: one.layer for one in left.values()}
    ordered = fill_order(layers.values(), shards)
    return [one for one in ordered if (one.layer.descriptor.digest, one.head) in left]
