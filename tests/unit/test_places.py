"""Tar layers written straight into their files: any order of arrival, any kill, the same bytes."""

from __future__ import annotations

import errno
import os
import tarfile
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fetcher.errors import InvalidArtifact, ModelError, NoSpace
from fetcher.oci import Digest
from fetcher.ranges import Range, aligned
from fetcher.store import chunks as chunks_module
from fetcher.store.blobs import PartialBlob
from fetcher.store.layers import load_layer
from fetcher.store.places import TarFiles
from fetcher.store.stored import StoredBlob
from tests.support.models import (
    END,
    Member,
    folder,
    hard_link,
    header_block,
    make_tar,
    padded,
    pax_record,
    symlink,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHUNK = 4096
GO_ON = threading.Event()


def _nothing(_: int) -> None:
    """Room without end."""


def _open(
    place: Path, data: bytes, grow: Callable[[int], None] = _nothing, chunk_size: int = CHUNK
) -> PartialBlob:
    files = TarFiles(place / "blob", grow)
    return PartialBlob(files, place / "blob.chunks", Digest.of(data), len(data), chunk_size)


def _send(blob: PartialBlob, data: bytes, piece: Range) -> None:
    assert blob.sink(piece)(data[piece.start : piece.stop])


def _chunks(blob: PartialBlob) -> list[Range]:
    return [piece for missing in blob.missing() for piece in aligned(missing, blob.chunk_size)]


def _contents(place: Path) -> dict[str, bytes]:
    return {file.entry.path: file.source.read_bytes() for file in load_layer(place).files}


def _check_complete(place: Path, archive: bytes, files: dict[str, bytes]) -> None:
    assert _contents(place / "blob.files") == files
    stored = StoredBlob.of_files(place / "blob.files")
    assert stored.size == len(archive)
    assert b"".join(bytes(block) for block in stored.blocks(GO_ON)) == archive
    assert stored.matches(Digest.of(archive), GO_ON)
    assert not (place / "blob.parts").exists()


names = st.integers(0, 10**6).map(lambda number: f"folder/file-{number}")
long_names = st.integers(0, 10**6).map(lambda number: f"{'long/' * 60}file-{number}")
contents = st.one_of(
    st.binary(max_size=2000),
    st.integers(0, 6 * CHUNK).map(lambda size: os.urandom(8) * (size // 8) + b"x" * (size % 8)),
)
archives = st.dictionaries(st.one_of(names, long_names), contents, max_size=12)


@settings(deadline=None)
@given(archives, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), st.data())
def test_a_tar_is_whole_however_it_arrives_and_is_interrupted(
    tmp_path_factory: pytest.TempPathFactory,
    files: dict[str, bytes],
    format: int,
    data: st.DataObject,
) -> None:
    place = tmp_path_factory.mktemp("layer")
    archive = make_tar([Member(name, content) for name, content in files.items()], format)
    chunk_size = data.draw(st.sampled_from([512, 700, CHUNK]))
    blob = _open(place, archive, chunk_size=chunk_size)
    boots = 0
    with pytest.MonkeyPatch.context() as patch:
        while pieces := _chunks(blob):
            order = data.draw(st.permutations(pieces))
            for piece in order[: data.draw(st.integers(1, len(order)))]:
                _send(blob, archive, piece)
            if begun := _chunks(blob)[:3]:
                # some of a chunk, and nothing more comes of it
                piece = data.draw(st.sampled_from(begun))
                stop = data.draw(st.integers(piece.start, piece.stop - 1))
                assert blob.sink(piece)(archive[piece.start : stop])
                assert stop == piece.start or stop in [one.start for one in blob.missing()]
            if data.draw(st.booleans()):
                blob.checkpoint(GO_ON)
            match data.draw(st.sampled_from(["go on", "kill", "power loss"])):
                case "kill":
                    blob.close()
                    blob = _open(place, archive, chunk_size=chunk_size)
                case "power loss" if boots < 3:
                    boots += 1
                    blob.close()
                    patch.setattr(chunks_module, "boot_id", lambda boot=boots: b"%036d" % boot)
                    blob = _open(place, archive, chunk_size=chunk_size)
        assert blob.done == len(archive)
        assert blob.verify(GO_ON)
        if data.draw(st.booleans()):
            # killed after verification, before it was recorded
            blob.close()
            blob = _open(place, archive, chunk_size=chunk_size)
            assert blob.verify(GO_ON)
        blob.finish(GO_ON)
        blob.close()
    _check_complete(place, archive, files)


def test_verification_moves_what_arrived_before_its_headers(tmp_path: Path) -> None:
    files = {f"file-{number}": os.urandom(3 * CHUNK + number) for number in range(40)}
    archive = make_tar([Member(name, content) for name, content in files.items()])
    blob = _open(tmp_path, archive)
    outcome: list[bool | None] = []
    verifying = threading.Thread(target=lambda: outcome.append(blob.verify(GO_ON)))
    verifying.start()
    pieces = list(Range(0, len(archive)).split(8 * CHUNK))

    def send(first: int) -> None:
        for piece in pieces[first::4]:
            _send(blob, archive, piece)

    senders = [threading.Thread(target=send, args=(number,)) for number in (3, 2, 1, 0)]
    for sender in senders:
        sender.start()
    for thread in (*senders, verifying):
        thread.join()
    assert outcome == [True]
    blob.finish(GO_ON)
    blob.close()
    _check_complete(tmp_path, archive, files)


def _taken(folder: Path) -> int:
    """Bytes that everything in ``folder`` takes on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_a_tar_never_takes_its_size_twice(tmp_path: Path, order: str) -> None:
    chunk = 256 * 1024
    files = {f"shard-{number}": os.urandom(8 * 1024 * 1024) for number in range(4)}
    archive = make_tar([Member(name, content) for name, content in files.items()])
    blob = _open(tmp_path, archive, chunk_size=chunk)
    pieces = _chunks(blob)
    peak = 0
    for piece in pieces if order == "ascending" else reversed(pieces):
        _send(blob, archive, piece)
        peak = max(peak, _taken(tmp_path))
    assert blob.verify(GO_ON)
    peak = max(peak, _taken(tmp_path))
    blob.finish(GO_ON)
    peak = max(peak, _taken(tmp_path))
    blob.close()
    assert peak <= 1.02 * len(archive)
    _check_complete(tmp_path, archive, files)


def test_a_chunk_inside_of_a_file_is_written_where_it_stays(tmp_path: Path) -> None:
    content = os.urandom(20 * CHUNK)
    archive = make_tar([Member("model.safetensors", content)])
    blob = _open(tmp_path, archive)
    _send(blob, archive, Range(0, CHUNK))
    _send(blob, archive, Range(8 * CHUNK, 12 * CHUNK))
    part = (tmp_path / "blob.parts/0").read_bytes()
    header = len(archive) - archive[::-1].index(content[::-1]) - len(content)
    assert part[8 * CHUNK - header : 12 * CHUNK - header] == archive[8 * CHUNK : 12 * CHUNK]
    assert (tmp_path / "blob").stat().st_blocks * 512 <= 2 * CHUNK
    blob.close()


def test_readers_go_on_while_a_tar_becomes_complete(tmp_path: Path) -> None:
    """Until it is closed: its files have another path by then, and few of them are open."""
    members = [Member(f"part-{number}", os.urandom(2 * CHUNK)) for number in range(20)]
    archive = make_tar(members)
    blob = _open(tmp_path, archive)
    for piece in _chunks(blob):
        _send(blob, archive, piece)
    assert blob.verify(GO_ON)
    blob.finish(GO_ON)
    got, buffer = bytearray(), memoryview(bytearray(CHUNK))
    while len(got) < len(archive):
        read = blob.read(len(got), buffer)
        assert read
        got += buffer[:read]
    assert got == archive
    blob.close()


def test_entries_keep_their_kind(tmp_path: Path) -> None:
    archive = make_tar(
        [
            folder("bin"),
            Member("bin/run", b"#!", mode=0o755),
            Member("empty"),
            hard_link("again", "bin/run"),
            symlink("link", "bin/run"),
        ]
    )
    blob = _open(tmp_path, archive)
    _send(blob, archive, Range(0, len(archive)))
    assert blob.verify(GO_ON)
    blob.finish(GO_ON)
    blob.close()
    layer = load_layer(tmp_path / "blob.files")
    assert [entry.path for entry in layer.entries] == ["bin", "bin/run", "empty", "again", "link"]
    modes = [file.source.stat().st_mode & 0o777 for file in layer.files]
    assert modes == [0o555, 0o444]


def _global_header() -> bytes:
    record = pax_record(b"comment", b"x" * 1_000_000)
    return header_block(b"global", len(record), b"g") + padded(record)


HOSTILE = {
    "escape": make_tar([Member("a", b"x"), Member("../b", b"y")]),
    "cut off": make_tar([Member("a", b"x" * 5000)])[:3000],
    "no tar": b"x" * 3000,
    "twice": make_tar([Member("a", b"x"), Member("a", b"y")]),
    "loop": make_tar([symlink("a", "b"), symlink("b", "a")]),
    "followed": make_tar([Member("a", b"x")]) + header_block(b"b") + END,
    "endless": header_block(b"a", b"\x80" + b"\xff" * 11) + END,
    "beyond": header_block(b"a", 10**9) + b"x" * 2000 + END,
    "empty": b"",
    # what looks like the archive's end, as it goes on so long, and is none
    "headers": _global_header() * 7 + make_tar([Member("a", b"x" * 9000)]),
}


@pytest.mark.parametrize("archive", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tar_is_refused_once_its_digest_is_right(tmp_path: Path, archive: bytes) -> None:
    # wrong bytes look hostile as well: until the digest is known, nobody is accused
    for _ in range(2):
        blob = _open(tmp_path, archive, chunk_size=512 if len(archive) < 10**6 else 2**18)
        for piece in reversed(_chunks(blob)):
            _send(blob, archive, piece)
        assert blob.verify(GO_ON)
        with pytest.raises(InvalidArtifact):
            blob.finish(GO_ON)
        blob.close()
    assert not (tmp_path / "blob.files").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "blob",
        "blob.chunks",
        "blob.parts",
    ]


def test_zeros_after_the_end_are_not_read_again_with_every_chunk(tmp_path: Path) -> None:
    archive = make_tar([Member("a", b"x")]) + bytes(64 * 1024 * 1024)
    blob = _open(tmp_path, archive, chunk_size=1024 * 1024)
    for piece in _chunks(blob):
        _send(blob, archive, piece)
    assert blob.verify(GO_ON)
    blob.finish(GO_ON)
    blob.close()
    _check_complete(tmp_path, archive, {"a": b"x"})


def test_what_a_layer_takes_beyond_its_size_is_asked_for(tmp_path: Path) -> None:
    files = {f"file-{number}": b"x" for number in range(200)}
    archive = make_tar([Member(name, content) for name, content in files.items()])
    asked: list[int] = []
    blob = _open(tmp_path, archive, asked.append)
    _send(blob, archive, Range(0, len(archive)))
    assert blob.verify(GO_ON)
    blob.finish(GO_ON)
    blob.close()
    assert len(archive) + sum(asked) >= _taken(tmp_path)

    def refuse(_: int) -> None:
        raise NoSpace("no room")

    (tmp_path / "small").mkdir()
    blob = _open(tmp_path / "small", archive, refuse)
    with pytest.raises(NoSpace):
        _send(blob, archive, Range(0, len(archive)))
    blob.close()


def test_what_an_earlier_process_wrote_is_synchronised_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_tar([Member(f"file-{number}", os.urandom(3 * CHUNK)) for number in range(3)])
    blob = _open(tmp_path, archive)
    pieces = _chunks(blob)
    for piece in pieces[:-1]:
        _send(blob, archive, piece)
    blob.close()
    synced: set[str] = set()
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    blob = _open(tmp_path, archive)
    blob.checkpoint(GO_ON)
    blob.close()
    assert {"0", "1", "blob"} <= synced


@pytest.mark.parametrize("step", ["checkpoint", "finish"])
def test_bytes_that_the_disk_refused_are_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    # the kernel tells once, and a second fsync succeeds whatever the disk has
    archive = make_tar([Member("file", os.urandom(9 * CHUNK))])
    blob = _open(tmp_path, archive)
    _send(blob, archive, Range(0, 4 * CHUNK))
    assert blob.done == 4 * CHUNK
    blob.checkpoint(GO_ON)
    _send(blob, archive, Range(4 * CHUNK, len(archive)))
    assert blob.verify(GO_ON)

    def refuse(_: int) -> None:
        raise OSError(errno.EIO, "I/O error")

    put_on_disk = blob.checkpoint if step == "checkpoint" else blob.finish
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(ModelError, match="I/O error"):
            put_on_disk(GO_ON)
    blob.close()
    blob = _open(tmp_path, archive)
    missing = sum(len(piece) for piece in blob.missing())
    assert missing >= len(archive) - 4 * CHUNK
    for piece in _chunks(blob):
        _send(blob, archive, piece)
    assert blob.verify(GO_ON)
    blob.finish(GO_ON)
    blob.close()
    assert StoredBlob.of_files(tmp_path / "blob.files").matches(Digest.of(archive), GO_ON)


def test_a_blob_that_cannot_be_opened_leaves_no_descriptor(tmp_path: Path) -> None:
    archive = make_tar([Member("file", b"x" * CHUNK)])
    blob = _open(tmp_path, archive)
    _send(blob, archive, Range(0, len(archive)))
    blob.close()

    def refuse(_: int) -> None:
        raise NoSpace("no room")

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(NoSpace):
            _open(tmp_path, archive, refuse)
    assert len(os.listdir("/proc/self/fd")) == before
