"""Bytes that come to where other bytes are: what is trusted, compared, replaced."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fetcher.oci import Digest
from fetcher.ranges import Range
from fetcher.store.blobs import PartialBlob
from fetcher.store.chunks import Verdict, read_header
from fetcher.store.places import WholeFile

if TYPE_CHECKING:
    from pathlib import Path

CHUNK = 64
STILL = threading.Event()
ALL = Range(0, 4 * CHUNK)


def opened(folder: Path, data: bytes) -> PartialBlob:
    place = WholeFile(folder / "blob")
    return PartialBlob(place, folder / "blob.chunks", Digest.of(data), len(data), CHUNK)


def trusted(blob: PartialBlob) -> list[int]:
    return [number for number in range(blob.count) if blob.is_trusted(number)]


def test_a_chunk_is_trusted_if_all_its_bytes_were(tmp_path: Path) -> None:
    data = os.urandom(4 * CHUNK)
    blob = opened(tmp_path, data)
    sink = blob.sink(ALL, trusted=True)
    assert sink(data[: CHUNK + 5])
    sink.trusted = False
    assert sink(data[CHUNK + 5 : 2 * CHUNK + 5])
    sink.trusted = True
    assert sink(data[2 * CHUNK + 5 :])
    assert trusted(blob) == [0, 3]
    blob.close()


def test_the_rest_of_a_begun_chunk_is_trusted_if_its_begin_was(tmp_path: Path) -> None:
    data = os.urandom(4 * CHUNK)
    for number, begin in enumerate((True, False)):
        blob = opened(tmp_path, data)
        start = number * CHUNK
        assert blob.sink(Range(start, start + CHUNK), trusted=begin)(data[start : start + 9])
        blob.close()
        blob = opened(tmp_path, data)
        rest = Range(start + 9, start + CHUNK)
        assert blob.sink(rest, trusted=True)(data[rest.start : rest.stop])
        blob.close()
    blob = opened(tmp_path, data)
    assert trusted(blob) == [0]
    assert blob.done == 2 * CHUNK
    blob.close()


@given(st.data())
def test_what_a_trusted_source_sends_is_what_is_there(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = data.draw(st.binary(min_size=1, max_size=5 * CHUNK))
    wrong = bytearray(content)
    for position in data.draw(st.sets(st.integers(0, len(content) - 1), max_size=3)):
        wrong[position] ^= 1
    blob = opened(tmp_path_factory.mktemp("blob"), content)
    everything = Range(0, len(content))
    assert blob.sink(everything)(bytes(wrong))
    assert blob.verify(STILL) == (wrong == content)
    assert trusted(blob) == []
    sink = blob.sink(everything, trusted=True)
    while sink.remaining:
        start = sink.remaining.start
        assert sink(content[start : start + data.draw(st.integers(1, 2 * CHUNK))])
    assert blob.is_all_trusted
    assert blob.done == len(content)
    blob.verify_anew()
    assert blob.verify(STILL)
    # what somebody else says later changes nothing
    assert blob.sink(everything)(bytes(len(content)))
    found = bytearray(len(content))
    offset = 0
    while offset < len(content):
        offset += blob.read(offset, memoryview(found)[offset:])
    assert found == content
    blob.close()
    assert blob.read(0, memoryview(found)) == 0


def test_a_replacement_that_is_cut_off_is_no_chunk_and_goes_on(tmp_path: Path) -> None:
    data = os.urandom(4 * CHUNK)
    wrong = bytearray(data)
    wrong[CHUNK + 7] ^= 1
    blob = opened(tmp_path, data)
    assert blob.sink(ALL)(bytes(wrong))
    assert blob.sink(Range(CHUNK, 2 * CHUNK), trusted=True)(data[CHUNK : CHUNK + 20])
    assert not blob.has(1)
    assert blob.missing() == [Range(CHUNK + 20, 2 * CHUNK)]
    blob.close()
    blob = opened(tmp_path, data)
    assert blob.sink(Range(CHUNK + 20, 2 * CHUNK), trusted=True)(data[CHUNK + 20 : 2 * CHUNK])
    assert trusted(blob) == [1]
    assert blob.verify(STILL)
    blob.close()


def test_another_name_is_not_trusted_for_what_the_first_one_sent(tmp_path: Path) -> None:
    data = os.urandom(4 * CHUNK)
    blob = opened(tmp_path, data)
    blob.trust("registry/one")
    assert blob.sink(Range(0, 2 * CHUNK), trusted=True)(data[: 2 * CHUNK])
    assert blob.sink(Range(2 * CHUNK, 3 * CHUNK), trusted=True)(data[2 * CHUNK : 2 * CHUNK + 9])
    blob.checkpoint(STILL)
    blob.close()
    for name, expected in (("registry/one", [0, 1]), ("registry/other", []), ("registry/one", [])):
        blob = opened(tmp_path, data)
        blob.trust(name)
        assert trusted(blob) == expected
        assert blob.is_fill_trusted(2) == (expected == [0, 1])
        assert blob.done == 2 * CHUNK
        blob.close()


def test_whoever_watches_is_told_of_all_bytes_and_reads_them(tmp_path: Path) -> None:
    data = os.urandom(4 * CHUNK)
    blob = opened(tmp_path, data)
    told: list[int] = []
    with blob.watch(told.append):
        sink = blob.sink(ALL)
        assert sink(data[: CHUNK + 10])
        found = bytearray(CHUNK)
        assert blob.read(CHUNK + 2, memoryview(found)) == 8
        assert found[:8] == data[CHUNK + 2 : CHUNK + 10]
        assert blob.read(CHUNK + 10, memoryview(found)) == 0
        assert sink(data[CHUNK + 10 :])
    assert told == [0, 1, 1, 2, 3]
    assert blob.sink(ALL)(data)
    assert told == [0, 1, 1, 2, 3]
    blob.close()


@pytest.mark.parametrize("verdict", list(Verdict))
def test_whoever_has_the_map_open_learns_the_end(tmp_path: Path, verdict: Verdict) -> None:
    blob = opened(tmp_path, os.urandom(CHUNK))
    with (tmp_path / "blob.chunks").open("rb") as chunk_map:
        (tmp_path / "blob.chunks").unlink()
        blob.conclude(verdict)
        header = read_header(chunk_map.read())
    assert header is not None
    assert header.verdict == verdict
    blob.close()


def test_a_thread_that_hashes_leaves_when_nothing_comes_and_goes_on(tmp_path: Path) -> None:
    data = os.urandom(4 * CHUNK)
    blob = opened(tmp_path, data)
    assert blob.verify(STILL, patience=0) is None
    assert blob.sink(Range(0, 2 * CHUNK))(data[: 2 * CHUNK])
    assert blob.verify(STILL, patience=0.01) is None
    assert blob.hashing == 2
    assert blob.sink(Range(2 * CHUNK, 4 * CHUNK))(data[2 * CHUNK :])
    assert blob.verify(STILL, patience=0)
    blob.close()
