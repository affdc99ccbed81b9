"""Ranges of bytes: half-open everywhere inside, HTTP's inclusive form only here.

RFC 9110 section 14 (range requests) is what a registry speaks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fetcher.errors import OutOfRange, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_RANGE = re.compile(r"\s*bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})\s*", re.IGNORECASE)
_CONTENT_RANGE = re.compile(r"\s*bytes\s+(\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\s*", re.IGNORECASE)


@dataclass(frozen=True, order=True, slots=True)
class Range:
    """The bytes from ``start`` up to, not including, ``stop``."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"no such range: {self.start} to {self.stop}")

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def http(self) -> str:
        """The value that follows ``bytes=`` in a ``Range`` header; the range must not be empty."""
        if not self:
            raise ValueError("HTTP has no empty range")
        return f"{self.start}-{self.stop - 1}"

    def split(self, most: int) -> Iterator[Range]:
        """This range as consecutive ones of at most ``most`` bytes."""
        for start in range(self.start, self.stop, most):
            yield Range(start, min(start + most, self.stop))


def aligned(wanted: Range, step: int) -> Iterator[Range]:
    """``wanted`` as consecutive ranges that end at multiples of ``step``."""
    start = wanted.start
    while start < wanted.stop:
        stop = min((start // step + 1) * step, wanted.stop)
        yield Range(start, stop)
        start = stop


def join_chunks(chunks: Iterable[int], chunk_size: int, size: int) -> Iterator[Range]:
    """The byte ranges that ascending chunk numbers of a blob of ``size`` bytes cover, joined."""
    start = stop = -1
    for chunk in chunks:
        if chunk != stop:
            if start >= 0:
                yield Range(start * chunk_size, min(stop * chunk_size, size))
            start = chunk
        stop = chunk + 1
    if start >= 0:
        yield Range(start * chunk_size, min(stop * chunk_size, size))


def parse_content_range(text: str) -> tuple[Range, int | None]:
    """Read a ``Content-Range``: the range, and the whole size unless the server hides it.

    Raises :class:`Unavailable` for what is not one, as another source or another try may be right.
    """
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None or int(match[1]) > int(match[2]):
        raise Unavailable(f"the server's Content-Range cannot be read: {text[:80]!r}")
    whole = None if match[3] == "*" else int(match[3])
    return Range(int(match[1]), int(match[2]) + 1), whole


def requested_range(text: str, size: int) -> Range | None:
    """What a ``Range`` header asks for of ``size`` bytes; None for everything.

    That is also what several ranges, other units and nonsense get: RFC 9110 section 14.2 lets a
    server ignore the header. Raises :class:`OutOfRange` for a range that has no byte in it.
    """
    match = _RANGE.fullmatch(text)
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, stop = max(size - int(match[2]), 0), size
    else:
        start, stop = int(match[1]), int(match[2]) + 1 if match[2] else size
        if match[2] and stop <= start:
            return None
    if start >= min(stop, size):
        raise OutOfRange(f"there is no byte in the range {text.strip()} of {size} bytes")
    return Range(start, min(stop, size))


def content_range(part: Range, size: int) -> str:
    """The value of a ``Content-Range``; ``part`` must not be empty."""
    return f"bytes {part.http}/{size}"
