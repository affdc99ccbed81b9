"""Laying out what was fetched compressed, each layer once, whoever wants it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final

import trio

from fetcher.archives import UnpackLimits
from fetcher.threads import run_stoppable

if TYPE_CHECKING:
    from fetcher.modelpack import Layer
    from fetcher.oci import Digest
    from fetcher.store import Store

_LEAST_BYTES: Final = 1024 * 1024
"""What any layer may unpack to, however small it is."""


class Layouts:
    """Brings complete blobs into the form that trees link to. Belongs to the trio thread."""

    def __init__(self, store: Store, unpacked_ratio: int) -> None:
        """A layer may unpack to ``unpacked_ratio`` times its size."""
        self._store = store
        self._ratio = unpacked_ratio
        self._locks: weakref.WeakValueDictionary[Digest, trio.Lock] = weakref.WeakValueDictionary()

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
