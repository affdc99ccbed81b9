"""Room for what is fetched and built: reserved before the first byte, enlarged on the way.

A reservation is one decision on the trio thread: what is missing, what has to be evicted for it,
and the claim in the records happen without a checkpoint between. Only then is the disk cleared, and
nobody writes a byte before that is done.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from fetcher.errors import ModelError, NoSpace
from fetcher.modelpack import Packing
from fetcher.quantities import bytes_text
from fetcher.store.disk import disk_error
from fetcher.store.footprint import taken
from fetcher.threads import Stopped, run_stoppable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from fetcher.modelpack import Layer
    from fetcher.store.garbage import Garbage
    from fetcher.store.space import Shortage, Space

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BLOCK: Final = 4096
_KIB: Final = 1024
_MIB: Final = 1024 * _KIB
_LARGEST_STEP: Final = 256 * _MIB
_SMALLEST_STEP: Final = 256 * _KIB

_KEPT_FOR_RECORDS: Final = 256 * _KIB

TREE_BYTES: Final = 64 * _KIB
"""What a tree of no more than some folders takes; a larger one grows."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a content or a tree is going to take."""

    bytes: int
    """In all, what is there already among it."""
    spare: int = 0
    """How much of that is there for its :meth:`Room.grow` to take."""


def need_of(layer: Layer, chunk_size: int) -> Need:
    """What a layer takes until it is complete, as far as its descriptor tells.

    The file system's own blocks for a file in many pieces are less than 1/4096 of it.
    """
    size = layer.descriptor.size
    chunk_map = -(-size // chunk_size) + _KIB
    size_on_disk = rounded(size) + rounded(size // _BLOCK) + rounded(chunk_map) + _BLOCK
    match layer.packing:
        case Packing.RAW:
            return Need(size_on_disk)
        case Packing.TAR:
            # a chunk lies in the frame and in its file while it is moved; folder and index
            return Need(size_on_disk + min(chunk_size, rounded(size)) + 4 * _BLOCK)
        case _:
            # it unpacks to its own size at least, but for text
            return Need(size_on_disk + rounded(size), spare=rounded(size))


def need_of_part(layer: Layer, chunk_size: int, size: int) -> int:
    """What a layer takes while ``size`` bytes of its blob are all that there is of it."""
    whole = need_of(layer, chunk_size)
    beside = whole.bytes - whole.spare - rounded(layer.descriptor.size)
    return min(beside + rounded(size), whole.bytes)


def rounded(size: int) -> int:
    """``size`` in whole blocks."""
    return -(-size // _BLOCK) * _BLOCK


class Room:
    """Lets what is being written grow beyond what was reserved for it.

    For worker threads; the trio thread may use it as long as no thread has it. What was granted
    lasts until the pulls that work on the content end: who opens a partial content again asks again
    for all that it takes beyond its blob's size.
    """

    def __init__(self, rooms: Rooms, name: str, token: trio.lowlevel.TrioToken | None) -> None:
        self._rooms = rooms
        self._name = name
        self._token = token
        self._lock = threading.Lock()
        self._left = 0

    def grow(self, count: int) -> None:
        """Reserve ``count`` more bytes. Raises :class:`NoSpace` when they cannot be had.

        Evicts what is not in use where that is needed; then the thread clears the disk.
        """
        with self._lock:
            if count > self._left:
                self._left += self._granted(count - self._left)
            self._left -= count

    def _granted(self, count: int) -> int:
        rooms, name, stop = self._rooms, self._name, threading.Event()
        granted = self._call(lambda: rooms.grant(name, count, evicting=False))
        if granted is None:
            # others may have written much of what they reserved since somebody looked
            held = self._call(rooms.unsettled)
            measured = rooms.measure(held, stop)
            self._call(lambda: rooms.written(measured))
            granted = self._call(lambda: rooms.grant(name, count, evicting=True))
        if granted is None:
            raise ValueError("a grant that may evict either gives or raises")
        # whoever evicted it, it was counted as room, and its bytes are still there
        going = self._call(rooms.going)
        while going:
            failures = rooms.remove_trash(going, stop)
            going = self._call(partial(rooms.removed_trash, name, going, failures))
        return granted

    def _call(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the trio thread."""
        if self._token is None or _in_trio(self._token):
            return work()
        try:
            return trio.from_thread.run_sync(work, trio_token=self._token)
        except trio.RunFinishedError as error:
            raise Stopped from error


def _in_trio(token: trio.lowlevel.TrioToken) -> bool:
    try:
        return trio.lowlevel.current_trio_token() is token
    except RuntimeError:
        return False


class Rooms:
    """Reserves. Belongs to the trio thread, but for what says otherwise."""

    def __init__(self, space: Space, garbage: Garbage) -> None:
        self.root = space.root
        self._space = space
        self._garbage = garbage
        self._spare: dict[str, int] = {}
        self._token: trio.lowlevel.TrioToken | None = None

    async def reserve(self, what: str, needs: Mapping[str, Need], whole: int) -> None:
        """Reserve for contents and trees that the caller holds, before a byte of them is written.

        What others reserved for the same content counts once. Evicts what is not in use, but
        nothing where that would not be enough. ``what`` is named in errors, ``whole`` is what it
        takes with all that it has already. Raises :class:`NoSpace` with the figures.
        """
        self._token = trio.lowlevel.current_trio_token()
        await self._check_possible(what, whole)
        await self.settle(needs)
        claims = {name: need.bytes for name, need in needs.items()}
        if self._space.shortage(claims) is not None:
            await self._garbage.tidy_records()
        fresh = [name for name in needs if not self._space.is_claimed(name)]
        self._make_room(what, claims)
        # what others claimed for the same content has been given to their threads, or will be
        self._spare.update((name, needs[name].spare) for name in fresh)
        going = self.going()
        while going:
            await self._garbage.empty_trash()
            going = self._evict_instead(what, claims, going)

    async def reserve_left(self, what: str, claims: Mapping[str, int]) -> None:
        """As :meth:`reserve`, of what nobody has: nothing is evicted for it.

        Raises :class:`NoSpace` with the figures, and :class:`ModelError`.
        """
        self._token = trio.lowlevel.current_trio_token()
        if self._space.is_granted(claims):
            return
        if self._space.shortage(claims) is not None:
            await self.settle(claims)
            await self._garbage.tidy_records()
        shortage = self._space.shortage(claims)
        if shortage is None:
            self._space.claim(claims)
            while self.going():
                # what is there of it still counted as room
                await self._garbage.empty_trash()
            shortage = self._space.overdrawn(claims)
        if shortage is not None:
            raise shortage.error(f"{what} does not fit", "; nothing is evicted for it")

    async def _check_possible(self, what: str, whole: int) -> None:
        if self._space.never_fits(whole) is not None:
            await self._garbage.tidy_records()
        never = self._space.never_fits(whole)
        if never is not None:
            raise never.error(f"{what} can never fit", "")

    def _make_room(self, what: str, claims: Mapping[str, int]) -> None:
        """Evict what is needed and claim; no checkpoint."""
        shortage = self._space.shortage(claims)
        if shortage is not None:
            self._evict(what, shortage)
        self._space.claim(claims)

    def _evict(self, what: str, shortage: Shortage) -> None:
        plan = self._garbage.plan(shortage.bytes)
        if plan.bytes < shortage.bytes:
            advice = "; nothing in the store can be evicted"
            if plan.bytes:
                advice = f"; evicting all that is not in use would give {bytes_text(plan.bytes)}"
            raise shortage.error(f"{what} does not fit", advice)
        self._garbage.evict(plan)

    def _evict_instead(
        self, what: str, claims: Mapping[str, int], counted_on: frozenset[str]
    ) -> frozenset[str]:
        """Make room again for what was claimed, where trash that it counted on stays.

        Gives what is going to be removed for it.
        """
        if self._space.stuck.isdisjoint(counted_on):
            return frozenset()
        shortage = self._space.overdrawn(claims)
        if shortage is None:
            return frozenset()
        self._evict(what, shortage)
        return self.going()

    async def settle(self, also: Iterable[str] = ()) -> None:
        """Measure what is promised, in a thread: what is worked on as written so far, the rest for
        good. What cannot be measured keeps what it was promised. Raises :class:`ModelError`.
        """
        await self._settle({*self._space.holdings.unsettled(), *also})

    async def settle_only(self, names: Iterable[str]) -> None:
        """As :meth:`settle`, for those of ``names`` that are promised, and for nothing else."""
        await self._settle(self._space.holdings.promised(names))

    async def _settle(self, names: Collection[str]) -> None:
        if not names:
            return
        with self._space.watched() as worked_on:
            measured = await run_stoppable(lambda stop: self.measure(names, stop))
            self._space.believe(measured, worked_on)
        for name in measured.keys() - self._space.holding():
            self._spare.pop(name, None)

    def measure(self, names: Iterable[str], stop: threading.Event) -> dict[str, int]:
        """Bytes of those of ``names`` that can be measured; for a worker thread."""
        measured = {}
        for name in names:
            try:
                measured[name] = self.taken(name, stop)
            except ModelError as error:
                # trouble of its own: nobody else's pull may fail for it
                logger.warning("what is promised cannot be measured: %s", error.message)
        return measured

    def taken(self, name: str, stop: threading.Event) -> int:
        """Bytes of a name on the disk; for a worker thread. Raises :class:`ModelError`."""
        try:
            return taken(self.root, name, stop)
        except OSError as error:
            raise disk_error(error, self.root / name) from error

    async def check_records(self, size: int) -> None:
        """Raise :class:`NoSpace` unless so many bytes more fit into the records.

        What the records need from day to day is kept free by every reservation; a manifest may be
        larger than that. Waits for the trash to be removed where it fits only then.
        """
        # it is written to the log first, and from there to the database
        needed = 2 * size + _KEPT_FOR_RECORDS
        left = self._space.left()
        if left is not None and needed > left:
            await self._garbage.tidy_records()
        while (left := self._space.left()) is not None and needed > left:
            left = max(left + self._space.totals()[1], 0)
            if needed > left:
                raise NoSpace(
                    f"a manifest of {bytes_text(size)} does not fit below {self.root}, where "
                    f"{bytes_text(left)} are left of what max-size allows",
                    needed=2 * size,
                    free=left,
                    limit=self._space.limits.max_size,
                )
            await self._garbage.empty_trash()

    # -- growing -----------------------------------------------------------------------------------

    def room(self, name: str) -> Room:
        """A room for a content or a tree that is held. From any thread."""
        token = trio.lowlevel.current_trio_token() if trio.lowlevel.in_trio_run() else self._token
        return Room(self, name, token)

    def grant(self, name: str, count: int, *, evicting: bool) -> int | None:
        """So many bytes more for ``name``, or some more than that; None if they are not there.

        With ``evicting`` it makes room or raises :class:`NoSpace`.
        """
        spare = self._spare.pop(name, 0)
        if spare >= count:
            return spare
        recorded = self._space.holdings.get([name]).get(name, 0)
        step = min(max(recorded // 16, _SMALLEST_STEP), _LARGEST_STEP)
        for more in (max(count, step) - spare, count - spare):
            claims = {name: recorded + more}
            if self._space.shortage(claims) is None:
                self._space.claim(claims)
                return spare + more
        self._spare[name] = spare
        if not evicting:
            return None
        self._make_room(_grown(name), {name: recorded + count - spare})
        del self._spare[name]
        return count

    def unsettled(self) -> list[str]:
        """What is written to at the moment."""
        held = self._space.holding()
        return [name for name in self._space.holdings.unsettled() if name in held]

    def written(self, measured: Mapping[str, int]) -> None:
        """Take what a thread measured of what is written to."""
        self._space.believe(measured, set(measured))

    def going(self) -> frozenset[str]:
        """Names in the trash that are about to be removed, and count as gone."""
        return self._garbage.trash() - self._space.stuck

    def remove_trash(self, names: frozenset[str], stop: threading.Event) -> dict[str, ModelError]:
        """Remove the files of names in the trash; for a worker thread."""
        return self._garbage.remove_trash(names, stop)

    def removed_trash(
        self, name: str, names: frozenset[str], failures: Mapping[str, ModelError]
    ) -> frozenset[str]:
        """Take what a thread removed for ``name``; gives what has to be removed in the place of
        what stays. Raises :class:`NoSpace`.
        """
        self._garbage.removed_trash(names, failures)
        return self._evict_instead(_grown(name), self._space.holdings.get([name]), names)


def _grown(name: str) -> str:
    """What grows, in errors."""
    return f"{name}, which takes more than was known before,"
