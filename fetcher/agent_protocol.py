"""What is spoken on ``<root>/agent.sock``: newline-delimited JSON over a unix stream socket.

A request is one line, ``{"call": name, "params": {...}}``. Its answer is any number of
``{"progress": {"done": n, "total": n}}`` lines and one last line, ``{"result": {...}}`` or
``{"error": {"code": ..., "message": ..., "context": {...}}}``, where ``code`` is the name of a
class of :mod:`fetcher.errors`. A connection carries one call at a time, as many after another as it
likes; a client that closes its end stops waiting. Lines have a bounded size in both directions.

Commands and (later) the workers of lazy volumes import this module, so it knows nothing of gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Generic, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from fetcher.errors import ModelError
from fetcher.lines import Malformed

if TYPE_CHECKING:
    from pathlib import Path

MAX_REQUEST_BYTES: Final = 1024 * 1024
"""A reference, a folder, credentials and patterns are far below this."""

MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
"""The longest is a list of some ten thousand layers, models or volumes."""

Text = Annotated[str, Meta(max_length=4096)]
Secret = Annotated[str, Meta(max_length=64 * 1024)]


def socket_path(root: Path) -> Path:
    """Where the agent that owns ``root`` listens."""
    return root / "agent.sock"


# ---------------------------------------------------------------------------------- parameters


class Login(Struct, frozen=True, forbid_unknown_fields=True):
    """What the caller shows to the registry of the call's own reference, and to no other."""

    username: Secret = ""
    password: Secret = ""
    identity_token: Secret = ""

    def __repr__(self) -> str:
        return "Login(…)"

    __str__ = __repr__

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


class NoParams(Struct, frozen=True, forbid_unknown_fields=True):
    """A call that takes nothing."""


class InspectParams(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    reference: Text
    login: Login | None = None


class PullParams(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    reference: Text
    pull_policy: Text = "IfNotPresent"
    exclude_weights: bool = False
    exclude_patterns: Annotated[tuple[Text, ...], Meta(max_length=1000)] = ()
    login: Login | None = None


class MountParams(PullParams, frozen=True, forbid_unknown_fields=True, kw_only=True):
    target: Text
    """Absolute and resolved: the agent's working folder is not the caller's."""
    mode: Text = "eager"
    prefetch: Text = ""


class UnmountParams(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    target: Text


class IndexParams(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    reference: Text
    chunk_size: int
    login: Login | None = None


class GcParams(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    all: bool = False
    """All that is not in use, not only what is above the watermarks."""
    dry_run: bool = False


class RemoveParams(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    references: Annotated[tuple[Text, ...], Meta(min_length=1, max_length=1000)]
    """References, or digests of models."""


class VerifyParams(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    references: Annotated[tuple[Text, ...], Meta(max_length=1000)] = ()
    """References, or digests of models; none: everything."""
    dry_run: bool = False


# ------------------------------------------------------------------------------------- results


class PingResult(Struct, frozen=True, kw_only=True):
    version: str
    pid: int


class HandoverResult(Struct, frozen=True, kw_only=True):
    pid: int
    """The process that is about to leave the store."""


class PullResult(Struct, frozen=True, kw_only=True):
    reference: str
    digest: str
    path: str
    """The folder with the model's files."""
    size: int
    files: int
    fetched: int
    """Bytes that were not in the store when the call came."""
    seconds: float


class MountResult(Struct, frozen=True, kw_only=True):
    reference: str
    digest: str
    target: str
    volume_id: str
    shown: str = "bind"
    """As :attr:`VolumeRow.shown`."""
    reason: str | None = None


class UnmountResult(Struct, frozen=True, kw_only=True):
    target: str
    volume_id: str
    was_mounted: bool


class ModelRow(Struct, frozen=True, kw_only=True):
    digest: str
    selection: str
    """The key of what was left out; empty when nothing was."""
    references: tuple[str, ...]
    size: int
    files: int
    last_used: float
    """Seconds since the epoch."""
    volumes: tuple[str, ...]
    """The ids of the volumes that show it now."""


class ListResult(Struct, frozen=True, kw_only=True):
    models: tuple[ModelRow, ...]


class LayerRow(Struct, frozen=True, kw_only=True):
    digest: str
    media_type: str
    kind: str
    packing: str
    size: int
    path: str | None


class InspectResult(Struct, frozen=True, kw_only=True):
    reference: str
    digest: str
    artifact_type: str
    size: int
    layers: tuple[LayerRow, ...]
    annotations: dict[str, str]
    config: Any
    """The model's config as it is; None when it is not JSON, or more than is shown."""


class IndexResult(Struct, frozen=True, kw_only=True):
    """A list of chunk digests that was made, and is not pushed yet."""

    reference: str
    """With the digest of the model's manifest."""
    digest: str
    chunk_size: int
    """What was asked for, or more where the list would have become too long."""
    blobs: int
    """How many have more than one chunk."""
    bytes: int
    """Of these blobs."""
    fetched: int
    """Bytes that were not in the store."""
    list: str
    """The document."""


class VolumeRow(Struct, frozen=True, kw_only=True):
    id: str
    target: str
    reference: str
    digest: str
    state: str
    pod: str | None
    shown: str = "bind"
    """``bind``: the tree of a complete model; ``lazy``: what the process of its model serves."""
    reason: str | None = None
    """Why it is shown like that, where the volume's mode left it open."""
    done: int = 0
    total: int = 0
    """Of a lazily shown volume: bytes that are here, and bytes in all; 0 where that is not known.
    """
    problem: str | None = None
    """What is wrong with it, as far as is known without asking its file system."""


class MountRow(Struct, frozen=True, kw_only=True):
    target: str
    digest: str
    selection: str


class PullRow(Struct, frozen=True, kw_only=True):
    reference: str
    digest: str
    done: int
    total: int
    rate: float
    """Bytes per second, lately."""
    waiters: int


class AgentRow(Struct, frozen=True, kw_only=True):
    pid: int
    role: str
    """``serve``, or ``command`` for a command that is the agent while it runs."""
    mode: str
    driver_name: str
    version: str
    started: float


class DiskRow(Struct, frozen=True, kw_only=True):
    """Bytes, and how many."""

    used: int
    """What everything below the root takes."""
    reserved: int
    """Promised to running pulls, and not written yet."""
    trash: int
    """Evicted and not removed yet; part of ``used``."""
    orphan_bytes: int
    """Of what lies below the root and is in no record."""
    limit: int | None
    """What the root may take; None where only the disk is the limit."""
    free: int
    total: int
    models: int
    contents: int
    """Layers, whole or in part."""


class UploadsRow(Struct, frozen=True, kw_only=True):
    """What was sent to peers since the agent started; see :mod:`fetcher.peers.served`."""

    bytes: int
    from_store: int
    passed_on: int
    filled: int
    lacking: int
    busy: int
    refused: int
    strangers: int
    connections: int
    uploads: int


class AskedRow(Struct, frozen=True, kw_only=True):
    """What peers were asked for since the agent started; see :mod:`fetcher.peers.standings`."""

    members: int
    """Other nodes that may be asked at present."""
    bytes: int = 0
    requests: int = 0
    failures: int = 0
    busy: int = 0
    slow: int = 0
    wrong: int = 0
    """How often what a peer sent proved wrong."""
    banned: int = 0
    """How often a peer was banned for it."""


class EvictedRow(Struct, frozen=True, kw_only=True):
    kind: str
    """``model``: its tree; ``content``: what there was of a layer."""
    digest: str
    selection: str = ""
    references: tuple[str, ...] = ()
    bytes: int
    last_used: float
    """Seconds since the epoch."""


class GcResult(Struct, frozen=True, kw_only=True):
    dry_run: bool
    evicted: tuple[EvictedRow, ...] = ()
    """With ``dry_run`` what would have been."""
    freed: int = 0
    orphan_bytes: int = 0
    """Of what was in no record, and was adopted or released as well."""
    used_before: int = 0
    used: int = 0
    limit: int | None = None


class RemoveResult(Struct, frozen=True, kw_only=True):
    removed: tuple[EvictedRow, ...]
    freed: int


class DamageRow(Struct, frozen=True, kw_only=True):
    kind: str
    """``model``: a tree; ``content``: a layer."""
    digest: str
    selection: str = ""
    references: tuple[str, ...] = ()
    problem: str
    outcome: str
    repaired: bool
    """Whether nothing wrong is left of it in the store."""


class VerifyResult(Struct, frozen=True, kw_only=True):
    dry_run: bool
    bytes: int = 0
    """How much was read again."""
    damaged: tuple[DamageRow, ...] = ()


class StatusResult(Struct, frozen=True, kw_only=True):
    root: str
    agent: AgentRow | None
    volumes: tuple[VolumeRow, ...]
    pulls: tuple[PullRow, ...]
    disk: DiskRow | None
    unknown_mounts: tuple[MountRow, ...] = ()
    """Mounts of models below kubelet's folder that belong to no volume."""
    uploads: UploadsRow | None = None
    """None where the node serves no peers."""
    asked: AskedRow | None = None
    """None where the node knows no peers."""


# --------------------------------------------------------------------------------------- calls

ParamsT = TypeVar("ParamsT", bound=Struct)
ResultT = TypeVar("ResultT", bound=Struct)
ParamsCo = TypeVar("ParamsCo", bound=Struct, covariant=True)
ResultCo = TypeVar("ResultCo", bound=Struct, covariant=True)


@dataclass(frozen=True, slots=True)
class Call(Generic[ParamsCo, ResultCo]):
    """One call by name, with the types of what goes in and what comes out."""

    name: str
    params: type[ParamsCo]
    result: type[ResultCo]


PING: Final = Call("ping", NoParams, PingResult)
PULL: Final = Call("pull", PullParams, PullResult)
MOUNT: Final = Call("mount", MountParams, MountResult)
UNMOUNT: Final = Call("unmount", UnmountParams, UnmountResult)
LIST: Final = Call("ls", NoParams, ListResult)
INSPECT: Final = Call("inspect", InspectParams, InspectResult)
INDEX: Final = Call("index", IndexParams, IndexResult)
STATUS: Final = Call("status", NoParams, StatusResult)
GC: Final = Call("gc", GcParams, GcResult)
REMOVE: Final = Call("rm", RemoveParams, RemoveResult)
VERIFY: Final = Call("verify", VerifyParams, VerifyResult)
HANDOVER: Final = Call("handover", NoParams, HandoverResult)
"""Asks a command that is the agent to leave the store to the caller; a serving agent refuses."""

CALLS: Final = (
    PING,
    PULL,
    MOUNT,
    UNMOUNT,
    LIST,
    INSPECT,
    INDEX,
    STATUS,
    GC,
    REMOVE,
    VERIFY,
    HANDOVER,
)


# ------------------------------------------------------------------------------------ messages


class Request(Struct, frozen=True, forbid_unknown_fields=True):
    call: Annotated[str, Meta(max_length=64)]
    params: Raw = Raw(b"{}")

    def __repr__(self) -> str:
        return f"Request({self.call!r}, …)"


class ProgressBody(Struct, frozen=True):
    """Bytes that are there, of the bytes that are wanted."""

    done: int
    total: int


class ErrorBody(Struct, frozen=True):
    code: str
    message: str
    context: dict[str, str] = {}


class Answer(Struct, frozen=True):
    """One line of an answer; exactly one field is set, for ``result`` to something not empty."""

    progress: ProgressBody | None = None
    error: ErrorBody | None = None
    result: Raw = Raw(b"")


def encode_request(call: Call[ParamsT, ResultT], params: ParamsT) -> bytes:
    """The line that makes ``call``."""
    return _line(Request(call.name, Raw(msgspec.json.encode(params))))


def decode_request(line: bytes) -> Request:
    """Read a request line; :class:`Malformed` when it is none."""
    return _decode(line, Request, "the request")


def decode_params(request: Request, call: Call[ParamsT, ResultT]) -> ParamsT:
    """Read the parameters of ``request``; :class:`Malformed` when they are not ``call``'s."""
    return _decode(bytes(request.params), call.params, f"the parameters of {call.name}")


def encode_progress(done: int, total: int) -> bytes:
    return _line({"progress": ProgressBody(done, total)})


def encode_result(result: Struct) -> bytes:
    return _line({"result": result})


def encode_error(error: ModelError) -> bytes:
    body = ErrorBody(type(error).__name__, error.message[:4096], error.context)
    return _line({"error": body})


def decode_answer(line: bytes) -> Answer:
    """Read one line of an answer; :class:`Malformed` when it is none."""
    return _decode(line, Answer, "the agent's answer")


def decode_result(answer: Answer, call: Call[ParamsT, ResultT]) -> ResultT:
    """Read the result of ``call``; :class:`Malformed` when it is none."""
    return _decode(bytes(answer.result), call.result, f"the result of {call.name}")


def error_of(body: ErrorBody) -> ModelError:
    """The exception that the other side raised, of the class it had there."""
    error = _error_classes().get(body.code, ModelError)(body.message)
    error.context = dict(body.context)
    return error


def _error_classes() -> dict[str, type[ModelError]]:
    found: dict[str, type[ModelError]] = {}
    waiting = [ModelError]
    while waiting:
        one = waiting.pop()
        found[one.__name__] = one
        waiting.extend(one.__subclasses__())
    return found


def _line(message: Struct | dict[str, Struct]) -> bytes:
    return msgspec.json.encode(message) + b"\n"


DecodedT = TypeVar("DecodedT")


def _decode(line: bytes, kind: type[DecodedT], what: str) -> DecodedT:
    """Decode without ever quoting the line, which may carry credentials.

    msgspec's messages name types and fields, and quote nothing but the names of unknown fields.
    """
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Malformed(f"{what} cannot be read: {str(error)[:200]}") from error
    except RecursionError as error:
        raise Malformed(f"{what} is nested too deeply") from error
