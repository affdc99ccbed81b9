"""Ranges: half-open inside, inclusive on the wire."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fetcher.errors import Unavailable
from fetcher.ranges import Range, join_chunks, parse_content_range


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 10**5))
def test_split_covers_the_range_once(start: int, length: int, most: int) -> None:
    pieces = list(Range(start, start + length).split(max(most, length // 50 + 1)))
    assert pieces[0].start == start
    assert pieces[-1].stop == start + length
    assert all(one.stop == other.start for one, other in itertools.pairwise(pieces))


@given(st.sets(st.integers(0, 40)), st.integers(1, 16), st.integers(0, 15))
def test_joined_chunks_are_the_bytes_of_the_chunks(
    chunks: set[int], chunk_size: int, short: int
) -> None:
    size = 41 * chunk_size - min(short, chunk_size - 1)
    expected = {
        byte
        for chunk in chunks
        for byte in range(chunk * chunk_size, min((chunk + 1) * chunk_size, size))
    }
    joined = list(join_chunks(sorted(chunks), chunk_size, size))
    assert [byte for one in joined for byte in range(one.start, one.stop)] == sorted(expected)
    assert all(one.stop < other.start for one, other in itertools.pairwise(joined))


def test_http_form_is_inclusive() -> None:
    assert Range(0, 1).http == "0-0"
    assert Range(10, 20).http == "10-19"
    with pytest.raises(ValueError, match="empty"):
        _ = Range(5, 5).http


def test_content_range() -> None:
    assert parse_content_range("bytes 0-0/10") == (Range(0, 1), 10)
    assert parse_content_range("BYTES 5-9/*") == (Range(5, 10), None)


@pytest.mark.parametrize(
    "text",
    ["", "bytes", "bytes 9-5/10", "bytes */10", "bytes -1-5/10", "bytes 0-" + "9" * 20 + "/1"],
)
def test_content_range_that_is_none(text: str) -> None:
    with pytest.raises(Unavailable):
        parse_content_range(text)


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4)])
def test_impossible_range(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="no such range"):
        Range(start, stop)
