"""The mount of a worker: its lock, the mount itself, and what the kernel reads ahead there."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from fetcher.errors import InProgress, ModelError, Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

TYPE: Final = "fuse.model-csi"
MAX_READ: Final = 1024 * 1024
READ_AHEAD_KB: Final = 4096
"""Measured best: the kernel then asks for :data:`MAX_READ` at a time, several at once."""

_LOOK_SECONDS: Final = 1.0

_MS_RDONLY: Final = 1
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MNT_DETACH: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mounted:
    """A mount of a worker."""

    path: Path
    device: str
    """``major:minor``, as the kernel names its device."""


class _Holder(msgspec.Struct):
    pid: int
    started: int
    """When, in clock ticks after the boot: with the pid it names one process for ever."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the one worker of a mountpoint, and say in the lock's file who that is.

    The lock is held until the process ends, however it ends. Raises :class:`InProgress` when there
    is another one, and :class:`ModelError`.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ModelError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        _lock(file, path)
        os.ftruncate(file, 0)
        os.pwrite(file, msgspec.json.encode(_Holder(os.getpid(), _started())), 0)
        yield
    finally:
        os.close(file)


def _lock(file: int, path: Path) -> None:
    """Take the lock. Who only looks whether it is held has it for a moment, too."""
    deadline = time.monotonic() + _LOOK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise InProgress(f"another worker holds {path}") from error
            time.sleep(_LOOK_SECONDS / 50)
        else:
            return


def _started() -> int:
    # the program's name, in parentheses, may hold anything
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19])


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[tuple[int, Mounted]]:
    """Mount a file system at ``path``, in place of what a dead worker left there.

    Gives the descriptor that the kernel's requests come from, and the mount. Nothing is unmounted
    at the end: whoever serves leaves because it was, or leaves pods an error rather than an empty
    folder. Raises :class:`Unsupported` where FUSE cannot be used, and :class:`ModelError`.
    """
    _clear(path)
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Unsupported(f"/dev/fuse cannot be opened: {error.strerror}") from error
    try:
        try:
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
            _mount(path, device)
        except PermissionError as error:
            raise Unsupported(f"{path} cannot be mounted: {error.strerror}") from error
        except OSError as error:
            raise ModelError(f"{path} cannot be mounted: {error.strerror}") from error
        yield device, _mounts_at(path)[-1]
    finally:
        os.close(device)


def _mount(path: Path, device: int) -> None:
    options = (
        f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,"
        f"max_read={MAX_READ}"
    )
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    _call(_libc.mount(os.fsencode(path), os.fsencode(path), TYPE.encode(), flags, options.encode()))


def _call(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _clear(path: Path) -> None:
    """Take away mounts of earlier workers, none of which lives, as the lock is ours."""
    for stale in reversed(_mounts_at(path)):
        logger.info("detaching the mount that an earlier worker left at %s", stale.path)
        with contextlib.suppress(OSError):
            _call(_libc.umount2(os.fsencode(path), _MNT_DETACH))


def is_mounted(mount: Mounted) -> bool:
    """Whether ``mount`` is still at its place."""
    return any(one.device == mount.device for one in _mounts_at(mount.path))


def _mounts_at(path: Path) -> list[Mounted]:
    """The mounts of workers at ``path``, the one that is seen last."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        _, _, device, _, place = fields.split(" ")[:5]
        place = _OCTAL.sub(lambda match: chr(int(match[1], 8)), place)
        if rest.startswith(f"{TYPE} ") and place == str(path):
            found.append(Mounted(path, device))
    return found


def tune(mount: Mounted) -> None:
    """Raise what the kernel reads ahead, and log what it is.

    Where that is not allowed the mount is slower and works.
    """
    read_ahead = Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb")
    try:
        read_ahead.write_text(str(READ_AHEAD_KB))
        found = int(read_ahead.read_text())
    except (OSError, ValueError) as error:
        logger.warning("the read-ahead of %s stays as it is: %s", mount.path, error)
    else:
        logger.info("the kernel reads %d KiB ahead on %s", found, mount.path)
