"""The CSI services on a unix socket: gRPC to one log line and one status for each call.

gRPC answers each call in a thread of its own, which has the call run in the trio loop
(:mod:`csi.bridge`) and makes what comes back an answer.
"""

from __future__ import annotations

import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc
import trio
from google.protobuf.message_factory import GetMessageClass

from csi.bridge import Bridge, CallEnded
from csi.codes import code_of
from csi.redaction import shown
from csi.sockets import listening
from fetcher.errors import ModelError
from fetcher.logs import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
    from google.protobuf.message import Message

    from csi.bridge import Method

logger = logging.getLogger(__name__)

MAX_CALLS: Final = 512
"""Calls at one time, each with a thread that is made when it is needed; more than the volumes of a
node, so that long publishes take nothing from other volumes' calls. Further calls are refused."""

MAX_REQUEST_BYTES: Final = 4 * 1024 * 1024
MAX_RESPONSE_BYTES: Final = 4 * 1024 * 1024
"""What a Go client reads unless told otherwise."""

MAX_DETAILS_BYTES: Final = 2048
"""Of a status message, which travels in a header: clients refuse headers beyond 8 KiB, and each
byte that is not ASCII takes three there."""

STOP_SECONDS: Final = 2.0
"""For gRPC to send its last answers when the server ends."""

QUIET_METHODS: Final = frozenset({"Probe"})
"""Asked every few seconds: logged at debug."""


class Service(Protocol):
    """One gRPC service: an ``async def Method(self, request, call) -> response`` for each RPC.

    An RPC of the descriptor for which there is no such method is answered ``UNIMPLEMENTED``. A
    method raises :class:`ModelError`; anything else is a bug and answered ``INTERNAL``.
    """

    @property
    def descriptor(self) -> ServiceDescriptor:
        """The service in the contract."""


class Server:
    """Serves ``services`` on a unix socket that only root can connect to."""

    def __init__(self, path: Path, services: Sequence[Service]) -> None:
        self._path = path
        self._services = services
        self._stopping = trio.Event()
        self._grace = 0.0

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled or stopped; started once calls can be made.

        Calls that are under way when it is cancelled are cancelled too and answered
        ``UNAVAILABLE``. Raises :class:`ModelError` when the socket cannot be listened on.
        """
        # gRPC's threads wait for the loop, so they may not be the loop's own worker threads
        threads = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="grpc")
        server = grpc.server(threads, maximum_concurrent_rpcs=MAX_CALLS, options=_options())
        with listening(self._path, server.add_insecure_port):
            try:
                async with trio.open_nursery() as calls:
                    bridge = Bridge(trio.lowlevel.current_trio_token(), calls)
                    server.add_generic_rpc_handlers(
                        tuple(_handler(service, bridge) for service in self._services)
                    )
                    server.start()
                    logger.info("serving on %s", self._path)
                    task_status.started()
                    await self._stopping.wait()
                    # new calls are refused from here on; those under way have the grace to end
                    server.stop(self._grace + STOP_SECONDS)
                    calls.cancel_scope.deadline = trio.current_time() + self._grace
            finally:
                await _finish(server)
                threads.shutdown(wait=False)

    def stop(self, grace: float) -> None:
        """Refuse new calls, give those under way ``grace`` seconds, have :meth:`serve` return."""
        self._grace = grace
        self._stopping.set()


class _Endpoint:
    """Answers the calls of one RPC, each in a thread of gRPC."""

    def __init__(self, name: str, method: Method, bridge: Bridge) -> None:
        self._name = name
        self._method = method
        self._bridge = bridge

    def answer(self, request: Message, context: grpc.ServicerContext) -> Message:
        """The response, or an abort of ``context`` with the status of what went wrong."""
        started = time.monotonic()
        try:
            response = self._bridge.run(self._method, request, context)
        except Exception as error:
            code, details = _status(error)
            self._log(request, time.monotonic() - started, code, details)
            context.abort(code, details)
        self._log(request, time.monotonic() - started, grpc.StatusCode.OK)
        return response

    def _log(
        self, request: Message, seconds: float, code: grpc.StatusCode, details: str = ""
    ) -> None:
        level = logging.DEBUG if self._name in QUIET_METHODS else _LEVELS.get(code, logging.WARNING)
        if not logger.isEnabledFor(level):
            return
        volume = str(getattr(request, "volume_id", None) or getattr(request, "name", ""))[:256]
        logger.log(
            level,
            "%s %s: %s in %.3f s%s; request: {%s}",
            self._name,
            printable(volume) or "-",
            code.name,
            seconds,
            f": {printable(details)}" if details else "",
            shown(request),
            extra={"method": self._name, "volume": volume, "code": code.name, "seconds": seconds},
        )


_LEVELS: Final = {
    grpc.StatusCode.OK: logging.INFO,
    # kubelet asks again: nothing went wrong
    grpc.StatusCode.ABORTED: logging.INFO,
    grpc.StatusCode.CANCELLED: logging.INFO,
    grpc.StatusCode.INTERNAL: logging.ERROR,
}


def _status(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Code and message of what ended a call. The stack of a bug goes to the log, never out."""
    if isinstance(error, CallEnded):
        return error.code, error.details
    if isinstance(error, ModelError):
        return code_of(error), _bounded(error.message)
    bug = secrets.token_hex(4)
    logger.error("internal error %s", bug, exc_info=error)
    return grpc.StatusCode.INTERNAL, f"internal error (id {bug}), see the driver's log"


def _bounded(details: str) -> str:
    encoded = details.encode(errors="replace")
    if len(encoded) <= MAX_DETAILS_BYTES:
        return encoded.decode()
    return encoded[:MAX_DETAILS_BYTES].decode(errors="ignore") + "…"


def _handler(service: Service, bridge: Bridge) -> grpc.GenericRpcHandler:
    """The RPCs of one service, as the contract has them; gRPC refuses what is not among them."""
    endpoints = {
        rpc.name: _rpc_handler(rpc, _Endpoint(rpc.name, getattr(service, rpc.name), bridge))
        for rpc in service.descriptor.methods
        if hasattr(service, rpc.name)
    }
    return grpc.method_handlers_generic_handler(service.descriptor.full_name, endpoints)


def _rpc_handler(rpc: MethodDescriptor, endpoint: _Endpoint) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.unary_unary_rpc_method_handler(
        endpoint.answer,
        request_deserializer=GetMessageClass(rpc.input_type).FromString,
        response_serializer=GetMessageClass(rpc.output_type).SerializeToString,
    )


def _options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_send_message_length", MAX_RESPONSE_BYTES),
    ]


async def _finish(server: grpc.Server) -> None:
    """Close gRPC: every call has its end by now, and a moment to tell its caller."""
    stopped = server.stop(STOP_SECONDS)
    with trio.CancelScope(shield=True):
        # bounded: gRPC drops what is left after that time
        limiter = trio.CapacityLimiter(1)
        await trio.to_thread.run_sync(stopped.wait, STOP_SECONDS + 1, limiter=limiter)
