"""The files of a model as inodes: what a selection leaves of its layers, as far as it is known.

A raw layer is a file, known from the manifest. What is in an archive is known once its headers were
read, or it was unpacked: until then the layer is *open*, and so is whether any name exists that no
other layer has. What a name is once known, it stays.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import trio

from fetcher.artifacts import Entry, FileEntry, FolderEntry, HardLinkEntry, LinkEntry, Tree
from fetcher.errors import InvalidArtifact
from fetcher.modelpack import Packing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fetcher.modelpack import Layer, Model, Selection
    from fetcher.oci import Digest

ROOT: Final = 1
"""The inode of the root, as the kernel's protocol has it."""

_AT_ONE_TIME: Final = 2000
"""Entries that become inodes before somebody else gets the thread."""


@dataclass(slots=True, eq=False)
class File:
    """A regular file, and where its bytes are."""

    inode: int
    size: int
    executable: bool
    mtime_ns: int
    layer: Layer
    number: int
    """Which of the layer's regular files it is; -1 if it is the whole of a raw layer."""
    offset: int
    """Where it begins in the blob; -1 where that is compressed."""
    links: int = 1


@dataclass(slots=True, eq=False)
class Link:
    inode: int
    target: str


@dataclass(slots=True, eq=False)
class Folder:
    inode: int
    children: dict[str, Node] = field(default_factory=dict)


Node = Folder | File | Link
Index = list[tuple[Entry, int]]
"""As :func:`fetcher.store.layers.load_index` gives it."""


class _Shown(NamedTuple):
    """An entry that is shown; of a file its number and offset."""

    entry: Entry
    number: int = -1
    offset: int = -1


NodeT = TypeVar("NodeT", Folder, File, Link)


class Inodes:
    """The names and inodes of what ``selection`` leaves of ``model``.

    An inode's number is made of its path, so that it is the same in every process that shows the
    model, in whatever order its layers came to be known.
    """

    def __init__(self, model: Model, selection: Selection) -> None:
        """Raises :class:`InvalidArtifact` when raw layers contradict each other."""
        self.root = Folder(ROOT)
        self.open: dict[Digest, Layer] = {}
        """The archives whose content is not known yet, by their blobs."""
        self._selection = selection
        self._nodes: dict[int, Node] = {ROOT: self.root}
        self._tree: Tree | None = Tree()
        self._adding = trio.Lock()
        self.problem: InvalidArtifact | None = None
        """Why some of the names will never be known: two layers contradict each other."""
        self.size = 0
        """Bytes of all regular files that are known, each name counted once."""
        for layer in model.layers:
            if not selection.wants_layer(layer):
                continue
            if layer.packing is not Packing.RAW:
                self.open[layer.descriptor.digest] = layer
            elif layer.path is not None:
                size = layer.descriptor.size
                entry = FileEntry(layer.path, size, layer.executable, layer.mtime_ns)
                self._tree.add(entry)
                self._place(entry.path, self._file(entry, layer, -1, 0))
        if not self.open:
            self._tree = None

    @property
    def complete(self) -> bool:
        """Whether every name is known."""
        return not self.open and self.problem is None

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, inode: int) -> Node | None:
        """The node of an inode; None where there is none."""
        return self._nodes.get(inode)

    def files(self) -> Iterator[File]:
        """Every regular file that is known, once."""
        return (node for node in self._nodes.values() if isinstance(node, File))

    async def add(self, layer: Layer, content: Index) -> None:
        """Let what is in an open layer be known; nothing where it is known already.

        ``content`` is used up. Raises :class:`InvalidArtifact`, now and for every layer that comes
        later, when it contradicts another layer.
        """
        async with self._adding:
            if layer.descriptor.digest not in self.open:
                return
            if self.problem is not None or self._tree is None:
                raise self.problem or ValueError("all layers are known")
            linked = {entry.target for entry, _ in content if isinstance(entry, HardLinkEntry)}
            try:
                shown = self._shown(layer, linked, content)
                await trio.to_thread.run_sync(_check, self._tree, shown)
                if len(self.open) == 1:
                    # nothing is checked against it any more, and it is as large as all names
                    self._tree = None
                await self._place_all(layer, self._shown(layer, linked, _taken(content)))
            except InvalidArtifact as error:
                self.problem = error
                raise
            del self.open[layer.descriptor.digest]

    def _shown(
        self, layer: Layer, linked: set[str], content: Iterable[tuple[Entry, int]]
    ) -> Iterator[_Shown]:
        """The entries that are shown; ``linked`` are the files that hard links name.

        A hard link is one more name of a file, whether or not the file's first one is shown.
        """
        firsts: dict[str, _Shown] = {}
        number = -1
        for entry, offset in content:
            shown = _Shown(entry)
            if isinstance(entry, FileEntry):
                number += 1
                shown = _Shown(entry, number, offset)
                if entry.path in linked:
                    firsts[entry.path] = shown
            if not self._selection.wants_path(layer.kind, entry.path):
                continue
            if isinstance(entry, HardLinkEntry):
                first = firsts[entry.target]
                named = replace(first.entry, path=entry.path)
                shown = _Shown(named, first.number, first.offset)
            yield shown

    async def _place_all(self, layer: Layer, wanted: Iterable[_Shown]) -> None:
        known: dict[int, File] = {}
        for count, (entry, number, offset) in enumerate(wanted):
            if count % _AT_ONE_TIME == 0:
                await trio.lowlevel.checkpoint()
            match entry:
                case FileEntry():
                    file = known.get(number)
                    if file is None:
                        file = known[number] = self._file(entry, layer, number, offset)
                    else:
                        file.links += 1
                    self._place(entry.path, file)
                case FolderEntry():
                    self._folder(entry.path)
                case LinkEntry():
                    self._place(entry.path, self._new(Link(_inode(entry.path), entry.target)))

    def _file(self, entry: FileEntry, layer: Layer, number: int, offset: int) -> File:
        about = entry.size, entry.executable, entry.mtime_ns or 0
        return self._new(File(_inode(entry.path), *about, layer, number, offset))

    def _new(self, node: NodeT) -> NodeT:
        if node.inode in self._nodes:
            raise InvalidArtifact("two paths of the model have the same inode number")
        self._nodes[node.inode] = node
        return node

    def _place(self, path: str, node: File | Link) -> None:
        folder, _, name = path.rpartition("/")
        self._folder(folder).children[name] = node
        if isinstance(node, File):
            self.size += node.size

    def _folder(self, path: str) -> Folder:
        folder = self.root
        position = 0
        while position < len(path):
            end = path.find("/", position)
            end = len(path) if end < 0 else end
            name = path[position:end]
            child = folder.children.get(name)
            if child is None:
                child = folder.children[name] = self._new(Folder(_inode(path[:end])))
            if not isinstance(child, Folder):
                raise ValueError(f"{path!r} is below a file, which the tree has to refuse")
            folder = child
            position = end + 1
        return folder


def _check(tree: Tree, wanted: Iterator[_Shown]) -> None:
    for shown in wanted:
        tree.add(shown.entry)


def _taken(content: Index) -> Iterator[tuple[Entry, int]]:
    """All of it, in order, none of which is kept: its memory is that of what is made of it."""
    content.reverse()
    while content:
        yield content.pop()


def _inode(path: str) -> int:
    """Of 62 bits, so that every program can hold it, and never the root's."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2 | 1 << 61
