"""Trying members that say they have all of a blob, before anything of what they send is used.

What a liar sends is passed on by those that believe him, and nobody knows in the end whose bytes
were wrong. So the first answer of such a member waits in memory, until a part of it, which he
cannot foresee, was compared with the registry's own: he is used, or banned, and no wrong byte has
gone anywhere. His other answers wait for that at their first byte. Where a list of chunk digests is
there, or comes in a moment, it proves each chunk by itself, and nothing has to be asked; but his
other answers wait for the first chunk all the same, as a list says nothing before its end.
"""

from __future__ import annotations

import enum
import threading
from typing import TYPE_CHECKING, Final, Protocol

import trio

from fetcher.errors import ChunkMismatch, ModelError, NotFound
from fetcher.excerpts import EXCERPT_BYTES, excerpt_of
from fetcher.peers.strands import Cut
from fetcher.threads import Stopped

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fetcher.answers import Sink
    from fetcher.ranges import Range

TRIED_FROM: Final = 32 * 1024 * 1024
"""Bytes of a blob below which a trial would be no small part of it: the blob's own digest tells."""
_LOOK_SECONDS: Final = 0.05
_MOST_LOOKS: Final = 10
"""For a list that is looked for, before the registry is asked."""


class _Verdict(enum.Enum):
    """What becomes of bytes that were held."""

    USED = enum.auto()
    REFUSED = enum.auto()
    LEFT = enum.auto()
    """Whoever asked for them does so no more."""


class Held:
    """A sink before that of an answer: keeps what comes until it is known what becomes of it.

    Taken from in the thread that fetches; everything else is for the trio thread.
    """

    def __init__(self, sink: Sink, name: str) -> None:
        self._sink = sink
        self._name = name
        self._change = threading.Condition()
        self._kept = bytearray()
        self._needed = 0
        """Bytes that are taken before anything is decided."""
        self._verdict: _Verdict | None = None
        self._token = trio.lowlevel.current_trio_token()
        self._heard = trio.Event()
        self._arrived = trio.Event()

    def whole(self) -> bool:
        """See :class:`fetcher.answers.Sink`."""
        return self._sink.whole()

    def __call__(self, data: memoryview) -> bool:
        """Take the next bytes; returns once they are used, or more are needed."""
        with self._change:
            if self._kept or self._verdict is None:
                self._kept += data
                self._wait()
                if self._verdict is None:
                    return True
                data, self._kept = memoryview(self._kept), bytearray()
        if self._verdict is _Verdict.LEFT:
            raise Stopped
        if self._verdict is _Verdict.REFUSED:
            raise NotFound(f"peer {self._name} sent other bytes than the registry")
        return self._sink(data)

    def _wait(self) -> None:
        """Until it is decided, or more is needed for that. Whoever fetches decides in any case."""
        while self._verdict is None and len(self._kept) >= self._needed:
            if self._needed:
                self._token.run_sync_soon(self._arrived.set, idempotent=True)
            self._change.wait()

    def hear(self, *, is_whole: bool) -> None:
        """An answer has begun, from who has all of the blob, or not."""
        if is_whole:
            self._heard.set()
        else:
            self.decide(_Verdict.USED)

    async def heard(self) -> None:
        """Wait for the answer of somebody who has all of the blob."""
        await self._heard.wait()

    async def taken(self, begin: int, count: int) -> bytes:
        """Some of what comes, once it is there."""
        with self._change:
            self._needed = begin + count
            self._change.notify()
        await self._arrived.wait()
        with self._change:
            return bytes(self._kept[begin : begin + count])

    def decide(self, verdict: _Verdict) -> None:
        """What becomes of them; the first word counts."""
        with self._change:
            self._verdict = self._verdict or verdict
            self._change.notify()


class Judging(Protocol):
    """What trials of one blob ask of others."""

    def is_proven(self) -> bool:
        """Whether each chunk is proven by itself when it has come."""

    def awaits_list(self, name: str) -> bool:
        """Whether that may soon be so, by what this member is asked for."""

    async def excerpt(self, wanted: Range) -> bytes | None:
        """What the registry has there; None where it does not say."""

    def ban(self, name: str) -> None:
        """A member's bytes were others."""


class Trials:
    """Those of one blob. Belongs to the trio thread."""

    def __init__(self, judging: Judging, size: int, tried_from: int = TRIED_FROM) -> None:
        self._judging = judging
        self._is_large = size >= tried_from
        self._settled: dict[str, _Verdict] = {}
        self._turns: dict[str, trio.Lock] = {}

    def held(self, name: str, sink: Sink) -> Held | None:
        """What to put before the sink of an answer of this member; None where nothing is to be."""
        is_known = self._settled.get(name) is _Verdict.USED
        return None if is_known or not self._is_large else Held(sink, name)

    async def judged(
        self, held: Held, name: str, wanted: Range, fetch: Callable[[], Awaitable[None]]
    ) -> None:
        """Have ``fetch`` fetch ``wanted`` into ``held``, and see what becomes of it. Raises what
        it does, and :class:`NotFound` where the bytes are wrong.
        """
        failure: ModelError | Cut | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._settle, held, name, wanted)
            try:
                await fetch()
            except (ModelError, Cut) as error:
                failure = error
            self._settle_by(name, failure)
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    def acquit(self) -> None:
        """Those whose chunks were wrong may have been right: what said so is not gone by."""
        self._settled = {
            name: verdict
            for name, verdict in self._settled.items()
            if verdict is not _Verdict.REFUSED
        }

    def _settle_by(self, name: str, failure: ModelError | Cut | None) -> None:
        """See what becomes of a member by an answer that ended, where its chunk is proven."""
        if not self._judging.is_proven():
            return
        if failure is None:
            self._settled.setdefault(name, _Verdict.USED)
        elif isinstance(failure, ChunkMismatch) and failure.sole:
            self._settled[name] = _Verdict.REFUSED

    async def _settle(self, held: Held, name: str, wanted: Range) -> None:
        try:
            await held.heard()
            async with self._turns.setdefault(name, trio.Lock()):
                known = self._settled.get(name)
                held.decide(known or await self._tried(held, name, wanted))
                if known is None and self._judging.is_proven():
                    # his others wait until this one has ended
                    await trio.sleep_forever()
        finally:
            held.decide(_Verdict.LEFT)

    async def _tried(self, held: Held, name: str, wanted: Range) -> _Verdict:
        for _ in range(_MOST_LOOKS):
            if self._judging.is_proven() or not self._judging.awaits_list(name):
                break
            await trio.sleep(_LOOK_SECONDS)
        if self._judging.is_proven():
            return _Verdict.USED
        part = excerpt_of(wanted)
        right = await self._judging.excerpt(part)
        if right is None or await held.taken(part.start - wanted.start, len(part)) == right:
            # where the registry does not say, the blob's digest will
            verdict = _Verdict.USED
        else:
            verdict = _Verdict.REFUSED
            self._judging.ban(name)
        if len(part) == EXCERPT_BYTES or verdict is _Verdict.REFUSED:
            self._settled[name] = verdict
        return verdict
