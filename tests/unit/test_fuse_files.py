"""Reads of a worker that meet what goes on at the same time."""

from __future__ import annotations

import fcntl
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from fetcher.errors import InProgress, ModelError, Unavailable
from fetcher.modelpack import Packing, Selection, read_model
from fetcher.oci import Digest
from fetcher.ranges import Range
from fuse import mountpoint
from fuse.buffers import Buffers
from fuse.chunks import Blob
from fuse.droppings import Droppings
from fuse.files import OpenFile
from fuse.layers import OpenLayer
from fuse.mountpoint import locked
from fuse.tree import Inodes
from tests.support.lazy_agent import CHUNK, SmallAgent
from tests.support.models import ModelBuilder

if TYPE_CHECKING:
    from pathlib import Path


class Brings:
    """What a worker asks: all of it is there at once, or refused."""

    def __init__(self, agent: SmallAgent) -> None:
        self._agent = agent
        self.failure: ModelError | None = None
        self.asked = trio.Event()

    async def want(self, blob: str, part: Range) -> None:
        self._agent.fill(blob, part)
        await trio.lowlevel.checkpoint()

    async def index(self, blob: str) -> None:
        self.asked.set()
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        self._agent.open_archive(blob)


def small_agent(root: Path, builder: ModelBuilder, data: bytes) -> SmallAgent:
    return SmallAgent(root, builder.body, lambda _, part: data[part.start : part.stop])


def test_a_read_whose_file_was_closed_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of a closed descriptor may be that of any other file by then."""
    data = os.urandom(4 * CHUNK)
    builder = ModelBuilder().add_raw("x", data)
    agent = small_agent(tmp_path, builder, data)
    name = str(Digest.of(data))
    layer = read_model(builder.manifest()).layers[0]
    blob = Blob(tmp_path / "blobs" / "sha256", layer, lambda *_: None)
    [file] = Inodes(read_model(builder.manifest()), Selection()).files()
    reads = 0
    read = OpenFile._read

    async def overtaken(self: OpenFile, *arguments: Any) -> None:
        nonlocal reads
        reads += 1
        await read(self, *arguments)
        if reads == 1:
            # the agent begins anew, and what comes is the same: only who looks at the files sees it
            agent.spoil(name, "", tell=False)
            agent.fill(name, Range(0, len(data)))
            blob.look()
            arguments[1][:] = bytes(len(arguments[1]))

    async def main() -> None:
        opened = OpenFile(file, blob, Brings(agent), Buffers(), Droppings())  # type: ignore[arg-type]
        with trio.fail_after(10):
            assert bytes(await opened.read(Range(5, CHUNK))) == data[5:CHUNK]
        opened.close()

    monkeypatch.setattr(OpenFile, "_read", overtaken)
    trio.run(main)
    assert reads == 2


def test_who_asks_right_after_a_failure_is_not_forgotten(tmp_path: Path) -> None:
    data = {"a": b"b"}
    builder = ModelBuilder().add_tar(data, Packing.TAR)
    archive = next(iter(reversed(builder.blobs.values())))
    agent = small_agent(tmp_path, builder, archive)
    model = read_model(builder.manifest())
    blob = Blob(tmp_path / "blobs" / "sha256", model.layers[0], lambda *_: None)

    async def main() -> None:
        asked = Brings(agent)
        asked.failure = Unavailable("not now")
        layer = OpenLayer(model.layers[0], blob, Inodes(model, Selection()), asked)  # type: ignore[arg-type]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(layer.run)
            with pytest.raises(Unavailable):
                await layer.known()
            asked.failure = None
            with trio.fail_after(10):
                await layer.known()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_who_only_looks_at_a_lock_keeps_no_worker_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mountpoint, "_LOOK_SECONDS", 5.0)
    path = tmp_path / "lock"
    path.touch()
    other = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        threading.Timer(0.2, lambda: fcntl.flock(other, fcntl.LOCK_UN)).start()
        with locked(path):
            pass
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(mountpoint, "_LOOK_SECONDS", 0.1)
        with pytest.raises(InProgress), locked(path):
            pass
    finally:
        os.close(other)


def test_a_reader_does_not_fail_where_no_descriptor_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(_: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "dup", none_left)
    Droppings(lambda: 0.0).read((1, 2), 0, Range(0, 5))
