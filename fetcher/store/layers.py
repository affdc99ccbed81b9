"""The files of tar layers: ``<root>/blobs/<algorithm>/<hex>.files``, an index and numbered files.

A layer is laid out once, whatever number of models has it; their trees hard-link its files. The
index is written last and renamed into place with its folder, so that half a layer is never taken
for a whole one. An uncompressed tar was written straight into these files; what lies between them
in the archive, headers and padding, is in ``frame``, so that the blob can still be read byte for
byte.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

import msgspec

from fetcher.archives import read_tar
from fetcher.artifacts import Entry, FileEntry, FolderEntry, HardLinkEntry, LinkEntry
from fetcher.oci import Digest
from fetcher.store.disk import finish_file, whole_folder, write_all, write_durably
from fetcher.threads import Stopped

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from fetcher.archives import UnpackLimits
    from fetcher.modelpack import Packing

_COPY_BYTES: Final = 1024 * 1024
_FILE_BYTES: Final = 2 * 4096
"""What a file takes beyond its size: the rest of its last block, its name."""
INDEX: Final = "index.json"
FRAME: Final = "frame"


@dataclass(frozen=True, slots=True)
class LayerFile:
    """A regular file of a layer, and where its bytes lie."""

    entry: FileEntry
    source: Path
    offset: int
    """Where its bytes begin in the blob; -1 where the blob was compressed."""
    digest: Digest | None
    """Of its bytes, where the blob was compressed: that one's digest does not tell of them."""


@dataclass(frozen=True, slots=True)
class LayerFiles:
    """What a layer holds: entries in the archive's order, files with their place on the disk."""

    entries: tuple[Entry, ...]
    files: tuple[LayerFile, ...]


class _Record(msgspec.Struct, omit_defaults=True):
    kind: str
    path: str
    size: int = 0
    executable: bool = False
    mtime_ns: int | None = None
    target: str = ""
    offset: int = -1
    digest: str = ""


def _to_record(entry: Entry, offset: int, digest: Digest | None) -> _Record:
    match entry:
        case FileEntry():
            executable, mtime_ns = entry.executable, entry.mtime_ns
            found = str(digest or "")
            return _Record(
                "file", entry.path, entry.size, executable, mtime_ns, offset=offset, digest=found
            )
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


def encode_index(entries: Iterable[tuple[Entry, int]]) -> bytes:
    """The index of an uncompressed tar: its entries, with the offset of each in the blob."""
    return msgspec.json.encode([_to_record(entry, offset, None) for entry, offset in entries])


def load_layer(folder: Path) -> LayerFiles:
    """Read a layer's index back. Raises :class:`FileNotFoundError` if it is not there."""
    records = msgspec.json.decode((folder / INDEX).read_bytes(), type=list[_Record])
    entries = tuple(_to_entry(record) for record in records)
    regular = [
        (entry, record)
        for entry, record in zip(entries, records, strict=True)
        if isinstance(entry, FileEntry)
    ]
    files = tuple(
        LayerFile(
            entry,
            folder / str(number),
            record.offset,
            Digest.parse(record.digest) if record.digest else None,
        )
        for number, (entry, record) in enumerate(regular)
    )
    return LayerFiles(entries, files)


def load_index(folder: Path) -> list[tuple[Entry, int]]:
    """Read only a layer's index back: its entries, with the offset of each file in the blob, -1
    where that was compressed. Raises :class:`FileNotFoundError` if it is not there.
    """
    records = msgspec.json.decode((folder / INDEX).read_bytes(), type=list[_Record])
    records.reverse()
    found: list[tuple[Entry, int]] = []
    while records:
        # each gives its memory to the next: there may be a hundred thousand
        record = records.pop()
        found.append((_to_entry(record), record.offset))
    return found


def unpack_layer(
    blob: Path,
    folder: Path,
    packing: Packing,
    limits: UnpackLimits,
    stop: threading.Event,
    check: Callable[[Entry], None],
    grow: Callable[[int], None],
) -> None:
    """Unpack the complete ``blob`` into ``folder``, durably, all of it or nothing.

    ``check`` sees every entry before it is written and refuses it by raising; ``grow`` is told of
    bytes before they are taken. Raises :class:`fetcher.errors.InvalidArtifact` for a hostile or
    broken archive, ``NoSpace``, and :class:`fetcher.threads.Stopped`.
    """
    with whole_folder(folder, mode=0o700) as scratch:
        records: list[_Record] = []
        regular = 0
        with blob.open("rb", buffering=0) as stream:
            for entry, content in read_tar(stream, packing, limits):
                check(entry)
                digest = None
                if isinstance(entry, FileEntry) and content is not None:
                    grow(entry.size + _FILE_BYTES)
                    digest = _write_file(scratch / str(regular), entry, content, stop)
                    regular += 1
                records.append(_to_record(entry, -1, digest))
        index = msgspec.json.encode(records)
        grow(len(index) + _FILE_BYTES)
        write_durably(scratch / INDEX, index)


def _write_file(path: Path, entry: FileEntry, content: BinaryIO, stop: threading.Event) -> Digest:
    """Write a file's bytes and put them on the disk; what their digest is."""
    hasher = hashlib.sha256()
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
            hasher.update(view[:read])
            write_all(file.fileno(), view[:read])
            left -= read
        finish_file(file.fileno(), executable=entry.executable, mtime_ns=entry.mtime_ns)
        os.fsync(file.fileno())
    return Digest("sha256", hasher.hexdigest())
