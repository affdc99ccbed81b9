"""Open files: the bytes of each read, once they are there and trusted."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

import trio

from fetcher.errors import ModelError
from fetcher.modelpack import Packing
from fetcher.ranges import Range
from fuse.chunks import Changed

if TYPE_CHECKING:
    from fuse.agent import Agent
    from fuse.buffers import Buffers
    from fuse.chunks import Blob, Piece, StoreFile
    from fuse.droppings import Droppings
    from fuse.tree import File

_PAUSE: Final = 0.02
"""Seconds before it is looked again at what was not as the agent said."""

_PACKED: Final = (Packing.TAR_GZIP, Packing.TAR_ZSTD)


class OpenFile:
    """A regular file of the model that somebody has open."""

    def __init__(
        self, file: File, blob: Blob, agent: Agent, buffers: Buffers, droppings: Droppings
    ) -> None:
        self.file = file
        self._blob = blob
        self._agent = agent
        self._buffers = buffers
        self._droppings = droppings
        self._own: StoreFile | None = None
        """Where the bytes of an archive's file lie."""
        self._generation = -1
        blob.use()

    def close(self) -> None:
        """Nobody has it open any more."""
        if self._own is not None:
            self._own.close()
        self._blob.leave()

    async def read(self, wanted: Range) -> memoryview:
        """These bytes of the file, all of them; valid until the caller's next checkpoint.

        At most as many as a buffer holds. Waits for the agent as long as it takes. Raises
        :class:`ModelError`.
        """
        while True:
            try:
                missing = self._blob.missing(self._in_blob(wanted))
                if missing is None:
                    return await self._show(wanted)
                await self._fetch(missing)
                if self._blob.missing(self._in_blob(wanted)) is None:
                    continue
            except Changed:
                pass
            except OSError as error:
                raise ModelError(
                    f"the layer {self._blob.name} cannot be read from the store: "
                    f"{error.strerror or error}",
                    digest=self._blob.name,
                ) from error
            await trio.sleep(_PAUSE)

    @property
    def is_complete(self) -> bool:
        """Whether nothing of its blob has to be fetched."""
        return self._blob.complete

    def look(self) -> None:
        """See what became of its blob. Raises :class:`ModelError` and :class:`OSError`."""
        self._blob.look()

    def missing(self, wanted: Range) -> Range | None:
        """What of these bytes of the file is not there, as a range of the blob.

        Raises :class:`ModelError` and :class:`OSError`.
        """
        return self._blob.missing(self._in_blob(wanted))

    def _in_blob(self, wanted: Range) -> Range:
        """Where bytes of the file are in the blob; all of it where that is compressed."""
        offset = self.file.offset
        if offset < 0:
            return Range(0, self._blob.size)
        return Range(offset + wanted.start, offset + wanted.stop)

    def in_blob(self) -> Range:
        """Where the whole file is in the blob."""
        return self._in_blob(Range(0, self.file.size))

    async def _fetch(self, missing: Range) -> None:
        if self._blob.layer.packing in _PACKED:
            await self._agent.index(self._blob.name)
        else:
            await self._agent.want(self._blob.name, missing)

    async def _show(self, wanted: Range) -> memoryview:
        buffer = await self._buffers.take()
        view = buffer[: len(wanted)]
        try:
            generation = self._blob.generation
            pieces = self._blob.pieces(self._in_blob(wanted)) if self._has_places else []
            await self._fill_of(generation, view, wanted, pieces)
            self._blob.check(pieces)
        except trio.Cancelled:
            # a thread may be in the middle of writing to it
            self._buffers.lose()
            raise
        except BaseException:
            self._buffers.give(buffer)
            raise
        self._buffers.give(buffer)
        return view

    async def _fill_of(
        self, generation: int, view: memoryview, wanted: Range, pieces: list[Piece]
    ) -> None:
        """As :meth:`_fill`, from the files that the blob had then.

        Raises :class:`Changed` where they were closed meanwhile: what was read may be another's.
        """
        try:
            await self._fill(view, wanted, pieces)
        except OSError:
            if self._blob.generation != generation:
                raise Changed from None
            raise
        if self._blob.generation != generation:
            raise Changed

    @property
    def _has_places(self) -> bool:
        """Whether its bytes are in the blob one after another."""
        return self.file.offset >= 0

    async def _fill(self, view: memoryview, wanted: Range, pieces: list[Piece]) -> None:
        if not pieces:
            await self._read(self._own_file(), view, wanted.start)
            return
        done = 0
        for piece in pieces:
            part = view[done : done + len(piece.range)]
            done += len(part)
            if piece.framed or self.file.number < 0:
                if self._blob.whole is None:
                    raise Changed
                await self._read(self._blob.whole, part, piece.range.start)
            else:
                offset = piece.range.start - self.file.offset
                await self._read(self._own_file(), part, offset)

    def _own_file(self) -> StoreFile:
        if self._own is None or self._generation != self._blob.generation:
            if self._own is not None:
                self._own.close()
                self._own = None
            self._own = self._blob.open_file(self.file.number)
            self._generation = self._blob.generation
        return self._own

    async def _read(self, file: StoreFile, view: memoryview, offset: int) -> None:
        done = _read_cached(file.descriptor, view, offset)
        if done < len(view):
            await trio.to_thread.run_sync(
                _read_all,
                file.descriptor,
                view[done:],
                offset + done,
                limiter=self._buffers.threads,
                abandon_on_cancel=True,
            )
        self._droppings.read(file.identity, file.descriptor, Range(offset, offset + len(view)))


def _read_cached(descriptor: int, view: memoryview, offset: int) -> int:
    """Read what is in the page cache, without waiting for the disk; how many bytes."""
    try:
        return os.preadv(descriptor, [view], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return 0
        raise


def _read_all(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill ``view``. Raises :class:`OSError`, also when the file ends before that."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise OSError(errno.EIO, "the file is shorter than it should be")
        done += count
