"""How large chunks are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fetcher.chunk_sizes import chunk_size_for
from fetcher.modelpack import Layer, Packing, blob_layer
from fetcher.oci import Digest

MIB = 1024 * 1024


def layer(size: int, packing: Packing = Packing.RAW) -> Layer:
    found = blob_layer(Digest.parse("sha256:" + "0" * 64), size, "")
    return replace(found, packing=packing)


@pytest.mark.parametrize(
    ("size", "configured", "expected"),
    [
        (0, 4, 1),
        (MIB // 2, 4, 1),
        (64 * MIB, 4, 1),
        (256 * MIB - 1, 4, 1),
        (256 * MIB, 4, 2),
        (512 * MIB, 4, 4),
        (1 << 40, 4, 4),
        (1 << 40, 64, 64),
    ],
)
def test_small_blobs_have_small_chunks(size: int, configured: int, expected: int) -> None:
    assert chunk_size_for(layer(size), configured * MIB) == expected * MIB


def test_smaller_chunks_that_are_configured_stay() -> None:
    assert chunk_size_for(layer(1 << 30), 64 * 1024) == 64 * 1024


def test_archives_have_chunks_of_whole_blocks() -> None:
    found = chunk_size_for(layer(100 * MIB + 1, Packing.TAR), 4 * MIB)
    assert found % 4096 == 0
    assert 100 * MIB // 129 < found <= 100 * MIB // 128
