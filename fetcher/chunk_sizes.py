"""How large the chunks of a blob are. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fetcher.modelpack import Packing

if TYPE_CHECKING:
    from fetcher.modelpack import Layer

_TAR_CHUNKS: Final = 128
"""Of a tar layer, at least: one of them lies on the disk twice for the moment of being moved."""

_LEAST_CHUNK: Final = 64 * 1024
_BLOCK: Final = 4096


def chunk_size_for(layer: Layer, configured: int) -> int:
    """Bytes of a chunk of the layer's blob, where chunks have ``configured`` bytes otherwise."""
    if layer.packing is not Packing.TAR:
        return configured
    # of whole blocks of the disk: at every other edge one would stay in the frame
    part = layer.descriptor.size // _TAR_CHUNKS // _BLOCK * _BLOCK
    return max(min(configured, part), _LEAST_CHUNK)
