"""SHA-2 that can begin in the middle, with the intermediate hash value of what came before.

FIPS 180-4, section 6, computes a digest block by block: each step makes the next *intermediate hash
value* of the one before and of one block, and the last one is the digest. Whoever has the value at
some point can go on from there. ``hashlib`` does not give it, so this asks libcrypto, which
``hashlib`` uses as well, by its functions for SHA-256 and SHA-512: they keep the value in a
structure that has been public and the same in all its versions.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import sys
from typing import Any, Final

from fetcher.errors import Unsupported

logger: Final = logging.getLogger(__name__)

_LIBRARIES: Final = ("libcrypto.so.3", "libcrypto.so.1.1")


class _Sha256Context(ctypes.Structure):
    """``SHA256_CTX`` of ``openssl/sha.h``."""

    _fields_ = (
        ("h", ctypes.c_uint32 * 8),
        ("low", ctypes.c_uint32),
        ("high", ctypes.c_uint32),
        ("data", ctypes.c_uint32 * 16),
        ("pending", ctypes.c_uint),
        ("digest_bytes", ctypes.c_uint),
    )


class _Sha512Context(ctypes.Structure):
    """``SHA512_CTX`` of ``openssl/sha.h``."""

    _fields_ = (
        ("h", ctypes.c_uint64 * 8),
        ("low", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("data", ctypes.c_uint64 * 16),
        ("pending", ctypes.c_uint),
        ("digest_bytes", ctypes.c_uint),
    )


_CONTEXTS: Final[dict[str, type[Any]]] = {"sha256": _Sha256Context, "sha512": _Sha512Context}
VALUE_BYTES: Final = {"sha256": 32, "sha512": 64}
"""Bytes of an intermediate hash value, by algorithm; as many as of a digest."""
MAX_BLOCK_BYTES: Final = 128
"""Of any algorithm: values are to be had where a multiple of this ends."""


class Sha2:
    """A running digest that tells its intermediate hash value, and can start at one."""

    def __init__(self, algorithm: str, value: bytes | None = None, length: int = 0) -> None:
        """Begin, or go on after ``length`` bytes that led to ``value``.

        ``length`` is a multiple of :data:`MAX_BLOCK_BYTES`. Raises :class:`Unsupported` where
        :func:`is_available` is false.
        """
        library = _library()
        if library is None:
            raise Unsupported("this system has no libcrypto that computes SHA-2 in parts")
        self._algorithm = algorithm
        number = algorithm.removeprefix("sha")
        self._update = getattr(library, f"SHA{number}_Update")
        self._final = getattr(library, f"SHA{number}_Final")
        self._context = _CONTEXTS[algorithm]()
        getattr(library, f"SHA{number}_Init")(ctypes.byref(self._context))
        if value is not None:
            self._go_on(value, length)

    def _go_on(self, value: bytes, length: int) -> None:
        if length % MAX_BLOCK_BYTES or len(value) != VALUE_BYTES[self._algorithm]:
            raise ValueError(f"{len(value)} bytes after {length} are no {self._algorithm} value")
        context, word = self._context, len(value) // 8
        for index in range(8):
            context.h[index] = int.from_bytes(value[index * word : (index + 1) * word], "big")
        high, low = divmod(length * 8, 1 << (word * 8))
        context.high, context.low = high, low

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes, from ``bytes`` or a buffer of bytes that may be written to.

        Other threads run meanwhile.
        """
        if isinstance(data, bytes):
            self._update(ctypes.byref(self._context), data, ctypes.c_size_t(len(data)))
            return
        size = len(data)
        buffer = (ctypes.c_char * size).from_buffer(data)
        self._update(ctypes.byref(self._context), buffer, ctypes.c_size_t(size))

    @property
    def value(self) -> bytes:
        """The intermediate hash value, written as digests are; after a whole number of blocks."""
        if self._context.pending:
            raise ValueError("there is no intermediate hash value within a block")
        word = VALUE_BYTES[self._algorithm] // 8
        return b"".join(one.to_bytes(word, "big") for one in self._context.h)

    def hexdigest(self) -> str:
        """The digest of all; nothing can be added afterwards."""
        digest = ctypes.create_string_buffer(VALUE_BYTES[self._algorithm])
        self._final(digest, ctypes.byref(self._context))
        return digest.raw.hex()


def is_available() -> bool:
    """Whether SHA-2 can be computed in parts here."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """libcrypto, loaded once; None where there is none that does what is expected of it."""
    for name in _LIBRARIES:
        try:
            found = ctypes.CDLL(name)
            for number in ("256", "512"):
                for function in ("Init", "Update", "Final"):
                    getattr(found, f"SHA{number}_{function}").restype = ctypes.c_int
        except (OSError, AttributeError):
            continue
        if _does_what_it_should(found):
            return found
    logger.warning("no libcrypto was found for chunk digests: lists of them are not used")
    return None


def _does_what_it_should(library: ctypes.CDLL) -> bool:
    """Whether structures and functions are as they are taken to be, by computing something."""
    data = bytes(range(256)) * 3
    for algorithm, kind in _CONTEXTS.items():
        number = algorithm.removeprefix("sha")
        update = getattr(library, f"SHA{number}_Update")
        # room behind the structure, should it be larger than it is taken to be
        memory = ctypes.create_string_buffer(ctypes.sizeof(kind) + 256)
        context = kind.from_buffer(memory)
        getattr(library, f"SHA{number}_Init")(ctypes.byref(context))
        update(ctypes.byref(context), data, ctypes.c_size_t(256))
        again = kind.from_buffer_copy(memory)
        told = (again.low, again.high, again.pending, again.digest_bytes)
        if told != (256 * 8, 0, 0, VALUE_BYTES[algorithm]):
            return False
        update(ctypes.byref(context), data[256:], ctypes.c_size_t(len(data) - 256))
        digest = ctypes.create_string_buffer(VALUE_BYTES[algorithm])
        getattr(library, f"SHA{number}_Final")(digest, ctypes.byref(context))
        if digest.raw != hashlib.new(algorithm, data).digest():
            return False
    return sys.byteorder in ("little", "big")
