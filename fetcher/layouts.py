"""What is made of blobs that are complete, each once, whoever wants it: unpacked layers, trees."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Final

import trio

from fetcher.archives import UnpackLimits
from fetcher.modelpack import Packing
from fetcher.threads import run_stoppable

if TYPE_CHECKING:
    from fetcher.modelpack import Layer, Model, Selection
    from fetcher.store import ModelTree, Store

_LEAST_BYTES: Final = 1024 * 1024
"""What any layer may unpack to, however small it is."""


class Layouts:
    """Makes what volumes show of complete blobs. Belongs to the trio thread."""

    def __init__(self, store: Store, unpacked_ratio: int) -> None:
        """A layer may unpack to ``unpacked_ratio`` times its size."""
        self._store = store
        self._ratio = unpacked_ratio
        self._locks: weakref.WeakValueDictionary[object, trio.Lock] = weakref.WeakValueDictionary()

    def turn(self, layer: Layer) -> contextlib.AbstractAsyncContextManager[object]:
        """The time from asking for a compressed layer until it is unpacked, for one at a time.

        Its blob is gone once it is unpacked: who came to ask in between would fetch it again.
        """
        if layer.packing in (Packing.RAW, Packing.TAR):
            return contextlib.nullcontext()
        return self._locks.setdefault(("turn", layer.descriptor.digest), trio.Lock())

    async def lay_out(self, layer: Layer) -> None:
        """Have the content of a layer whose blob is complete. Raises :class:`ModelError`."""
        if self._store.has_content(layer):
            return
        # another model, or another selection of this one, may be at the same layer
        async with self._locks.setdefault(layer.descriptor.digest, trio.Lock()):
            if self._store.has_content(layer):
                return
            size = layer.descriptor.size
            limits = UnpackLimits(max_bytes=size * self._ratio + _LEAST_BYTES)
            await run_stoppable(lambda stop: self._store.lay_out(layer, limits, stop))
            self._store.laid_out(layer)

    async def build(self, model: Model, selection: Selection) -> ModelTree:
        """The tree of a model whose layers are all here and laid out.

        Raises :class:`ModelError`.
        """
        store = self._store
        async with self._locks.setdefault((model.digest, selection.key), trio.Lock()):
            tree = store.tree(model.digest, selection)
            if tree is None:
                planned = await run_stoppable(lambda _: store.plan(model, selection))
                tree = await run_stoppable(
                    lambda stop: store.build(model, selection, planned, stop)
                )
                store.add_tree(tree, model, selection)
        return tree
