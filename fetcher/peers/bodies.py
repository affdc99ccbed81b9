"""The bytes of a blob as they are sent to a peer: where they lie, and which of them are there.

What is complete lies in files and stays as it is; what is on its way is passed on as it arrives.
"""

from __future__ import annotations

import bisect
import collections
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from fetcher.peers.protocol import Have
from fetcher.ranges import Range

if TYPE_CHECKING:
    from pathlib import Path

    from fetcher.oci import Digest
    from fetcher.store.blobs import PartialBlob
    from fetcher.store.store import Store
    from fetcher.store.stored import StoredBlob

_MAX_KEPT: Final = 256


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive bytes of a file."""

    path: Path
    offset: int
    count: int


class Body(Protocol):
    """A blob that is sent, or a part of it. For any thread."""

    @property
    def size(self) -> int:
        """Bytes of the whole blob."""

    def there(self, part: Range) -> int:
        """Up to where the bytes of ``part`` are there, from its start on."""

    def is_begun(self, part: Range) -> bool:
        """Whether some bytes of every chunk of ``part`` are there: the others are on their way."""

    def have(self) -> Have:
        """Which chunks are there."""

    def spans(self, part: Range) -> list[Span] | None:
        """Where a part lies that is there, in order; None where it can only be read."""

    def read(self, offset: int, buffer: memoryview) -> int:
        """Read bytes that are there, in a worker thread. Raises ``OSError``, ``ModelError``."""

    @property
    def is_over(self) -> bool:
        """Whether it is not what there is of the blob any more: it became complete, or was dropped.

        A file that was opened before is still its own.
        """


class StoredBody:
    """A complete blob."""

    is_over = False

    def __init__(self, blob: StoredBlob) -> None:
        self._pieces = blob.pieces
        self._starts = [piece.blob.start for piece in blob.pieces]
        self.size = blob.size

    def inode(self) -> int:
        """Of the file that it begins in; 0 where that is gone. Another one means other bytes."""
        try:
            return self._pieces[0].path.stat().st_ino if self._pieces else 1
        except OSError:
            return 0

    def there(self, part: Range) -> int:
        return part.stop

    def is_begun(self, part: Range) -> bool:
        return True

    def have(self) -> Have:
        return Have.all()

    def spans(self, part: Range) -> list[Span]:
        found = []
        first = bisect.bisect_right(self._starts, part.start) - 1
        for piece in self._pieces[max(first, 0) :]:
            start, stop = max(piece.blob.start, part.start), min(piece.blob.stop, part.stop)
            if start >= stop:
                break
            found.append(Span(piece.path, piece.offset + start - piece.blob.start, stop - start))
        return found

    def read(self, offset: int, buffer: memoryview) -> int:
        [span, *_] = self.spans(Range(offset, offset + len(buffer)))
        with span.path.open("rb", buffering=0) as file:
            file.seek(span.offset)
            return file.readinto(buffer[: span.count]) or 0


class StoredBodies:
    """The complete blobs of a store; the indexes of archives are kept. Of the trio thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: collections.OrderedDict[Digest, tuple[int, StoredBody]] = (
            collections.OrderedDict()
        )

    def find(self, digest: Digest) -> StoredBody | None:
        """A complete blob, if it is here."""
        inode, body = self._kept.get(digest, (0, None))
        if body is not None and body.inode() == inode:
            self._kept.move_to_end(digest)
            return body
        self._kept.pop(digest, None)
        stored = self._store.stored(digest)
        body = None if stored is None else StoredBody(stored)
        inode = 0 if body is None else body.inode()
        if body is None or not inode:
            return None
        self._kept[digest] = inode, body
        while len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return body


class ArrivingBody:
    """A blob on its way, until it is closed."""

    def __init__(self, blob: PartialBlob, path: Path | None) -> None:
        """``path`` is the file with the bytes where they lie in one, at their own offsets."""
        self._blob = blob
        self._path = path
        self.size = blob.size

    @property
    def is_over(self) -> bool:
        return self._blob.is_closed

    def there(self, part: Range) -> int:
        blob, position = self._blob, part.start
        while position < part.stop:
            number = position // blob.chunk_size
            chunk = blob.chunk(number)
            if not blob.has(number):
                begun = chunk.start + blob.fill(number)[0]
                # between the two looks the chunk may have become complete, and its fill void
                if not blob.has(number):
                    return min(max(begun, position), part.stop)
            position = chunk.stop
        return part.stop

    def is_begun(self, part: Range) -> bool:
        blob = self._blob
        return all(blob.has(one) or blob.fill(one)[0] for one in blob.chunks(part))

    def have(self) -> Have:
        blob = self._blob
        return Have.of_states(blob.chunk_size, blob.states())

    def spans(self, part: Range) -> list[Span] | None:
        return None if self._path is None else [Span(self._path, part.start, len(part))]

    def read(self, offset: int, buffer: memoryview) -> int:
        return self._blob.read(offset, buffer)
