"""Readers are recognised by where they read, and only those who read on are read ahead of."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from fetcher.ranges import Range
from fuse.readahead import MOST_STEPS, STEP, Streams

MIB = 1024 * 1024
SIZE = 4096 * MIB


def _read(streams: Streams, start: int, size: int = MIB) -> Range | None:
    return streams.read(Range(start, start + size))


def test_one_read_asks_for_nothing() -> None:
    assert _read(Streams(SIZE), 100 * MIB) is None


def test_who_reads_on_is_read_ahead_of_in_a_growing_window() -> None:
    streams = Streams(SIZE)
    windows = [found for at in range(1500) if (found := _read(streams, at * MIB))]
    assert len(windows[0]) == STEP
    lengths = [len(window) for window in windows]
    assert max(lengths) <= MOST_STEPS * STEP
    assert lengths.index(max(lengths)) < 10
    # one after another, without a gap and nothing twice
    for one, two in itertools.pairwise(windows):
        assert one.stop == two.start
    assert len(windows) < 40


def test_the_reader_is_never_ahead_of_its_window() -> None:
    streams = Streams(SIZE)
    fetched = 2 * MIB
    for at in range(1000):
        found = _read(streams, at * MIB)
        fetched = max(fetched, found.stop if found else 0)
        # who waits for the read after this one waits for no fetch
        assert at < 1 or fetched >= (at + 2) * MIB


def test_a_window_ends_with_the_file() -> None:
    streams = Streams(10 * MIB)
    windows = [found for at in range(10) if (found := _read(streams, at * MIB))]
    assert max(window.stop for window in windows) == 10 * MIB


def test_small_steps_are_a_stream_too() -> None:
    streams = Streams(SIZE)
    assert any(_read(streams, at * 4096, 4096) for at in range(300))


def test_a_read_here_or_there_that_comes_in_pieces_is_no_stream() -> None:
    streams = Streams(SIZE)
    for start in range(0, SIZE, 128 * MIB):
        assert not any(_read(streams, start + at * MIB // 4, MIB // 4) for at in range(4))


def test_a_reader_here_and_there_gets_nothing() -> None:
    chance = random.Random(7)  # noqa: S311 - the same every time
    streams = Streams(SIZE)
    for _ in range(5000):
        at = chance.randrange(0, SIZE - 4096, 4096)
        assert _read(streams, at, 4096) is None


def test_many_streams_through_one_descriptor_are_told_apart() -> None:
    streams = Streams(SIZE)
    starts = [number * 128 * MIB for number in range(32)]
    windows: dict[int, int] = dict.fromkeys(starts, 0)
    for step in range(100):
        for start in starts:
            found = _read(streams, start + step * MIB)
            if found is not None:
                windows[start] += 1
                assert start <= found.start <= start + 512 * MIB
    assert all(count >= 3 for count in windows.values())


def test_the_kernel_may_send_the_reads_of_a_stream_out_of_order() -> None:
    chance = random.Random(3)  # noqa: S311 - the same every time
    streams = Streams(SIZE)
    for at in range(8):
        _read(streams, at * MIB)
    asked = 0
    for group in range(2, 100):
        parts = [group * 4 + part for part in range(4)]
        chance.shuffle(parts)
        asked += sum(_read(streams, at * MIB) is not None for at in parts)
    assert 1 <= asked < 20


def test_a_stream_that_reads_again_asks_for_nothing_twice() -> None:
    streams = Streams(SIZE)
    for at in range(100):
        _read(streams, at * MIB)
    assert not any(_read(streams, at * MIB) for at in range(95, 99))


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(1, 256)), max_size=300))
def test_what_is_asked_for_lies_in_the_file(reads: list[tuple[int, int]]) -> None:
    streams = Streams(65 * MIB)
    for at, pages in reads:
        found = streams.read(Range(at * MIB, at * MIB + pages * 4096))
        assert found is None or 0 <= found.start < found.stop <= 65 * MIB
