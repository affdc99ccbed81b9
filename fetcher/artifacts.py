"""Paths, entries and trees of artifacts: hostile until they have been through here. No I/O.

What :func:`safe_path` returns, and what :meth:`Tree.entries` yields in its order, can be created
below any folder without a byte landing outside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fetcher.errors import InvalidArtifact

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_NAME_BYTES: Final = 255
"""``NAME_MAX`` of every file system a model may lie on."""

MAX_PATH_BYTES: Final = 3072
"""``PATH_MAX`` is 4096 with the NUL; the rest is for the store's and the volume's own folders."""

MAX_DEPTH: Final = 128
"""Folders may nest this deep, so that walking or removing a tree never exhausts a stack."""

MAX_TARGET_BYTES: Final = 4095
"""The longest symbolic link that Linux makes."""

MAX_ENTRIES: Final = 100_000
MAX_NAMES_BYTES: Final = 64 * 1024 * 1024
"""Characters of all paths and link targets together: what a tree costs in memory."""

_MAX_FOLLOWED: Final = 40
"""Links that Linux follows for one path before it says ELOOP."""

_QUOTED: Final = 200
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def quoted(text: str) -> str:
    """``text`` for a message: printable whatever it holds, and at most about 200 characters."""
    return repr(text) if len(text) <= _QUOTED else f"{text[:_QUOTED]!r}…"


def safe_path(text: str) -> str:
    """The normal form of a path below the tree's root: ``./a//b/`` is ``a/b``.

    Raises :class:`InvalidArtifact` unless the path is relative, names something below the root,
    goes up nowhere (not even to come back), is UTF-8 without control characters, and fits the
    limits above.
    """
    if text.startswith("/"):
        raise InvalidArtifact(f"the path {quoted(text)} is absolute")
    parts = _components(text, "path", MAX_PATH_BYTES)
    if not parts:
        raise InvalidArtifact(f"the path {quoted(text)} is empty: it names no file")
    if ".." in parts:
        raise InvalidArtifact(f"the path {quoted(text)} contains '..'")
    if len(parts) > MAX_DEPTH:
        raise InvalidArtifact(f"the path {quoted(text)} is more than {MAX_DEPTH} folders deep")
    return "/".join(parts)


def safe_target(path: str, target: str) -> str:
    """Check that the symbolic link at ``path`` may say ``target``; gives ``target`` back as it is.

    A target is relative and goes up only at its start, at most to the root of the tree. Nothing in
    a tree lies below a symbolic link, so those ``..`` climb real folders, and no way through any
    other links of the tree can lead out of it, whatever is added before or after. ``a/../b`` has no
    such proof (``a`` may be a link) and is refused. Raises :class:`InvalidArtifact`.
    """
    where = f"the symbolic link {quoted(path)} → {quoted(target)}"
    if target.startswith("/"):
        raise InvalidArtifact(f"{where} is absolute; only links inside the model are mounted")
    parts = _components(target, "symbolic link's target", MAX_TARGET_BYTES)
    if not target:
        raise InvalidArtifact(f"{where} has no target")
    up = _leading_ups(parts)
    if ".." in parts[up:]:
        raise InvalidArtifact(f"{where} has '..' behind a name; it may only be at the start")
    if up > path.count("/"):
        raise InvalidArtifact(f"{where} leaves the model")
    return target


def usable_time(nanoseconds: int) -> int | None:
    """``nanoseconds`` since 1970 if a file can have been written then, else ``None``."""
    return nanoseconds if 0 <= nanoseconds < 1 << 63 else None


def _components(text: str, what: str, limit: int) -> list[str]:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidArtifact(f"the {what} {quoted(text)} is not valid UTF-8") from error
    if size > limit:
        raise InvalidArtifact(f"the {what} {quoted(text)} has more than {limit} bytes")
    if _CONTROL.search(text):
        raise InvalidArtifact(f"the {what} {quoted(text)} contains control characters")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise InvalidArtifact(
            f"the {what} {quoted(text)} has a component of more than {MAX_NAME_BYTES} bytes"
        )
    return parts


def _leading_ups(parts: list[str]) -> int:
    return next((count for count, part in enumerate(parts) if part != ".."), len(parts))


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A regular file; ``path`` is a :func:`safe_path`."""

    path: str
    size: int
    executable: bool = False
    mtime_ns: int | None = None


@dataclass(frozen=True, slots=True)
class FolderEntry:
    """A folder; the root itself has no entry."""

    path: str


@dataclass(frozen=True, slots=True)
class LinkEntry:
    """A symbolic link; ``target`` is a :func:`safe_target`, kept as the artifact has it."""

    path: str
    target: str


@dataclass(frozen=True, slots=True)
class HardLinkEntry:
    """One more name of the regular file at ``target``, an earlier entry of the same layer."""

    path: str
    target: str


Entry = FileEntry | FolderEntry | LinkEntry | HardLinkEntry


@dataclass(slots=True)
class _Folder:
    children: dict[str, _Node] = field(default_factory=dict)


_Node = _Folder | FileEntry | LinkEntry | HardLinkEntry


class Tree:
    """What all layers of a model are together: one consistent set of names.

    Names are compared byte by byte, with their case. Whether a set of entries is a tree does not
    depend on their order, but for hard links, which follow what they name.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._root = _Folder()
        self._count = 0
        self._names = 0
        self._max_entries = max_entries

    def add(self, entry: Entry) -> None:
        """Take ``entry`` in. Raises :class:`InvalidArtifact`, and then the tree is not to be used.

        Refused are a name that is taken (folders may repeat), anything below a file or a link,
        links that leave the tree, and more than the limits allow; implied folders count too.
        """
        path = safe_path(entry.path)
        if path != entry.path:
            raise InvalidArtifact(f"the path {quoted(entry.path)} is not in normal form")
        if isinstance(entry, LinkEntry):
            safe_target(path, entry.target)
        if isinstance(entry, HardLinkEntry):
            self._check_hard_link(entry)
        *folders, name = path.split("/")
        parent = self._root
        for depth, folder in enumerate(folders):
            parent = self._enter(parent, folder, "/".join(folders[: depth + 1]), path)
        if isinstance(entry, FolderEntry):
            self._enter(parent, name, path, path)
            return
        if name in parent.children:
            raise InvalidArtifact(
                f"{_describe(parent.children[name], path)} is there already; two entries of the "
                "model have this path"
            )
        self._count_one(len(path) + len(getattr(entry, "target", "")))
        parent.children[name] = entry

    def entries(self) -> Iterator[Entry]:
        """All entries in an order in which they can be created, the same for the same set.

        Folders come first, each before what it contains and with those that no entry named; then
        regular files, hard links, and symbolic links, so that nothing is ever written through a
        link. Raises :class:`InvalidArtifact`, before the first entry, for symbolic links that form
        a loop.
        """
        folders: list[FolderEntry] = []
        files: list[FileEntry] = []
        hard_links: list[HardLinkEntry] = []
        links: list[LinkEntry] = []
        for path, node in self._walk():
            match node:
                case _Folder():
                    folders.append(FolderEntry(path))
                case FileEntry():
                    files.append(node)
                case HardLinkEntry():
                    hard_links.append(node)
                case LinkEntry():
                    links.append(node)
        resolver = _Resolver(self._root)
        for link in links:
            resolver.follow(link)
        return iter([*folders, *files, *hard_links, *links])

    def __iter__(self) -> Iterator[Entry]:
        return self.entries()

    def _walk(self) -> Iterator[tuple[str, _Node]]:
        waiting: list[tuple[str, _Node]] = [("", self._root)]
        while waiting:
            path, node = waiting.pop()
            if path:
                yield path, node
            if isinstance(node, _Folder):
                below = f"{path}/" if path else ""
                waiting += [
                    (below + name, node.children[name])
                    for name in sorted(node.children, reverse=True)
                ]

    def _enter(self, parent: _Folder, name: str, path: str, wanted: str) -> _Folder:
        child = parent.children.get(name)
        if child is None:
            self._count_one(len(name))
            child = parent.children[name] = _Folder()
        if not isinstance(child, _Folder):
            what = "it is a folder too" if path == wanted else f"{quoted(wanted)} is below it"
            raise InvalidArtifact(f"{_describe(child, path)} is not a folder, yet {what}")
        return child

    def _check_hard_link(self, entry: HardLinkEntry) -> None:
        node: _Node | None = self._root
        for name in safe_path(entry.target).split("/"):
            node = node.children.get(name) if isinstance(node, _Folder) else None
        if not isinstance(node, FileEntry):
            raise InvalidArtifact(
                f"the hard link {quoted(entry.path)} names {quoted(entry.target)}, "
                "which is no regular file before it"
            )

    def _count_one(self, characters: int) -> None:
        self._count += 1
        self._names += characters
        if self._count > self._max_entries:
            raise InvalidArtifact(
                f"the model has more than {self._max_entries} files, folders and links"
            )
        if self._names > MAX_NAMES_BYTES:
            raise InvalidArtifact(
                f"the paths of the model have more than {MAX_NAMES_BYTES} characters together"
            )


def _describe(node: _Node, path: str) -> str:
    match node:
        case _Folder():
            kind = "folder"
        case LinkEntry():
            kind = "symbolic link"
        case _:
            kind = "file"
    return f"the {kind} {quoted(path)}"


class _Resolver:
    """Follows the symbolic links of a tree as Linux would, every link once."""

    def __init__(self, root: _Folder) -> None:
        self._root = root
        self._followed: dict[str, tuple[_Node | None, int]] = {}
        self._under_way: set[str] = set()

    def follow(self, link: LinkEntry) -> tuple[_Node | None, int]:
        """What ``link`` leads to, nothing if it dangles, and how many links were followed for it.

        Its recursion is at most as deep as the number of links that Linux follows.
        """
        known = self._followed.get(link.path)
        if known is not None:
            return known
        if link.path in self._under_way or len(self._under_way) >= _MAX_FOLLOWED:
            raise _loop(link)
        self._under_way.add(link.path)
        found, followed = self._walk(link)
        self._under_way.remove(link.path)
        if followed > _MAX_FOLLOWED:
            raise _loop(link)
        self._followed[link.path] = found, followed
        return found, followed

    def _walk(self, link: LinkEntry) -> tuple[_Node | None, int]:
        parts = [part for part in link.target.split("/") if part not in ("", ".")]
        up = _leading_ups(parts)
        folders = link.path.split("/")[:-1]
        node: _Node | None = self._root
        followed = 1
        for name in folders[: len(folders) - up] + parts[up:]:
            node = node.children.get(name) if isinstance(node, _Folder) else None
            if isinstance(node, LinkEntry):
                node, more = self.follow(node)
                followed += more
            if node is None:
                break
        return node, followed


def _loop(link: LinkEntry) -> InvalidArtifact:
    return InvalidArtifact(
        f"the symbolic link {quoted(link.path)} → {quoted(link.target)} is part of a loop, or of a "
        f"chain of more than {_MAX_FOLLOWED} links"
    )
