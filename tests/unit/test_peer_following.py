"""A part that a thread sends while it arrives: what is there, what comes, and when it ends."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from fetcher.oci import Digest
from fetcher.peers.bodies import ArrivingBody
from fetcher.peers.following import Following
from fetcher.ranges import Range
from fetcher.store.blobs import PartialBlob
from fetcher.store.places import WholeFile
from fetcher.threads import Stopped
from tests.support.stores import CHUNK, STILL

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = os.urandom(3 * CHUNK)
PART = Range(0, len(DATA))


@pytest.fixture
def blob(tmp_path: Path) -> Iterator[PartialBlob]:
    made = PartialBlob(
        WholeFile(tmp_path / "blob"), tmp_path / "chunks", Digest.of(DATA), len(DATA), CHUNK
    )
    yield made
    if not made.is_closed:
        made.close()


def test_what_comes_is_seen_in_order(blob: PartialBlob, tmp_path: Path) -> None:
    following = Following(ArrivingBody(blob, tmp_path / "blob"), PART)
    sink = blob.sink(PART)
    came = [10, CHUNK, CHUNK + 1, len(DATA)]

    def write() -> None:
        for start, stop in zip([0, *came], came, strict=False):
            sink(memoryview(DATA)[start:stop])

    thread = threading.Thread(target=write)
    thread.start()
    position = 0
    while following.left:
        piece = following.next(STILL)
        assert piece.start == position
        position = piece.stop
        following.took(len(piece))
    thread.join()
    assert following.sent == position == len(DATA)


def test_it_stops_waiting_when_it_is_told_to(blob: PartialBlob) -> None:
    stop = threading.Event()
    following = Following(ArrivingBody(blob, None), PART)
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Stopped):
        following.next(stop)


def test_nothing_comes_for_a_while(blob: PartialBlob) -> None:
    following = Following(ArrivingBody(blob, None), PART)
    assert not following.next(STILL)
    blob.sink(PART)(memoryview(DATA)[:9])
    assert following.next(STILL) == Range(0, 9)


def test_a_blob_that_was_closed_is_none_any_more(blob: PartialBlob) -> None:
    """Its file may be another one's by now, in which other bytes are there."""
    blob.sink(PART)(memoryview(DATA))
    following = Following(ArrivingBody(blob, None), PART)
    assert following.next(STILL) == PART
    blob.close()
    assert not following.next(STILL)
