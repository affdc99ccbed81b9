"""Chunk digests: what proves a chunk by itself, and what only all of them prove."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fetcher.chunk_digests import (
    LEAST_CHUNK,
    MAX_LIST_BYTES,
    BlobChunks,
    ChunkDigests,
    ChunkHasher,
    is_chunk_size,
    list_bytes,
)
from fetcher.errors import DigestMismatch, InvalidArtifact
from fetcher.oci import Descriptor, Digest
from fetcher.sha2 import Sha2, is_available

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHUNK = LEAST_CHUNK


def digest_of(data: bytes, algorithm: str = "sha256") -> Digest:
    return Digest(algorithm, hashlib.new(algorithm, data).hexdigest())


def chunks_of(data: bytes, algorithm: str = "sha256", chunk_size: int = CHUNK) -> BlobChunks:
    hasher = ChunkHasher(digest_of(data, algorithm), len(data), chunk_size)
    hasher.update(data)
    return hasher.finish()


def split(data: bytes, chunk_size: int = CHUNK) -> Iterator[bytes]:
    for start in range(0, max(len(data), 1), chunk_size):
        yield data[start : start + chunk_size]


def blob(data: bytes) -> Descriptor:
    return Descriptor("application/x", digest_of(data), len(data))


def list_of(*contents: bytes) -> ChunkDigests:
    return ChunkDigests.over([chunks_of(data) for data in contents], CHUNK)


def test_this_system_can_compute_them() -> None:
    assert is_available()


@given(st.sampled_from(["sha256", "sha512"]), st.integers(0, 40), st.binary(max_size=500))
def test_a_digest_can_begin_in_the_middle(algorithm: str, blocks: int, rest: bytes) -> None:
    before = os.urandom(blocks * 128)
    first = Sha2(algorithm)
    first.update(before)
    second = Sha2(algorithm, first.value, len(before))
    second.update(bytearray(rest) if rest else rest)
    assert second.hexdigest() == hashlib.new(algorithm, before + rest).hexdigest()


def test_lengths_beyond_32_bits_of_bits_are_counted() -> None:
    # with a value made up, two computations that differ in what went before differ in the end
    value = bytes(range(32))
    ends = set()
    for length in (0, 1 << 29, 1 << 32, 1 << 40):
        running = Sha2("sha256", value, length)
        running.update(b"end")
        ends.add(running.hexdigest())
    assert len(ends) == 4


def test_there_is_no_value_within_a_block() -> None:
    running = Sha2("sha256")
    running.update(b"x")
    with pytest.raises(ValueError, match="within a block"):
        _ = running.value
    with pytest.raises(ValueError, match="no sha256 value"):
        Sha2("sha256", bytes(32), 100)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 77])
def test_every_chunk_is_proven_by_itself_in_any_order(size: int, algorithm: str) -> None:
    data = os.urandom(size)
    found = chunks_of(data, algorithm)
    for number, chunk in reversed(list(enumerate(split(data)))):
        assert found.check(number, [chunk])
        assert found.check(number, [chunk[:100], memoryview(bytearray(chunk[100:]))])


def test_a_wrong_a_short_a_long_and_a_misplaced_chunk_are_refused() -> None:
    data = os.urandom(3 * CHUNK + 77)
    found = chunks_of(data)
    pieces = list(split(data))
    for number, piece in enumerate(pieces):
        wrong = bytes([piece[0] ^ 1]) + piece[1:]
        assert not found.check(number, [wrong])
        assert not found.check(number, [piece[:-1]])
        assert not found.check(number, [piece, b"x"])
        assert not found.check(number, [pieces[number - 1]])
    with pytest.raises(ValueError, match="no chunk 4"):
        found.check(4, [b""])


def test_values_do_not_depend_on_how_the_bytes_came() -> None:
    data = os.urandom(2 * CHUNK + 5)
    hasher = ChunkHasher(digest_of(data), len(data), CHUNK)
    view = memoryview(bytearray(data))
    for start in range(0, len(data), 1000):
        hasher.update(view[start : start + 1000])
    assert hasher.finish() == chunks_of(data)


def test_no_list_is_made_of_other_bytes() -> None:
    data = os.urandom(2 * CHUNK)
    for other in (data[:-1], bytes(len(data))):
        hasher = ChunkHasher(digest_of(data), len(data), CHUNK)
        hasher.update(other)
        with pytest.raises(DigestMismatch, match="something else"):
            hasher.finish()


def test_forged_values_can_pass_single_chunks_and_never_all() -> None:
    """Who pushes a list need not be believed once the whole blob is there."""
    data, forged = os.urandom(4 * CHUNK), os.urandom(4 * CHUNK)
    right, lie = chunks_of(data), chunks_of(forged)
    for taken in range(4):
        values = lie.values[: taken * 32] + right.values[taken * 32 :]
        mixed = BlobChunks(right.digest, right.size, CHUNK, values)
        pairs = zip(split(data), split(forged), strict=True)
        passes = [
            mixed.check(number, [honest]) or mixed.check(number, [other])
            for number, (honest, other) in enumerate(pairs)
        ]
        assert all(passes) == (taken == 0)


def test_a_list_comes_back_as_it_was_written() -> None:
    contents = [os.urandom(CHUNK + 1), os.urandom(5 * CHUNK)]
    own = chunks_of(os.urandom(300_000), chunk_size=128 * 1024)
    written = ChunkDigests.over([*(chunks_of(one) for one in contents), own], CHUNK)
    blobs = [*map(blob, contents), Descriptor("x", own.digest, own.size)]
    body = written.encode()
    read = ChunkDigests.parse(body, blobs)
    assert read == ChunkDigests.over(read.blobs.values(), CHUNK)
    assert read.blobs == written.blobs
    assert read.encode() == body
    assert read.of(own.digest) == own
    assert read.of(Digest.of(b"other")) is None


def test_what_a_list_tells_of_other_blobs_is_left_out() -> None:
    mine, other = os.urandom(2 * CHUNK), os.urandom(2 * CHUNK)
    read = ChunkDigests.parse(list_of(mine, other).encode(), [blob(mine)])
    assert list(read.blobs) == [digest_of(mine)]


DATA = bytes(range(256)) * (2 * CHUNK // 256)


def changed(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update(changes)


def of_blob(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["blobs"][str(digest_of(DATA))].update(changes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (changed(version=2), "version 2"),
        (changed(algorithm="sha256"), "algorithm 'sha256'"),
        (changed(chunk_size=1), "no list has"),
        (changed(chunk_size=CHUNK + 1), "no list has"),
        (changed(chunk_size=1 << 40), "no list has"),
        (changed(chunk_size="many"), "cannot be read"),
        (changed(blobs=[]), "cannot be read"),
        (of_blob(size=len(DATA) - 1), "and the manifest"),
        (of_blob(chunks="AAAA"), "2 chunks need 32"),
        (of_blob(chunks="§§"), "no base64"),
        (of_blob(chunk_size=100), "chunks of 100 bytes"),
        (of_blob(chunk_size=2 * CHUNK), "1 chunks need 0"),
    ],
)
def test_a_list_that_cannot_be_right_is_refused(
    change: Callable[[dict[str, Any]], None], match: str
) -> None:
    document = json.loads(list_of(DATA).encode())
    change(document)
    with pytest.raises(InvalidArtifact, match=match):
        ChunkDigests.parse(json.dumps(document).encode(), [blob(DATA)])


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b"[" * 100_000, b"<html>"])
def test_what_is_no_list_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidArtifact, match="cannot be read"):
        ChunkDigests.parse(body, [])
    with pytest.raises(InvalidArtifact, match="more than"):
        ChunkDigests.parse(bytes(MAX_LIST_BYTES + 1), [])


@given(st.lists(st.integers(0, 30 * CHUNK), max_size=5))
def test_the_length_of_a_list_is_foreseen(sizes: list[int]) -> None:
    contents = [bytes([number]) * size for number, size in enumerate(sizes)]
    large = [data for data in contents if len(data) > CHUNK]
    foreseen = list_bytes((blob(data), CHUNK) for data in large)
    assert len(list_of(*large).encode()) <= foreseen


def test_chunk_sizes_are_bounded_and_end_with_a_block() -> None:
    assert is_chunk_size(CHUNK)
    assert is_chunk_size(CHUNK + 4096)
    assert not is_chunk_size(CHUNK // 2)
    assert not is_chunk_size(CHUNK + 1)
    assert not is_chunk_size(1 << 30)
