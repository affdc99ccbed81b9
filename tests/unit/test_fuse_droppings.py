"""Pages of the store's files go behind their readers, and those of others stay."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

import trio

from fetcher.ranges import Range
from fuse.droppings import Behind, Droppings

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1024 * 1024
FILE = (1, 2)
OTHER = (1, 3)


def _read(behind: Behind, start: int, stop: int, now: float = 0.0) -> bool:
    return behind.read(FILE, Range(start, stop), now)


def test_little_waits_a_moment() -> None:
    behind = Behind()
    assert not _read(behind, 0, MIB)
    assert behind.due(0.5) == []
    assert behind.next_due() == 1.0
    assert behind.due(1.0) == [(FILE, Range(0, 2 * MIB))]


def test_much_goes_at_once() -> None:
    behind = Behind()
    told = [_read(behind, at * MIB, (at + 1) * MIB) for at in range(16)]
    assert told == [False] * 15 + [True]
    assert behind.due(0.0) == [(FILE, Range(0, 16 * MIB))]


def test_what_was_read_on_is_gone_over_again() -> None:
    behind = Behind()
    _read(behind, 0, 4 * MIB)
    times = []
    now = 0.0
    while (when := behind.next_due()) is not None:
        now = max(when, now)
        assert behind.due(now) == [(FILE, Range(0, 4 * MIB))]
        times.append(now)
    assert len(times) == 4
    assert times[-1] > 45
    assert behind.files() == set()


def test_of_what_is_read_here_and_there_only_that_goes() -> None:
    behind = Behind()
    _read(behind, 10 * MIB, 10 * MIB + 4096)
    _read(behind, 50 * MIB, 50 * MIB + 4096)
    dropped = behind.due(2.0)
    assert [len(part) for _, part in dropped] == [64 * 1024] * 2
    assert behind.next_due() is None


def test_files_are_kept_apart() -> None:
    behind = Behind()
    _read(behind, 0, MIB)
    behind.read(OTHER, Range(0, MIB), 0.0)
    assert {file for file, _ in behind.due(2.0)} == {FILE, OTHER}


def _cached(path: Path) -> int:
    """Bytes of a file that are in the page cache."""
    size = path.stat().st_size
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
        pages = -(-size // mmap.PAGESIZE)
        vector = (ctypes.c_ubyte * pages)()
        address = ctypes.c_void_p()
        length = ctypes.c_size_t()
        buffer = ctypes.py_object(mapped)
        ctypes.pythonapi.PyObject_AsReadBuffer(buffer, ctypes.byref(address), ctypes.byref(length))
        assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(size), vector) == 0
        return sum(one & 1 for one in vector) * mmap.PAGESIZE


def test_pages_leave_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(os.urandom(20 * MIB))
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    assert _cached(path) == 20 * MIB

    async def main() -> None:
        droppings = Droppings()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(droppings.run)
            for at in range(0, 16 * MIB, MIB):
                droppings.read(FILE, file, Range(at, at + MIB))
            os.close(file)
            with trio.fail_after(30):
                # the page cache tells nobody
                while _cached(path) > 4 * MIB:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    trio.run(main)
