"""The node's connections, dealt out so that no registry keeps another one waiting.

A slot is held for one request, and given to whom has fewest of them. A request that takes long is
stopped only while somebody waits who has less than his share, and asked again later from the byte
where it stopped. What would then start at its first byte goes on beside the slots instead.

Requests for bytes that somebody waits for, or will in a moment, do not queue behind those that are
less urgent, which give way to them meanwhile (:mod:`fetcher.pacing`).
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from fetcher.pacing import PacedSink, Pacing
from fetcher.schedule import Demand, Urgency
from fetcher.threads import run_stoppable
from fetcher.transport import Connection, TransferSettings
from fetcher.trust import Contexts

if TYPE_CHECKING:
    import threading
    from collections.abc import Awaitable, Callable

    from fetcher.answers import Piece, Sink
    from fetcher.hosts import Host
    from fetcher.oci import Reference
    from fetcher.registry import BlobAccess

_SLICE_SECONDS: Final = 5.0
"""How long a slot is held undisturbed, whoever waits: opening a connection costs its part of it."""

_FRESH_SECONDS: Final = 1.0
"""How long a token that was just had is taken to be good: asking again takes five turns of threads.
"""

_MOST_BESIDE: Final = 32
"""Requests that go on beside the slots; each has buffers of half a megabyte."""

MOST_URGENT: Final = 16
"""Requests that somebody waits for, at one time; the next ones queue."""


def group_of(reference: Reference, host: Host) -> str:
    """Whose slots requests to a host for what is of that reference's registry are."""
    return f"{reference.registry} {host.base}"


@dataclass(eq=False, slots=True)
class Slot:
    """The right to one request, for whoever belongs to ``group``."""

    group: str
    demand: Demand
    since: float
    connection: Connection
    pacing: Pacing
    blob: object
    """What is fetched, for whoever wants to know how many there are."""
    queued: bool = False
    """Whether it had to be waited for, so long that an access of before may be stale."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    keep: Callable[[], bool] = field(default=lambda: False)
    """Whether what came would come again, were the request stopped now."""
    beside: bool = False
    """It does not count any more."""

    async def fetch(self, access: BlobAccess, piece: Piece, sink: Sink) -> None:
        """See :meth:`fetcher.transport.Connection.fetch`."""

        def work(stop: threading.Event) -> None:
            paced = PacedSink(sink, self.demand, self.pacing, stop)
            self.connection.fetch(access, piece, paced, stop)

        await run_stoppable(work)

    @property
    def is_leaving(self) -> bool:
        """Whether it was told to make room."""
        return self.scope.cancel_called


@dataclass(eq=False, slots=True)
class _Waiter:
    group: str
    demand: Demand
    blob: object
    since: float = field(default_factory=trio.current_time)
    granted: trio.Event = field(default_factory=trio.Event)
    slot: Slot | None = None
    promised: Slot | None = None
    """A slot that was told to make room for it."""


class Transfers:
    """The node's connections, of which so many are used at one time. Of the trio thread."""

    def __init__(
        self, connections: int, settings: TransferSettings, prefetch_rate: float | None = None
    ) -> None:
        """``prefetch_rate`` limits what nobody waits for, in bytes per second."""
        self._connections = connections
        self._settings = settings
        self._contexts = Contexts()
        self.pacing = Pacing(prefetch_rate)
        """Of whatever fetches bytes on this node."""
        self._slots: set[Slot] = set()
        self._queue: list[_Waiter] = []
        self._idle: list[Connection] = []

    async def run(
        self,
        group: str,
        work: Callable[[Slot], Awaitable[None]],
        demand: Demand | None = None,
        blob: object = None,
    ) -> float | None:
        """Do ``work`` for ``blob`` with a slot, once there is one for ``group``.

        Returns after how many seconds it was stopped to make room for others; None where it came
        to its own end. Whoever changes ``demand`` meanwhile calls :meth:`hurry`.
        """
        slot = await self._take(_Waiter(group, demand or Demand(), blob))
        try:
            with slot.scope:
                await work(slot)
        finally:
            self._release(slot)
        return trio.current_time() - slot.since if slot.scope.cancelled_caught else None

    def hurry(self, demand: Demand) -> None:
        """A demand has become more urgent."""
        if any(slot.demand is demand for slot in self._slots):
            self.pacing.begin(demand)
        self._deal()

    def share(self, blob: object) -> int:
        """How many connections one blob may use, among those that are being fetched; at least one.

        A blob that comes over one connection comes in order, and is hashed as it comes.
        """
        blobs = {slot.blob for slot in self._slots} | {one.blob for one in self._queue} | {blob}
        return max(self._connections // len(blobs), 1)

    async def _take(self, waiter: _Waiter) -> Slot:
        self._queue.append(waiter)
        self._deal()
        try:
            while waiter.slot is None:
                with trio.move_on_after(self._make_room(waiter)):
                    await waiter.granted.wait()
        except trio.Cancelled:
            if waiter.slot is not None:
                self._release(waiter.slot)
            raise
        finally:
            if waiter in self._queue:
                self._queue.remove(waiter)
        return waiter.slot

    def _give(self, waiter: _Waiter) -> Slot:
        connection = self._idle.pop() if self._idle else Connection(self._settings, self._contexts)
        now = trio.current_time()
        queued = now - waiter.since > _FRESH_SECONDS
        slot = Slot(waiter.group, waiter.demand, now, connection, self.pacing, waiter.blob, queued)
        self._slots.add(slot)
        self.pacing.begin(slot.demand)
        return slot

    def _release(self, slot: Slot) -> None:
        self._slots.remove(slot)
        self.pacing.end(slot.demand)
        if len(self._idle) < self._connections:
            self._idle.append(slot.connection)
        else:
            # there were more for a moment, as many were waited for: they keep sockets open
            slot.connection.close()
        self._deal()

    def _against(self, urgency: Urgency) -> list[Slot]:
        """The slots that a request of this urgency has to share the connections with."""
        slots = [slot for slot in self._slots if not slot.beside]
        if urgency is Urgency.URGENT:
            return [slot for slot in slots if slot.demand.urgency is urgency]
        return [slot for slot in slots if Urgency.URGENT < slot.demand.urgency <= urgency]

    def _is_free(self, urgency: Urgency) -> bool:
        most = MOST_URGENT if urgency is Urgency.URGENT else self._connections
        return len(self._against(urgency)) < most

    def _deal(self) -> None:
        """Give free slots to the most urgent; of the others to those groups that have fewest, to
        each in the order of urgency and of coming.
        """
        while waiting := [one for one in self._queue if self._is_free(one.demand.urgency)]:
            held = collections.Counter(slot.group for slot in self._slots if not slot.beside)

            def turn(one: _Waiter, held: collections.Counter[str] = held) -> tuple[int, ...]:
                demand = one.demand
                hurry = min(demand.urgency, Urgency.WHOLE)
                return hurry, held[one.group], demand.urgency, demand.order

            waiter = min(waiting, key=turn)
            self._queue.remove(waiter)
            waiter.slot = self._give(waiter)
            waiter.granted.set()

    def _make_room(self, waiter: _Waiter) -> float:
        """Have a slot freed, if this group has less than its share; when to look again, seconds."""
        if waiter.promised in self._slots:
            return _SLICE_SECONDS
        now = trio.current_time()
        shares = self._shares()
        mine = shares[waiter.group]
        candidates = [
            slot
            for slot in self._against(waiter.demand.urgency)
            if not (slot.is_leaving or slot.group == waiter.group)
            # one slot for everybody in turn; more only where that makes shares more equal
            and (mine == 0 or shares[slot.group] > mine + 1)
        ]
        due = [slot for slot in candidates if slot.since + _SLICE_SECONDS <= now]
        if not due:
            return min(
                (slot.since + _SLICE_SECONDS - now for slot in candidates), default=_SLICE_SECONDS
            )
        victim = max(due, key=lambda slot: (shares[slot.group], -slot.since))
        if victim.keep() and sum(slot.beside for slot in self._slots) < _MOST_BESIDE:
            victim.beside = True
            self._deal()
            return 0.0
        victim.scope.cancel()
        waiter.promised = victim
        return _SLICE_SECONDS

    def _shares(self) -> collections.Counter[str]:
        """How many slots each group has, or is to have as soon as they are free."""
        held = [slot.group for slot in self._slots if not (slot.beside or slot.is_leaving)]
        promised = [one.group for one in self._queue if one.promised in self._slots]
        return collections.Counter(held + promised)

    def close(self) -> None:
        """Close idle connections, once nothing is fetched any more."""
        while self._idle:
            self._idle.pop().close()
