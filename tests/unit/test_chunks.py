"""Chunk maps and partial blobs: presence survives a killed process and is believed no further."""

import hashlib
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fetcher.oci import Digest
from fetcher.ranges import Range, aligned
from fetcher.store import chunks as chunks_module
from fetcher.store.blobs import PartialBlob
from fetcher.store.chunks import ChunkMap
from fetcher.store.places import WholeFile
from fetcher.threads import Stopped

CHUNK = 64


def _blob(folder: Path, data: bytes, digest: Digest | None = None) -> PartialBlob:
    wanted = digest or Digest.of(data)
    place = WholeFile(folder / "blob")
    return PartialBlob(place, folder / "blob.chunks", wanted, len(data), CHUNK)


def test_marks_survive_reopening(tmp_path: Path) -> None:
    one = ChunkMap(tmp_path / "map", 10 * CHUNK - 5, CHUNK)
    one.mark(0)
    one.mark(9)
    one.close()
    two = ChunkMap(tmp_path / "map", 10 * CHUNK - 5, CHUNK)
    assert list(two.missing()) == list(range(1, 9))
    assert two.done() == 2 * CHUNK - 5
    assert two.contiguous(0) == 1
    assert two.contiguous(9) == 10
    two.close()


def test_a_map_of_another_blob_is_not_believed(tmp_path: Path) -> None:
    one = ChunkMap(tmp_path / "map", 10 * CHUNK, CHUNK)
    one.mark(3)
    one.close()
    two = ChunkMap(tmp_path / "map", 9 * CHUNK, CHUNK)
    assert two.done() == 0
    two.close()


def test_a_map_keeps_its_chunk_size(tmp_path: Path) -> None:
    # a command and the driver may be configured differently: neither throws the other's bytes away
    one = ChunkMap(tmp_path / "map", 10 * CHUNK, CHUNK)
    one.mark(3)
    one.close()
    two = ChunkMap(tmp_path / "map", 10 * CHUNK, 2 * CHUNK)
    assert (two.chunk_size, two.done()) == (CHUNK, CHUNK)
    two.close()


def test_after_a_power_loss_only_what_a_checkpoint_synced_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ChunkMap(tmp_path / "map", 10 * CHUNK, CHUNK)
    for chunk in (3, 4, 5):
        one.mark(chunk)
    one.mark(6, framed=True)
    one.mark_synced([3, 5])
    one.close()
    for boot in (b"0" * 36, b"0" * 36, b"1" * 36):
        monkeypatch.setattr(chunks_module, "boot_id", lambda boot=boot: boot)
        two = ChunkMap(tmp_path / "map", 10 * CHUNK, CHUNK)
        assert [chunk for chunk in range(10) if two.has(chunk)] == [3, 5]
        two.close()


def test_a_map_of_a_blob_in_another_form_is_not_believed(tmp_path: Path) -> None:
    one = ChunkMap(tmp_path / "map", 10 * CHUNK, CHUNK, form=1)
    one.mark(3)
    one.close()
    two = ChunkMap(tmp_path / "map", 10 * CHUNK, CHUNK, form=2)
    assert two.done() == 0
    two.close()


def test_a_map_whose_bytes_are_gone_is_not_believed(tmp_path: Path) -> None:
    content = os.urandom(3 * CHUNK)
    for left in (None, 5):
        blob = _blob(tmp_path, content)
        assert blob.sink(Range(0, 3 * CHUNK))(content)
        blob.close()
        if left is None:
            (tmp_path / "blob").unlink()
        else:
            os.truncate(tmp_path / "blob", left)
        again = _blob(tmp_path, content)
        assert again.done == 0
        again.close()


def test_a_checkpoint_saves_what_is_there_from_a_power_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(8 * CHUNK)
    blob = _blob(tmp_path, content)
    assert blob.sink(Range(0, 3 * CHUNK))(content[: 3 * CHUNK])
    blob.checkpoint(threading.Event())
    assert blob.sink(Range(3 * CHUNK, 5 * CHUNK))(content[3 * CHUNK : 5 * CHUNK])
    blob.close()
    monkeypatch.setattr(chunks_module, "boot_id", lambda: b"0" * 36)
    again = _blob(tmp_path, content)
    assert again.missing() == [Range(3 * CHUNK, 8 * CHUNK)]
    again.close()


@pytest.mark.parametrize("content", [b"", b"x", os.urandom(200), b"\0" * 5000])
def test_a_damaged_map_is_not_believed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "map").write_bytes(content)
    opened = ChunkMap(tmp_path / "map", 10 * CHUNK, CHUNK)
    assert opened.done() == 0
    opened.close()


@given(st.data())
def test_pieces_in_any_order_make_the_blob(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("blob")
    content = data.draw(st.binary(min_size=0, max_size=6 * CHUNK + 7))
    blob = _blob(folder, content)
    pieces = [piece for missing in blob.missing() for piece in aligned(missing, CHUNK)]
    for piece in data.draw(st.permutations(pieces)):
        sink = blob.sink(piece)
        while sink.remaining:
            step = data.draw(st.integers(1, 2 * CHUNK))
            start = sink.remaining.start
            assert sink(content[start : min(start + step, piece.stop)])
    assert blob.done == len(content)
    assert blob.verify(threading.Event())
    assert (folder / "blob").read_bytes() == content
    blob.close()


def test_an_unfinished_chunk_is_not_there_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    content = os.urandom(3 * CHUNK)
    blob = _blob(tmp_path, content)
    sink = blob.sink(Range(0, 3 * CHUNK))
    assert sink(content[: 2 * CHUNK - 1])
    blob.close()
    again = _blob(tmp_path, content)
    assert again.missing() == [Range(2 * CHUNK - 1, 3 * CHUNK)]
    assert again.done == CHUNK
    assert again.sink(Range(2 * CHUNK - 1, 3 * CHUNK))(content[2 * CHUNK - 1 :])
    assert again.verify(threading.Event())
    again.close()


def test_a_begun_chunk_may_be_begun_again(tmp_path: Path) -> None:
    # a server that ignores ranges sends it from its first byte
    content = os.urandom(3 * CHUNK)
    blob = _blob(tmp_path, content)
    assert blob.sink(Range(0, 3 * CHUNK))(content[: CHUNK - 1])
    assert blob.sink(Range(0, 3 * CHUNK))(content[:5])
    assert blob.missing() == [Range(5, 3 * CHUNK)]
    with pytest.raises(ValueError, match="starts neither"):
        blob.sink(Range(7, 3 * CHUNK))
    blob.close()


def test_a_chunk_that_proved_wrong_begins_with_its_first_byte(tmp_path: Path) -> None:
    # and not where it stood before its last bytes came
    blob = _blob(tmp_path, bytes(3 * CHUNK))
    sink = blob.sink(Range(0, CHUNK))
    assert sink(b"x" * 10)
    assert sink(b"x" * (CHUNK - 10))
    blob.drop(0)
    assert blob.missing() == [Range(0, 3 * CHUNK)]
    assert blob.sink(Range(0, 3 * CHUNK))(bytes(3 * CHUNK))
    assert blob.verify(threading.Event())
    blob.close()


def test_a_power_loss_takes_begun_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(3 * CHUNK)
    blob = _blob(tmp_path, content)
    assert blob.sink(Range(0, 3 * CHUNK))(content[: CHUNK - 1])
    blob.checkpoint(threading.Event())
    blob.close()
    monkeypatch.setattr(chunks_module, "boot_id", lambda: b"0" * 36)
    again = _blob(tmp_path, content)
    assert again.missing() == [Range(0, 3 * CHUNK)]
    again.close()


def test_more_than_was_wanted_is_refused(tmp_path: Path) -> None:
    content = os.urandom(3 * CHUNK)
    blob = _blob(tmp_path, content)
    assert not blob.sink(Range(0, CHUNK))(content[: CHUNK + 1])
    assert blob.done == 0
    blob.close()


def test_a_chunk_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    # it may have been hashed already: other bytes in its place would be shown unverified
    content = os.urandom(3 * CHUNK)
    blob = _blob(tmp_path, content)
    assert blob.sink(Range(CHUNK, 2 * CHUNK))(content[CHUNK : 2 * CHUNK])
    wrong = bytearray(content)
    wrong[CHUNK] ^= 1
    assert blob.sink(Range(0, 3 * CHUNK))(bytes(wrong))
    assert (tmp_path / "blob").read_bytes() == content
    assert blob.done == 3 * CHUNK
    blob.close()


def test_wrong_bytes_are_noticed(tmp_path: Path) -> None:
    content = os.urandom(3 * CHUNK)
    blob = _blob(tmp_path, content, Digest("sha256", hashlib.sha256(b"other").hexdigest()))
    assert blob.sink(Range(0, 3 * CHUNK))(content)
    assert not blob.verify(threading.Event())
    blob.close()


def test_verification_follows_the_arriving_bytes_and_stops_when_told(tmp_path: Path) -> None:
    content = os.urandom(3 * CHUNK)
    blob = _blob(tmp_path, content)
    stop = threading.Event()
    outcome: list[object] = []

    def verify() -> None:
        try:
            outcome.append(blob.verify(stop))
        except Stopped as stopped:
            outcome.append(stopped)

    thread = threading.Thread(target=verify)
    thread.start()
    blob.sink(Range(0, CHUNK))(content[:CHUNK])
    stop.set()
    thread.join(30)
    assert len(outcome) == 1
    assert isinstance(outcome[0], Stopped)
    blob.close()


def test_closing_again_closes_nothing_else(tmp_path: Path) -> None:
    blob = _blob(tmp_path, b"x" * CHUNK)
    blob.close()
    # they get the numbers that the blob's descriptors had
    others = [os.open(tmp_path, os.O_RDONLY) for _ in range(4)]
    blob.close()
    for other in others:
        os.close(other)
