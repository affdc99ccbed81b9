"""The bytes of layers: read where they lie in the store, or wait until the agent has brought them.

Nothing is shown but what is trusted: the whole blob was verified, or its chunk map says of every
chunk that is read that its bytes came from the registry itself or matched a digest of their own.
The agent writes the files that are read here at the same time. What keeps a reader from wrong bytes
is the order in which it does so: bytes before the mark of their chunk; the map before the blob's
file, so that a file without a map is whole; the verdict before a blob's files go.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fetcher.errors import DigestMismatch
from fetcher.modelpack import Packing
from fetcher.ranges import Range
from fetcher.store.chunks import (
    FRAMED,
    HEADER_BYTES,
    NAME_BYTES,
    THERE,
    TRUSTED,
    MapHeader,
    Verdict,
    boot_id,
    name_mark,
    read_header,
)
from fetcher.store.layers import load_index
from fetcher.store.places import TarFiles, WholeFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fetcher.modelpack import Layer
    from fuse.tree import Index

_SHOWN: Final = THERE | TRUSTED
_WRONG: Final = "its digest is another one"
_GUESSED_CHUNK: Final = 64 * 1024
"""The least that chunks have, of a blob that nobody has begun yet: the agent knows how many."""


class Changed(Exception):
    """The agent moved or dropped these bytes while they were read: look again."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a blob that lie in one file."""

    range: Range
    framed: bool
    """Whether they wait in the frame of a tar, and are not where they belong yet."""


class StoreFile:
    """A file of the store, open to be read here and there."""

    def __init__(self, path: Path) -> None:
        """Open it. Raises :class:`OSError`."""
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        state = os.fstat(self.descriptor)
        self.identity = state.st_dev, state.st_ino
        self.size = state.st_size
        # what it reads in advance would be dropped unread, or stay behind
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def is_at(self, path: Path) -> bool:
        """Whether it still is what has this name."""
        try:
            state = path.stat()
        except FileNotFoundError:
            return False
        return (state.st_dev, state.st_ino) == self.identity

    def close(self) -> None:
        os.close(self.descriptor)


class Blob:
    """The blob of a layer, as it is in the store, while files of it are open."""

    def __init__(
        self,
        folder: Path,
        layer: Layer,
        spoiled: Callable[[Blob, str], None],
        registry: str = "",
    ) -> None:
        """``folder`` holds the blobs of its algorithm. ``spoiled`` is told when its bytes proved
        wrong. ``registry`` is the name, with the repository, that the model has: what is trusted by
        another one may be anything.
        """
        digest = layer.descriptor.digest
        self.layer = layer
        self.name = str(digest)
        self.size = layer.descriptor.size
        self.complete = False
        """Whether it is verified, so that nothing is looked up any more."""
        self.problem: DigestMismatch | None = None
        self.whole: StoreFile | None = None
        """Its file; of a tar the frame, where chunks wait for their place."""
        self.generation = 0
        """Counts how often its files were others than before."""
        self._path = folder / digest.hex
        self._map_path = folder / f"{digest.hex}.chunks"
        self._parts = folder / f"{digest.hex}.parts"
        self._files = folder / f"{digest.hex}.files"
        self._map: StoreFile | None = None
        self._boot = boot_id()
        self._mark = name_mark(registry)
        self._form = TarFiles.form if layer.packing is Packing.TAR else WholeFile.form
        self._shown = False
        self._users = 0
        self._spoiled = spoiled

    def use(self) -> None:
        """One more file of it is open."""
        self._users += 1

    def leave(self) -> None:
        """One file of it less is open; the last one closes all that it has open."""
        self._users -= 1
        if not self._users:
            self._close()

    def _close(self) -> None:
        for file in (self.whole, self._map):
            if file is not None:
                file.close()
        self.whole = self._map = None
        self.generation += 1
        self.complete = False

    def spoil(self, reason: str) -> DigestMismatch:
        """Let nothing of it be shown any more; the error that readers get."""
        if self.problem is None:
            self.problem = DigestMismatch(
                f"the bytes of the layer {self.name} proved wrong: {reason}", digest=self.name
            )
            self._spoiled(self, reason)
        return self.problem

    # -- what is there -----------------------------------------------------------------------------

    def missing(self, wanted: Range) -> Range | None:
        """What of these bytes cannot be shown yet, in whole chunks; None if all can be.

        Raises :class:`DigestMismatch` once the blob proved wrong, and :class:`OSError`.
        """
        header = self.look()
        if self.complete:
            return None
        step = header.chunk_size if header else _GUESSED_CHUNK
        first, last = _chunks(wanted, step)
        states = self._states(first, last) if header else bytes(last - first)
        absent = [chunk for chunk, state in enumerate(states, first) if state & _SHOWN != _SHOWN]
        if not absent:
            return None
        return Range(absent[0] * step, min((absent[-1] + 1) * step, self.size))

    def pieces(self, wanted: Range) -> list[Piece]:
        """Where these bytes lie, in pieces that follow one another.

        Raises :class:`Changed` if they are not there any more.
        """
        if self.complete or self.layer.packing is not Packing.TAR:
            return [Piece(wanted, framed=False)]
        step = self._believed().chunk_size
        first, last = _chunks(wanted, step)
        pieces: list[Piece] = []
        for chunk, state in enumerate(self._states(first, last), first):
            start, stop = max(chunk * step, wanted.start), min((chunk + 1) * step, wanted.stop)
            framed = bool(state & FRAMED)
            if pieces and pieces[-1].framed is framed:
                start = pieces.pop().range.start
            pieces.append(Piece(Range(start, stop), framed))
        return pieces

    def check(self, pieces: list[Piece]) -> None:
        """Make sure that what was read from these places is what had been promised.

        Raises :class:`Changed`, and :class:`DigestMismatch` once the blob proved wrong.
        """
        if self.problem is not None:
            raise self.problem
        if self.complete:
            return
        # said first: whoever looks after a verdict came finds that something was shown
        self._shown = True
        header = self._believed()
        if header.verdict == Verdict.SPOILED:
            raise self.spoil(_WRONG)
        for piece in pieces:
            expected = _SHOWN | (FRAMED if piece.framed else 0)
            states = self._states(*_chunks(piece.range, header.chunk_size))
            if any(state & (_SHOWN | FRAMED) != expected for state in states):
                raise Changed
        # by now the map may be another name's, and the states with it
        self._believed()

    def look(self) -> MapHeader | None:
        """See what there is of the blob; the header of its map, if that can be believed.

        Raises :class:`DigestMismatch` once the blob proved wrong, and :class:`OSError`.
        """
        if self.problem is not None:
            raise self.problem
        if self.complete:
            return None
        if self.layer.packing is not Packing.RAW and self._files.is_dir():
            self.complete = True
            return None
        if self._map is None or not self._map.is_at(self._map_path):
            header = self._header()
            if header is not None and header.verdict != Verdict.OPEN:
                # it ended since it was looked at last
                return self._ended(header)
            self._reopen()
        header = self._header()
        return header if header is None else self._ended(header)

    def _ended(self, header: MapHeader) -> MapHeader | None:
        """Take notice of the verdict, if there is one."""
        if header.verdict == Verdict.VERIFIED and self.layer.packing is Packing.RAW:
            self.complete = True
            return None
        if header.verdict == Verdict.SPOILED:
            if self._shown:
                raise self.spoil(_WRONG)
            # nobody saw any of it: it will be fetched anew
            self._close()
            return None
        return header

    def _reopen(self) -> None:
        """Open the blob's file and its map, in this order: as a blob is begun with its map, a file
        that was there when there was no map is whole.
        """
        self._close()
        if self.layer.packing not in (Packing.RAW, Packing.TAR):
            return
        try:
            self.whole = StoreFile(self._path)
            self._map = StoreFile(self._map_path)
        except FileNotFoundError:
            self.complete = (
                self.layer.packing is Packing.RAW
                and self.whole is not None
                and self.whole.size == self.size
                and self.whole.is_at(self._path)
            )
            if self.complete:
                return
        # the two belong together if neither was replaced meanwhile
        if self.whole is None or self._map is None or not self.whole.is_at(self._path):
            self._close()

    def _believed(self) -> MapHeader:
        header = self._header()
        if header is None:
            raise Changed
        return header

    def _header(self) -> MapHeader | None:
        """What the open map says; None where it is not to be believed."""
        return None if self._map is None else self._read_header(self._map)

    def _read_header(self, chunk_map: StoreFile) -> MapHeader | None:
        """None where a map does not tell of this blob, as this layer has it, or not of this boot,
        or by the word of another name.
        """
        header = read_header(os.pread(chunk_map.descriptor, HEADER_BYTES, 0))
        if header is None or (header.size, header.form) != (self.size, self._form):
            return None
        mark = os.pread(chunk_map.descriptor, NAME_BYTES, header.name_offset)
        return header if (header.boot, mark) == (self._boot, self._mark) else None

    def _states(self, first: int, last: int) -> bytes:
        """The states of the chunks from ``first`` up to, not including, ``last``."""
        if self._map is None:
            raise Changed
        found = os.pread(self._map.descriptor, last - first, HEADER_BYTES + first)
        return found.ljust(last - first, b"\0")

    # -- its files ---------------------------------------------------------------------------------

    def open_file(self, number: int) -> StoreFile:
        """Open the file in which the regular file ``number`` of an archive lies.

        Raises :class:`Changed` if it is not there, and :class:`OSError`.
        """
        for folder in (self._parts, self._files):
            try:
                return StoreFile(folder / str(number))
            except FileNotFoundError:
                continue
        raise Changed

    def load(self) -> Index:
        """What is in the archive, as far as the store knows it; for a worker thread.

        Raises :class:`Changed` if it does not know yet, and :class:`OSError`.
        """
        try:
            return load_index(self._files)
        except FileNotFoundError:
            # what another name's registry made up is gone before the map is of this one
            self._check_name()
        try:
            return load_index(self._parts)
        except FileNotFoundError:
            raise Changed from None

    def _check_name(self) -> None:
        """Raise :class:`Changed` unless the map may be believed. From any thread."""
        try:
            chunk_map = StoreFile(self._map_path)
        except FileNotFoundError:
            raise Changed from None
        try:
            if self._read_header(chunk_map) is None:
                raise Changed
        finally:
            chunk_map.close()


def _chunks(wanted: Range, step: int) -> tuple[int, int]:
    """The first chunk of a range, and the one after its last."""
    return wanted.start // step, -(-wanted.stop // step)
