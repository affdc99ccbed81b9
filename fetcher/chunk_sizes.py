"""How large the chunks of a blob are. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fetcher.modelpack import Packing

if TYPE_CHECKING:
    from fetcher.modelpack import Layer

_TAR_CHUNKS: Final = 128
"""Of a tar layer, at least: one of them lies on the disk twice for the moment of being moved."""

_LEAST_TAR_CHUNK: Final = 64 * 1024

_CHUNKS: Final = 128
"""Of any other layer, at least: with fewer of them, the last ones keep nodes that share a blob
waiting for each other, and so do the first ones those whose pods read here and there.
"""
_LEAST_CHUNK: Final = 1024 * 1024
"""Less would be more requests than it is worth."""
_BLOCK: Final = 4096


def chunk_size_for(layer: Layer, configured: int) -> int:
    """Bytes of a chunk of the layer's blob, where chunks have ``configured`` bytes otherwise."""
    size = layer.descriptor.size
    if layer.packing is not Packing.TAR:
        part = 1 << max(size // _CHUNKS, 1).bit_length() - 1
        return min(configured, max(part, _LEAST_CHUNK))
    # of whole blocks of the disk: at every other edge one would stay in the frame
    part = size // _TAR_CHUNKS // _BLOCK * _BLOCK
    return max(min(configured, part), _LEAST_TAR_CHUNK)
