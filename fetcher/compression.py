"""The bytes of a compressed layer, counted and bounded, from a stream that may be hostile.

A compressed stream that ends early, that does not end where its last member does, or that holds
more than was allowed is an :class:`InvalidArtifact`; an :class:`OSError` of the stream beneath
stays one.
"""

from __future__ import annotations

import gzip
import zlib
from typing import TYPE_CHECKING, Final, Protocol

import zstandard

from fetcher.errors import InvalidArtifact

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

MAX_ZSTD_WINDOW: Final = 128 * 1024 * 1024
"""What ``zstd --long=27`` needs, and the most that ``zstd -d`` gives unasked."""

_ZSTD_MAGIC: Final = 0xFD2FB528
_SKIPPABLE_MAGIC: Final = 0x184D2A50
_READ_BYTES: Final = 128 * 1024
_SCRATCH_BYTES: Final = 64 * 1024


class Readable(Protocol):
    """What bytes are read from: files opened without a buffer, ``BytesIO``, decompressors."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


class BoundedReader:
    """The bytes of a stream, of which there may be at most ``limit``."""

    def __init__(self, stream: Readable, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self.position = 0

    @property
    def left(self) -> int:
        """Bytes that may still come."""
        return self._limit - self.position

    def readinto(self, buffer: memoryview) -> int:
        """Read some bytes, without a copy; 0 at the end. Raises :class:`InvalidArtifact`."""
        if not buffer:
            return 0
        if self.left:
            count = self._read(buffer[: self.left])
            self.position += count
            return count
        if self._read(memoryview(bytearray(1))):
            raise InvalidArtifact(
                f"the layer unpacks to more than the {self._limit} bytes that it may have"
            )
        return 0

    def read(self, size: int) -> bytes:
        """Read ``size`` bytes, fewer only at the end."""
        buffer = bytearray(size)
        view = memoryview(buffer)
        filled = 0
        while filled < size and (count := self.readinto(view[filled:])):
            filled += count
        return bytes(view[:filled])

    def skip(self, size: int) -> int:
        """Pass over ``size`` bytes, fewer only at the end; gives how many."""
        scratch = memoryview(bytearray(min(size, _SCRATCH_BYTES)))
        skipped = 0
        while skipped < size and (count := self.readinto(scratch[: size - skipped])):
            skipped += count
        return skipped

    def _read(self, buffer: memoryview) -> int:
        return self._stream.readinto(buffer) or 0


def plain_reader(stream: BinaryIO, limit: int) -> BoundedReader:
    """A layer that is not compressed."""
    return BoundedReader(_as_readable(stream), limit)


def _as_readable(stream: BinaryIO) -> Readable:
    # BinaryIO does not name readinto, but every binary stream of the standard library has it
    return stream  # type: ignore[return-value]


class GzipReader(BoundedReader):
    """A gzip stream of one or more members, RFC 1952. Zeros may follow the last one."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        super().__init__(gzip.GzipFile(fileobj=stream, mode="rb"), limit)

    def _read(self, buffer: memoryview) -> int:
        try:
            return super()._read(buffer)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InvalidArtifact(f"the gzip layer is damaged: {error}") from error


class ZstdReader(BoundedReader):
    """A Zstandard stream of one or more frames, RFC 8878."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._frames = _FrameScanner(stream)
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
        frames = decompressor.stream_reader(
            self._frames,  # type: ignore[arg-type]  # all that it asks for is read
            read_size=_READ_BYTES,
            read_across_frames=True,
            closefd=False,
        )
        super().__init__(frames, limit)

    def _read(self, buffer: memoryview) -> int:
        try:
            return super()._read(buffer)
        except zstandard.ZstdError as error:
            raise InvalidArtifact(f"the zstd layer is damaged: {error}") from error


class _FrameScanner:
    """Hands compressed bytes on, and sees to it that they end where a frame ends.

    The library takes the end of its input in the middle of a frame for the end of the data. So this
    walks the frames' headers and block headers (RFC 8878, section 3.1) as they pass.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._part = b""
        self._wanted = 4
        self._next: Callable[[bytes], None] = self._magic
        self._skip = 0
        self._frames = 0
        self._checksum = False

    def read(self, size: int = _READ_BYTES) -> bytes:
        """The next bytes of the stream; raises :class:`InvalidArtifact` when they end too early."""
        data = self._stream.read(min(size, _READ_BYTES) if size >= 0 else _READ_BYTES)
        if data:
            self._scan(data)
        elif self._skip or self._part or self._next != self._magic:
            raise InvalidArtifact("the zstd layer is damaged: it ends in the middle of a frame")
        return data

    def _scan(self, data: bytes) -> None:
        position = 0
        while position < len(data):
            if self._skip:
                taken = min(self._skip, len(data) - position)
                self._skip -= taken
            else:
                taken = self._wanted - len(self._part)
                self._part += data[position : position + taken]
                if len(self._part) == self._wanted:
                    part, self._part = self._part, b""
                    self._next(part)
            position += taken

    def _expect(self, wanted: int, following: Callable[[bytes], None]) -> None:
        self._wanted = wanted
        self._next = following

    def _magic(self, part: bytes) -> None:
        magic = int.from_bytes(part, "little")
        if magic == _ZSTD_MAGIC:
            self._expect(1, self._descriptor)
        elif magic & 0xFFFFFFF0 == _SKIPPABLE_MAGIC:
            self._expect(4, self._skippable)
        else:
            raise InvalidArtifact(
                "the zstd layer is damaged: something that is no zstd frame follows the last one"
                if self._frames
                else "the layer's media type says zstd, but it is not compressed with zstd"
            )

    def _skippable(self, part: bytes) -> None:
        self._skip = int.from_bytes(part, "little")
        self._end_frame()

    def _descriptor(self, part: bytes) -> None:
        flags = part[0]
        single_segment = bool(flags & 0x20)
        self._checksum = bool(flags & 0x04)
        content_size = (1 if single_segment else 0, 2, 4, 8)[flags >> 6]
        self._skip = (not single_segment) + (0, 1, 2, 4)[flags & 3] + content_size
        self._expect(3, self._block)

    def _block(self, part: bytes) -> None:
        header = int.from_bytes(part, "little")
        run_length = (header >> 1) & 3 == 1
        self._skip = 1 if run_length else header >> 3
        if header & 1:
            self._skip += 4 * self._checksum
            self._end_frame()

    def _end_frame(self) -> None:
        self._frames += 1
        self._expect(4, self._magic)
