"""Unpacked tar layers: ``<root>/blobs/<algorithm>/<hex>.files``, an index and numbered files.

A layer is unpacked once, whatever number of models has it; their trees hard-link its files. The
index is written last and renamed into place with its folder, so that half an unpacked layer is
never taken for a whole one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

import msgspec

from fetcher.archives import read_tar
from fetcher.artifacts import Entry, FileEntry, FolderEntry, HardLinkEntry, LinkEntry
from fetcher.store.blobs import disk_error, sync_folder
from fetcher.threads import Stopped

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fetcher.archives import UnpackLimits
    from fetcher.modelpack import Packing

_COPY_BYTES: Final = 1024 * 1024
_INDEX: Final = "index.json"


@dataclass(frozen=True, slots=True)
class UnpackedFile:
    """A regular file of an unpacked layer, and where its bytes lie."""

    entry: FileEntry
    source: Path


@dataclass(frozen=True, slots=True)
class UnpackedLayer:
    """What a layer holds: entries in the archive's order, files with their place on the disk."""

    entries: tuple[Entry, ...]
    files: tuple[UnpackedFile, ...]


class _Record(msgspec.Struct, omit_defaults=True):
    kind: str
    path: str
    size: int = 0
    executable: bool = False
    mtime_ns: int | None = None
    target: str = ""


def _to_record(entry: Entry) -> _Record:
    match entry:
        case FileEntry():
            return _Record("file", entry.path, entry.size, entry.executable, entry.mtime_ns)
        case FolderEntry():
            return _Record("folder", entry.path)
        case LinkEntry():
            return _Record("symlink", entry.path, target=entry.target)
        case HardLinkEntry():
            return _Record("hardlink", entry.path, target=entry.target)


def _to_entry(record: _Record) -> Entry:
    match record.kind:
        case "file":
            return FileEntry(record.path, record.size, record.executable, record.mtime_ns)
        case "folder":
            return FolderEntry(record.path)
        case "symlink":
            return LinkEntry(record.path, record.target)
        case _:
            return HardLinkEntry(record.path, record.target)


def load_layer(folder: Path) -> UnpackedLayer:
    """Read an unpacked layer back. Raises :class:`FileNotFoundError` if it is not there."""
    records = msgspec.json.decode((folder / _INDEX).read_bytes(), type=list[_Record])
    return _layer(folder, tuple(_to_entry(record) for record in records))


def _layer(folder: Path, entries: tuple[Entry, ...]) -> UnpackedLayer:
    regular = [entry for entry in entries if isinstance(entry, FileEntry)]
    files = tuple(UnpackedFile(entry, folder / str(number)) for number, entry in enumerate(regular))
    return UnpackedLayer(entries, files)


def unpack_layer(
    blob: Path,
    folder: Path,
    packing: Packing,
    limits: UnpackLimits,
    stop: threading.Event,
    check: Callable[[Entry], None],
) -> None:
    """Unpack the complete ``blob`` into ``folder``, durably, all of it or nothing.

    ``check`` sees every entry before it is written and refuses it by raising. Raises
    :class:`fetcher.errors.InvalidArtifact` for a hostile or broken archive, ``NoSpace`` for a full
    disk, and :class:`fetcher.threads.Stopped`.
    """
    with whole_folder(folder, mode=0o700) as scratch:
        entries: list[Entry] = []
        regular = 0
        with blob.open("rb", buffering=0) as stream:
            for entry, content in read_tar(stream, packing, limits):
                check(entry)
                entries.append(entry)
                if isinstance(entry, FileEntry) and content is not None:
                    _write_file(scratch / str(regular), entry, content, stop)
                    regular += 1
        records = msgspec.json.encode([_to_record(entry) for entry in entries])
        _write_durably(scratch / _INDEX, records)


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
        sync_folder(scratch)
        scratch.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise disk_error(error, folder) from error
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _write_file(path: Path, entry: FileEntry, content: BinaryIO, stop: threading.Event) -> None:
    buffer = bytearray(min(_COPY_BYTES, max(entry.size, 1)))
    view = memoryview(buffer)
    left = entry.size
    with path.open("xb", buffering=0) as file:
        while left:
            if stop.is_set():
                raise Stopped
            # readinto is there on every stream that read_tar gives; BinaryIO does not name it
            read = content.readinto(view[: min(left, len(view))])  # type: ignore[attr-defined]
            if not read:
                raise ValueError(f"{entry.path!r} ended early, which read_tar has to refuse")
            write_all(file.fileno(), view[:read])
            left -= read
        finish_file(file.fileno(), executable=entry.executable, mtime_ns=entry.mtime_ns)
        os.fsync(file.fileno())


def finish_file(descriptor: int, *, executable: bool, mtime_ns: int | None) -> None:
    """Give a model's file the attributes that pods see: read-only, for everybody."""
    os.fchmod(descriptor, 0o555 if executable else 0o444)
    if mtime_ns is not None:
        os.utime(descriptor, ns=(mtime_ns, mtime_ns))


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb", buffering=0) as file:
        write_all(file.fileno(), memoryview(data))
        os.fsync(file.fileno())


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of ``data``; a short write is not an error, only half the work."""
    while data:
        data = data[os.write(descriptor, data) :]
