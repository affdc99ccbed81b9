"""Bytes hashed as they come, or later: in whatever order, and however often a chunk begins anew."""

from __future__ import annotations

import hashlib
import os
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fetcher.chunk_digests import LEAST_CHUNK
from fetcher.oci import Digest
from fetcher.ranges import Range
from fetcher.store.blobs import PartialBlob
from fetcher.store.hashing import Hashing
from fetcher.store.places import WholeFile

if TYPE_CHECKING:
    from pathlib import Path

STILL = threading.Event()
SIZES = pytest.mark.parametrize("chunk_size", [64, LEAST_CHUNK])
"""Without and with chunk digests on the way."""
COUNT = 5


def opened(folder: Path, data: bytes, chunk_size: int) -> PartialBlob:
    for name in ("blob", "blob.chunks"):
        (folder / name).unlink(missing_ok=True)
    place = WholeFile(folder / "blob")
    return PartialBlob(place, folder / "blob.chunks", Digest.of(data), len(data), chunk_size)


@SIZES
def test_what_comes_in_order_is_hashed_as_it_comes(chunk_size: int) -> None:
    data = os.urandom(3 * chunk_size + 7)
    hashing = Hashing(Digest.of(data), len(data), chunk_size)
    view = memoryview(bytearray(data))
    hashing.along(0, view[:chunk_size])
    hashing.along(2 * chunk_size, view[2 * chunk_size :])
    assert hashing.reached == chunk_size
    with hashing.turn:
        # somebody else is at it
        hashing.along(chunk_size, view[chunk_size:])
    assert hashing.reached == chunk_size
    hashing.along(chunk_size, view[chunk_size:])
    right, made = hashing.finish()
    assert right
    assert (made is not None) == (chunk_size == LEAST_CHUNK)


@SIZES
def test_it_goes_back_to_any_chunk(chunk_size: int) -> None:
    data = os.urandom(3 * chunk_size)
    for chunk in range(4):
        hashing = Hashing(Digest.of(data), len(data), chunk_size)
        wrong = bytearray(data[: chunk * chunk_size]) + bytearray(2 * chunk_size)
        hashing.along(0, memoryview(wrong)[: len(data)])
        hashing.go_back(chunk)
        assert hashing.reached <= chunk * chunk_size
        hashing.along(hashing.reached, memoryview(bytearray(data))[hashing.reached :])
        assert hashing.finish()[0]


@SIZES
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(play=st.data())
def test_in_whatever_order_bytes_come(tmp_path: Path, chunk_size: int, play: st.DataObject) -> None:
    """Chunks come in any order, begin anew after wrong bytes, go and come again, and whoever reads
    them back comes by now and then.
    """
    data = os.urandom((COUNT - 1) * chunk_size + 9)
    blob = opened(tmp_path, data, chunk_size)
    try:
        left = play.draw(st.permutations(range(COUNT)))
        while left:
            number, *left = left
            chunk = blob.chunk(number)
            step = play.draw(st.sampled_from(["right", "begun", "wrong", "look"]))
            if step == "look":
                assert blob.verify(STILL, 0.0) is None
            elif step == "begun":
                # its first bytes are wrong, and come again
                begun = play.draw(st.integers(1, len(chunk) - 1))
                assert blob.sink(chunk)(bytes(begun))
            elif step == "wrong":
                assert blob.sink(chunk)(bytes(len(chunk)))
                if play.draw(st.booleans()):
                    blob.verify(STILL, 0.0)
                blob.drop(number)
            if step == "right":
                cut = play.draw(st.integers(0, len(chunk)))
                sink = blob.sink(chunk)
                assert sink(data[chunk.start : chunk.start + cut])
                assert sink(data[chunk.start + cut : chunk.stop])
            else:
                left.append(number)
        assert blob.verify(STILL) is True
    finally:
        blob.close()


@SIZES
def test_a_wrong_byte_is_found_and_mends(tmp_path: Path, chunk_size: int) -> None:
    data = bytearray(os.urandom(COUNT * chunk_size))
    digest = Digest("sha256", hashlib.sha256(data).hexdigest())
    blob = opened(tmp_path, bytes(data), chunk_size)
    wrong = bytearray(data)
    wrong[2 * chunk_size + 5] ^= 1
    assert blob.digest == digest
    assert blob.sink(Range(0, len(data)))(wrong)
    assert blob.verify(STILL) is False
    blob.drop(2)
    chunk = blob.chunk(2)
    assert blob.sink(chunk)(data[chunk.start : chunk.stop])
    assert blob.verify(STILL) is True
    blob.close()
