"""Who waits for some of a blob: woken by what he waits for, and not by all that comes."""

from __future__ import annotations

import functools
import os
import time
from typing import TYPE_CHECKING

import trio
import trio.testing

from fetcher.credentials import Anonymous
from fetcher.download import Source
from fetcher.job import Job
from fetcher.modelpack import blob_layer
from fetcher.oci import Digest, Reference
from fetcher.ranges import Range
from fetcher.store.blobs import PartialBlob
from fetcher.store.places import WholeFile
from tests.support.stores import CHUNK

if TYPE_CHECKING:
    from pathlib import Path

DATA = os.urandom(3 * CHUNK)
SOURCE = Source(Reference.parse("registry.example/models/one:v1"), Anonymous())


class Wakings(trio.abc.Instrument):
    """Counts how often the loop waits for something, and so how often it was woken."""

    def __init__(self) -> None:
        self.count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += timeout > 0


def test_pieces_of_a_chunk_wake_nobody_who_waits_for_all_of_it(tmp_path: Path) -> None:
    blob = PartialBlob(
        WholeFile(tmp_path / "blob"), tmp_path / "chunks", Digest.of(DATA), len(DATA), CHUNK
    )
    wakings = Wakings()

    def receive() -> int:
        """As a thread does; how often the loop was woken before the chunk was whole."""
        sink = blob.sink(Range(CHUNK, 2 * CHUNK))
        before, last = wakings.count, 2 * CHUNK - 100
        for start in range(CHUNK, last, 100):
            sink(memoryview(DATA)[start : min(start + 100, last)])
        # a loop that was called is given the time to come
        time.sleep(0.05)
        woken = wakings.count - before
        sink(memoryview(DATA)[last : 2 * CHUNK])
        return woken

    async def main() -> None:
        job = Job(blob_layer(Digest.of(DATA), len(DATA), "file"), SOURCE, None, "")
        job.partial = blob
        with blob.watch(job.arrived):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(functools.partial(job.want, Range(CHUNK + 5, CHUNK + 10)))
                await trio.testing.wait_all_tasks_blocked()
                assert await trio.to_thread.run_sync(receive) == 0
            await job.pass_on(Range(CHUNK, 2 * CHUNK))
            with trio.move_on_after(0.05) as waiting:
                await job.want(Range(0, len(DATA)))
            assert waiting.cancelled_caught

    trio.run(main, instruments=[wakings])
    blob.close()
