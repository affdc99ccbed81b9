"""Tar headers: POSIX.1-2008 "pax Interchange Format" and "ustar", and GNU's long names. No I/O.

The standard library's ``tarfile`` takes a broken header for the end of the archive, follows chains
of extended headers recursively, and reads each as large as it claims to be. Layers are hostile, so
the blocks are read here: strictly, in bounded memory, and an error is an :class:`InvalidArtifact`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from fetcher.artifacts import quoted, usable_time
from fetcher.errors import InvalidArtifact

BLOCK: Final = 512

REGULAR: Final = frozenset(b"0\x007")
HARD_LINK: Final = ord("1")
SYMBOLIC_LINK: Final = ord("2")
FOLDER: Final = ord("5")
PAX: Final = frozenset(b"xX")
PAX_GLOBAL: Final = ord("g")
GNU_LONG_NAME: Final = ord("L")
GNU_LONG_TARGET: Final = ord("K")

REFUSED: Final = {
    ord("3"): "a character device",
    ord("4"): "a block device",
    ord("6"): "a fifo",
    ord("S"): "a sparse file",
    ord("M"): "a part of a file that began in another volume",
    ord("V"): "a volume label",
    ord("x"): "a second extended header for one entry",
    ord("L"): "a second long name for one entry",
    ord("K"): "a second long target for one entry",
}
"""Kinds that have a name and no place in a model; others are refused by their number."""

_OCTAL: Final = re.compile(rb" *([0-7]*)[ \0]*")
_RECORD_LENGTH: Final = re.compile(rb"([1-9][0-9]{0,7}) ")
_DECIMAL: Final = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,30}))?")
_SIZE: Final = re.compile(r"[0-9]{1,19}")
_MAX_RECORDS: Final = 1024


@dataclass(frozen=True, slots=True)
class Header:
    """One header block. Names are as they stand there: not checked, maybe cut short."""

    kind: int
    name: bytes
    target: bytes
    mode: int
    size: int
    mtime: int


@dataclass(frozen=True, slots=True)
class Pax:
    """What an extended header says that matters here; the rest (owners, attributes) is not kept."""

    path: bytes | None = None
    target: bytes | None = None
    size: int | None = None
    mtime_ns: int | None = None


def parse_header(block: bytes) -> Header:
    """Read one block that is not all zeros. Raises :class:`InvalidArtifact`."""
    if _number(block[148:156], "checksum") not in _checksums(block):
        raise InvalidArtifact("the layer's tar archive is damaged: a header's checksum is wrong")
    name = _text(block[0:100])
    prefix = _text(block[345:500])
    # GNU's own format has times where ustar has a prefix, and another magic
    if prefix and block[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return Header(
        kind=block[156],
        name=name,
        target=_text(block[157:257]),
        mode=_number(block[100:108], "mode"),
        size=_number(block[124:136], "size"),
        mtime=_number(block[136:148], "time"),
    )


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _checksums(block: bytes) -> tuple[int, int]:
    """Bytes added up, the checksum itself as spaces; some old tools took them for signed."""
    others = block[:148] + block[156:]
    unsigned = sum(others) + 8 * ord(" ")
    return unsigned, unsigned - 256 * sum(byte > 127 for byte in others)


def _number(field: bytes, what: str) -> int:
    """Octal digits, or GNU's base 256 where the first bit is set."""
    if field[0] & 0x80:
        negative = field[0] & 0x40
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        return value - (1 << (8 * len(field) - 1)) if negative else value
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise InvalidArtifact(f"the layer's tar archive is damaged: {field!r} is no {what}")
    return int(match[1] or b"0", 8)


def decode(name: bytes) -> str:
    """A path or a target as text; both are UTF-8 or an :class:`InvalidArtifact`."""
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        shown = quoted(name.decode(errors="backslashreplace"))
        raise InvalidArtifact(f"the path {shown} in the layer is not UTF-8") from error


def parse_pax(data: bytes, *, everywhere: bool) -> Pax:
    """Read the records of an extended header; ``everywhere`` says that it is a global one.

    An empty value is as good as none. Sparse files are refused, and so is a global header that
    would give every file the same name or size. Raises :class:`InvalidArtifact`.
    """
    records = _records(data)
    if any(key.startswith((b"GNU.sparse.", b"SCHILY.realsize")) for key in records):
        raise InvalidArtifact("the layer holds a sparse file, which is not mounted")
    if everywhere:
        if any(records.get(key) for key in (b"path", b"linkpath", b"size")):
            raise InvalidArtifact("the layer's global tar header names a path or a size")
        return Pax()
    size = records.get(b"size", b"").decode("latin-1")
    if size and not _SIZE.fullmatch(size):
        raise _bad_pax(f"{quoted(size)} is no size")
    return Pax(
        path=records.get(b"path") or None,
        target=records.get(b"linkpath") or None,
        size=int(size) if size else None,
        mtime_ns=_nanoseconds(records.get(b"mtime", b"").decode("latin-1")),
    )


def _records(data: bytes) -> dict[bytes, bytes]:
    """Split ``length key=value\\n``…, where the length counts the whole record."""
    records: dict[bytes, bytes] = {}
    position = count = 0
    while position < len(data):
        match = _RECORD_LENGTH.match(data, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise _bad_pax("a record's length is wrong")
        key, equals, value = data[match.end() : end - 1].partition(b"=")
        if not equals:
            raise _bad_pax("a record has no '='")
        records[key] = value
        position = end
        count += 1
        if count > _MAX_RECORDS:
            raise _bad_pax(f"it has more than {_MAX_RECORDS} records")
    return records


def _nanoseconds(text: str) -> int | None:
    match = _DECIMAL.fullmatch(text)
    if match is None:
        return None
    fraction = (match[2] or "")[:9].ljust(9, "0")
    return usable_time(int(match[1]) * 10**9 + int(fraction))


def _bad_pax(why: str) -> InvalidArtifact:
    return InvalidArtifact(f"the layer's tar archive has a damaged extended header: {why}")
