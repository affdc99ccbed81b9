"""The folder at a target: where it really is, what lies there, making and removing it.

Each question goes to a thread and has a deadline. A thread that does not come back is left behind,
so that a dead file system costs its own volume an error and no other volume anything.
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from fetcher.errors import Conflict, InvalidRequest, ModelError, NoSpace, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT: Final = 5.0
TARGET_MODE: Final = 0o750

T = TypeVar("T")


class Found(enum.Enum):
    """What a target is before it is mounted."""

    MISSING = "missing"
    EMPTY = "empty"


async def locate(target: Path, timeout: float = ANSWER_TIMEOUT) -> Path:  # noqa: ASYNC109 (asks a thread)
    """``target`` without symlinks before its last part, as the mount table spells it.

    Asks nothing of the target itself. Raises :class:`InvalidRequest` for a path that cannot be one.
    """
    text = str(target)
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest("the target path is not UTF-8") from error
    if not target.is_absolute() or not target.name or ".." in target.parts:
        raise InvalidRequest(f"the target path {text[:200]!r} is not absolute, or has '..'")
    if "\0" in text or size >= 4096 or len(os.fsencode(target.name)) > 255:
        raise InvalidRequest(f"the target path {text[:200]!r} is too long, or has a NUL")
    return await _answer(
        target, lambda: Path(os.path.realpath(target.parent), target.name), timeout
    )


async def inspect(target: Path) -> Found:
    """Whether a mount may be made at ``target``, which is no mount now; nothing is touched.

    Raises :class:`InvalidRequest` for a file, a symlink or a missing parent, :class:`Conflict` for
    a folder with something in it.
    """
    return await _answer(target, lambda: _inspect(target))


async def make(target: Path) -> None:
    """Make the folder, if it is not there."""
    await _change(target, lambda: _make(target))


async def remove(target: Path) -> bool:
    """Remove the folder, if it is one and empty: whether nothing is at ``target`` now.

    Never deletes a file, nor anything within.
    """
    return await _change(target, lambda: _remove(target))


async def parent_exists(target: Path) -> bool:
    """Whether the folder that holds the target is there: in Kubernetes, the pod's."""
    return await _answer(target, target.parent.is_dir)


async def answers(target: Path, timeout: float) -> bool:  # noqa: ASYNC109 (asks a thread)
    """Whether the file system that is mounted at ``target`` lists its folder in time."""
    try:
        await _answer(target, lambda: os.listdir(target), timeout)
    except ModelError:
        return False
    return True


async def _change(target: Path, change: Callable[[], T]) -> T:
    """As :func:`_answer`, and a cancellation waits: the next call finds it done, or not begun.

    Only on a file system that does not answer may it come later.
    """
    await trio.lowlevel.checkpoint()
    return await _answer(target, change, shield=True)


async def _answer(
    target: Path,
    question: Callable[[], T],
    timeout: float = ANSWER_TIMEOUT,  # noqa: ASYNC109 (asks a thread)
    *,
    shield: bool = False,
) -> T:
    try:
        with trio.move_on_after(timeout, shield=shield):
            # a limiter for each: calls that hang must not use up what other volumes need
            return await trio.to_thread.run_sync(
                question, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
    except OSError as error:
        raise _translated(target, error) from error
    raise Unavailable(f"{target}: its file system does not answer within {timeout:g} s")


def _inspect(target: Path) -> Found:
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError as error:
        if target.parent.is_dir():
            return Found.MISSING
        raise InvalidRequest(
            f"the folder {target.parent} that holds the target is missing"
        ) from error
    if not stat.S_ISDIR(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no folder"
        raise InvalidRequest(f"the target {target} is {kind}: it stays as it is")
    with os.scandir(target) as entries:
        if next(entries, None) is not None:
            raise Conflict(f"the target {target} is not empty: it stays as it is")
    return Found.EMPTY


def _make(target: Path) -> None:
    try:
        target.mkdir(TARGET_MODE)
    except FileExistsError:
        # what it is shows when it is opened to be mounted on
        return


def _remove(target: Path) -> bool:
    try:
        target.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        logger.warning("%s is left where it is: %s", target, error.strerror)
        return False
    return True


def _translated(target: Path, error: OSError) -> ModelError:
    message = f"{target}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(message, target=target)
    if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return InvalidRequest(message, target=target)
    return Unavailable(message, target=target)
