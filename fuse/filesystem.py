"""What a model looks like as files: here and only here.

Knows nothing of the kernel's protocol: a session asks it, and turns what it says or raises into
answers. Every call that may wait ends within the read timeout. Raised are :class:`OSError` for what
a program did wrong, and :class:`fetcher.errors.ModelError` for what cannot be had.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from fetcher.errors import ModelError, Unavailable
from fetcher.ranges import Range
from fetcher.tasks import for_each
from fuse.agent import Agent
from fuse.buffers import BUFFER_BYTES, Buffers
from fuse.chunks import Blob
from fuse.droppings import Droppings
from fuse.files import OpenFile
from fuse.layers import OpenLayer
from fuse.readahead import Streams
from fuse.tree import File, Folder, Link

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fetcher.lazy_protocol import AttachParams
    from fetcher.modelpack import Model
    from fuse.tree import Inodes, Node

logger = logging.getLogger(__name__)

BLOCK: Final = 4096
_STAT_BLOCK: Final = 512
_NAME_MAX: Final = 255
_SAME_TROUBLE_SECONDS: Final = 10.0
"""The same reason for failing reads is not logged more often."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """What ``stat`` says of an inode."""

    inode: int
    mode: int
    links: int
    size: int
    mtime_ns: int

    @property
    def blocks(self) -> int:
        """Of 512 bytes, as ``st_blocks`` has them."""
        return -(-self.size // BLOCK) * (BLOCK // _STAT_BLOCK)


@dataclass(frozen=True, slots=True)
class Space:
    """What ``statfs`` says."""

    blocks: int
    """Of :data:`BLOCK` bytes."""
    files: int
    name_max: int = _NAME_MAX


@dataclass(slots=True)
class _Opened:
    """A file that somebody has open, however often."""

    content: OpenFile
    streams: Streams
    times: int = 1


class FileSystem:
    """The files of one model."""

    def __init__(
        self,
        root: Path,
        params: AttachParams,
        model: Model,
        inodes: Inodes,
        read_timeout: float,
        registry: str = "",
    ) -> None:
        """``root`` is that of the store; ``params`` say who the worker is. Seconds. ``registry`` is
        the name, with the repository, by which the model is fetched.
        """
        self.agent = Agent(root, params, self._heard_spoiled, self._look_again)
        self._inodes = inodes
        self._read_timeout = read_timeout
        self._buffers = Buffers()
        self._droppings = Droppings()
        self._blobs = {
            str(layer.descriptor.digest): Blob(
                root / "blobs" / layer.descriptor.digest.algorithm,
                layer,
                self._spoiled,
                registry,
            )
            for layer in model.layers
        }
        self._layers = [
            OpenLayer(layer, self._blobs[str(digest)], inodes, self.agent)
            for digest, layer in inodes.open.items()
        ]
        self._opened: dict[int, _Opened] = {}
        self._listings: dict[int, tuple[list[tuple[str, Node]], int]] = {}
        self._bad: list[Blob] = []
        self._bad_came = trio.Event()
        self._troubles: dict[str, float] = {}

    async def run(self, forget: Callable[[int], None]) -> None:
        """All that goes on beside the calls, until cancelled.

        ``forget`` makes the kernel drop the pages of an inode; it may block, and is called in a
        worker thread.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.agent.run)
            nursery.start_soon(self._droppings.run)
            nursery.start_soon(self._forget_spoiled, forget)
            for layer in self._layers:
                nursery.start_soon(layer.run)

    # -- names -------------------------------------------------------------------------------------

    async def lookup(self, folder: int, name: bytes) -> Attributes | None:
        """The inode of a name; None if there is none, for ever."""
        parent = self._folder(folder)
        try:
            text = name.decode()
        except UnicodeDecodeError:
            return None
        found = parent.children.get(text)
        if found is None:
            await self._all_known()
            found = parent.children.get(text)
        return None if found is None else self._attributes(found)

    def attributes(self, inode: int) -> Attributes:
        """What there is to say of an inode."""
        return self._attributes(self._node(inode))

    def target(self, inode: int) -> bytes:
        """Where a symbolic link leads."""
        node = self._node(inode)
        if not isinstance(node, Link):
            raise OSError(errno.EINVAL, "no symbolic link")
        return node.target.encode()

    async def open_folder(self, inode: int) -> None:
        """Begin to list a folder; waits until all names in it are known."""
        folder = self._folder(inode)
        await self._all_known()
        listing, times = self._listings.get(inode, (list(folder.children.items()), 0))
        self._listings[inode] = listing, times + 1

    def list_folder(self, inode: int, start: int) -> Iterator[tuple[int, str, Attributes]]:
        """Names of a folder that is being listed, each with what to start from for the next."""
        listing, _ = self._listings[inode]
        for position in range(start, len(listing)):
            name, node = listing[position]
            yield position + 1, name, self._attributes(node)

    def close_folder(self, inode: int) -> None:
        """End listing a folder."""
        listing, times = self._listings.pop(inode)
        if times > 1:
            self._listings[inode] = listing, times - 1

    def space(self) -> Space:
        """The size of the model, as that of a file system which is full."""
        hidden = sum(layer.descriptor.size for layer in self._inodes.open.values())
        size = self._inodes.size + hidden
        return Space(-(-size // BLOCK), len(self._inodes))

    def _attributes(self, node: Node) -> Attributes:
        match node:
            case File():
                mode = stat.S_IFREG | (0o555 if node.executable else 0o444)
                return Attributes(node.inode, mode, node.links, node.size, node.mtime_ns)
            case Link():
                size = len(node.target.encode())
                return Attributes(node.inode, stat.S_IFLNK | 0o777, 1, size, 0)
            case Folder():
                # one link: as of file systems that do not count a folder's folders
                return Attributes(node.inode, stat.S_IFDIR | 0o755, 1, BLOCK, 0)

    def _node(self, inode: int) -> Node:
        node = self._inodes.get(inode)
        if node is None:
            raise OSError(errno.ENOENT, "no such inode")
        return node

    def _folder(self, inode: int) -> Folder:
        node = self._node(inode)
        if not isinstance(node, Folder):
            raise OSError(errno.ENOTDIR, "no folder")
        return node

    async def _all_known(self) -> None:
        """Return once every name of the model is known."""
        if self._inodes.complete:
            return
        if self._inodes.problem is not None:
            raise self._inodes.problem
        with self._in_time("the names of the model's files"):
            await for_each(self._layers, OpenLayer.known, len(self._layers))

    # -- content -----------------------------------------------------------------------------------

    def open(self, inode: int, flags: int) -> None:
        """Open a regular file for reading."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, "the model is read-only")
        opened = self._opened.get(inode)
        if opened is not None:
            opened.times += 1
            return
        node = self._node(inode)
        if not isinstance(node, File):
            raise OSError(errno.EISDIR, "no regular file")
        blob = self._blobs[str(node.layer.descriptor.digest)]
        content = OpenFile(node, blob, self.agent, self._buffers, self._droppings)
        self._opened[inode] = _Opened(content, Streams(node.size))
        if self._missing(content, Range(0, node.size)):
            self.agent.opened(blob.name, content.in_blob())

    def close(self, inode: int) -> None:
        """Close a file as often as it was opened."""
        opened = self._opened[inode]
        opened.times -= 1
        if not opened.times:
            del self._opened[inode]
            opened.content.close()

    async def read(self, inode: int, offset: int, size: int) -> memoryview:
        """Bytes of an open file, fewer only at its end; valid until the caller's next checkpoint.

        Raises :class:`ModelError` when they cannot be had, or not within the read timeout.
        """
        opened = self._opened[inode]
        content = opened.content
        wanted = Range(offset, max(min(offset + size, content.file.size), offset))
        if len(wanted) > BUFFER_BYTES:
            # fewer bytes than were asked for would be taken for the end of the file
            raise ModelError(f"the kernel asked for {size} bytes at one time")
        if not wanted:
            return memoryview(b"")
        if not content.is_complete:
            self._fetch_ahead(content, opened.streams.read(wanted))
        with self._in_time(f"bytes {wanted.start} to {wanted.stop} of a file"):
            return await content.read(wanted)

    def _fetch_ahead(self, content: OpenFile, ahead: Range | None) -> None:
        missing = self._missing(content, ahead) if ahead else None
        if missing is not None:
            self.agent.ahead(str(content.file.layer.descriptor.digest), missing)

    def _missing(self, content: OpenFile, wanted: Range) -> Range | None:
        """What is not there, as far as that can be seen now: whoever reads will be told better."""
        try:
            return content.missing(wanted) if wanted else None
        except (ModelError, OSError):
            return None

    @contextlib.contextmanager
    def _in_time(self, what: str) -> Iterator[None]:
        """Give the block the read timeout, and log what fails in it."""
        try:
            with trio.move_on_after(self._read_timeout) as scope:
                yield
            if scope.cancelled_caught:
                why = self.agent.trouble or "the agent has not brought them yet"
                raise Unavailable(f"not there within {self._read_timeout:g} s: {why}")
        except ModelError as error:
            self._tell(what, error)
            raise

    def _tell(self, what: str, error: ModelError) -> None:
        now = trio.current_time()
        if now - self._troubles.get(error.message, -_SAME_TROUBLE_SECONDS) < _SAME_TROUBLE_SECONDS:
            return
        self._troubles = {
            message: told
            for message, told in self._troubles.items()
            if now - told < _SAME_TROUBLE_SECONDS
        }
        self._troubles[error.message] = now
        logger.warning("%s could not be read: %s", what, error.message)

    # -- blobs that proved wrong -------------------------------------------------------------------

    def _heard_spoiled(self, name: str, reason: str) -> None:
        blob = self._blobs.get(name)
        if blob is not None:
            blob.spoil(reason)

    def _look_again(self) -> None:
        """Find the verdicts that an agent wrote and did not live to tell."""
        for opened in self._opened.values():
            # what proves wrong is noted, and told to who reads it
            with contextlib.suppress(ModelError, OSError):
                opened.content.look()

    def _spoiled(self, blob: Blob, reason: str) -> None:
        logger.error(
            "the bytes of the layer %s proved wrong: %s; its files cannot be read any more",
            blob.name,
            reason,
        )
        self._bad.append(blob)
        self._bad_came.set()

    async def _forget_spoiled(self, forget: Callable[[int], None]) -> None:
        """Make the kernel forget what it has of blobs that proved wrong."""
        while True:
            await self._bad_came.wait()
            self._bad_came = trio.Event()
            names, self._bad = {blob.name for blob in self._bad}, []
            inodes = [
                file.inode
                for file in self._inodes.files()
                if str(file.layer.descriptor.digest) in names
            ]
            await trio.to_thread.run_sync(_each, forget, inodes)


def _each(work: Callable[[int], None], inodes: list[int]) -> None:
    for inode in inodes:
        work(inode)
