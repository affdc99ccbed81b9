"""Tar layers: what is read, what is refused, and that nothing hostile does anything else."""

from __future__ import annotations

import gzip
import io
import tarfile
import time
import tracemalloc
from typing import TYPE_CHECKING, BinaryIO

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fetcher.archives import UnpackLimits, read_tar
from fetcher.artifacts import Entry, FileEntry, FolderEntry, HardLinkEntry, LinkEntry, Tree
from fetcher.compression import MAX_ZSTD_WINDOW
from fetcher.errors import InvalidArtifact
from fetcher.modelpack import Packing
from tests.support.models import (
    END,
    MTIME,
    Member,
    folder,
    gzip_bomb,
    hard_link,
    header_block,
    make_tar,
    pack,
    padded,
    pax_record,
    symlink,
    tar_files,
)

if TYPE_CHECKING:
    from collections.abc import Callable

ARCHIVES = [Packing.TAR, Packing.TAR_GZIP, Packing.TAR_ZSTD]
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
LIMITS = UnpackLimits(64 * 1024 * 1024)


def read(
    layer: bytes | BinaryIO, packing: Packing = Packing.TAR, limits: UnpackLimits = LIMITS
) -> tuple[list[Entry], dict[str, bytes]]:
    """All entries, and the bytes of the files."""
    stream = io.BytesIO(layer) if isinstance(layer, bytes) else layer
    entries, files = [], {}
    for entry, content in read_tar(stream, packing, limits):
        entries.append(entry)
        if content is not None:
            files[entry.path] = content.read()
    return entries, files


def refuse(layer: bytes, why: str, packing: Packing = Packing.TAR) -> None:
    with pytest.raises(InvalidArtifact, match=why) as caught:
        read(layer, packing)
    assert len(caught.value.message) < 1000
    assert caught.value.message.isprintable()


MEMBERS = [
    folder("./"),
    folder("sub"),
    Member("sub/model.bin", bytes(range(256)) * 5),
    Member("empty"),
    Member("run.sh", b"#!/bin/sh\n", mode=0o750),
    symlink("link", "sub/model.bin"),
    symlink("sub/up", "../empty"),
    hard_link("again", "sub/model.bin"),
    hard_link("and-again", "again"),
    Member("long/" + "n" * 200, b"x"),
]
MTIME_NS = MTIME * 10**9


@pytest.mark.parametrize("packing", ARCHIVES)
@pytest.mark.parametrize("format", FORMATS[1:])
def test_every_kind_of_entry_in_every_packing(packing: Packing, format: int) -> None:
    entries, files = read(pack(make_tar(MEMBERS, format), packing), packing)
    assert entries == [
        FolderEntry("sub"),
        FileEntry("sub/model.bin", 1280, mtime_ns=MTIME_NS),
        FileEntry("empty", 0, mtime_ns=MTIME_NS),
        FileEntry("run.sh", 10, executable=True, mtime_ns=MTIME_NS),
        LinkEntry("link", "sub/model.bin"),
        LinkEntry("sub/up", "../empty"),
        HardLinkEntry("again", "sub/model.bin"),
        HardLinkEntry("and-again", "sub/model.bin"),
        FileEntry("long/" + "n" * 200, 1, mtime_ns=MTIME_NS),
    ]
    assert files["sub/model.bin"] == bytes(range(256)) * 5
    assert files["empty"] == b""


def test_old_ways_to_write_a_tar() -> None:
    ustar_prefix = header_block(b"b", 1, prefix=b"a") + padded(b"x")
    gnu_times = header_block(b"c", 1, magic=b"ustar  \0", prefix=b"14123456701\0") + padded(b"y")
    v7 = header_block(b"d", 1, b"\0", magic=bytes(8)) + padded(b"z")
    v7_folder = header_block(b"e/", 0, b"\0", magic=bytes(8))
    contiguous = header_block(b"f", b"\x80" + bytes(10) + b"\1", b"7") + padded(b"w")
    _, files = read(ustar_prefix + gnu_times + v7 + v7_folder + contiguous + END)
    assert files == {"a/b": b"x", "c": b"y", "d": b"z", "f": b"w"}


def test_pax_headers_win_and_global_ones_are_passed_over() -> None:
    archive = make_tar(
        [Member("a", b"x", pax={"path": "ü/b", "mtime": "1.5", "SCHILY.xattr.user.a": "\0\n="})],
        headers={"comment": "0123456789abcdef"},
    )
    assert read(archive)[0] == [FileEntry("ü/b", 1, mtime_ns=1_500_000_000)]


@pytest.mark.parametrize("mtime", ["-1", "nan", "1e5", "9" * 12, "", "1.2.3", "0x5"])
def test_times_that_no_file_has_are_not_kept(mtime: str) -> None:
    records = pax_record(b"mtime", mtime.encode())
    archive = header_block(b"", len(records), b"x") + padded(records) + header_block(b"a") + END
    [entry] = read(archive)[0]
    assert isinstance(entry, FileEntry)
    assert entry.mtime_ns in (None, MTIME_NS)


def test_members_and_frames_may_be_several() -> None:
    archive = tar_files({"a": b"x" * 5000})
    halves = archive[:700], archive[700:]
    assert read(b"".join(map(gzip.compress, halves)), Packing.TAR_GZIP)[1] == {"a": b"x" * 5000}
    skippable = (0x184D2A53).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"stuff"
    frames = b"".join(zstandard.compress(half) + skippable for half in halves)
    assert read(frames, Packing.TAR_ZSTD)[1] == {"a": b"x" * 5000}


@pytest.mark.parametrize(
    "options",
    [
        {"write_content_size": False},
        {"write_checksum": True},
        {"level": 19, "write_checksum": True, "write_content_size": False},
    ],
)
def test_frames_of_every_shape(options: dict[str, int]) -> None:
    for data in (b"", b"x", bytes(300_000), b"abc" * 100_000, bytes(range(256)) * 3000):
        archive = tar_files({"a": data})
        frames = zstandard.ZstdCompressor(**options).compress(archive)  # type: ignore[arg-type]
        assert read(frames, Packing.TAR_ZSTD)[1] == {"a": data}
        streamed = zstandard.ZstdCompressor(**options).compressobj()  # type: ignore[arg-type]
        frames = streamed.compress(archive[:1000]) + streamed.flush(
            zstandard.COMPRESSOBJ_FLUSH_BLOCK
        )
        frames += streamed.compress(archive[1000:]) + streamed.flush()
        assert read(frames, Packing.TAR_ZSTD)[1] == {"a": data}


@pytest.mark.parametrize("packing", ARCHIVES)
def test_the_end_may_be_marked_badly(packing: Packing) -> None:
    one = header_block(b"a", 3) + b"abc"
    for archive in (
        one,
        padded(one),
        padded(one) + bytes(512),
        padded(one) + END + bytes(9000),
        END,
    ):
        _, files = read(pack(archive, packing), packing)
        assert files == ({} if archive == END else {"a": b"abc"})


def test_gzip_may_be_followed_by_zeros() -> None:
    layer = pack(tar_files({"a": b"x"}), Packing.TAR_GZIP)
    assert read(layer + bytes(100), Packing.TAR_GZIP)[1] == {"a": b"x"}


BAD_PATHS = ["/etc/passwd", "../a", "a/../../b", "a/..", "..", "a\nb", "n" * 256, "a/" * 200]


@pytest.mark.parametrize("name", BAD_PATHS)
@pytest.mark.parametrize(
    "make", [Member, folder, lambda name: symlink(name, "x"), lambda name: hard_link(name, "ok")]
)
def test_bad_paths_are_refused(name: str, make: Callable[[str], Member]) -> None:
    refuse(make_tar([Member("ok"), make(name)]), "path")


@pytest.mark.parametrize("name", [b"", b"/", b"a\xff", b"\xed\xb3\xbf"])
def test_bad_names_of_bytes_are_refused(name: bytes) -> None:
    refuse(header_block(name) + END, "path")
    refuse(header_block(b"a", type=b"2", target=name) + END, "link|path")


def test_a_name_cannot_hide_behind_a_nul() -> None:
    archive = pax_record(b"path", b"a\0/../../b")
    refuse(
        header_block(b"", len(archive), b"x") + padded(archive) + header_block(b"c") + END,
        "control",
    )


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([symlink("l", "/etc")], "absolute"),
        ([symlink("l", "../x")], "leaves"),
        ([symlink("l", "")], "no target"),
        ([hard_link("h", "no")], "before it"),
        ([hard_link("h", "later"), Member("later", b"x")], "before it"),
        ([hard_link("h", "/etc/passwd")], "absolute"),
        ([hard_link("h", "../x")], r"'\.\.'"),
        ([folder("f"), hard_link("h", "f")], "before it"),
        ([symlink("l", "x"), hard_link("h", "l")], "before it"),
        ([Member("f", type=tarfile.CHRTYPE)], "character device"),
        ([Member("f", type=tarfile.BLKTYPE)], "block device"),
        ([Member("f", type=tarfile.FIFOTYPE)], "fifo"),
        ([Member("f", type=b"Z")], "unknown type"),
        ([Member("f", type=b"V")], "volume label"),
        ([Member("f", mode=0o4755)], "setuid"),
        ([Member("f", mode=0o2755)], "setuid"),
        ([Member("f", pax={"GNU.sparse.size": "5"})], "sparse"),
        ([Member("f", pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})], "sparse"),
    ],
)
def test_what_has_no_place_in_a_model_is_refused(members: list[Member], why: str) -> None:
    refuse(make_tar(members), why)


def test_folders_may_be_setgid_and_sticky() -> None:
    shared = Member("f", type=tarfile.DIRTYPE, mode=0o3777)
    assert read(make_tar([shared]))[0] == [FolderEntry("f")]


def extended(type: bytes, data: bytes, size: int | None = None) -> bytes:
    return header_block(b"x", len(data) if size is None else size, type) + padded(data)


NEGATIVE = b"\xff" * 12


@pytest.mark.parametrize(
    ("archive", "why"),
    [
        (b"", "empty"),
        (b"not a tar at all", "cut off"),
        (b"not a tar at all" * 100, "damaged|checksum"),
        (header_block(b"f", b"\xff" * 11 + b"\x00") + END, "bytes"),
        (header_block(b"f", NEGATIVE) + END, "-1 bytes"),
        (header_block(b"f", b"\x80" + b"\xff" * 11) + END, "bytes"),
        (header_block(b"f", b"-0000000001\0") + END, "is no size"),
        (header_block(b"f", b"0o0000000_1\0") + END, "is no size"),
        (header_block(b"f", 10) + b"short", "cut off in 'f': 5 bytes"),
        (header_block(b"f", 10)[:300], "cut off in the middle"),
        (header_block(b"f", 1) + padded(b"x") + b"\1" * 512, "checksum"),
        (header_block(b"f", 1) + padded(b"x") + b"\1" * 511, "cut off"),
        (header_block(b"l", 5, b"2", target=b"a") + END, "has 5 bytes"),
        (header_block(b"f") + header_block(b"l", 5, b"1", target=b"f") + END, "has 5 bytes"),
        (header_block(b"f/", 5) + padded(b"12345") + END, "folder"),
        (END + header_block(b"f") + END, "followed by other data"),
        (bytes(512) + header_block(b"f") + END, "followed by other data"),
        (tar_files({"a": b"x"}) + b"garbage", "followed by other data"),
        (header_block(b"f", 0, b"S") + END, "sparse"),
        (extended(b"x", b"", 2 * 1024 * 1024), "at most"),
        (extended(b"L", b"", 2 * 1024 * 1024), "at most"),
        (header_block(b"x", NEGATIVE, b"g"), "at most"),
        (extended(b"x", b"", 1024 * 1024), "cut off in an extended"),
        (extended(b"L", b"a"), "should follow"),
        (extended(b"x", pax_record(b"path", b"a")) + END, "should follow"),
        (extended(b"x", b"") * 2 + header_block(b"a") + END, "second extended header"),
        (extended(b"L", b"a") * 2 + header_block(b"a") + END, "second long name"),
        (extended(b"g", pax_record(b"path", b"a")) + header_block(b"a") + END, "global"),
        (extended(b"g", pax_record(b"GNU.sparse.name", b"a")) + END, "sparse"),
        (extended(b"x", b"5 a=b\n") + header_block(b"a") + END, "length is wrong"),
        (extended(b"x", b"99999999 a=b\n") + header_block(b"a") + END, "length is wrong"),
        (extended(b"x", b"0 a=b\n") + header_block(b"a") + END, "length is wrong"),
        (extended(b"x", b"-6 a=b\n") + header_block(b"a") + END, "length is wrong"),
        (extended(b"x", b"9" * 5000) + header_block(b"a") + END, "length is wrong"),
        (extended(b"x", b"6 ab\n\n") + header_block(b"a") + END, "no '='|length"),
        (extended(b"x", b"6 a=b\n" * 2000) + header_block(b"a") + END, "1024 records"),
        (extended(b"x", pax_record(b"size", b"-1")) + header_block(b"a") + END, "no size"),
        (extended(b"x", pax_record(b"size", b"1_0")) + header_block(b"a") + END, "no size"),
        (extended(b"x", pax_record(b"size", b"9" * 19)) + header_block(b"a") + END, "bytes"),
        (extended(b"x", pax_record(b"size", b"9" * 5000)) + header_block(b"a") + END, "no size"),
    ],
)
def test_broken_archives_are_refused(archive: bytes, why: str) -> None:
    refuse(archive, why)


def test_chains_of_headers_are_no_recursion() -> None:
    layer = extended(b"g", pax_record(b"comment", b"x")) * 4001 + header_block(b"a") + END
    with pytest.raises(InvalidArtifact, match="more than 1000 entries"):
        read(layer, limits=UnpackLimits(1 << 30, max_entries=1000))
    assert read(layer)[0] == [FileEntry("a", 0, mtime_ns=MTIME_NS)]


@pytest.mark.parametrize("packing", [Packing.TAR_GZIP, Packing.TAR_ZSTD])
def test_every_truncation_of_a_compressed_layer_is_refused(packing: Packing) -> None:
    layer = pack(tar_files({"a": b"x" * 3000, "b": bytes(range(256))}), packing)
    for size in range(len(layer)):
        with pytest.raises(InvalidArtifact):
            read(layer[:size], packing)


def test_every_truncation_of_a_tar_is_refused_or_whole_entries() -> None:
    files = {"a": b"x" * 600, "b": bytes(range(256))}
    layer = tar_files(files)
    for size in range(len(layer)):
        try:
            found = read(layer[:size])[1]
        except InvalidArtifact:
            continue
        assert found.items() <= files.items()


@pytest.mark.parametrize("packing", [Packing.TAR_GZIP, Packing.TAR_ZSTD])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer + b"garbage",
        lambda layer: b"garbage" + layer,
        lambda layer: layer[:-6] + b"\0" + layer[-5:],
        lambda layer: tar_files({"a": b"not compressed"}),
    ],
)
def test_damaged_compression_is_refused(packing: Packing, change: Callable[[bytes], bytes]) -> None:
    refuse(change(pack(tar_files({"a": b"x" * 3000}), packing)), packing.value[4:], packing)


def test_a_large_zstd_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    layer = compressor.compress(tar_files({"a": bytes(1000)})) + compressor.flush()
    assert MAX_ZSTD_WINDOW < 1 << 28
    refuse(layer, "memory", Packing.TAR_ZSTD)


@pytest.mark.parametrize("packing", [Packing.TAR_GZIP, Packing.TAR_ZSTD])
def test_a_bomb_is_refused_before_its_bytes_are_given(packing: Packing) -> None:
    zeros = 256 * 1024 * 1024
    bomb = gzip_bomb(zeros)
    if packing is Packing.TAR_ZSTD:
        bomb = zstandard.compress(gzip.decompress(bomb))
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArtifact, match="where at most"):
            read(bomb, packing, UnpackLimits(1024 * 1024))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 1024 * 1024


@pytest.mark.parametrize("packing", ARCHIVES)
def test_the_limit_counts_headers_and_what_follows(packing: Packing) -> None:
    archive = tar_files({"a": b"x" * 1000})
    layer = pack(archive, packing)
    assert read(layer, packing, UnpackLimits(len(archive)))[1] == {"a": b"x" * 1000}
    with pytest.raises(InvalidArtifact, match="more than the"):
        read(layer, packing, UnpackLimits(len(archive) - 1))
    endless = pack(archive + bytes(4 * 1024 * 1024), packing)
    with pytest.raises(InvalidArtifact, match="more than the"):
        read(endless, packing, UnpackLimits(1024 * 1024))


def test_the_number_of_entries_is_limited() -> None:
    layer = tar_files({f"f{number}": b"" for number in range(11)})
    with pytest.raises(InvalidArtifact, match="more than 10"):
        read(layer, limits=UnpackLimits(1 << 20, max_entries=10))


def test_huge_headers_take_little_memory() -> None:
    record = pax_record(b"comment", b"x" * 1_000_000)
    layer = (extended(b"g", record) * 4) + header_block(b"a") + END
    stream = io.BytesIO(layer)
    tracemalloc.start()
    try:
        read(stream)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * 1024 * 1024


def test_headers_without_end_are_refused() -> None:
    record = pax_record(b"comment", b"x" * 1_000_000)
    layer = (extended(b"g", record) * 6) + header_block(b"a", 5) + padded(b"right") + END
    with pytest.raises(InvalidArtifact, match="bytes of headers before one entry"):
        read(io.BytesIO(layer))


class Dripping(io.RawIOBase):
    """A stream that gives a few bytes at a time, and never seeks."""

    def __init__(self, data: bytes) -> None:
        self._stream = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        return self._stream.readinto(memoryview(buffer)[:7])


@pytest.mark.parametrize("packing", ARCHIVES)
def test_a_stream_may_give_less_than_it_was_asked_for(packing: Packing) -> None:
    dripping = Dripping(pack(make_tar(MEMBERS), packing))
    entries, files = read(dripping, packing)  # type: ignore[arg-type]
    assert len(entries) == 9
    assert files["sub/model.bin"] == bytes(range(256)) * 5


class Failing(Dripping):
    """A disk that fails after a while."""

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if self._stream.tell() > 100:
            raise OSError(5, "the disk is broken")
        return super().readinto(buffer)


@pytest.mark.parametrize("packing", ARCHIVES)
def test_an_error_of_the_disk_is_not_the_artifacts(packing: Packing) -> None:
    layer = pack(tar_files({"a": bytes(range(256)) * 5}), packing)
    with pytest.raises(OSError, match="the disk is broken"):
        read(Failing(layer), packing)  # type: ignore[arg-type]


def test_contents_are_read_in_pieces_and_only_in_their_turn() -> None:
    layer = tar_files({"a": b"0123456789", "b": b"abcdefghij", "c": b""})
    archive = read_tar(io.BytesIO(layer), Packing.TAR, LIMITS)
    _, first = next(archive)
    assert first is not None
    assert first.read(4) == b"0123"
    buffer = bytearray(100)
    assert first.readinto(buffer) == 6  # type: ignore[attr-defined]
    assert buffer[:6] == b"456789"
    assert first.read(1 << 60) == b""
    _, second = next(archive)
    assert second is not None
    with pytest.raises(ValueError, match=r"read on past|closed"):
        first.read(1)
    assert second.read(3) == b"abc"
    entry, third = next(archive)
    assert entry == FileEntry("c", 0, mtime_ns=MTIME_NS)
    assert third is not None
    assert third.read() == b""
    assert next(archive, None) is None


def test_a_raw_layer_is_no_archive() -> None:
    with pytest.raises(ValueError, match="raw"):
        read_tar(io.BytesIO(b""), Packing.RAW, LIMITS)


def test_plain_archives_are_read_at_the_speed_of_memory() -> None:
    size = 64 * 1024 * 1024
    layer = header_block(b"a", size) + bytes(size) + END
    view = memoryview(bytearray(1024 * 1024))
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        for _, content in read_tar(io.BytesIO(layer), Packing.TAR, UnpackLimits(2 * size)):
            while content is not None and content.readinto(view):  # type: ignore[attr-defined]
                pass
        best = max(best, size / (time.perf_counter() - started))
    assert best > 0.5e9, "a copy too many"


names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1)
names = names.filter(lambda name: name not in (".", "..") and len(name.encode()) < 256)
trees = st.dictionaries(
    st.lists(names, min_size=1, max_size=4).map("/".join), st.binary(max_size=2000), max_size=8
)


@settings(deadline=None)
@given(trees, st.sampled_from(ARCHIVES), st.sampled_from(FORMATS[1:]))
def test_trees_come_out_as_they_went_in(
    files: dict[str, bytes], packing: Packing, format: int
) -> None:
    archive = make_tar([Member(path, data) for path, data in files.items()], format)
    entries, found = read(pack(archive, packing), packing)
    assert found == files
    assert [entry.path for entry in entries] == list(files)


mutations = st.lists(
    st.tuples(st.integers(0, 10**6), st.binary(max_size=4), st.integers(0, 600)), max_size=6
)
SAMPLE = make_tar(MEMBERS, headers={"comment": "x"}) + make_tar(MEMBERS, tarfile.GNU_FORMAT)


def mutate(data: bytes, changes: list[tuple[int, bytes, int]]) -> bytes:
    for position, inserted, removed in changes:
        position %= len(data) + 1
        data = data[:position] + inserted + data[position + removed :]
    return data


def mend(archive: bytes) -> bytes:
    """Right checksums wherever a header may be, so that damage gets past the first check."""
    blocks = [archive[at : at + 512] for at in range(0, len(archive), 512)]
    mended = []
    for block in blocks:
        if len(block) == 512 and any(block):
            total = sum(block[:148]) + sum(block[156:]) + 8 * 32
            block = block[:148] + b"%06o\0 " % total + block[156:]
        mended.append(block)
    return b"".join(mended)


def survives(layer: bytes, packing: Packing) -> None:
    tree = Tree()
    try:
        for entry, content in read_tar(io.BytesIO(layer), packing, UnpackLimits(1 << 22)):
            tree.add(entry)
            if content is not None:
                assert isinstance(entry, FileEntry)
                assert len(content.read()) == entry.size
        for entry in tree.entries():
            assert not entry.path.startswith(("/", "../"))
    except InvalidArtifact as error:
        assert len(error.message) < 1000  # noqa: PT017 -- any outcome is fine, but only these two


@settings(max_examples=300, deadline=None)
@given(mutations, st.sampled_from(ARCHIVES), st.sampled_from(["archive", "layer"]))
def test_damage_is_found_or_harmless(
    changes: list[tuple[int, bytes, int]], packing: Packing, where: str
) -> None:
    if where == "archive":
        survives(pack(mend(mutate(SAMPLE, changes)), packing), packing)
    else:
        survives(mutate(pack(SAMPLE, packing), changes), packing)


@settings(deadline=None)
@given(st.binary(max_size=2000), st.sampled_from(ARCHIVES))
def test_noise_is_no_archive(noise: bytes, packing: Packing) -> None:
    survives(noise, packing)
    survives(pack(noise, packing), packing)
