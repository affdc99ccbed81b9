"""Complete blobs, read byte for byte, in whatever form they lie on the disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fetcher.ranges import Range
from fetcher.store.disk import disk_error, sync_folder, write_all
from fetcher.store.layers import FRAME, load_layer
from fetcher.threads import Stopped

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from pathlib import Path

    from fetcher.oci import Digest

_COPY_BYTES: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """Consecutive bytes of a blob, as they lie in one file."""

    blob: Range
    path: Path
    offset: int
    """Where they begin in the file."""


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A complete blob: its pieces, in order, cover it."""

    size: int
    pieces: tuple[StoredPiece, ...]

    @classmethod
    def of_file(cls, path: Path, size: int) -> StoredBlob:
        """A blob in one file."""
        return cls(size, (StoredPiece(Range(0, size), path, 0),))

    @classmethod
    def of_files(cls, folder: Path) -> StoredBlob:
        """An uncompressed tar in its files, the frame between them. Raises :class:`OSError`."""
        frame = folder / FRAME
        pieces: list[StoredPiece] = []
        position = framed = 0
        for file in load_layer(folder).files:
            if not file.entry.size:
                continue
            if position < file.offset:
                pieces.append(StoredPiece(Range(position, file.offset), frame, framed))
                framed += file.offset - position
            position = file.offset + file.entry.size
            pieces.append(StoredPiece(Range(file.offset, position), file.source, 0))
        rest = frame.stat().st_size - framed
        if rest:
            pieces.append(StoredPiece(Range(position, position + rest), frame, framed))
        return cls(position + rest, tuple(pieces))

    def blocks(self, stop: threading.Event) -> Iterator[memoryview]:
        """All bytes in order, in one buffer that is used again; fewer if a file is too short.

        For a worker thread. Raises :class:`OSError` and :class:`fetcher.threads.Stopped`.
        """
        buffer = memoryview(bytearray(_COPY_BYTES))
        for piece in self.pieces:
            with piece.path.open("rb", buffering=0) as file:
                file.seek(piece.offset)
                left = len(piece.blob)
                while left and (read := file.readinto(buffer[: min(left, _COPY_BYTES)])):
                    if stop.is_set():
                        raise Stopped
                    yield buffer[:read]
                    left -= read

    def matches(self, digest: Digest, stop: threading.Event) -> bool:
        """Whether the bytes are what ``digest`` says. As :meth:`blocks`."""
        hasher = digest.hasher()
        for block in self.blocks(stop):
            hasher.update(block)
        return hasher.hexdigest() == digest.hex

    def copy_to(self, path: Path, stop: threading.Event) -> None:
        """Make the blob's one file, durably. Raises :class:`ModelError` and ``Stopped``."""
        scratch = path.with_name(path.name + ".new")
        try:
            with scratch.open("wb", buffering=0) as file:
                for block in self.blocks(stop):
                    write_all(file.fileno(), block)
                os.fsync(file.fileno())
            scratch.rename(path)
            sync_folder(path.parent)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise disk_error(error, path) from error
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
