"""Reaching the agent of a root: connect, else become.

A command looks for an agent on ``<root>/agent.sock``. Where there is none it takes the store's lock
and is the agent itself for the time of its call: it listens too, so that a second command joins it
and a blob is downloaded once whatever the number of processes. Whoever loses its agent in mid-call,
because that process ended or was killed, starts from the beginning; all calls are idempotent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from csi.agent import AgentServer, Calls, Watch, folder_descriptor, listening, peer_uid
from fetcher import agent_protocol as protocol
from fetcher.errors import AccessDenied, InProgress, ModelError, Unavailable
from fetcher.lines import ConnectionLost, Lines, Malformed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from msgspec import Struct

    Become = Callable[[], AbstractAsyncContextManager[Calls]]
    """Opens the store and gives what answers calls; InProgress while another process has it."""

logger = logging.getLogger(__name__)

ParamsT = TypeVar("ParamsT", bound="Struct")
ResultT = TypeVar("ResultT", bound="Struct")
NodeT = TypeVar("NodeT")

_POLL_SECONDS: Final = 0.05
_REPORT_SECONDS: Final = 0.1
_DRAIN_SECONDS: Final = 0.25
"""How long a command that is done stays for the last words to those whose calls ended with its."""

_LEAVE_SECONDS: Final = 5.0
_MAX_SILENT_LOSSES: Final = 20


@dataclass(frozen=True, slots=True)
class Patience:
    """How long is waited, in seconds."""

    lock: float = 30.0
    """For a process that holds the lock and does not listen: it starts, or ends, or hangs."""
    handover: float = 60.0
    """For a command that was asked to leave the store to a serving agent."""


class AgentLost(Exception):
    """The agent went away before it answered. ``heard`` is whether it had said anything."""

    def __init__(self, heard: bool) -> None:
        super().__init__("the agent went away in mid-call")
        self.heard = heard


class AgentClient:
    """Makes calls to the agent of ``root``, and is that agent where there is none."""

    def __init__(
        self,
        root: Path,
        become: Become,
        show: Callable[[int, int], None],
        patience: Patience | None = None,
    ) -> None:
        """``show`` gets bytes done and bytes in all whenever they change."""
        self._root = root
        self._become = become
        self._show = show
        self._patience = patience or Patience()

    async def call(self, call: protocol.Call[ParamsT, ResultT], params: ParamsT) -> ResultT:
        """Run ``call`` wherever the agent is. Raises :class:`ModelError`.

        Cancelling it stops the waiting; what was downloaded stays.
        """
        losses = _Losses(self._root)
        holder = _Holder(self._patience.lock)
        while True:
            try:
                result = await self.ask_running(call, params)
            except AgentLost as lost:
                holder = _Holder(self._patience.lock)
                await losses.pause(lost)
                continue
            if result is not None:
                return result
            try:
                return await self._be(call, params)
            except _StoreBusy as busy:
                holder.wait_for(busy)
                await trio.sleep(_POLL_SECONDS)
            except _HandedOver:
                await self._wait_for_successor()

    async def reachable(self) -> bool:
        """Whether an agent listens that this user may talk to."""
        try:
            stream = await connect(self._root)
        except AccessDenied as error:
            logger.info("%s", error.message)
            return False
        if stream is None:
            return False
        await stream.aclose()
        return True

    async def ask_running(
        self, call: protocol.Call[ParamsT, ResultT], params: ParamsT
    ) -> ResultT | None:
        """Run ``call`` in the agent that listens, None where none does.

        Raises :class:`ModelError`, and :class:`AgentLost` when it goes away in mid-call.
        """
        stream = await connect(self._root)
        if stream is None:
            return None
        async with stream:
            return await _ask(stream, call, params, self._show)

    async def _be(self, call: protocol.Call[ParamsT, ResultT], params: ParamsT) -> ResultT:
        """Be the agent for one call of this process's own."""
        outcome: ResultT | ModelError | None = None
        async with contextlib.AsyncExitStack() as stack:
            try:
                calls = await stack.enter_async_context(self._become())
            except InProgress as error:
                raise _StoreBusy(error) from error
            listener = stack.enter_context(listening(self._root))
            leave = trio.CancelScope()
            with leave:
                outcome = await self._serve_and_run(calls, listener, leave, call, params)
        # raised out here: a nursery inside would wrap it
        if outcome is None:
            raise _HandedOver
        if isinstance(outcome, ModelError):
            raise outcome
        return outcome

    async def _serve_and_run(
        self,
        calls: Calls,
        listener: trio.SocketListener,
        leave: trio.CancelScope,
        call: protocol.Call[ParamsT, ResultT],
        params: ParamsT,
    ) -> ResultT | ModelError:
        watch = Watch()
        server = AgentServer(calls, hand_over=leave.cancel)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, listener)
            finished = trio.Event()
            nursery.start_soon(self._show_progress, watch, finished)
            try:
                outcome: ResultT | ModelError = await calls.run(call, params, watch)
            except ModelError as error:
                outcome = error
            finished.set()
            # who waited for the same pull has its result now as well
            await server.drained(_DRAIN_SECONDS)
            nursery.cancel_scope.cancel()
        return outcome

    async def _show_progress(self, watch: Watch, finished: trio.Event) -> None:
        async def tell(done: int, total: int) -> None:
            self._show(done, total)

        await watch.report(tell, _REPORT_SECONDS, finished)

    async def _wait_for_successor(self) -> None:
        """Give the agent that asked for the store the time to take it."""
        logger.info("left the store at %s to a serving agent", self._root)
        with trio.move_on_after(self._patience.lock):
            while True:
                await trio.sleep(_POLL_SECONDS)
                stream = await connect(self._root)
                if stream is not None:
                    await stream.aclose()
                    return


@contextlib.asynccontextmanager
async def take_over(
    root: Path, become: Callable[[], AbstractAsyncContextManager[NodeT]], patience: Patience
) -> AsyncIterator[NodeT]:
    """Become the agent that serves ``root``; a command that is the agent leaves it to this one.

    Raises :class:`InProgress` naming the holder when the store does not become free in time.
    """
    async with contextlib.AsyncExitStack() as stack:
        yield await _enter(stack, root, become, _Holder(patience.handover))


async def _enter(
    stack: contextlib.AsyncExitStack,
    root: Path,
    become: Callable[[], AbstractAsyncContextManager[NodeT]],
    holder: _Holder,
) -> NodeT:
    while True:
        try:
            return await stack.enter_async_context(become())
        except InProgress as error:
            holder.wait_for(_StoreBusy(error))
        await _ask_to_leave(root)
        await trio.sleep(_POLL_SECONDS)


async def _ask_to_leave(root: Path) -> None:
    """Ask who holds the store to leave it. Whether it did shows at the lock."""
    try:
        with trio.move_on_after(_LEAVE_SECONDS):
            stream = await connect(root)
            if stream is None:
                return
            async with stream:
                answer = await _ask(stream, protocol.HANDOVER, protocol.NoParams(), lambda *_: None)
            logger.info("process %d leaves the store at %s to this one", answer.pid, root)
    except (AgentLost, ModelError) as error:
        logger.debug("the holder of %s was asked to leave it: %s", root, error)


async def connect(root: Path) -> trio.SocketStream | None:
    """A connection to the agent of ``root``, None where nobody listens.

    Raises :class:`AccessDenied` where the agent is not this user's to talk to, and where it is
    somebody who may not be told credentials.
    """
    path = protocol.socket_path(root)
    ours = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with folder_descriptor(root) as folder:
            await ours.connect(f"{folder}/{path.name}")
        if not _trusted(ours, path):
            ours.close()
            return None
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        ours.close()
        return None
    except PermissionError as error:
        ours.close()
        raise AccessDenied(
            f"{root} belongs to another user: run this command as root, or use another --root"
        ) from error
    except OSError as error:
        ours.close()
        raise Unavailable(f"the agent at {path} cannot be reached: {error.strerror}") from error
    except BaseException:
        ours.close()
        raise
    return trio.SocketStream(ours)


def _trusted(ours: trio.socket.SocketType, path: Path) -> bool:
    """Whether who listens may be told credentials; false where nobody has taken the call."""
    uid = peer_uid(ours)
    if uid in (0, os.geteuid()):
        return True
    if uid < 0:
        # a listener whose queue is full: the kernel leaves the socket unconnected
        return False
    raise AccessDenied(f"{path} belongs to user {uid}: its agent is not to be trusted")


class _StoreBusy(Exception):
    """Another process has the store open."""

    def __init__(self, error: InProgress) -> None:
        super().__init__(error.message)
        self.error = error


class _HandedOver(Exception):
    """A serving agent asked for the store before the call was done."""


class _Holder:
    """Bounds the waiting for one process that holds the lock and does not listen."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._message: str | None = None
        self._deadline = 0.0

    def wait_for(self, busy: _StoreBusy) -> None:
        """Return if it is still worth waiting for; another holder starts the time anew."""
        if busy.error.message != self._message:
            self._message = busy.error.message
            self._deadline = trio.current_time() + self._seconds
        if trio.current_time() > self._deadline:
            raise InProgress(
                f"{busy.error.message}, and it did not answer or leave within "
                f"{self._seconds:.0f} s: end it, or use another --root",
                **busy.error.context,
            ) from busy


class _Losses:
    """Bounds the tries with agents that die of what they are asked."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._silent = 0

    async def pause(self, lost: AgentLost) -> None:
        """Wait before the next try; longer when nothing was heard again."""
        self._silent = 0 if lost.heard else self._silent + 1
        logger.info("the agent of %s went away in mid-call: trying again", self._root)
        if self._silent > _MAX_SILENT_LOSSES:
            raise Unavailable(
                f"the agent of {self._root} went away {self._silent} times before it answered: "
                "look at its log"
            ) from lost
        await trio.sleep(_POLL_SECONDS * (1 + self._silent))


async def _ask(
    stream: trio.SocketStream,
    call: protocol.Call[ParamsT, ResultT],
    params: ParamsT,
    show: Callable[[int, int], None],
) -> ResultT:
    """Make one call on a connection and follow its answer to the end."""
    lines = Lines(stream, protocol.MAX_ANSWER_BYTES)
    heard = False
    try:
        with contextlib.suppress(ConnectionLost):
            # an agent that turns us away may have closed its end already: hear what it said
            await lines.send(protocol.encode_request(call, params))
        while (line := await lines.receive()) is not None:
            heard = True
            answer = protocol.decode_answer(line)
            if answer.error is not None:
                raise protocol.error_of(answer.error)
            if bytes(answer.result):
                return protocol.decode_result(answer, call)
            if answer.progress is not None:
                show(answer.progress.done, answer.progress.total)
    except Malformed as error:
        raise Unavailable(f"the agent is of another version than this command: {error}") from error
    except ConnectionLost as error:
        raise AgentLost(heard) from error
    raise AgentLost(heard)
