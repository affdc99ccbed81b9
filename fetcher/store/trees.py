"""The tree of a model below ``<root>/models``: what an eager volume binds.

Regular files are hard links to blobs and to the files of unpacked layers, so a model lies on the
disk once however many trees show it. A tree is built beside its place and renamed into it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fetcher.artifacts import FileEntry, FolderEntry, HardLinkEntry, LinkEntry, Tree
from fetcher.store.disk import finish_file, sync_folder, whole_folder
from fetcher.threads import Stopped

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from fetcher.oci import Digest

_FICLONE: Final = 0x40049409
_COPY_BYTES: Final = 8 * 1024 * 1024
_BLOCK: Final = 4096
_ENTRY_BYTES: Final = 32
"""Of a folder's entry, beside its name."""
_CANNOT_CLONE: Final = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENOSYS, errno.EPERM}
)


@dataclass(frozen=True, slots=True)
class ModelTree:
    """A model's tree on the disk, complete."""

    path: Path
    digest: Digest
    size: int
    """Bytes of its regular files, each name counted once."""
    files: int
    """Regular files and symbolic links in it."""


def build_tree(
    tree: Tree,
    sources: Mapping[str, Path],
    folder: Path,
    grow: Callable[[int], None],
    stop: threading.Event,
) -> tuple[int, int]:
    """Build ``folder`` from ``tree``; ``sources`` says where the bytes of each regular file lie.

    ``grow`` is told of bytes before they are taken. Durable, and all or nothing. Returns bytes and
    number of files. Raises ``NoSpace`` and :class:`fetcher.threads.Stopped`.
    """
    grow(_own_bytes(tree))
    with whole_folder(folder, mode=0o755) as scratch:
        folders: list[Path] = []
        for entry in tree.entries():
            if stop.is_set():
                raise Stopped
            place = scratch / entry.path
            match entry:
                case FolderEntry():
                    place.mkdir(mode=0o755)
                    folders.append(place)
                case FileEntry():
                    _place_file(sources[entry.path], place, entry, grow)
                case LinkEntry():
                    place.symlink_to(entry.target)
                case HardLinkEntry():
                    place.hardlink_to(scratch / entry.target)
        # the folder itself, and its new name, are synchronised when it gets that
        for inner in reversed(folders):
            if stop.is_set():
                raise Stopped
            sync_folder(inner)
    return measure_tree(tree)


def measure_tree(tree: Tree) -> tuple[int, int]:
    """Bytes of the regular files of a tree, and how many files and symbolic links it has."""
    entries = list(tree.entries())
    size = sum(entry.size for entry in entries if isinstance(entry, FileEntry))
    return size, sum(not isinstance(entry, FolderEntry) for entry in entries)


def _own_bytes(tree: Tree) -> int:
    """What the folders and symbolic links of a tree may take; names in them, with what an index of
    them may add.
    """
    names: Counter[str] = Counter({"": 0})
    links = 0
    for entry in tree.entries():
        folder, _, name = entry.path.rpartition("/")
        names[folder] += 2 * (len(name.encode()) + _ENTRY_BYTES)
        if isinstance(entry, FolderEntry):
            names[entry.path] += 0
        links += isinstance(entry, LinkEntry)
    return sum(-(-size // _BLOCK) + 1 for size in names.values()) * _BLOCK + links * _BLOCK


def _place_file(source: Path, place: Path, entry: FileEntry, grow: Callable[[int], None]) -> None:
    """Link ``source`` at ``place``; clone or copy it where another tree needs it with another mode.

    Two trees may want different times for one blob: the first decides, as a second copy of a weight
    file is not worth a timestamp.
    """
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        state = os.fstat(descriptor)
        if state.st_nlink == 1:
            finish_file(descriptor, executable=entry.executable, mtime_ns=entry.mtime_ns)
        elif bool(state.st_mode & 0o111) != entry.executable:
            _copy_file(descriptor, place, entry, grow)
            return
        try:
            place.hardlink_to(source)
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            _copy_file(descriptor, place, entry, grow)
    finally:
        os.close(descriptor)


def _copy_file(source: int, place: Path, entry: FileEntry, grow: Callable[[int], None]) -> None:
    grow(entry.size + entry.size // _BLOCK + 2 * _BLOCK)
    with place.open("xb", buffering=0) as file:
        try:
            fcntl.ioctl(file.fileno(), _FICLONE, source)
        except OSError as error:
            if error.errno not in _CANNOT_CLONE:
                raise
            offset = 0
            while copied := os.copy_file_range(source, file.fileno(), _COPY_BYTES, offset):
                offset += copied
        finish_file(file.fileno(), executable=entry.executable, mtime_ns=entry.mtime_ns)
        os.fsync(file.fileno())
