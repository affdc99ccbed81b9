"""What peers say to each other beyond the OCI distribution API: headers, and what they have.

A peer speaks the distribution API, so that any client can pull through it. These headers are what
nodes of one cluster add. None of them carries an address, and nothing in them is believed that the
registry could be asked instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fetcher.ranges import Range

TOKEN: Final = "Model-CSI-Peer"  # noqa: S105 (a header's name)
"""Of a request: the shared token, without which nobody gets a byte."""
FROM: Final = "Model-CSI-From"
"""Of a request: the name of the member that asks. Who leaves it out is a foreign client."""
HOPS: Final = "Model-CSI-Hops"
"""Of a request: how many members it came through. From :data:`MOST_HOPS` on nothing is fetched.

Each node has its own view of who there is: those that differ must not ask each other in circles.
"""
LAYER: Final = "Model-CSI-Layer"
"""Of a request: the media type that the manifest gives the blob, by which it is laid out."""
CHUNK: Final = "Model-CSI-Chunk"
"""Of a request: the bytes of a chunk for who asks; its chunks are what owners are dealt."""
MODEL: Final = "Model-CSI-Model"
"""Of a request: ``<digest of a manifest> <index of a layer in it>``, as which the asker knows the
blob. It says how chunks are dealt out; see :class:`fetcher.peers.owners.Deal`.
"""
READY: Final = "Model-CSI-Ready"
"""Of a request: only what is there whole is wanted, neither filled in nor passed on as it arrives.

So the rest of a begun chunk is asked for: no two nodes must wait for what the other one has.
"""
URGENT: Final = "Model-CSI-Urgent"
"""Of a request: a pod waits for these very bytes; what is fetched for it comes first."""
SPARE: Final = "Model-CSI-Spare"
"""Of a request: where more uploads than this are under way, another member that has it will do."""
HAVE: Final = "Model-CSI-Have"
"""Of an answer: which chunks of the blob are there; see :class:`Have`."""
LOAD: Final = "Model-CSI-Load"
"""Of an answer: how many uploads are under way there."""
TRY: Final = "Model-CSI-Try"
"""Of a 429: the name of a member that was given this chunk a short while ago."""

MOST_HOPS: Final = 4
MAX_HAVE_CHARACTERS: Final = 4096
_ALL: Final = "all"
_DIGITS: Final = b"0" + b"1" * 255
"""Of each byte, whether it is 0."""
_SWAPPED: Final = bytes(int(f"{one:08b}"[::-1], 2) for one in range(256))
"""Of each byte, its bits the other way round."""


@dataclass(frozen=True, slots=True)
class Have:
    """Which chunks of a blob a node has.

    As text ``<bytes of a chunk>:<hex digits>``, where chunk *n* is the bit of weight ``0x80 >> n %
    8`` in byte ``n // 8``; or ``all``.
    """

    chunk_size: int
    bitmap: bytes
    """Meaningless where ``chunk_size`` is 0: then all is there."""

    @classmethod
    def all(cls) -> Have:
        """The whole blob."""
        return cls(0, b"")

    @classmethod
    def of(cls, chunk_size: int, count: int, chunks: Iterable[int]) -> Have:
        """Some ``chunks`` of ``count``."""
        bitmap = bytearray(-(-count // 8))
        for chunk in chunks:
            bitmap[chunk // 8] |= 0x80 >> chunk % 8
        return cls(chunk_size, bytes(bitmap))

    @classmethod
    def of_states(cls, chunk_size: int, states: bytes) -> Have:
        """The chunks, a byte for each, whose byte is not 0."""
        digits = states.translate(_DIGITS).ljust(-(-len(states) // 8) * 8, b"0")
        return cls(chunk_size, int(digits or b"0", 2).to_bytes(len(digits) // 8, "big"))

    @classmethod
    def parse(cls, text: str) -> Have | None:
        """Read a header's value; None for what is none, or too long."""
        if text == _ALL:
            return cls.all()
        size, colon, digits = text.partition(":")
        usable = colon and size.isascii() and size.isdigit() and len(size) <= 10 and int(size)
        if not usable or len(text) > MAX_HAVE_CHARACTERS:
            return None
        try:
            return cls(int(size), bytes.fromhex(digits))
        except ValueError:
            return None

    @property
    def is_all(self) -> bool:
        """Whether it is the whole blob, complete and verified."""
        return not self.chunk_size

    @property
    def text(self) -> str | None:
        """The header's value; None where it would be too long to be sent."""
        if not self.chunk_size:
            return _ALL
        text = f"{self.chunk_size}:{self.bitmap.hex()}"
        return text if len(text) <= MAX_HAVE_CHARACTERS else None

    @property
    def bits(self) -> int:
        """The chunks that are there, chunk *n* as the bit of weight ``1 << n``."""
        return int.from_bytes(self.bitmap.translate(_SWAPPED), "little")

    def has(self, wanted: Range) -> bool:
        """Whether all bytes of ``wanted``, which are some, are there."""
        if not self.chunk_size:
            return True
        first, last = wanted.start // self.chunk_size, (wanted.stop - 1) // self.chunk_size
        return last < 8 * len(self.bitmap) and all(
            self.bitmap[chunk // 8] & (0x80 >> chunk % 8) for chunk in range(first, last + 1)
        )
