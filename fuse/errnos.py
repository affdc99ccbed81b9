"""What a reader is told: errors to ``errno``, decided once, here.

A read ends in the right bytes or in ``EIO``, which every program takes for what it is: these bytes
cannot be had. ``ENOENT`` or ``EACCES`` in the middle of a file would be taken for something else.
The reason is in the log and in the volume's condition.
"""

from __future__ import annotations

import errno
from typing import Final

from fetcher import errors

ERRNOS: Final = {
    errors.ModelError: errno.EIO,
    errors.InvalidRequest: errno.EIO,
    errors.InvalidArtifact: errno.EIO,
    errors.NotFound: errno.EIO,
    errors.Unauthenticated: errno.EIO,
    errors.AccessDenied: errno.EIO,
    errors.Unavailable: errno.EIO,
    errors.NoSpace: errno.EIO,
    errors.Conflict: errno.EIO,
    errors.OutOfRange: errno.EIO,
    errors.InProgress: errno.EIO,
    errors.DigestMismatch: errno.EIO,
    errors.Unsupported: errno.EOPNOTSUPP,
}


def errno_of(error: Exception) -> int:
    """The ``errno`` of an error; of what is no error of ours, too."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return next((ERRNOS[kind] for kind in type(error).__mro__ if kind in ERRNOS), errno.EIO)
