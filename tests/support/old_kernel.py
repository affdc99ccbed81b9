"""A process for which the kernel has no mount API, as before Linux 5.12 or behind old filters."""

from __future__ import annotations

import ctypes
import errno
import struct

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_MODE_FILTER = 2
_LOAD_NUMBER, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_MISSING = (428, 429, 442)
"""open_tree, move_mount, mount_setattr."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def lose_the_mount_api() -> None:
    """Have it answer ENOSYS in this thread, and in all that it starts, for good: seccomp(2)."""
    jumps = [
        (_JUMP_IF_EQUAL, len(_MISSING) - position, 0, number)
        for position, number in enumerate(_MISSING)
    ]
    rules = [
        (_LOAD_NUMBER, 0, 0, 0),
        *jumps,
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    content = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    program = _Program(len(rules), content)
    library = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if library.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")
