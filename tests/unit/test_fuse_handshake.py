"""What the kernel is told that pyfuse3 has no word for."""

from __future__ import annotations

import struct

from fuse.handshake import CONGESTION, MAX_BACKGROUND, agreed

PARALLEL_DIROPS = 1 << 18


def _request(flags: int, opcode: int = 26) -> bytes:
    header = struct.pack("<IIQQIIIHH", 104, opcode, 2, 0, 0, 0, 0, 0, 0)
    return header + struct.pack("<IIII", 7, 40, 131072, flags) + bytes(48)


def _answer(flags: int, error: int = 0) -> bytes:
    header = struct.pack("<IiQ", 80, error, 2)
    return header + struct.pack("<IIIIHHI", 7, 40, 131072, flags, 12, 9, 1 << 20) + bytes(40)


def test_what_the_kernel_offers_is_taken() -> None:
    answer = agreed(_request(PARALLEL_DIROPS | 1), _answer(1))
    flags, background, congestion, max_write = struct.unpack_from("<IHHI", answer, 28)
    assert flags == PARALLEL_DIROPS | 1
    assert (background, congestion) == (MAX_BACKGROUND, CONGESTION)
    # all else is as it was
    assert (max_write, len(answer), answer[:28]) == (1 << 20, 80, _answer(1)[:28])


def test_what_the_kernel_does_not_offer_is_not() -> None:
    answer = agreed(_request(1), _answer(1))
    assert struct.unpack_from("<I", answer, 28) == (1,)


def test_other_answers_go_through_as_they_are() -> None:
    for request, answer in (
        (_request(PARALLEL_DIROPS), _answer(1, error=-71)),
        (_request(PARALLEL_DIROPS), _answer(1)[:16]),
        (_request(PARALLEL_DIROPS, opcode=1), _answer(1)),
    ):
        assert agreed(request, answer) == answer
