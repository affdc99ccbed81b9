"""Chunk digests that come when some of a blob is there already, from whom is believed or not."""

from __future__ import annotations

import contextlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.chunk_digests import ChunkDigests
from fetcher.chunk_lists import KnownList
from fetcher.download import Source
from fetcher.errors import ChunkMismatch, DigestMismatch
from fetcher.modelpack import read_model
from fetcher.oci import Digest, Reference
from fetcher.ranges import Range
from tests.integration.test_chunk_proofs import (
    blob_of,
    chunks_of,
    files_of,
    opened,
    pulled,
    push_list,
)
from tests.support.commands import wait_until
from tests.support.lazy_models import until
from tests.support.registry_calls import NOBODY
from tests.support.stores import CHUNK, NO_FLOOR, STILL, node_parts, weights

if TYPE_CHECKING:
    from pathlib import Path

    from fetcher.chunk_digests import BlobChunks
    from fetcher.store.blobs import PartialBlob
    from tests.support.faulty_registry import FaultyRegistry, Reply
    from tests.support.proxy import BlobAnswer, Proxy
    from tests.support.registry import RegistryServer


def put(partial: PartialBlob, number: int, data: bytes, *, trusted: bool = False) -> None:
    """Bring one chunk, of the blob ``data``."""
    chunk = partial.chunk(number)
    assert partial.sink(chunk, trusted=trusted)(data[chunk.start : chunk.stop])


def wrong_at(data: bytes, *numbers: int) -> bytes:
    spoiled = bytearray(data)
    for number in numbers:
        spoiled[number * CHUNK] ^= 1
    return bytes(spoiled)


# -- one blob --------------------------------------------------------------------------------------


def test_what_was_there_is_proven_and_what_is_wrong_comes_again(tmp_path: Path) -> None:
    builder = weights(5 * CHUNK)
    data = blob_of(builder)
    with opened(tmp_path, builder) as (_, partial):
        spoiled = wrong_at(data, 1, 3)
        for number in (0, 1, 3, 4):
            put(partial, number, spoiled)
        assert partial.verify(STILL, 0.0) is None
        assert partial.expect(chunks_of(data), "r/m")
        assert partial.verify(STILL, 0.0) is None
        assert [partial.has(number) for number in range(5)] == [True, False, False, False, True]
        assert partial.disproved == {1, 3}
        assert [partial.is_trusted(number) for number in (0, 4)] == [True, True]
        for number in (1, 2, 3):
            put(partial, number, data)
        assert partial.verify(STILL) is True
        assert partial.made == chunks_of(data)


def test_hearsay_finds_what_is_wrong_and_lets_nothing_be_shown(tmp_path: Path) -> None:
    builder = weights(4 * CHUNK)
    data = blob_of(builder)
    with opened(tmp_path, builder) as (_, partial):
        spoiled = wrong_at(data, 1)
        for number in (0, 1):
            put(partial, number, spoiled)
        assert partial.expect(chunks_of(data))
        assert not partial.is_proving
        assert partial.verify(STILL, 0.0) is None
        assert (partial.doubted, partial.disproved) == ({1}, set())
        for number in (1, 2, 3):
            put(partial, number, data)
        assert not partial.is_any_trusted
        assert partial.verify(STILL) is True


def test_hearsay_that_is_given_up_leaves_what_is_there(tmp_path: Path) -> None:
    """The digest of the whole has the last word."""
    builder = weights(4 * CHUNK)
    data = blob_of(builder)
    with opened(tmp_path, builder) as (_, partial):
        partial.expect(chunks_of(wrong_at(data, 3), digest=partial.digest))
        for number in range(3):
            put(partial, number, data)
        partial.expect(None)
        put(partial, 3, data)
        assert partial.done == len(data)
        assert partial.verify(STILL) is True


def test_hearsay_against_the_registrys_own_bytes_is_not_followed(tmp_path: Path) -> None:
    builder = weights(4 * CHUNK)
    data = blob_of(builder)
    with opened(tmp_path, builder) as (_, partial):
        for number in range(4):
            put(partial, number, data, trusted=True)
        partial.expect(chunks_of(os.urandom(len(data)), digest=partial.digest))
        assert partial.verify(STILL) is None
        assert partial.is_contradicted
        assert partial.done == len(data)
        partial.expect(None)
        assert partial.verify(STILL) is True


def test_hashing_goes_on_at_the_first_chunk_that_was_wrong(tmp_path: Path) -> None:
    builder = weights(6 * CHUNK + 5)
    data = blob_of(builder)
    with opened(tmp_path, builder) as (store, partial):
        spoiled = wrong_at(data, 2, 4)
        for number in range(7):
            put(partial, number, spoiled)
        assert partial.verify(STILL) is False
        partial.drop(4)
        put(partial, 4, data)
        assert partial.verify(STILL) is False
        # behind its back, to see that nobody looks there again
        with store.blob_path(partial.digest).open("r+b") as file:
            file.write(bytes(2 * CHUNK))
        partial.drop(2)
        put(partial, 2, data)
        assert partial.verify(STILL) is True
        assert partial.made == chunks_of(data)


def test_digests_may_come_and_go_while_a_thread_verifies(tmp_path: Path) -> None:
    builder = weights(40 * CHUNK)
    data = blob_of(builder)
    right, forged = chunks_of(data), chunks_of(os.urandom(len(data)))
    with opened(tmp_path, builder) as (_, partial):
        forged = replace(forged, digest=partial.digest)
        ends: list[bool | None] = []

        def verify() -> None:
            while not ends or ends[-1] is None:
                ends.append(partial.verify(STILL, 0.01))

        with ThreadPoolExecutor(1) as threads:
            verified = threads.submit(verify)
            for number in range(40):
                try:
                    put(partial, number, data, trusted=True)
                except ChunkMismatch:
                    partial.expect(None)
                    put(partial, number, data, trusted=True)
                partial.expect((None, forged, right)[number % 3])
            partial.expect(None)
            verified.result(30)
        assert ends[-1] is True
        assert False not in ends
        assert partial.done == len(data)


# -- one download ----------------------------------------------------------------------------------


def test_a_download_that_was_begun_takes_up_a_list(
    registry: RegistryServer, home: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As one begun for a peer, before a pod of this node names the model."""
    builder = weights(12 * CHUNK)
    data = blob_of(builder)
    builder.push(registry, "late/begun", "v1")
    reference = Reference.parse(f"{home.address}/late/begun:v1").with_digest(builder.digest)
    layer = read_model(builder.manifest()).layers[0]
    home.faults.rewrites = [_flipped]

    async def main() -> None:
        async with node_parts(tmp_path, NO_FLOOR) as node:
            first = Source(reference, NOBODY)
            with node.jobs.join(layer, first, background=False) as job:
                await job.want(Range(0, 1))
                # it is counted a moment after it is there
                await until(lambda: job.done == CHUNK)
                job.offer(replace(first, chunks=_known(chunks_of(data), reference)))
                with trio.fail_after(20):
                    with job.whole():
                        await job.wait()
            assert node.store.blob_path(layer.descriptor.digest).read_bytes() == data

    trio.run(main)
    assert "fetching anew" not in caplog.text
    assert home.counts.total == 13 * CHUNK


def test_a_list_that_comes_late_and_lies_costs_no_pull(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(12 * CHUNK)
    data = blob_of(builder)
    builder.push(registry, "late/lies", "v1")
    reference = Reference.parse(f"{home.address}/late/lies:v1").with_digest(builder.digest)
    layer = read_model(builder.manifest()).layers[0]
    lie = chunks_of(os.urandom(len(data)), digest=layer.descriptor.digest)
    told: list[str] = []

    async def main() -> None:
        async with node_parts(tmp_path, NO_FLOOR) as node:
            first = Source(reference, NOBODY)
            with node.jobs.join(layer, first, background=False) as job:
                await job.want(Range(0, 4 * CHUNK))
                known = replace(_known(lie, reference), contradicted=lambda: told.append("lie"))
                job.offer(replace(first, chunks=replace(known, is_hearsay=True)))
                with trio.fail_after(20), contextlib.ExitStack() as closing:
                    closing.enter_context(job.whole())
                    await job.wait()
            assert node.store.blob_path(layer.descriptor.digest).read_bytes() == data

    trio.run(main)
    assert told == ["lie"]
    # besides the blob only what was on its way when the lie was found
    assert home.counts.total <= 2 * 12 * CHUNK


def test_a_list_that_comes_when_all_is_there_changes_nothing(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(12 * CHUNK)
    data = blob_of(builder)
    builder.push(registry, "late/over", "v1")
    reference = Reference.parse(f"{home.address}/late/over:v1").with_digest(builder.digest)
    layer = read_model(builder.manifest()).layers[0]
    lie = chunks_of(os.urandom(len(data)), digest=layer.descriptor.digest)
    heard = replace(_known(chunks_of(data), reference), is_hearsay=True)

    async def main() -> None:
        async with node_parts(tmp_path, NO_FLOOR) as node:
            first = Source(reference, NOBODY, heard)
            with trio.fail_after(20), node.jobs.join(layer, first) as job:
                await job.wait()
                job.offer(Source(reference, NOBODY, _known(lie, reference)))
            assert job.chunks is heard
            assert job.partial is not None
            assert job.partial.is_closed
            assert job.partial.done == len(data)

    trio.run(main)
    assert home.counts.total == len(data)


# -- one pull --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begins", "chunk_size", "is_used"),
    [(True, CHUNK, True), (False, CHUNK, True), (False, 2 * CHUNK, True), (True, 2 * CHUNK, False)],
)
def test_a_pull_waits_for_no_list_and_goes_by_it_once_it_comes(
    registry: RegistryServer,
    faulty: FaultyRegistry,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    *,
    begins: bool,
    chunk_size: int,
    is_used: bool,
) -> None:
    """A list of other chunks than the node's is of use only where next to nothing has come."""
    builder = weights(20 * CHUNK)
    data = blob_of(builder)
    builder.push(registry, "late/beside", "v1")
    push_list(registry, "late/beside", builder, chunks_of(data, chunk_size))
    caplog.set_level(logging.INFO)
    asked: list[str] = []

    def asked_for_blob(reply: Reply) -> Reply:
        asked.append("blob")
        if len(asked) > begins:
            wait_until(lambda: "has chunk digests" in caplog.text, "the list", 20)
        return replace(reply, body=bytes([reply.body[0] ^ 1]) + reply.body[1:])

    def asked_for_list(reply: Reply) -> Reply:
        wait_until(lambda: len(asked) > begins, "the blob to be asked for", 20)
        return reply

    faulty.add(str(Digest.of(data)), change=asked_for_blob, method="GET", times=1)
    faulty.add(str(Digest.of(data)), change=asked_for_blob, method="GET", times=1)
    faulty.add("/referrers/", change=asked_for_list)
    with contextlib.nullcontext() if is_used else pytest.raises(DigestMismatch):
        assert pulled(tmp_path, faulty.reference("late/beside", "v1")) == files_of(builder)
    assert ("in chunks whose digests came" in caplog.text) == (is_used and chunk_size != CHUNK)


def _known(chunks: BlobChunks, reference: Reference) -> KnownList:
    digests = ChunkDigests.over([chunks], CHUNK)
    return KnownList(digests, reference, chunks.digest, lambda: None)


def _flipped(answer: BlobAnswer) -> BlobAnswer:
    answer.body = bytes([answer.body[0] ^ 1]) + answer.body[1:]
    return answer
