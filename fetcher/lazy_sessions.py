"""The agent's end of the conversations with workers: :mod:`fetcher.lazy_protocol`.

A worker attaches for its model and asks for bytes; every question is a task of its own, which waits
until they are there. Nothing that a worker says can make the agent fetch what is not in its model.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Final

import trio

from fetcher import agent_protocol as protocol
from fetcher.errors import InvalidRequest, ModelError, NotFound, Unavailable
from fetcher.lazy_protocol import (
    AttachResult,
    Failed,
    Forget,
    FromAgent,
    Here,
    Index,
    Opened,
    Spoiled,
    Ticket,
    Want,
    decode_from_worker,
    encode,
)
from fetcher.lines import ConnectionLost, LineTooLong, Malformed
from fetcher.oci import Digest
from fetcher.ranges import Range
from fetcher.schedule import Prefetch

if TYPE_CHECKING:
    from fetcher.lazy import LazyModel, LazyModels
    from fetcher.lazy_blobs import LazyBlob
    from fetcher.lazy_protocol import AttachParams, FromWorker
    from fetcher.lines import Lines

logger = logging.getLogger(__name__)

MAX_QUESTIONS: Final = 4096
"""Of one worker at a time; the kernel has far fewer reads under way."""


class LazySessions:
    """Serves the workers of a node. Belongs to the trio thread."""

    def __init__(self, models: LazyModels) -> None:
        self._models = models

    async def serve(self, lines: Lines, params: AttachParams) -> None:
        """Answer the call ``attach``, and then the worker until it leaves.

        Raises :class:`ModelError` for a model that is not open, before it has answered, and
        :class:`ConnectionLost`.
        """
        model = self._models.get(Digest.parse(params.model), params.selection)
        if model is None:
            raise NotFound(f"no volume shows the lazy model {params.model[:100]} now")
        try:
            await model.recall(params.ticket)
        except ModelError as error:
            logger.warning("the worker of %s: %s", model.digest.short, error.message)
        await lines.send(protocol.encode_result(AttachResult(ticket=model.ticket)))
        logger.info("process %d serves the lazy model %s", params.pid, model.digest.short)
        await _Session(model, lines).run()


class _Session:
    """One worker that is attached."""

    def __init__(self, model: LazyModel, lines: Lines) -> None:
        self._model = model
        self._lines = lines
        self._questions: dict[int, trio.CancelScope] = {}
        # as many as it may ask, and what it is told unasked: nobody waits to say something
        self._say, self._said = trio.open_memory_channel[FromAgent](math.inf)

    async def run(self) -> None:
        """Answer until the worker leaves."""
        self._model.listeners.add(self)
        self._model.start.attached()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._speak, nursery.cancel_scope)
                for blob, reason in self._model.ruins():
                    self.spoiled(blob, reason)
                try:
                    while (line := await self._lines.receive()) is not None:
                        self._read(line, nursery)
                except (ConnectionLost, LineTooLong) as error:
                    logger.warning(
                        "the worker of %s is let go: %s", self._model.digest.short, error
                    )
                nursery.cancel_scope.cancel()
        finally:
            self._model.listeners.discard(self)

    async def _speak(self, scope: trio.CancelScope) -> None:
        try:
            async for message in self._said:
                await self._lines.send(encode(message))
        except ConnectionLost as error:
            logger.debug("a worker left: %s", error)
            scope.cancel()

    # -- what the model tells ----------------------------------------------------------------------

    def spoiled(self, blob: Digest, reason: str) -> None:
        """The bytes of a blob proved wrong."""
        self._say.send_nowait(Spoiled(str(blob), reason[:4096]))

    def renewed(self, ticket: str) -> None:
        """There is another ticket."""
        self._say.send_nowait(Ticket(ticket))

    # -- what the worker asks ----------------------------------------------------------------------

    def _read(self, line: bytes, nursery: trio.Nursery) -> None:
        try:
            message = decode_from_worker(line)
        except Malformed as error:
            # a worker may be of another version than the agent
            logger.warning("the worker of %s: %s", self._model.digest.short, error)
            return
        self._take(message, nursery)

    def _take(self, message: FromWorker, nursery: trio.Nursery) -> None:
        match message:
            case Forget():
                scope = self._questions.get(message.id)
                if scope is not None:
                    scope.cancel()
            case Opened():
                nursery.start_soon(self._open, message)
            case Want() | Index():
                if message.id in self._questions or len(self._questions) >= MAX_QUESTIONS:
                    error = Unavailable("the worker asks too much at one time")
                    self._say.send_nowait(Failed.of(message.id, error))
                    return
                scope = self._questions[message.id] = trio.CancelScope()
                nursery.start_soon(self._answer, message, scope)

    async def _open(self, message: Opened) -> None:
        if self._model.prefetch is Prefetch.NONE:
            return
        try:
            blob = await self._blob(message.blob)
            await self._model.start.over()
            blob.open(_range(blob, message.start, message.stop))
        except ModelError as error:
            logger.debug("a worker opened what is not there: %s", error.message)

    async def _blob(self, digest: str) -> LazyBlob:
        """One of the model's layers, once there is room for it: a worker is back sooner than that,
        where the agent was started again. Raises :class:`ModelError`.
        """
        await self._model.ready.wait()
        return self._model.blob(digest)

    async def _answer(self, message: Want | Index, scope: trio.CancelScope) -> None:
        try:
            with scope:
                self._say.send_nowait(await self._found(message))
        finally:
            if self._questions.get(message.id) is scope:
                del self._questions[message.id]

    async def _found(self, message: Want | Index) -> FromAgent:
        try:
            blob = await self._blob(message.blob)
            if isinstance(message, Index):
                complete = await blob.index()
            else:
                wanted = _range(blob, message.start, message.stop)
                complete = await blob.want(wanted, ahead=message.ahead)
        except ModelError as error:
            return Failed.of(message.id, error)
        return Here(message.id, complete)


def _range(blob: LazyBlob, start: int, stop: int) -> Range:
    size = blob.layer.descriptor.size
    if not 0 <= start <= stop <= size:
        raise InvalidRequest(f"there are no bytes {start} to {stop} in a blob of {size}")
    return Range(start, stop)
