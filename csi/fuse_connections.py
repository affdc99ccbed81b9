"""What can be known of, and done to, a FUSE connection from outside: whether FUSE works, and abort.

Connections are told by the minor number of their file system's device, as fusectl has them. The
control file system is opened without being mounted anywhere, so that none has to be there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from csi.mount_table import Mount

logger = logging.getLogger(__name__)

DEVICE: Final = Path("/dev/fuse")
_FILE_SYSTEMS: Final = Path("/proc/filesystems")
_STATUS: Final = Path("/proc/self/status")
_CAP_SYS_ADMIN: Final = 21

# <linux/mount.h>; the numbers of system calls from 424 on are the same on every architecture
_SYS_FSOPEN: Final = 430
_SYS_FSCONFIG: Final = 431
_SYS_FSMOUNT: Final = 432
_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_FSMOUNT_CLOEXEC: Final = 1


def obstacle(setting: Literal["auto", "off"]) -> str | None:
    """Why FUSE does not work here, and what to do about it; None where it does."""
    if setting == "off":
        return "the setting fuse is off"
    if importlib.util.find_spec("pyfuse3") is None:
        return "the Python package pyfuse3 is not installed"
    try:
        # opening it loads the module where the kernel has it as one
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return (
            f"{DEVICE} cannot be opened ({error.strerror}): the node's kernel needs FUSE, and the "
            "driver's container the device"
        )
    if "fuse" not in _FILE_SYSTEMS.read_text().split():
        return "the kernel has no FUSE file system: load the module fuse"
    if not _may_mount():
        return "mounting needs CAP_SYS_ADMIN: run the driver as root, in a privileged container"
    return None


def _may_mount() -> bool:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> _CAP_SYS_ADMIN & 1)
    return False


def abort(mount: Mount) -> bool:
    """End the connection of a FUSE mount: everybody who waits for its server gets an error.

    Whether that was done; what fails is logged. Never waits for the server.
    """
    minor = mount.device.partition(":")[2]
    try:
        root = _control()
        try:
            flags = os.O_WRONLY | os.O_CLOEXEC
            descriptor = os.open(f"{minor}/abort", flags, dir_fd=root)
            try:
                os.write(descriptor, b"1")
            finally:
                os.close(descriptor)
        finally:
            os.close(root)
    except OSError as error:
        logger.error("the FUSE connection of %s cannot be aborted: %s", mount.mountpoint, error)
        return False
    return True


def _control() -> int:
    """A descriptor of the root of fusectl."""
    library = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: int | bytes | None) -> int:
        converted = [
            ctypes.c_long(argument) if isinstance(argument, int) else argument
            for argument in arguments
        ]
        result = library.syscall(ctypes.c_long(number), *converted)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return int(result)

    context = call(_SYS_FSOPEN, b"fusectl", _FSOPEN_CLOEXEC)
    try:
        call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return call(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
