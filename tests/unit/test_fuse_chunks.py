"""What a worker shows of a blob that the agent writes at the same time: trusted bytes, or none."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from fetcher.errors import DigestMismatch
from fetcher.modelpack import Kind, Packing, layer_type, read_model
from fetcher.oci import Digest
from fetcher.ranges import Range
from fetcher.store import chunks as chunks_module
from fuse.chunks import Blob, Changed
from tests.support.lazy_agent import CHUNK, SmallAgent
from tests.support.models import ModelBuilder, tar_files

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 10 * CHUNK - 100


class Scene:
    """One blob, the agent that writes it, and the worker's view of it."""

    def __init__(self, root: Path, builder: ModelBuilder, data: bytes) -> None:
        self.data = data
        self.name = str(Digest.of(data))
        self.agent = SmallAgent(root, builder.body, lambda _, part: data[part.start : part.stop])
        self.layer = read_model(builder.manifest()).layers[0]
        self.path = root / "blobs" / "sha256" / self.layer.descriptor.digest.hex
        self.spoiled: list[str] = []
        self.blob = self.view()
        self.whole = Range(0, len(data))

    def view(self) -> Blob:
        """As a worker that has just begun sees it."""
        blob = Blob(self.path.parent, self.layer, lambda _, reason: self.spoiled.append(reason))
        blob.use()
        return blob

    def fill(self, start: int, stop: int) -> None:
        self.agent.fill(self.name, Range(start * CHUNK, min(stop * CHUNK, len(self.data))))


@pytest.fixture
def raw(tmp_path: Path) -> Scene:
    data = os.urandom(SIZE)
    return Scene(tmp_path, ModelBuilder().add_raw("x", data), data)


def test_nothing_is_there_of_a_blob_that_nobody_has_begun(raw: Scene) -> None:
    assert raw.blob.missing(raw.whole) == raw.whole
    assert raw.blob.missing(Range(5, 6)) is not None


def test_what_is_missing_is_told_in_whole_chunks(raw: Scene) -> None:
    raw.fill(2, 5)
    assert raw.blob.missing(Range(2 * CHUNK, 5 * CHUNK)) is None
    assert raw.blob.missing(Range(2 * CHUNK + 7, 5 * CHUNK + 1)) == Range(5 * CHUNK, 6 * CHUNK)
    assert raw.blob.missing(Range(1, 6 * CHUNK)) == Range(0, 6 * CHUNK)
    assert raw.blob.missing(raw.whole) == raw.whole


def test_what_is_not_trusted_is_missing(raw: Scene) -> None:
    raw.agent.orders.trusted = False
    raw.fill(0, 4)
    assert raw.blob.missing(Range(0, CHUNK)) == Range(0, CHUNK)
    raw.agent.orders.trusted = True
    raw.fill(0, 1)
    assert raw.blob.missing(Range(0, 2 * CHUNK)) == Range(CHUNK, 2 * CHUNK)


def test_what_another_name_trusts_is_not_shown(raw: Scene) -> None:
    raw.fill(0, 4)
    pieces = raw.blob.pieces(Range(0, CHUNK))
    assert raw.blob.missing(Range(0, CHUNK)) is None
    other = Blob(raw.path.parent, raw.layer, lambda *_: None, "registry/other")
    other.use()
    assert other.missing(Range(0, CHUNK)) is not None
    raw.agent.blob(raw.name).trust("registry/other")
    raw.fill(0, 4)
    # in the middle of a read
    with pytest.raises(Changed):
        raw.blob.check(pieces)
    assert raw.blob.missing(Range(0, CHUNK)) is not None
    assert other.missing(Range(0, CHUNK)) is None


def test_a_file_of_which_another_model_makes_a_tar_is_not_shown_with_holes(tmp_path: Path) -> None:
    archive = tar_files({"x": os.urandom(4 * CHUNK), "y": os.urandom(CHUNK)})
    as_tar = ModelBuilder().add_layer(layer_type(Kind.WEIGHT, Packing.TAR), archive)
    tar = Scene(tmp_path, as_tar, archive)
    file = Scene(tmp_path, ModelBuilder().add_raw("x.tar", archive), archive)
    tar.agent.open_archive(tar.name)
    tar.fill(0, 4)
    assert tar.blob.missing(Range(CHUNK, CHUNK + 1)) is None
    assert file.blob.missing(Range(CHUNK, CHUNK + 1)) is not None


def test_a_verified_blob_is_complete_for_who_watched_it_and_for_who_comes_later(
    raw: Scene,
) -> None:
    raw.fill(0, 1)
    assert raw.blob.missing(raw.whole) is not None
    raw.agent.complete(raw.name)
    for blob in (raw.blob, raw.view()):
        assert blob.missing(raw.whole) is None
        assert blob.complete


def test_who_closed_all_files_of_a_blob_looks_again(raw: Scene) -> None:
    raw.agent.complete(raw.name)
    assert raw.blob.missing(raw.whole) is None
    raw.blob.leave()
    raw.path.unlink()
    raw.blob.use()
    assert raw.blob.missing(raw.whole) == raw.whole


def test_a_file_of_another_size_is_not_the_blob(raw: Scene) -> None:
    raw.path.write_bytes(raw.data[:-1])
    assert raw.blob.missing(raw.whole) is not None


def test_a_map_of_another_boot_is_not_believed(raw: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    raw.agent.fill(raw.name, raw.whole)
    monkeypatch.setattr("fuse.chunks.boot_id", lambda: b"0" * 36)
    assert raw.view().missing(raw.whole) == raw.whole
    # until the agent has gone over it
    monkeypatch.setattr(chunks_module, "boot_id", lambda: b"0" * 36)
    again = SmallAgent(raw.agent.root, raw.agent.body, raw.agent.content)
    again.fill(raw.name, Range(0, CHUNK))
    assert raw.view().missing(Range(0, CHUNK)) is None


@pytest.mark.parametrize("content", [b"", b"x" * 63, b"\0" * 500, os.urandom(500)])
def test_a_damaged_map_is_not_believed(raw: Scene, content: bytes) -> None:
    raw.fill(0, 10)
    raw.path.with_name(f"{raw.path.name}.chunks").write_bytes(content)
    assert raw.blob.missing(raw.whole) == raw.whole


def test_a_map_that_becomes_shorter_takes_its_chunks_with_it(raw: Scene) -> None:
    raw.fill(0, 10)
    assert raw.blob.missing(raw.whole) is None
    os.truncate(raw.path.with_name(f"{raw.path.name}.chunks"), 66)
    # with the name by which chunks are trusted
    assert raw.blob.missing(raw.whole) == raw.whole


def test_once_shown_a_spoiled_blob_is_spoiled_for_ever(raw: Scene) -> None:
    raw.fill(0, 10)
    assert raw.blob.missing(raw.whole) is None
    raw.blob.check(raw.blob.pieces(raw.whole))
    raw.agent.spoil(raw.name, "why", tell=False)
    for _ in range(2):
        with pytest.raises(DigestMismatch):
            raw.blob.missing(raw.whole)
    assert len(raw.spoiled) == 1
    raw.agent.complete(raw.name)
    with pytest.raises(DigestMismatch):
        raw.blob.missing(raw.whole)


def test_a_read_that_a_verdict_overtakes_shows_nothing(raw: Scene) -> None:
    raw.fill(0, 10)
    pieces = raw.blob.pieces(raw.whole)
    assert raw.blob.missing(raw.whole) is None
    raw.agent.spoil(raw.name, "why", tell=False)
    with pytest.raises(DigestMismatch):
        raw.blob.check(pieces)


def test_a_spoiled_blob_that_nobody_saw_is_fetched_anew(raw: Scene) -> None:
    raw.fill(0, 10)
    assert raw.blob.missing(raw.whole) is None
    raw.agent.spoil(raw.name, "why", tell=False)
    assert raw.blob.missing(raw.whole) == raw.whole
    raw.agent.complete(raw.name)
    assert raw.blob.missing(raw.whole) is None
    assert not raw.spoiled


def test_a_file_of_a_blob_that_was_dropped_meanwhile_is_not_taken_for_a_whole_one(
    raw: Scene,
) -> None:
    raw.fill(0, 10)
    assert raw.blob.missing(raw.whole) is None
    # what is seen of a blob whose file was opened before it was dropped, and its map looked for
    # afterwards
    chunks = raw.path.with_name(f"{raw.path.name}.chunks")
    raw.path.rename(raw.path.with_name("elsewhere"))
    chunks.unlink()
    assert raw.blob.missing(raw.whole) == raw.whole


@pytest.fixture
def tar(tmp_path: Path) -> Scene:
    builder = ModelBuilder()
    builder.add_tar({"one": os.urandom(3 * CHUNK), "two": os.urandom(5 * CHUNK)}, Packing.TAR)
    data = next(data for data in builder.blobs.values() if len(data) > CHUNK)
    return Scene(tmp_path, builder, data)


def test_an_index_that_another_name_left_is_not_believed(tar: Scene) -> None:
    tar.agent.open_archive(tar.name)
    assert [entry.path for entry, _ in tar.blob.load()]
    other = Blob(tar.path.parent, tar.layer, lambda *_: None, "registry/other")
    with pytest.raises(Changed):
        other.load()


def test_chunks_wait_in_the_frame_until_their_place_is_known(tar: Scene) -> None:
    tar.fill(2, 4)
    assert tar.blob.missing(Range(2 * CHUNK, 4 * CHUNK)) is None
    framed = tar.blob.pieces(Range(2 * CHUNK + 5, 4 * CHUNK))
    assert [(piece.range, piece.framed) for piece in framed] == [
        (Range(2 * CHUNK + 5, 4 * CHUNK), True)
    ]
    tar.blob.check(framed)
    tar.agent.open_archive(tar.name)
    tar.agent.fill(tar.name, tar.whole)
    blob = tar.agent.blob(tar.name)
    assert blob.verify(tar.agent.still)
    # they were moved since: what was read of the frame may be a hole
    with pytest.raises(Changed):
        tar.blob.check(framed)
    moved = tar.blob.pieces(tar.whole)
    assert [piece.framed for piece in moved] == [False]
    tar.blob.check(moved)


def test_the_files_of_a_tar_are_found_wherever_they_are(tar: Scene) -> None:
    with pytest.raises(Changed):
        tar.blob.load()
    with pytest.raises(Changed):
        tar.blob.open_file(0)
    tar.agent.open_archive(tar.name)
    early = tar.blob.load()
    assert [entry.path for entry, _ in early] == ["one", "two"]
    tar.agent.fill(tar.name, tar.whole)
    before = tar.blob.open_file(1)
    tar.agent.complete(tar.name)
    after = tar.blob.open_file(1)
    assert before.identity == after.identity
    assert tar.blob.load() == early
    assert tar.blob.missing(tar.whole) is None
    assert tar.blob.complete
    offset = early[1][1]
    assert os.pread(after.descriptor, 100, 0) == tar.data[offset : offset + 100]
    before.close()
    after.close()
