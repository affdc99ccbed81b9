"""The kernel's side of a mount, by pyfuse3: requests to calls of the file system, and back.

Another session may take its place: it needs the file system's methods and the descriptor, and
nothing of the file system needs it.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pyfuse3
import trio

from fetcher.errors import ModelError
from fuse.errnos import errno_of
from fuse.filesystem import BLOCK
from fuse.handshake import shake_hands

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fuse.filesystem import Attributes, FileSystem

logger = logging.getLogger(__name__)

_FOR_EVER: Final = 10.0 * 365 * 24 * 3600
"""Seconds: content never changes, so the kernel need not ask twice."""

_REQUESTS: Final = 4096
"""Served at one time, most of which wait: more than the kernel has under way."""

_IDLE: Final = 8
"""Tasks that wait for the next request."""


@contextmanager
def _answering(what: str) -> Iterator[None]:
    """Turn whatever goes wrong into an answer: one stray exception would end the mount."""
    try:
        yield
    except pyfuse3.FUSEError:
        raise
    except (OSError, ModelError) as error:
        raise pyfuse3.FUSEError(errno_of(error)) from error
    except Exception as error:
        logger.exception("fault of this program in %s", what)
        raise pyfuse3.FUSEError(errno.EIO) from error


class Operations(pyfuse3.Operations):
    """Answers the kernel's requests out of a file system."""

    enable_writeback_cache = False
    enable_acl = False
    supports_dot_lookup = False

    def __init__(self, files: FileSystem) -> None:
        super().__init__()
        self._files = files

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        with _answering("lookup"):
            return _entry(await self._files.lookup(parent_inode, name))

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """Inodes are there as long as the worker is."""

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        with _answering("getattr"):
            return _entry(self._files.attributes(inode))

    async def readlink(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileNameT:
        with _answering("readlink"):
            return pyfuse3.FileNameT(self._files.target(inode))

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        with _answering("open"):
            self._files.open(inode, flags)
            return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> Any:
        with _answering("read"):
            return await self._files.read(fh, off, size)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        with _answering("release"):
            self._files.close(fh)

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """Nothing was written."""

    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        with _answering("opendir"):
            await self._files.open_folder(inode)
            return pyfuse3.FileHandleT(inode)

    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        with _answering("readdir"):
            for following, name, attributes in self._files.list_folder(fh, start_id):
                encoded = pyfuse3.FileNameT(name.encode())
                if not pyfuse3.readdir_reply(token, encoded, _entry(attributes), following):
                    break

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        with _answering("releasedir"):
            self._files.close_folder(fh)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        with _answering("statfs"):
            space = self._files.space()
            found = pyfuse3.StatvfsData()
            found.f_bsize = found.f_frsize = BLOCK
            found.f_blocks = space.blocks
            found.f_bfree = found.f_bavail = 0
            found.f_files = space.files
            found.f_ffree = found.f_favail = 0
            found.f_namemax = space.name_max
            return found

    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        raise pyfuse3.FUSEError(errno.ENODATA)

    async def listxattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> Sequence[pyfuse3.XAttrNameT]:
        return ()


def _entry(attributes: Attributes | None) -> pyfuse3.EntryAttributes:
    """What the kernel keeps of a name; of one that there is not, too."""
    entry = pyfuse3.EntryAttributes()
    entry.entry_timeout = entry.attr_timeout = _FOR_EVER
    if attributes is None:
        entry.st_ino = pyfuse3.InodeT(0)
        return entry
    entry.st_ino = pyfuse3.InodeT(attributes.inode)
    entry.st_mode = pyfuse3.ModeT(attributes.mode)
    entry.st_nlink = attributes.links
    entry.st_uid = entry.st_gid = 0
    entry.st_size = attributes.size
    entry.st_blksize = BLOCK
    entry.st_blocks = attributes.blocks
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = attributes.mtime_ns
    return entry


def forget(inode: int) -> None:
    """Make the kernel drop its pages of an inode. Blocks; for a worker thread."""
    try:
        pyfuse3.invalidate_inode(pyfuse3.InodeT(inode))
    except OSError as error:
        # it never heard of this one
        if error.errno != errno.ENOENT:
            logger.warning("pages of an inode could not be dropped: %s", error)


async def serve(files: FileSystem, device: int) -> None:
    """Answer what comes from ``device``, until the file system is unmounted everywhere."""
    ours, library = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # libfuse closes its own
    descriptor = library.detach()
    pyfuse3.init(Operations(files), f"/dev/fd/{descriptor}", set())
    try:
        with ours:
            await _begin(ours, device, descriptor)
        await pyfuse3.main(min_tasks=_IDLE, max_tasks=_REQUESTS)
    except* OSError as group:
        logger.warning("the kernel ended the connection: %s", group.exceptions[0])
    finally:
        pyfuse3.close(unmount=False)


async def _begin(ours: socket.socket, device: int, descriptor: int) -> None:
    """Let libfuse answer the first request over a socket, and put the device in its place then."""
    async with trio.open_nursery() as nursery:
        ended = trio.Event()
        nursery.start_soon(_first_request, ended)
        await shake_hands(device, ours)
        os.dup2(device, descriptor, inheritable=False)
        # whoever waits for the socket, or for the device by now, has to begin anew
        while not ended.is_set():
            trio.lowlevel.notify_closing(descriptor)
            await trio.lowlevel.checkpoint()


async def _first_request(ended: trio.Event) -> None:
    await pyfuse3.main(min_tasks=1, max_tasks=1)
    ended.set()
