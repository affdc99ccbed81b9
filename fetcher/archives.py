"""Tar layers as a stream of checked entries: RFC 1952, RFC 8878 and POSIX tar, all of it hostile.

Accepted and refused is listed in ``docs/artifacts.md``.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

from fetcher import tar
from fetcher.artifacts import (
    MAX_ENTRIES,
    MAX_NAMES_BYTES,
    Entry,
    FileEntry,
    FolderEntry,
    HardLinkEntry,
    LinkEntry,
    quoted,
    safe_path,
    safe_target,
    usable_time,
)
from fetcher.compression import BoundedReader, GzipReader, ZstdReader, plain_reader
from fetcher.errors import InvalidArtifact
from fetcher.modelpack import Packing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from _typeshed import WriteableBuffer

MAX_EXTENSION_BYTES: Final = 1024 * 1024
"""The largest extended header: the most that is read into memory at a time."""

MAX_HEADERS_BYTES: Final = 4 * 1024 * 1024
"""Of all headers that stand before one entry, extended ones with what they hold."""

_SET_ID: Final = 0o6000


@dataclass(frozen=True, slots=True)
class UnpackLimits:
    """How much a layer may hold."""

    max_bytes: int
    """Of the archive after decompression, headers and padding included."""
    max_entries: int = MAX_ENTRIES


def read_tar(
    stream: BinaryIO, packing: Packing, limits: UnpackLimits
) -> Iterator[tuple[Entry, BinaryIO | None]]:
    """Read a tar layer's entries, in its order, each regular file with its bytes.

    ``stream`` is read once, front to back. An entry's bytes can be read (``readinto`` makes no copy
    for an uncompressed layer) until the next entry is asked for; what was not read by then is
    passed over. The iteration has to be run to its end, as only then the layer is known to be
    whole.

    Every path is a safe path, every link stays inside, every hard link names an earlier regular
    file of this layer; whether entries agree with each other is for
    :class:`fetcher.artifacts.Tree`. Raises :class:`InvalidArtifact`, from the iteration and from
    the reads; an :class:`OSError` is the stream's own.
    """
    return _Archive(_open(stream, packing, limits.max_bytes), limits).entries()


class NotThere(Exception):
    """Raised by a reader whose next bytes have not arrived; never reaches a user."""


class TarWalk:
    """Reads the headers of an uncompressed tar as they arrive, in any order, and no contents.

    ``reader`` raises :class:`NotThere` for bytes that are still to come.
    """

    def __init__(self, reader: BoundedReader, limits: UnpackLimits) -> None:
        self._archive = _Archive(reader, limits)

    @property
    def position(self) -> int:
        """Where the headers begin that have not been read yet, by their end at the latest."""
        return self._archive.mark[0]

    @property
    def reached(self) -> int:
        """How far reading got, beyond :attr:`position` if something was missing there."""
        return self._archive.reader.position

    def advance(self) -> Iterator[tuple[Entry, int]]:
        """The entries that can be read now, each with the offset of its content.

        Ends at the end of the archive. Raises :class:`NotThere`, after which it may be called again
        and goes on, and :class:`InvalidArtifact`.
        """
        self._archive.rewind()
        for entry, _ in self._archive.entries():
            yield entry, self._archive.reader.position


def _open(stream: BinaryIO, packing: Packing, limit: int) -> BoundedReader:
    match packing:
        case Packing.TAR:
            return plain_reader(stream, limit)
        case Packing.TAR_GZIP:
            return GzipReader(stream, limit)
        case Packing.TAR_ZSTD:
            return ZstdReader(stream, limit)
        case Packing.RAW:
            raise ValueError("a raw layer is no archive")


class _Content(io.RawIOBase):
    """The bytes of one regular file, all of them or an error."""

    def __init__(self, reader: BoundedReader, entry: FileEntry) -> None:
        self._reader = reader
        self._path = entry.path
        self.left = entry.size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        if self.closed:
            raise ValueError(f"the layer was read on past {quoted(self._path)}")
        wanted = memoryview(buffer).cast("B")[: self.left]
        count = self._reader.readinto(wanted)
        if wanted and not count:
            raise self._truncated()
        self.left -= count
        return count

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; no more memory than there are bytes left."""
        return super().read(min(size, self.left) if size >= 0 else size) or b""

    def finish(self) -> None:
        """Pass over what nobody read, and let nobody read any more."""
        if self._reader.skip(self.left) < self.left:
            raise self._truncated()
        self.close()

    def _truncated(self) -> InvalidArtifact:
        return InvalidArtifact(
            f"the layer is cut off in {quoted(self._path)}: {self.left} bytes of it are missing"
        )


@dataclass(slots=True)
class _Extensions:
    """What headers before an entry's own say about it; the first that says it has precedence."""

    pax: tar.Pax | None = None
    name: bytes | None = None
    target: bytes | None = None

    @property
    def empty(self) -> bool:
        return self.pax is None and self.name is None and self.target is None


@dataclass(slots=True)
class _Archive:
    """Reads one archive from front to back."""

    reader: BoundedReader
    limits: UnpackLimits
    mark: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Where the last entry was done with, for :meth:`rewind`."""
    count: int = 0
    headers: int = 0
    names: int = 0
    files: dict[str, str] = field(default_factory=dict)
    """Where hard links may lead: a path, and the first name of the file that is there."""

    def entries(self) -> Iterator[tuple[Entry, BinaryIO | None]]:
        extensions = _Extensions()
        self._set_mark()
        while (header := self._next_header()) is not None:
            if self._extend(extensions, header):
                continue
            entry = self._entry(header, extensions)
            extensions = _Extensions()
            if isinstance(entry, FileEntry):
                content = _Content(self.reader, entry)
                yield entry, cast("BinaryIO", content)
                content.finish()
                self._skip_padding(entry.size)
            elif entry is not None:
                yield entry, None
            self._set_mark()
        if not extensions.empty:
            raise InvalidArtifact("the layer's tar archive ends where an entry should follow")

    def _set_mark(self) -> None:
        self.mark = (self.reader.position, self.count, self.headers, self.names)

    def rewind(self) -> None:
        """Go back to after the last entry: the next :meth:`entries` go on from there."""
        self.reader.position, self.count, self.headers, self.names = self.mark

    def _next_header(self) -> tar.Header | None:
        """The next header; ``None`` at the end, marked by zeros or (some tools) only by it."""
        if self.reader.position - self.mark[0] > MAX_HEADERS_BYTES:
            raise InvalidArtifact(
                f"the layer's tar archive has more than {MAX_HEADERS_BYTES} bytes of headers "
                "before one entry"
            )
        block = self.reader.read(tar.BLOCK)
        if not block and self.reader.position == 0:
            raise InvalidArtifact("the layer is empty: it is no tar archive")
        if not block:
            return None
        if len(block) < tar.BLOCK:
            raise InvalidArtifact("the layer is cut off in the middle of a tar header")
        if not any(block):
            self._check_end()
            return None
        self.headers += 1
        if self.headers > 4 * self.limits.max_entries:
            raise self._too_many()
        return tar.parse_header(block)

    def _check_end(self) -> None:
        """After the first block of zeros there are only zeros.

        What follows is invisible to some tools and an archive of its own to others, and reading it
        also makes a decompressor check its stream's end.
        """
        buffer = bytearray(64 * 1024)
        view = memoryview(buffer)
        while count := self.reader.readinto(view):
            if buffer.count(0, 0, count) != count:
                raise InvalidArtifact("the layer's tar archive is followed by other data")

    def _skip_padding(self, size: int) -> None:
        # programs that forget to close their tar writer leave out the last padding: nothing is lost
        self.reader.skip(-size % tar.BLOCK)

    def _extend(self, extensions: _Extensions, header: tar.Header) -> bool:
        """Take in a header that says something about a following one, if it is such a header."""
        match header.kind:
            case tar.PAX_GLOBAL:
                tar.parse_pax(self._extension(header), everywhere=True)
            case kind if kind in tar.PAX and extensions.pax is None:
                extensions.pax = tar.parse_pax(self._extension(header), everywhere=False)
            case tar.GNU_LONG_NAME if extensions.name is None:
                extensions.name = self._extension(header).rstrip(b"\0")
            case tar.GNU_LONG_TARGET if extensions.target is None:
                extensions.target = self._extension(header).rstrip(b"\0")
            case _:
                return False
        return True

    def _extension(self, header: tar.Header) -> bytes:
        if not 0 <= header.size <= MAX_EXTENSION_BYTES:
            raise InvalidArtifact(
                f"the layer's tar archive has an extended header of {header.size} bytes; at most "
                f"{MAX_EXTENSION_BYTES} are read"
            )
        data = self.reader.read(header.size)
        if len(data) < header.size:
            raise InvalidArtifact("the layer is cut off in an extended tar header")
        self._skip_padding(header.size)
        return data

    def _entry(self, header: tar.Header, extensions: _Extensions) -> Entry | None:
        """Check one entry; ``None`` for the root folder, which tar likes to name ``./``."""
        pax = extensions.pax or tar.Pax()
        name = tar.decode(pax.path or extensions.name or header.name)
        size = header.size if pax.size is None else pax.size
        self._count_entry(name)
        if header.kind in tar.REGULAR and not (name.endswith("/") and size == 0):
            return self._file(name, size, header, pax)
        if header.kind in tar.REGULAR or header.kind == tar.FOLDER:
            # the oldest tars mark a folder by nothing but the slash
            return None if _is_root(name) else FolderEntry(safe_path(name))
        path = safe_path(name)
        target = tar.decode(pax.target or extensions.target or header.target)
        self.names += len(target)
        if header.kind not in (tar.SYMBOLIC_LINK, tar.HARD_LINK):
            kind = tar.REFUSED.get(header.kind, f"an entry of the unknown type {header.kind}")
            raise InvalidArtifact(f"{quoted(path)} in the layer is {kind}; that is not mounted")
        if size:
            raise InvalidArtifact(f"the link {quoted(path)} in the layer has {size} bytes")
        if header.kind == tar.SYMBOLIC_LINK:
            return LinkEntry(path, safe_target(path, target))
        return self._hard_link(path, target)

    def _file(self, name: str, size: int, header: tar.Header, pax: tar.Pax) -> FileEntry:
        path = safe_path(name)
        if name.endswith("/"):
            raise InvalidArtifact(f"the folder {quoted(path)} in the layer has {size} bytes")
        if not 0 <= size <= self.reader.left:
            raise InvalidArtifact(
                f"the file {quoted(path)} in the layer has {size} bytes, where at most "
                f"{self.reader.left} may be left"
            )
        if header.mode & _SET_ID:
            raise InvalidArtifact(f"the file {quoted(path)} in the layer is setuid or setgid")
        self.files[path] = path
        mtime_ns = pax.mtime_ns
        if mtime_ns is None:
            mtime_ns = usable_time(header.mtime * 10**9)
        return FileEntry(path, size, bool(header.mode & 0o111), mtime_ns)

    def _hard_link(self, path: str, target: str) -> HardLinkEntry:
        first = self.files.get(safe_path(target))
        if first is None:
            raise InvalidArtifact(
                f"the hard link {quoted(path)} names {quoted(target)}, which is no regular file "
                "before it in the layer"
            )
        self.files[path] = first
        return HardLinkEntry(path, first)

    def _count_entry(self, name: str) -> None:
        self.count += 1
        self.names += len(name)
        if self.count > self.limits.max_entries or self.names > MAX_NAMES_BYTES:
            raise self._too_many()

    def _too_many(self) -> InvalidArtifact:
        return InvalidArtifact(
            f"the layer has more than {self.limits.max_entries} entries, or their paths more than "
            f"{MAX_NAMES_BYTES} characters"
        )


def _is_root(name: str) -> bool:
    return bool(name) and not name.startswith("/") and set(name.split("/")) <= {"", "."}
