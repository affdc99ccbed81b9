"""What the worker of a lazy volume and the agent tell each other on ``<root>/agent.sock``.

A worker makes one ordinary call of :mod:`fetcher.agent_protocol`, ``attach``. After the line with
its result the connection carries lines both ways, one JSON object each, told apart by their
``type``, until one side closes it. A line has at most :data:`MAX_LINE_BYTES`.

The worker asks, each question under a number of its own choice: :class:`Want` for bytes of a blob,
:class:`Index` for what is in an archive. The agent answers every question once, with :class:`Here`
or :class:`Failed`, in any order; :class:`Forget` takes a question back, and then there may or may
not be an answer. Without being asked the agent says :class:`Spoiled` and :class:`Ticket`.

A worker outlives agents, so each side may be older than the other: fields that one does not know
are passed over, and so is a line of an unknown type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from fetcher.agent_protocol import MAX_REQUEST_BYTES, Call, ErrorBody, error_of
from fetcher.lines import Malformed

if TYPE_CHECKING:
    from fetcher.errors import ModelError

MAX_LINE_BYTES: Final = MAX_REQUEST_BYTES

_Name = Annotated[str, Meta(max_length=256)]
_Text = Annotated[str, Meta(max_length=4096)]
_Ticket = Annotated[str, Meta(max_length=MAX_LINE_BYTES // 2)]
_Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class AttachParams(Struct, frozen=True, kw_only=True):
    """Which model the caller is the worker of."""

    model: _Name
    """The digest of its manifest."""
    selection: _Name = ""
    """The key of what is left out of it; empty when nothing is."""
    pid: _Count
    ticket: _Ticket = ""
    """The last one that this worker was given by an agent of this store, if any."""

    def __repr__(self) -> str:
        return f"AttachParams(model={self.model!r}, selection={self.selection!r}, pid={self.pid})"

    __str__ = __repr__

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("model", self.model), ("selection", self.selection), ("pid", self.pid)]


class AttachResult(Struct, frozen=True, kw_only=True):
    """The worker is known."""

    ticket: _Ticket = ""
    """As :class:`Ticket`."""

    def __repr__(self) -> str:
        return "AttachResult(…)"

    __str__ = __repr__

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


ATTACH: Final = Call("attach", AttachParams, AttachResult)
"""Not among ``agent_protocol.CALLS``: its connection goes on after its answer."""


# ------------------------------------------------------------------------- from worker to agent


class Want(Struct, frozen=True, tag="want", tag_field="type"):
    """Some bytes of a blob are wanted, to be shown: trusted ones.

    Answered when every chunk that they lie in is there and trusted.
    """

    id: _Count
    blob: _Name
    start: _Count
    stop: _Count
    """The first byte that is not wanted."""
    ahead: bool = False
    """Whether nobody waits for them yet: they come behind all that somebody waits for."""


class Index(Struct, frozen=True, tag="index", tag_field="type"):
    """What is in an archive is wanted: a tar's ``index.json``, a compressed layer unpacked."""

    id: _Count
    blob: _Name


class Opened(Struct, frozen=True, tag="opened", tag_field="type"):
    """A file was opened, whose bytes are these: fetch them ahead of other background work."""

    blob: _Name
    start: _Count
    stop: _Count


class Forget(Struct, frozen=True, tag="forget", tag_field="type"):
    """Nobody waits for the answer to this question any more."""

    id: _Count


FromWorker = Want | Index | Opened | Forget


# ------------------------------------------------------------------------- from agent to worker


class Here(Struct, frozen=True, tag="here", tag_field="type"):
    """What was asked for is in the store."""

    id: _Count
    complete: bool = False
    """Whether the whole blob is verified, so that nobody has to look at its chunk map any more."""


class Failed(Struct, frozen=True, tag="failed", tag_field="type"):
    """What was asked for cannot be had now."""

    id: _Count
    code: _Name
    """The name of a class of :mod:`fetcher.errors`."""
    message: _Text
    transient: bool = False
    """Whether it may be worth while to ask again before long."""

    @classmethod
    def of(cls, number: int, error: ModelError) -> Failed:
        """The answer to question ``number`` that tells of ``error``."""
        return cls(number, type(error).__name__, error.message[:4096], error.transient)

    def error(self) -> ModelError:
        """The exception that the agent has, of the class it has there."""
        return error_of(ErrorBody(self.code, self.message))


class Spoiled(Struct, frozen=True, tag="spoiled", tag_field="type"):
    """The bytes of a blob proved wrong: none of them is shown any more."""

    blob: _Name
    reason: _Text


class Ticket(Struct, frozen=True, tag="ticket", tag_field="type"):
    """What to show at the next ``attach``, so that a new agent can go on where this one stopped.

    Opaque to the worker, and secret: it stands for the credentials of the model's volumes.
    """

    ticket: _Ticket

    def __repr__(self) -> str:
        return "Ticket(…)"

    __str__ = __repr__

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


FromAgent = Here | Failed | Spoiled | Ticket

_from_worker: Final = msgspec.json.Decoder(FromWorker)
_from_agent: Final = msgspec.json.Decoder(FromAgent)


def encode(message: FromWorker | FromAgent) -> bytes:
    """The line, with its newline, that says ``message``."""
    return msgspec.json.encode(message) + b"\n"


def decode_from_worker(line: bytes) -> FromWorker:
    """Read what a worker says; :class:`Malformed` when it is none of that. Never quotes it."""
    message: FromWorker = _decode(line, _from_worker, "the worker's line")
    if isinstance(message, Want | Opened) and message.start > message.stop:
        raise Malformed("the worker's line names a range that ends before it begins")
    return message


def decode_from_agent(line: bytes) -> FromAgent:
    """Read what an agent says; :class:`Malformed` when it is none of that. Never quotes it."""
    message: FromAgent = _decode(line, _from_agent, "the agent's line")
    return message


def _decode(line: bytes, decoder: msgspec.json.Decoder[Any], what: str) -> Any:
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Malformed(f"{what} cannot be read: {str(error)[:200]}") from error
    except RecursionError as error:
        raise Malformed(f"{what} is nested too deeply") from error
