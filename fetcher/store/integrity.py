"""Whether what is complete still is what it was, and making it so again.

Disks rot, and files below the root can be changed by whoever is root. Blobs are hashed again, trees
are compared with what they link to. A tree that pods have mounted cannot be replaced: it is put
right in place, block by block, from a blob that was fetched anew and verified. Everything here runs
in worker threads.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from fetcher.artifacts import FileEntry, FolderEntry, LinkEntry
from fetcher.errors import ModelError
from fetcher.store.disk import disk_error, finish_file, write_at
from fetcher.store.layers import FRAME, load_layer
from fetcher.store.stored import StoredBlob
from fetcher.threads import Stopped

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from fetcher.artifacts import Entry, Tree
    from fetcher.oci import Digest

_COPY_BYTES: Final = 1024 * 1024


def blob_problem(path: Path, digest: Digest, stop: threading.Event) -> str | None:
    """What is wrong with a blob in one file; None if it is what its digest says."""
    return _problem(lambda: _check(StoredBlob.of_file(path, path.stat().st_size), digest, stop))


def layer_problem(folder: Path, digest: Digest, stop: threading.Event) -> str | None:
    """What is wrong with the files of a tar layer; None if they are what they were."""
    return _problem(lambda: _check_layer(folder, digest, stop))


def _problem(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read: {error.strerror}"
    except (ValueError, msgspec.MsgspecError, ModelError) as error:
        return f"its index cannot be read: {error}"


def _check(blob: StoredBlob, digest: Digest, stop: threading.Event) -> str | None:
    return None if blob.matches(digest, stop) else "its bytes have another digest"


def _check_layer(folder: Path, digest: Digest, stop: threading.Event) -> str | None:
    if (folder / FRAME).exists():
        return _check(StoredBlob.of_files(folder), digest, stop)
    for file in load_layer(folder).files:
        wanted = file.digest
        blob = StoredBlob.of_file(file.source, file.entry.size)
        if wanted is not None and not blob.matches(wanted, stop):
            return f"the bytes of {file.entry.path} have another digest"
    return None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a tree has to be."""

    entries: Mapping[str, Entry]
    """By path."""
    sources: Mapping[str, Path]
    """Where the bytes of each regular file lie, verified."""

    @classmethod
    def of(cls, planned: tuple[Tree, Mapping[str, Path]]) -> Wanted:
        """A tree with all that is planned."""
        tree, sources = planned
        return cls({entry.path: entry for entry in tree.entries()}, sources)

    def found_in(self, folder: Path) -> Wanted:
        """Of this what is in ``folder``: a tree may have been built without the rest."""
        there = {path for path in self.entries if os.path.lexists(folder / path)}
        return Wanted({path: self.entries[path] for path in there}, self.sources)


def tree_problem(wanted: Wanted, folder: Path, stop: threading.Event) -> str | None:
    """What is wrong with the tree at ``folder``; None if it is what it has to be."""
    return _problem(lambda: next(_differences(wanted, folder, stop), None))


def _differences(wanted: Wanted, folder: Path, stop: threading.Event) -> Iterator[str]:
    for path, entry in wanted.entries.items():
        place = folder / path
        match entry:
            case FileEntry() if place.is_file() and not place.is_symlink():
                if not _same(wanted.sources[path], place, stop):
                    yield f"{path} has other bytes than the model"
            case LinkEntry() if place.is_symlink():
                if os.readlink(place) != entry.target:
                    yield f"{path} leads elsewhere than in the model"
            case FolderEntry() if place.is_dir() and not place.is_symlink():
                continue
            case _:
                there = os.path.lexists(place)
                yield f"{path} is {'not what it is in the model' if there else 'missing'}"
    for path in _walk(folder):
        if path not in wanted.entries:
            yield f"{path} is not in the model"


def _walk(folder: Path) -> Iterator[str]:
    """Paths of all that is no folder, relative to ``folder``."""
    for parent, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in [*files, *links]:
            yield os.path.relpath(os.path.join(parent, name), folder)


def _raise(error: OSError) -> None:
    raise error


def _same(source: Path, place: Path, stop: threading.Event) -> bool:
    """Whether two files are one, or have the same bytes."""
    one, other = os.stat(source), os.stat(place)
    if (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino):
        return True
    if one.st_size != other.st_size:
        return False
    blocks = zip(_blocks(source, stop), _blocks(place, stop), strict=False)
    return all(right == found for (_, right), (_, found) in blocks)


def _blocks(path: Path, stop: threading.Event) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_COPY_BYTES):
            if stop.is_set():
                raise Stopped
            yield offset, block
            offset += len(block)


def heal_tree(wanted: Wanted, folder: Path, stop: threading.Event) -> None:
    """Put the files of a tree right in place, as pods have it mounted, and link them to their
    sources again.

    Only what differs is written, and only with verified bytes; a kill leaves it for the next time.
    Raises :class:`ModelError` for what cannot be put right, and :class:`fetcher.threads.Stopped`.
    """
    try:
        for path, entry in wanted.entries.items():
            if isinstance(entry, FileEntry):
                _heal(wanted.sources[path], folder / path, entry, stop)
    except OSError as error:
        raise disk_error(error, folder) from error
    problem = tree_problem(wanted, folder, stop)
    if problem is not None:
        raise ModelError(f"{folder} cannot be put right while it is mounted: {problem}")


def _heal(source: Path, place: Path, entry: FileEntry, stop: threading.Event) -> None:
    if not os.path.lexists(place):
        os.link(source, place)
    if place.is_symlink() or not place.is_file():
        return  # told as a problem that stays: another name under a pod would not reach it
    right = os.stat(source)
    if right.st_ino == os.stat(place).st_ino:
        return
    _copy_differences(source, place, entry, stop)
    if right.st_nlink == 1 or bool(right.st_mode & 0o111) == entry.executable:
        _relink(source, place)


def _copy_differences(source: Path, place: Path, entry: FileEntry, stop: threading.Event) -> None:
    descriptor = os.open(place, os.O_RDWR | os.O_CLOEXEC)
    try:
        for offset, block in _blocks(source, stop):
            if os.pread(descriptor, len(block), offset) != block:
                write_at(descriptor, offset, memoryview(block))
        os.ftruncate(descriptor, entry.size)
        finish_file(descriptor, executable=entry.executable, mtime_ns=entry.mtime_ns)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _relink(source: Path, place: Path) -> None:
    """Let ``source`` be the file at ``place``, which has the same bytes: it lies there once."""
    scratch = source.with_name(source.name + ".new")
    scratch.unlink(missing_ok=True)
    try:
        os.link(place, scratch)
    except OSError as error:
        if error.errno == errno.EMLINK:
            return
        raise
    scratch.rename(source)
