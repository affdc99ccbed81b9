"""The server side of ``<root>/agent.sock``: connections to validated calls, outcomes to lines.

Only who holds the store's lock listens there, so the name always leads to the one process that may
write the store. Peers are root or the agent's own user. What arrives is nevertheless taken for
hostile: every size and number is bounded, and no connection can harm another one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import trio

from csi import sockets
from fetcher import agent_protocol as protocol
from fetcher.errors import AccessDenied, Conflict, InvalidRequest, ModelError, Unavailable
from fetcher.lazy_protocol import ATTACH, AttachParams
from fetcher.lines import ConnectionLost, Lines, LineTooLong, Malformed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from pathlib import Path

    from msgspec import Struct

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 256
"""Commands and workers of one node are far fewer."""

_BACKLOG: Final = 128
_PROGRESS_SECONDS: Final = 0.25
_LAST_WORD_SECONDS: Final = 1.0
"""How long a peer that is turned away may take to read why."""

ParamsT = TypeVar("ParamsT", bound="Struct")
ResultT = TypeVar("ResultT", bound="Struct")


class Progressing(Protocol):
    """Bytes that are there, of the bytes that are wanted."""

    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...


class Watch:
    """Where a call says how far it is, for whoever shows it."""

    def __init__(self) -> None:
        self._source: Callable[[], Progressing | None] | None = None

    def follow(self, source: Callable[[], Progressing | None]) -> None:
        """From now on, ``source`` knows; it is asked a few times a second, in the trio thread."""
        self._source = source

    def progress(self) -> tuple[int, int] | None:
        """Bytes done and bytes in all, None while nothing is known."""
        progress = self._source() if self._source else None
        return (progress.done, progress.total) if progress else None

    async def report(
        self,
        tell: Callable[[int, int], Awaitable[None]],
        seconds: float,
        finished: trio.Event,
    ) -> None:
        """Tell what has changed, looked at every so many seconds, until ``finished``.

        What there is at the end is told too, where there was anything to tell before.
        """
        last: tuple[int, int] | None = None
        while True:
            ended = finished.is_set()
            progress = self.progress()
            if progress is not None and progress != last and (last is not None or not ended):
                last = progress
                await tell(*progress)
            if ended:
                return
            with trio.move_on_after(seconds):
                await finished.wait()


class Calls(Protocol):
    """What an agent can be asked for, in its own process or over the socket."""

    async def run(
        self, call: protocol.Call[ParamsT, ResultT], params: ParamsT, watch: Watch
    ) -> ResultT:
        """Run one call. Raises :class:`ModelError`; cancelling stops waiting."""


class Sessions(Protocol):
    """Who serves the workers of lazy models."""

    async def serve(self, lines: Lines, params: AttachParams) -> None:
        """Answer the call ``attach``, and what the worker asks on its connection from then on.

        Raises :class:`ModelError` where there is nothing to attach to.
        """


def peer_uid(peer: socket.socket | trio.socket.SocketType) -> int:
    """The user at the other end of a unix socket, as the kernel knows it."""
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", raw)
    return int(uid)


@contextlib.contextmanager
def folder_descriptor(folder: Path) -> Iterator[str]:
    """A short name for ``folder``: a socket's path has at most 107 bytes, a root may have more."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def listening(root: Path) -> Iterator[trio.SocketListener]:
    """Listen on the agent's socket of ``root``, whose store this process holds the lock of.

    The socket appears under its name complete, with its mode, and in place of a stale one. It is
    gone again when the block is left. Raises :class:`ModelError`.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:

        def bind(address: str) -> None:
            listener.bind(address.removeprefix("unix://"))
            listener.listen(_BACKLOG)

        with sockets.listening(protocol.socket_path(root), bind):
            yield trio.SocketListener(trio.socket.from_stdlib_socket(listener))


class AgentServer:
    """Answers the calls that arrive on the agent's socket."""

    def __init__(
        self,
        calls: Calls,
        hand_over: Callable[[], None] | None,
        max_connections: int = MAX_CONNECTIONS,
        sessions: Sessions | None = None,
    ) -> None:
        """``hand_over`` makes this process leave the store; None where it serves a node, and has
        ``sessions`` with workers.
        """
        self._calls = calls
        self._sessions = sessions
        self._max_connections = max_connections
        self._hand_over = hand_over
        self._leaving = False
        self._connections = 0
        self._busy = 0
        self._idle = trio.Event()
        self._known: Mapping[str, protocol.Call[Struct, Struct]] = {
            call.name: call for call in protocol.CALLS if call is not protocol.HANDOVER
        }

    async def serve(self, listener: trio.SocketListener) -> None:
        """Answer connections until cancelled."""
        await trio.serve_listeners(self._connection, [listener])

    async def drained(self, seconds: float) -> None:
        """Return when no call is under way any more, or after ``seconds``."""
        with trio.move_on_after(seconds):
            while self._busy:
                self._idle = trio.Event()
                await self._idle.wait()

    async def _connection(self, stream: trio.SocketStream) -> None:
        """One connection to its end. Nothing that happens on it gets further than here."""
        self._connections += 1
        lines = Lines(stream, protocol.MAX_REQUEST_BYTES)
        try:
            refusal = self._refusal(stream)
            if refusal is not None:
                await _last_word(stream, lines, refusal)
                return
            while (line := await lines.receive()) is not None:
                params = None if self._sessions is None else _attaching(line)
                if self._sessions is None or params is None:
                    await self._request(lines, line)
                    continue
                try:
                    await self._sessions.serve(lines, params)
                except ModelError as error:
                    await _last_word(stream, lines, error)
                return
        except LineTooLong as error:
            await _last_word(stream, lines, InvalidRequest(f"the request is {error}"))
        except ConnectionLost as error:
            logger.debug("a client of the agent left: %s", error)
        except Exception:
            logger.exception("fault of this program on a connection of the agent")
        finally:
            self._connections -= 1
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
                await stream.aclose()

    def _refusal(self, stream: trio.SocketStream) -> ModelError | None:
        uid = peer_uid(stream.socket)
        if uid not in (0, os.geteuid()):
            logger.warning("turned a client of user %d away from the agent", uid)
            return AccessDenied("only root and the agent's own user may talk to the agent")
        if self._connections > self._max_connections:
            return Unavailable(f"the agent already has {self._max_connections} connections")
        return None

    async def _request(self, lines: Lines, line: bytes) -> None:
        """Run one call while watching whether the client is still there."""
        watch = Watch()
        self._busy += 1
        try:
            async with trio.open_nursery() as connection:
                connection.start_soon(_cancel_when_closed, lines, connection.cancel_scope)
                finished = trio.Event()
                async with trio.open_nursery() as call:
                    call.start_soon(_report, lines, watch, finished)
                    answer = await self._answer(line, watch)
                    # the reporter ends by itself, after the line it may be in the middle of
                    finished.set()
                with contextlib.suppress(ConnectionLost):
                    await lines.send(answer)
                connection.cancel_scope.cancel()
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()
        if self._leaving and self._hand_over is not None:
            self._hand_over()

    async def _answer(self, line: bytes, watch: Watch) -> bytes:
        """The last line of the answer to the request in ``line``."""
        try:
            result = await self._run(protocol.decode_request(line), watch)
            answer = protocol.encode_result(result)
            if len(answer) > protocol.MAX_ANSWER_BYTES:
                raise ModelError(f"the answer has more than {protocol.MAX_ANSWER_BYTES} bytes")
            return answer
        except ModelError as error:
            return protocol.encode_error(error)
        except Malformed as error:
            return protocol.encode_error(InvalidRequest(str(error)))
        except Exception:
            logger.exception("fault of this program in a call of the agent")
            return protocol.encode_error(
                ModelError("internal error of the agent; its log says more")
            )

    async def _run(self, request: protocol.Request, watch: Watch) -> Struct:
        if request.call == protocol.HANDOVER.name:
            return self._handed_over(request)
        call = self._known.get(request.call)
        if call is None:
            raise InvalidRequest(
                f"there is no call {request.call!r}; known are {', '.join(sorted(self._known))}"
            )
        return await self._calls.run(call, protocol.decode_params(request, call), watch)

    def _handed_over(self, request: protocol.Request) -> Struct:
        protocol.decode_params(request, protocol.HANDOVER)
        if self._hand_over is None:
            raise Conflict(f"process {os.getpid()} serves this node with this store")
        self._leaving = True
        return protocol.HandoverResult(pid=os.getpid())


def _attaching(line: bytes) -> AttachParams | None:
    """What a worker that attaches says; None for any other call, or where it cannot be read."""
    try:
        request = protocol.decode_request(line)
        return protocol.decode_params(request, ATTACH) if request.call == ATTACH.name else None
    except Malformed:
        return None


async def _cancel_when_closed(lines: Lines, scope: trio.CancelScope) -> None:
    """Stop a call whose client is gone, or sends what nobody can hold."""
    try:
        await lines.wait_closed()
    except (LineTooLong, ConnectionLost) as error:
        logger.debug("a client of the agent left in mid-call: %s", error)
    scope.cancel()


async def _report(lines: Lines, watch: Watch, finished: trio.Event) -> None:
    """Send how far the call is, until it has ended."""

    async def tell(done: int, total: int) -> None:
        await lines.send(protocol.encode_progress(done, total))

    try:
        await watch.report(tell, _PROGRESS_SECONDS, finished)
    except ConnectionLost as error:
        logger.debug("a client of the agent left: %s", error)


async def _last_word(stream: trio.SocketStream, lines: Lines, error: ModelError) -> None:
    """Say why, and wait for the peer to leave: closed with its request unread, the connection would
    break under a peer that still writes, or before it has read this.
    """
    gone = (ConnectionLost, LineTooLong, trio.BrokenResourceError)
    with trio.move_on_after(_LAST_WORD_SECONDS), contextlib.suppress(*gone):
        await lines.send(protocol.encode_error(error))
        await stream.send_eof()
        await lines.wait_closed()
