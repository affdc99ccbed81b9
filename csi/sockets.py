"""The unix socket that a server listens on: private from its first moment, and only ours to remove.

The socket is bound in a folder of its own that nobody else can enter, restricted, and then renamed
to its path. So there is no moment at which another user could connect, whatever the umask; a stale
socket is replaced at once and not first missed; and a server that ends late cannot delete the
socket of its successor, as gRPC would that unlinks by name.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fetcher.errors import Conflict, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOCKET_MODE: Final = 0o600
FOLDER_MODE: Final = 0o700

_PROBE_TIMEOUT: Final = 1.0


@contextmanager
def listening(path: Path, bind: Callable[[str], object]) -> Iterator[None]:
    """Have ``bind`` make a socket at the address it is given, and show it at ``path``.

    Leaving the block removes it, unless somebody else's is there by then; the listener itself is
    the caller's to close, inside the block. Only root can connect. Raises :class:`InvalidRequest`
    where no socket can be, :class:`Conflict` when somebody listens at ``path`` or it is no socket.
    """
    try:
        path.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        _check_replaceable(path)
        folder = Path(tempfile.mkdtemp(prefix=".csi-", dir=path.parent))
    except OSError as error:
        raise _unusable(path, error) from error
    # by its descriptor, since the path of a socket is short and that of the folder may not be; it
    # stays open, so that the name under which gRPC unlinks its socket never means anything else
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        identity = _bound(folder / "s", path, lambda: bind(f"unix:///proc/self/fd/{descriptor}/s"))
        try:
            yield
        finally:
            _remove(path, identity)
    finally:
        os.close(descriptor)


def _bound(made: Path, path: Path, bind: Callable[[], object]) -> tuple[int, int]:
    """Bind ``made``, move it to ``path``, and say which inode it is."""
    try:
        bind()
        made.chmod(SOCKET_MODE)
        identity = _identity(made)
        made.replace(path)
    except (OSError, RuntimeError) as error:
        made.unlink(missing_ok=True)
        raise _unusable(path, error) from error
    finally:
        made.parent.rmdir()
    return identity


def _check_replaceable(path: Path) -> None:
    """Raise :class:`Conflict` unless ``path`` is free, or a socket to which nobody listens."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Conflict(f"{path} is there already and is no socket: it stays as it is", path=path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT)
        try:
            probe.connect(os.fspath(path))
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                return
            raise Conflict(
                f"{path} is a socket of something else ({error}): it stays as it is", path=path
            ) from error
    raise Conflict(f"another process listens on {path}: stop it first", path=path)


def _remove(path: Path, identity: tuple[int, int]) -> None:
    try:
        if _identity(path) == identity:
            path.unlink()
    except FileNotFoundError:
        return


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _unusable(path: Path, error: Exception) -> InvalidRequest:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return InvalidRequest(f"cannot listen on {path}: {reason}", path=path)
