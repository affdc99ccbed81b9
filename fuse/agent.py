"""The connection to the agent: questions that wait for it to come back, for as long as it takes.

The agent may be killed, upgraded or not there yet; its worker serves on. Whoever asks waits until
it is answered or gives up by himself (is cancelled, by a deadline of his own): then the agent is
told to forget it.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Final

import msgspec
import trio

from fetcher import agent_protocol
from fetcher import lazy_protocol as protocol
from fetcher.errors import ModelError
from fetcher.lines import ConnectionLost, Lines, LineTooLong, Malformed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import NoReturn

    from fetcher.ranges import Range

logger = logging.getLogger(__name__)

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 1.0
"""Seconds between two tries to reach the agent: it is on the same machine."""

_RETRY_SECONDS: Final = 0.5
"""After which a question is asked again that the agent could not answer now."""

_MOST_AHEAD: Final = 256
_MOST_OPENED: Final = 1024

_Question = protocol.Want | protocol.Index
_Key = tuple[str, int, int]


class _Asked:
    """A question under way, and whoever waits for its answer."""

    def __init__(self, question: _Question, key: _Key | None = None) -> None:
        self.question = question
        self.key = key
        """What makes it the same question as another one's; None if nobody waits for it."""
        self.waiters = 0
        self.answered = trio.Event()
        self.answer: protocol.Here | protocol.Failed | None = None


class Agent:
    """What the worker of one model asks the agent of its store."""

    def __init__(
        self,
        root: Path,
        params: protocol.AttachParams,
        spoiled: Callable[[str, str], None],
        attached: Callable[[], None],
    ) -> None:
        """``spoiled`` is told of blobs whose bytes proved wrong, and why; ``attached`` is called
        whenever an agent is reached, as the one before may have died without a word.
        """
        self._root = root
        self._params = params
        self._spoiled = spoiled
        self._on_attached = attached
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._same: dict[_Key, _Asked] = {}
        """What is asked for already, so that many readers ask once."""
        self._opened: OrderedDict[_Key, protocol.Opened] = OrderedDict()
        self._outgoing: deque[bytes] = deque()
        self._wake = trio.Event()
        self._attached = False
        self.trouble: str | None = "the agent has not been reached yet"
        """Why questions wait, in the words for a log; None while nothing is known to be wrong."""

    # -- what is asked -----------------------------------------------------------------------------

    async def want(self, blob: str, part: Range) -> protocol.Here:
        """Return once these bytes of a blob are there and trusted.

        Raises :class:`ModelError` when the agent refuses; what may pass is waited for.
        """
        return await self._ask(
            (blob, part.start, part.stop),
            lambda number: protocol.Want(number, blob, part.start, part.stop),
        )

    async def index(self, blob: str) -> protocol.Here:
        """Return once what is in an archive is known. As :meth:`want`."""
        return await self._ask((blob, -1, -1), lambda number: protocol.Index(number, blob))

    def ahead(self, blob: str, part: Range) -> None:
        """Say that these bytes will be wanted before long; nobody waits for them."""
        if sum(asked.waiters == 0 for asked in self._asked.values()) < _MOST_AHEAD:
            number = next(self._numbers)
            self._send(_Asked(protocol.Want(number, blob, part.start, part.stop, ahead=True)))

    def opened(self, blob: str, part: Range) -> None:
        """Say that a file was opened whose bytes are these."""
        message = protocol.Opened(blob, part.start, part.stop)
        key = (blob, part.start, part.stop)
        # a new agent is told of the latest again
        self._opened[key] = message
        self._opened.move_to_end(key)
        if len(self._opened) > _MOST_OPENED:
            self._opened.popitem(last=False)
        self._say(message)

    async def _ask(self, key: _Key, make: Callable[[int], _Question]) -> protocol.Here:
        while True:
            asked = self._same.get(key)
            if asked is None:
                asked = self._same[key] = _Asked(make(next(self._numbers)), key)
                self._send(asked)
            answer = await self._answer(asked)
            if isinstance(answer, protocol.Here):
                return answer
            self.trouble = answer.message
            if not answer.transient:
                raise answer.error()
            await trio.sleep(_RETRY_SECONDS * (1 + random.random()))  # noqa: S311 - spreads load

    async def _answer(self, asked: _Asked) -> protocol.Here | protocol.Failed:
        asked.waiters += 1
        try:
            await asked.answered.wait()
        finally:
            asked.waiters -= 1
            if not asked.waiters and self._drop(asked):
                self._say(protocol.Forget(asked.question.id))
        if asked.answer is None:
            raise ValueError("answered without an answer")
        return asked.answer

    def _drop(self, asked: _Asked) -> bool:
        """Let a question be under way no more; whether it was."""
        if asked.key is not None and self._same.get(asked.key) is asked:
            del self._same[asked.key]
        return self._asked.pop(asked.question.id, None) is not None

    def _send(self, asked: _Asked) -> None:
        self._asked[asked.question.id] = asked
        self._say(asked.question)

    def _say(self, message: protocol.FromWorker) -> None:
        """Send it now; what has to be said to the next agent too is said again then."""
        if self._attached:
            self._outgoing.append(protocol.encode(message))
            self._wake.set()

    # -- the connection ----------------------------------------------------------------------------

    async def run(self) -> NoReturn:
        """Be connected, again and again, until cancelled."""
        pause = _FIRST_PAUSE
        while True:
            try:
                async with await _connect(self._root) as stream:
                    lines = Lines(stream, protocol.MAX_LINE_BYTES)
                    await self._attach(lines)
                    pause = _FIRST_PAUSE
                    await self._converse(lines)
            except (OSError, ConnectionLost) as error:
                self._lost(f"the agent of {self._root} cannot be reached: {error}")
            except (Malformed, ModelError) as error:
                self._lost(f"the agent of {self._root} does not know this worker: {error}")
            finally:
                self._attached = False
                self._outgoing.clear()
            await trio.sleep(pause * (0.5 + random.random()))  # noqa: S311 - spreads load
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _lost(self, trouble: str) -> None:
        if trouble != self.trouble:
            logger.warning("%s; what is there stays readable, and it is tried again", trouble)
        self.trouble = trouble

    async def _attach(self, lines: Lines) -> None:
        await lines.send(agent_protocol.encode_request(protocol.ATTACH, self._params))
        while True:
            line = await lines.receive()
            if line is None:
                raise ConnectionLost("it closed the connection")
            answer = agent_protocol.decode_answer(line)
            if answer.error is not None:
                raise agent_protocol.error_of(answer.error)
            if answer.progress is None:
                break
        result = agent_protocol.decode_result(answer, protocol.ATTACH)
        self._take_ticket(result.ticket)
        logger.info("attached to the agent of %s", self._root)
        self.trouble = None
        self._attached = True
        self._on_attached()
        for message in [*self._opened.values(), *(one.question for one in self._asked.values())]:
            self._say(message)

    async def _converse(self, lines: Lines) -> None:
        """Speak and listen until the connection breaks."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._speak, lines, nursery.cancel_scope)
            try:
                while (line := await lines.receive()) is not None:
                    self._take(line)
            except (ConnectionLost, LineTooLong) as error:
                self._lost(f"the agent of {self._root} was lost: {error}")
            else:
                self._lost(f"the agent of {self._root} was lost: it closed the connection")
            nursery.cancel_scope.cancel()

    async def _speak(self, lines: Lines, connection: trio.CancelScope) -> None:
        while True:
            while self._outgoing:
                together = b"".join(self._outgoing)
                self._outgoing.clear()
                try:
                    await lines.send(together)
                except ConnectionLost as error:
                    self._lost(f"the agent of {self._root} was lost: {error}")
                    connection.cancel()
                    return
            self._wake = trio.Event()
            await self._wake.wait()

    def _take(self, line: bytes) -> None:
        try:
            self._hear(protocol.decode_from_agent(line))
        except Malformed as error:
            # a newer agent says more than is known here
            logger.warning("a line of the agent was passed over: %s", error)

    def _hear(self, message: protocol.FromAgent) -> None:
        match message:
            case protocol.Here() | protocol.Failed():
                asked = self._asked.get(message.id)
                if asked is not None:
                    self._drop(asked)
                    asked.answer = message
                    asked.answered.set()
            case protocol.Spoiled():
                self._spoiled(message.blob, message.reason)
            case protocol.Ticket():
                self._take_ticket(message.ticket)

    def _take_ticket(self, ticket: str) -> None:
        self._params = msgspec.structs.replace(self._params, ticket=ticket)


async def _connect(root: Path) -> trio.SocketStream:
    """Reach the agent's socket by a short name: its path may be longer than a socket's can be."""
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name = agent_protocol.socket_path(root).name
        return await trio.open_unix_socket(f"/proc/self/fd/{folder}/{name}")
    finally:
        os.close(folder)
