"""The one bridge between gRPC's threads and the trio loop.

A thread hands its call to the loop, where it becomes a task of the server's nursery, and waits for
its end. The call's deadline is a cancel scope; a caller that goes away cancels it. Whatever happens
to the loop, a waiting thread gets an answer.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from google.protobuf.message import Message

    Method = Callable[[Any, "Call"], Awaitable[Message]]

logger = logging.getLogger(__name__)

NO_DEADLINE: Final = 1e9
"""Seconds; gRPC says "no deadline" as a number of seconds that no caller waits."""


@dataclass(frozen=True)
class Call:
    """What a service method may know of its call besides the request."""

    deadline: float | None = None
    """In trio's clock; None if the caller set none."""

    @property
    def time_remaining(self) -> float | None:
        """Seconds until the caller gives up, never negative; None if it does not."""
        if self.deadline is None:
            return None
        return max(self.deadline - trio.current_time(), 0.0)


class CallEnded(Exception):
    """A call that ended without its method's doing."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class Bridge:
    """Carries calls from gRPC's threads into the loop, and their ends back."""

    def __init__(self, token: trio.lowlevel.TrioToken, calls: trio.Nursery) -> None:
        self._token = token
        self._calls = calls

    def run(self, method: Method, request: Message, context: grpc.ServicerContext) -> Message:
        """Run ``method`` in the loop and wait for it, in a thread of gRPC.

        Raises what the method raised, or :class:`CallEnded`. Always ends: a task that started
        reports on every way out, and for one that cannot start any more it is done here.
        """
        call = _RunningCall(method, request, _seconds_left(context))
        try:
            self._token.run_sync_soon(self._start, call)
            if not context.add_callback(lambda: self._abandon(call)):
                self._abandon(call)
        except trio.RunFinishedError as error:
            raise _stopping() from error
        return call.result.result()

    def _start(self, call: _RunningCall) -> None:
        """In the loop: make the call a task."""
        try:
            self._calls.start_soon(call.run)
        except RuntimeError:
            # the nursery is closed
            call.result.set_exception(_stopping())

    def _abandon(self, call: _RunningCall) -> None:
        """In a thread of gRPC, when a call is over: nobody waits for the answer any more."""
        try:
            self._token.run_sync_soon(call.scope.cancel)
        except trio.RunFinishedError:
            logger.debug("a call ended after the loop")


class _RunningCall:
    """One call on its way through the loop. Made in a thread of gRPC, run in the loop."""

    def __init__(self, method: Method, request: Message, seconds: float | None) -> None:
        self.result: Future[Message] = Future()
        self.scope = trio.CancelScope()
        self._method = method
        self._request = request
        self._expiry = None if seconds is None else time.monotonic() + seconds

    async def run(self) -> None:
        """The task. Never raises, but to be cancelled; sets the result on every way out."""
        try:
            response = await self._run()
        except Exception as error:
            self.result.set_exception(error)
        except BaseException:
            self.result.set_exception(_stopping())
            raise
        else:
            self.result.set_result(response)

    async def _run(self) -> Message:
        call = Call()
        if self._expiry is not None:
            # what the call waited for the loop is the caller's time too
            self.scope.deadline = trio.current_time() + self._expiry - time.monotonic()
            call = Call(self.scope.deadline)
        with self.scope:
            return await self._method(self._request, call)
        if call.time_remaining == 0:
            raise CallEnded(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's deadline passed")
        raise CallEnded(grpc.StatusCode.CANCELLED, "the caller cancelled the call")


def _stopping() -> CallEnded:
    return CallEnded(grpc.StatusCode.UNAVAILABLE, "the driver is stopping: ask again")


def _seconds_left(context: grpc.ServicerContext) -> float | None:
    seconds = context.time_remaining()
    return None if seconds >= NO_DEADLINE else seconds
