"""What the driver and a worker of lazy models tell each other while the worker starts.

They have a pair of sockets that keep messages apart. The driver sends one :class:`Order`, at once
or long after the process was started, and with it the log that the worker writes to from then on.
The worker answers once, with :class:`Ready`. An end that is closed tells that its process ended.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Final

import msgspec

_MOST_BYTES: Final = 16 * 1024


class Order(msgspec.Struct, frozen=True):
    """Which model to serve."""

    model: str
    """The digest of its manifest."""
    selection: str = ""
    """The key of what is left out of it; empty when nothing is."""


class Ready(msgspec.Struct, frozen=True, omit_defaults=True):
    """The model is mounted, or cannot be."""

    ready: bool = False
    error: str = ""
    """Why not, in the user's words."""
    code: str = ""
    """The name of a class of :mod:`fetcher.errors`, where it is one."""


def pair() -> tuple[socket.socket, socket.socket]:
    """The driver's end, which never waits, and the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def send_order(line: socket.socket, order: Order, log: int) -> None:
    """Say what to serve. Raises :class:`OSError` where the worker has ended."""
    socket.send_fds(line, [msgspec.json.encode(order)], [log])


def receive_order(line: socket.socket) -> tuple[Order, int] | None:
    """Wait for an order, with the descriptor of its log; None where the driver has ended.

    Raises :class:`ValueError` for what is none.
    """
    try:
        said, logs, _, _ = socket.recv_fds(line, _MOST_BYTES, 1)
    except ConnectionError:
        return None
    if not said:
        return None
    order = msgspec.json.decode(said, type=Order)
    if not logs:
        raise ValueError("an order came without a log")
    os.set_inheritable(logs[0], False)
    return order, logs[0]


def send_ready(descriptor: int, answer: Ready) -> None:
    """Tell whoever started the worker, unless that one has ended: over a pipe, it is a line."""
    with contextlib.suppress(OSError):
        os.write(descriptor, msgspec.json.encode(answer) + b"\n")


def read_ready(line: socket.socket) -> Ready | None:
    """What the worker answered; None where it ended without a word.

    Raises :class:`BlockingIOError` before that, and :class:`ValueError` for what is no answer.
    """
    try:
        said = line.recv(_MOST_BYTES)
    except ConnectionError:
        return None
    return msgspec.json.decode(said, type=Ready) if said else None
