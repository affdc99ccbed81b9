"""Small dealings with the disk that every part of the store has."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from typing import TYPE_CHECKING, Final

from fetcher.errors import ModelError, NoSpace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_WRITE_BYTES: Final = 64 * 1024
"""The page cache grows in folios of the size of a write. Large ones come from memory that nobody
used for long: where a hypervisor has taken that back, they cost several times as much to write."""

_SYNC_FILE_RANGE_WRITE: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)
_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_fallocate = _libc.fallocate64
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_PUNCH_HOLE_KEEP_SIZE: Final = 3


def disk_error(error: OSError, path: Path) -> ModelError:
    """What a failed write means for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(
            f"the disk below {path} is full: free some space there, or give the store another root",
            path=path,
        )
    return ModelError(f"{path} cannot be used: {error.strerror or error}", path=path)


class WritesLost(OSError):
    """The kernel could not put written bytes on the disk, and may have dropped them from memory.

    It says so once: a second ``fsync`` succeeds, whatever the disk has.
    """


def sync_file(descriptor: int) -> None:
    """Put the bytes of a file on the disk. Raises :class:`WritesLost`."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise WritesLost(error.errno, error.strerror) from error


def sync_folder(folder: Path) -> None:
    """Put the names in ``folder`` on the disk. Raises :class:`OSError`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writing(descriptor: int, offset: int, length: int) -> None:
    """Have the kernel start to put these bytes on the disk.

    Only a hint that spreads the writing over the download: its failure costs time, not data.
    """
    _sync_file_range(descriptor, offset, length, _SYNC_FILE_RANGE_WRITE)


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Give the blocks of these bytes back. Where the file system cannot, they stay taken."""
    _fallocate(descriptor, _PUNCH_HOLE_KEEP_SIZE, offset, length)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of ``data``; a short write is not an error, only half the work."""
    while data:
        data = data[os.write(descriptor, data) :]


def write_at(descriptor: int, offset: int, data: memoryview) -> None:
    """Write all of ``data`` at ``offset``. Raises :class:`OSError`."""
    while data:
        written = os.pwrite(descriptor, data[:_WRITE_BYTES], offset)
        data = data[written:]
        offset += written


def write_durably(path: Path, data: bytes) -> None:
    """Make the file ``path``, with its bytes on the disk. Raises :class:`OSError`."""
    with path.open("xb", buffering=0) as file:
        write_all(file.fileno(), memoryview(data))
        os.fsync(file.fileno())


def publish_folder(scratch: Path, folder: Path) -> None:
    """Make the finished ``scratch`` be ``folder``, durably. Raises :class:`OSError`."""
    sync_folder(scratch)
    scratch.rename(folder)
    sync_folder(folder.parent)


@contextlib.contextmanager
def whole_folder(folder: Path, mode: int) -> Iterator[Path]:
    """A folder to fill, which then becomes ``folder``, durably; or nothing of it stays.

    Raises :class:`fetcher.errors.ModelError` for what goes wrong on the disk.
    """
    scratch = folder.with_name(folder.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(mode=mode, parents=True)
        yield scratch
        publish_folder(scratch, folder)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise disk_error(error, folder) from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def finish_file(descriptor: int, *, executable: bool, mtime_ns: int | None) -> None:
    """Give a model's file the attributes that pods see: read-only, for everybody."""
    os.fchmod(descriptor, 0o555 if executable else 0o444)
    if mtime_ns is not None:
        os.utime(descriptor, ns=(mtime_ns, mtime_ns))
