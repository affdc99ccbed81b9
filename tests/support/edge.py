"""The gRPC edge for tests: services served in this trio loop, called from threads."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar, cast

import grpc
import pytest
import trio

from csi.server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from csi.server import Service

T = TypeVar("T")


@asynccontextmanager
async def serving(path: Path, services: Sequence[Service]) -> AsyncIterator[Server]:
    """A server on ``path`` for the block, cancelled at its end."""
    server = Server(path, services)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        yield server
        nursery.cancel_scope.cancel()


async def in_thread(call: Callable[[], T]) -> T:
    """Make a blocking call while the loop goes on."""
    return await trio.to_thread.run_sync(call, limiter=trio.CapacityLimiter(1))


def failure(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Code and message with which ``call`` fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    # what gRPC raises is both, which its types cannot say
    answer = cast("grpc.Call", caught.value)
    return answer.code(), answer.details() or ""


async def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """:func:`failure`, of a call made in a thread."""
    return await in_thread(lambda: failure(call))
