"""Which chunks of a blob on its way were proven by digests of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fetcher.chunk_digests import BlobChunks


_PROVEN: Final = 1
_ALONE: Final = 2


class Proving:
    """What chunk digests have proven of a blob, in this process.

    Several threads may check different chunks at the same time.
    """

    def __init__(self, chunks: BlobChunks, name: str | None) -> None:
        """``name`` is the registry and repository that the digests are from; None where they are
        hearsay, for which nothing is shown to anybody.
        """
        self.name = name
        self.chunks = chunks
        self._proven = bytearray(chunks.count)

    def check(
        self, number: int, blocks: Iterable[bytes | memoryview], *, alone: bool = True
    ) -> bool:
        """Whether these bytes are the chunk; it is proven then.

        ``alone`` says that nothing else speaks for them.
        """
        right = self.chunks.check(number, blocks)
        self._proven[number] = (_ALONE if alone else _PROVEN) if right else 0
        return right

    def is_vouched(self, number: int) -> bool:
        """Whether a chunk may have been shown, and nothing but its digest speaks for it."""
        return self.name is not None and self._proven[number] == _ALONE

    def vouched(self) -> list[int]:
        """The chunks of which that is true."""
        return [number for number in range(len(self._proven)) if self.is_vouched(number)]

    def has(self, number: int) -> bool:
        """Whether a chunk was proven."""
        return bool(self._proven[number])

    def forget(self, number: int) -> None:
        """A chunk is not what it was."""
        self._proven[number] = 0

    @property
    def is_complete(self) -> bool:
        """Whether all chunks were, so that the blob's own digest is proven."""
        return all(self._proven)
