"""The first request of a mount, in which kernel and file system agree on what they can do.

libfuse answers it, and leaves out what pyfuse3 has no word for. So its answer goes through here:

- names of one folder may be looked up at the same time: one that has to wait for its layer must not
  keep others waiting;
- the kernel may have many requests under way: reads that wait for the network count, and must not
  keep others from being asked. Its own limit is 12.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    import socket

MAX_BACKGROUND: Final = 1024
CONGESTION: Final = 256
"""From so many requests on the kernel does not read ahead."""

_BUFFER_BYTES: Final = 64 * 1024
_INIT: Final = 26
_PARALLEL_DIROPS: Final = 1 << 18

# linux/fuse.h: fuse_in_header, fuse_init_in, fuse_out_header, fuse_init_out, as far as needed
_IN_HEADER: Final = struct.Struct("<IIQQIIIHH")
_INIT_IN: Final = struct.Struct("<IIII")
_OUT_HEADER: Final = struct.Struct("<IiQ")
_INIT_OUT: Final = struct.Struct("<IIIIHH")


async def shake_hands(device: int, library: socket.socket) -> None:
    """Pass the kernel's first request on to who reads the other end of ``library``, and the answer
    back.

    Raises :class:`OSError`.
    """
    await trio.lowlevel.wait_readable(device)
    request = os.read(device, _BUFFER_BYTES)
    library.send(request)
    await trio.lowlevel.wait_readable(library)
    os.write(device, agreed(request, library.recv(_BUFFER_BYTES)))


def agreed(request: bytes, answer: bytes) -> bytes:
    """The answer, with what it leaves out of what the kernel can do."""
    opcode = _IN_HEADER.unpack_from(request)[1]
    error = _OUT_HEADER.unpack_from(answer)[1]
    if opcode != _INIT or error or len(answer) < _OUT_HEADER.size + _INIT_OUT.size:
        return answer
    offered = _INIT_IN.unpack_from(request, _IN_HEADER.size)[3]
    major, minor, read_ahead, flags, _, _ = _INIT_OUT.unpack_from(answer, _OUT_HEADER.size)
    changed = bytearray(answer)
    flags |= offered & _PARALLEL_DIROPS
    _INIT_OUT.pack_into(
        changed, _OUT_HEADER.size, major, minor, read_ahead, flags, MAX_BACKGROUND, CONGESTION
    )
    return bytes(changed)
