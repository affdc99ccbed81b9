"""What lies below the root under which name, and how many bytes of the disk it takes.

A *name* is a path relative to the root that stands for everything of one digest: all of
``blobs/sha256/<hex>*`` is one content, whatever form it has at the moment, and
``models/sha256/<hex>[.<selection>]*`` is one tree. Functions here read the disk and decide nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING, Final

from fetcher.errors import InvalidArtifact
from fetcher.oci import Digest
from fetcher.threads import Stopped

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable, Iterator
    from pathlib import Path

BLOBS: Final = "blobs"
MODELS: Final = "models"
TRASH: Final = "trash"

MAP_SUFFIX: Final = ".chunks"
"""Of the file that only a content which is not complete has."""

_ALGORITHMS: Final = ("sha256", "sha512")
_SCRATCH: Final = ".new"
_CONTENT_SUFFIXES: Final = ("", MAP_SUFFIX, ".parts", ".files", _SCRATCH, f".files{_SCRATCH}")
_TREE_SUFFIXES: Final = ("", _SCRATCH)
_SECTOR: Final = 512


def content_name(digest: Digest) -> str:
    """The name of what there is of a blob, or of the layer that it holds."""
    return f"{BLOBS}/{digest.algorithm}/{digest.hex}"


def tree_name(model: Digest, selection: str) -> str:
    """The name of a model's tree; ``selection`` is the key of what was left out."""
    return f"{MODELS}/{model.algorithm}/{model.hex}" + (f".{selection}" if selection else "")


def tree_of(name: str) -> tuple[Digest, str] | None:
    """Model and selection of a tree's name; None for what is not one of ours."""
    if not name.startswith(f"{MODELS}/"):
        return None
    encoded, _, selection = name.rpartition("/")[2].partition(".")
    digest = _digest(name.split("/")[1], encoded)
    return None if digest is None else (digest, selection)


def content_of(name: str) -> Digest | None:
    """The digest of a content's name; None for what is not one of ours."""
    if not name.startswith(f"{BLOBS}/"):
        return None
    return _digest(name.split("/")[1], name.rpartition("/")[2])


def _digest(algorithm: str, encoded: str) -> Digest | None:
    try:
        return Digest.parse(f"{algorithm}:{encoded}")
    except InvalidArtifact:
        return None


def suffixes(name: str) -> tuple[str, ...]:
    """What may stand behind a name."""
    return _CONTENT_SUFFIXES if name.startswith(f"{BLOBS}/") else _TREE_SUFFIXES


def taken(root: Path, name: str, stop: threading.Event, found: Iterable[str] | None = None) -> int:
    """Bytes on the disk of everything that has this name; what vanishes meanwhile counts nothing.

    ``found`` are the suffixes to look at, all that are ours if it is left out. A tree's files are
    links to contents, which count them: of a tree count its folders, and the files that nothing
    else links to. Raises :class:`OSError` and :class:`fetcher.threads.Stopped`.
    """
    seen: set[int] = set()
    total = 0
    for suffix in suffixes(name) if found is None else found:
        for status in _statuses(root / f"{name}{suffix}", stop):
            linked = status.st_nlink > 1 and not _is_folder(status)
            if (linked and name.startswith(f"{MODELS}/")) or status.st_ino in seen:
                continue
            seen.add(status.st_ino)
            total += status.st_blocks * _SECTOR
    return total


def taken_with_links(path: Path, stop: threading.Event) -> int:
    """Bytes of everything at ``path``, whoever else links to it. Raises as :func:`taken`."""
    found = {status.st_ino: status.st_blocks * _SECTOR for status in _statuses(path, stop)}
    return sum(found.values())


def measured_tree(path: Path, stop: threading.Event) -> tuple[int, int]:
    """Bytes of the regular files below ``path``, and how many files and symbolic links there are.

    Raises as :func:`taken`.
    """
    statuses = [status for status in _statuses(path, stop) if not _is_folder(status)]
    sizes = (status.st_size for status in statuses if status.st_mode & 0o170000 == 0o100000)
    return sum(sizes), len(statuses)


def present(path: Path) -> int:
    """Bytes on the disk of one file or folder itself; 0 if it is not there."""
    try:
        return os.lstat(path).st_blocks * _SECTOR
    except FileNotFoundError:
        return 0


def _statuses(path: Path, stop: threading.Event) -> Iterator[os.stat_result]:
    """The status of ``path`` and of everything below it."""
    waiting = [os.fspath(path)]
    while waiting:
        if stop.is_set():
            raise Stopped
        one = waiting.pop()
        try:
            status = os.lstat(one)
            if _is_folder(status):
                waiting.extend(entry.path for entry in os.scandir(one))
        except (FileNotFoundError, NotADirectoryError):
            continue
        yield status


def _is_folder(status: os.stat_result) -> bool:
    return status.st_mode & 0o170000 == 0o040000


def listing(root: Path, kind: str) -> dict[str, set[str]]:
    """The names below ``<root>/<kind>`` with the suffixes that are there; ``kind`` is one of the
    constants above. Reads folders and nothing else. Raises :class:`OSError`.
    """
    found: dict[str, set[str]] = {}
    top = root / kind
    # a disk that is mounted there has folders of its own, as lost+found
    inner = [f"{algorithm}/" for algorithm in _ALGORITHMS if (top / algorithm).is_dir()]
    for folder in [""] if kind == TRASH else inner:
        for entry in os.scandir(top / folder):
            name, suffix = _split(entry.name, kind)
            found.setdefault(f"{kind}/{folder}{name}", set()).add(suffix)
    return found


def _split(file_name: str, kind: str) -> tuple[str, str]:
    if kind == MODELS:
        base = file_name.removesuffix(_SCRATCH)
        return base, file_name[len(base) :]
    base, dot, suffix = file_name.partition(".")
    return base, dot + suffix


def move(root: Path, name: str, to: str, found: Iterable[str]) -> None:
    """Rename what has a name and one of the suffixes in ``found``.

    What cannot be renamed is removed where it is. Synchronous, so that nobody finds the half of it;
    not synchronised to the disk. Raises :class:`OSError` for what stays.
    """
    for suffix in found:
        source = root / f"{name}{suffix}"
        try:
            source.rename(root / f"{to}{suffix}")
        except FileNotFoundError:
            continue
        except OSError:
            # a folder may need a block for one more entry, on a disk that has none
            remove(source)


def rename(root: Path, name: str, to: str, found: Iterable[str]) -> None:
    """Rename what has a name and one of the suffixes in ``found``. Raises :class:`OSError`."""
    for suffix in found:
        with contextlib.suppress(FileNotFoundError):
            (root / f"{name}{suffix}").rename(root / f"{to}{suffix}")


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there. Raises :class:`OSError`."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        shutil.rmtree(path)
