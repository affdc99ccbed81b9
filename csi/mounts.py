"""Making and removing the mounts that pods see.

Bind: the tree is cloned detached, locked down (read-only, nosuid, nodev) and only then moved to its
target, so what appears is right from its first moment, here and in every mount namespace to which
the target's folder propagates; a process killed half-way leaves nothing. A remount after the bind
would not reach the copies that had already propagated: the host would keep a writable one.

Unmount: in a child that can be killed, since an unmount can wait for a dead server for ever. What
answers "busy", or does not answer, is detached.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from csi.mount_table import Mount, mount_at, mount_table
from fetcher.errors import AccessDenied, Conflict, InvalidRequest, ModelError, NoSpace, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

__all__ = ["Mount", "bind_read_only", "mount_at", "mount_table", "unmount"]

logger = logging.getLogger(__name__)

UNMOUNT_TIMEOUT: Final = 5.0
"""Seconds for one attempt; an unmount of a healthy bind takes microseconds."""

MAX_STACKED: Final = 64
"""Mounts on top of each other at one target; more than a loop of ours could ever leave."""

# <linux/mount.h>, <sys/mount.h>, <fcntl.h>; the numbers of system calls from 424 on are the same on
# every architecture.
_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_SYS_MOUNT_SETATTR: Final = 442
_AT_EMPTY_PATH: Final = 0x1000
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40
_MOUNT_ATTR_LOCKED: Final = 0x1 | 0x2 | 0x4  # RDONLY, NOSUID, NODEV
_MS_LOCKED: Final = 0x1 | 0x2 | 0x4  # the same three, as mount(2) has them
_MS_REMOUNT: Final = 0x20
_MS_BIND: Final = 0x1000
_MS_PRIVATE: Final = 1 << 18
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class MountApiMissing(Exception):
    """This kernel, or a seccomp filter before it, has no open_tree, mount_setattr or move_mount."""


@dataclass(frozen=True)
class _System:
    """The C library's system calls, with errno as OSError."""

    library: ctypes.CDLL

    @classmethod
    def load(cls) -> _System:
        return cls(ctypes.CDLL(None, use_errno=True))

    def call(self, number: int, *arguments: object) -> int:
        converted = [
            ctypes.c_long(argument) if isinstance(argument, int) else argument
            for argument in arguments
        ]
        result = self.library.syscall(ctypes.c_long(number), *converted)
        return self._checked(result)

    def mount(self, source: str, target: str, flags: int) -> None:
        self._checked(
            self.library.mount(
                os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(flags), None
            )
        )

    def _checked(self, result: int) -> int:
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result


class _MountAttributes(ctypes.Structure):
    """``struct mount_attr``, mount_setattr(2)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


async def bind_read_only(source: Path, target: Path) -> None:
    """Show the folder ``source`` at the empty folder ``target``: read-only, nosuid, nodev.

    Neither may be a symlink. Once it has begun it is not interrupted by a cancellation, so the
    caller finds either the mount or an error. Raises :class:`Conflict` when ``target`` is not
    empty, :class:`InvalidRequest` when it is no folder, :class:`AccessDenied` without
    CAP_SYS_ADMIN.
    """
    await trio.lowlevel.checkpoint()
    with trio.CancelScope(shield=True):
        # a limiter of its own: a bind that hangs keeps no other one from starting
        await trio.to_thread.run_sync(_bind, source, target, limiter=trio.CapacityLimiter(1))


async def bind_over(source: Path, target: Path) -> None:
    """Show the folder ``source`` over the mount that is at ``target``, whatever became of that.

    As :func:`bind_read_only`, and nothing is asked of what is mounted there: it may be dead.
    """
    await trio.lowlevel.checkpoint()
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(_bind_over, source, target, limiter=trio.CapacityLimiter(1))


def _bind_over(source: Path, target: Path) -> None:
    with _source(source) as tree, _folder(target, "the target", os.O_PATH) as place:
        _bind_tree(tree, place, target)


def _bind(source: Path, target: Path) -> None:
    with _source(source) as tree, _folder(target, "the target") as place:
        with os.scandir(place) as entries:
            if next(entries, None) is not None:
                raise Conflict(f"the target {target} is not empty: it stays as it is")
        _bind_tree(tree, place, target)


def _bind_tree(tree: int, place: int, target: Path) -> None:
    try:
        try:
            bind_by_mount_api(tree, place)
        except MountApiMissing:
            bind_by_mount(tree, place, target)
    except OSError as error:
        raise _mount_error(target, error) from error


def _source(source: Path) -> AbstractContextManager[int]:
    """What is to be shown, without opening it: a worker would first have to know all names in it,
    and one that hangs would never answer.
    """
    return _folder(source, "the model's tree", os.O_PATH)


@contextmanager
def _folder(path: Path, what: str, how: int = os.O_RDONLY) -> Iterator[int]:
    """A descriptor of a folder: what was checked through it is what is mounted."""
    try:
        descriptor = os.open(path, _FOLDER | how)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENOENT):
            raise InvalidRequest(f"{what} {path} is not a folder: {error.strerror}") from error
        raise Unavailable(f"{what} {path} cannot be opened: {error.strerror}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def bind_by_mount_api(tree: int, place: int) -> None:
    """Bind with the mount API of Linux 5.12: atomic. Raises MountApiMissing where it is not."""
    system = _System.load()
    try:
        clone = system.call(
            _SYS_OPEN_TREE, tree, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH
        )
    except OSError as error:
        raise _if_missing(error) from error
    try:
        attributes = _MountAttributes(attr_set=_MOUNT_ATTR_LOCKED, propagation=_MS_PRIVATE)
        try:
            system.call(
                _SYS_MOUNT_SETATTR,
                clone,
                b"",
                _AT_EMPTY_PATH,
                ctypes.byref(attributes),
                ctypes.sizeof(attributes),
            )
        except OSError as error:
            raise _if_missing(error) from error
        system.call(
            _SYS_MOVE_MOUNT,
            clone,
            b"",
            place,
            b"",
            _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH,
        )
    finally:
        os.close(clone)


def binds_in_one_step() -> bool:
    """Whether binds go by :func:`bind_by_mount_api` here: what is there and locked is right.

    One that :func:`bind_by_mount` did not finish may be locked here and writable elsewhere.
    """
    system = _System.load()
    attributes = _MountAttributes(attr_set=_MOUNT_ATTR_LOCKED)
    size = ctypes.sizeof(attributes)
    for number, *arguments in (
        (_SYS_OPEN_TREE, -1, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH),
        (_SYS_MOUNT_SETATTR, -1, b"", _AT_EMPTY_PATH, ctypes.byref(attributes), size),
    ):
        try:
            system.call(number, *arguments)
        except OSError as error:
            # no such descriptor: the call exists, and it got as far as looking for that
            if error.errno != errno.EBADF:
                return False
    return True


def bind_by_mount(tree: int, place: int, target: Path) -> None:
    """Bind with mount(2), for older kernels; ``place`` is an open descriptor of ``target``.

    A remount does not propagate, a bind does, with the flags of what it binds: so the locked mount
    is bound once more, on top of itself, and that one is right in every namespace. A process killed
    in between leaves a mount that no record calls published; it is removed and made again.
    """
    system = _System.load()
    system.mount(f"/proc/self/fd/{tree}", f"/proc/self/fd/{place}", _MS_BIND)
    try:
        # the path now means the mount, the descriptor still the folder beneath
        system.mount("none", str(target), _MS_BIND | _MS_REMOUNT | _MS_LOCKED)
        system.mount(str(target), str(target), _MS_BIND)
    except OSError:
        system.library.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW)
        raise


def _if_missing(error: OSError) -> Exception:
    # seccomp filters that do not know a call answer EPERM; mount(2) then tells the two apart
    if error.errno in (errno.ENOSYS, errno.EPERM):
        return MountApiMissing()
    return error


def _mount_error(target: Path, error: OSError) -> ModelError:
    message = f"{target} cannot be mounted: {error.strerror}"
    if error.errno in (errno.EPERM, errno.EACCES):
        return AccessDenied(f"{message}; mounting needs root (CAP_SYS_ADMIN)", target=target)
    if error.errno in (errno.ENOSPC, errno.ENOMEM):
        return NoSpace(f"{message}; the kernel has no room for more mounts", target=target)
    return Unavailable(message, target=target)


async def unmount(target: Path, ours: Callable[[Mount], bool] | None = None) -> int:
    """Remove every mount stacked at ``target`` (without symlinks), and say how many there were.

    Looks at the mount table only, never at the file system that is mounted, and holds no thread
    that could hang. A mount that ``ours`` refuses ends it with :class:`Conflict`, itself untouched.
    Raises :class:`Unavailable` when a mount cannot even be detached. Cancelled, it leaves the mount
    or not; asked again, it goes on.
    """
    for removed in range(MAX_STACKED):
        mount = mount_at(target)
        if mount is None:
            return removed
        if ours is not None and not ours(mount):
            raise Conflict(
                f"{target} is a mount of something else ({mount.type}, {mount.root[:200]}): it "
                "stays as it is",
                target=target,
            )
        await _unmount_one(target, mount)
    raise Unavailable(f"{target} has more than {MAX_STACKED} mounts on top of each other")


async def unmount_all_but_lowest(target: Path, ours: Callable[[Mount], bool]) -> None:
    """Remove what is stacked at ``target`` upon the lowest mount, as :func:`unmount` does."""
    for _ in range(MAX_STACKED):
        mount = mount_at(target)
        if mount is None or mount.parent not in _ids_at(target):
            return
        if not ours(mount):
            raise Conflict(
                f"{target} is a mount of something else ({mount.type}): it stays as it is",
                target=target,
            )
        await _unmount_one(target, mount)
    raise Unavailable(f"{target} has more than {MAX_STACKED} mounts on top of each other")


def _ids_at(target: Path) -> set[int]:
    return {mount.id for mount in mount_table() if mount.mountpoint == str(target)}


async def _unmount_one(target: Path, mount: Mount) -> None:
    code = await _umount2(target, _UMOUNT_NOFOLLOW)
    # where it failed because somebody else was faster, the table says so
    if code == 0 or _gone(target, mount):
        return
    logger.warning(
        "unmounting %s: %s; detaching it", target, os.strerror(code) if code else "no answer"
    )
    code = await _umount2(target, _UMOUNT_NOFOLLOW | _MNT_DETACH)
    if _gone(target, mount):
        return
    reason = "it does not answer" if code is None else os.strerror(code)
    if code == errno.EPERM:
        raise AccessDenied(f"{target} cannot be unmounted: needs root (CAP_SYS_ADMIN)")
    raise Unavailable(f"{target} cannot be unmounted: {reason}", target=target)


def _gone(target: Path, mount: Mount) -> bool:
    now = mount_at(target)
    return now is None or now.id != mount.id


_CHILD_ERRNO: Final = 64
"""Added to the child's errno, so that a Python that dies by itself is not taken for EPERM."""

# Started with -I -S: no site, no environment; it imports nothing of ours, calls, and tells errno.
# It starts for some milliseconds. A driver killed meanwhile may have been started again, and have
# mounted anew at the target: an orphan must not touch that.
_CHILD: Final = f"""
import ctypes, os, sys
if os.getppid() != int(sys.argv[3]):
    os._exit(1)
library = ctypes.CDLL(None, use_errno=True)
done = library.umount2(os.fsencode(sys.argv[1]), int(sys.argv[2]))
os._exit({_CHILD_ERRNO} + ctypes.get_errno() if done else 0)
"""


async def _umount2(target: Path, flags: int) -> int | None:
    """umount2(2) in a child: its errno, 0 for success, None if there was no answer."""
    try:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-I", "-S", "-c", _CHILD, target, str(flags), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    except OSError as error:
        raise Unavailable(f"no process to unmount {target} with: {error.strerror}") from error
    try:
        with trio.move_on_after(UNMOUNT_TIMEOUT):
            return _errno(await process.wait())
        return None
    finally:
        if process.returncode is None:
            process.kill()
            # one that sleeps in the kernel cannot die: it is left behind, not waited for
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await process.wait()


def _errno(status: int) -> int | None:
    if status == 0:
        return 0
    return status - _CHILD_ERRNO if status > _CHILD_ERRNO else None
