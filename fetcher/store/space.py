"""How much the store may take, what it takes, and whether something more fits.

What is taken is a sum over records (:mod:`fetcher.store.holdings`), never a walk. What is worked on
is *held*: it is recorded with all that it may come to take, and what of that was not written yet
counts as taken on the disk as well, as others would take it otherwise.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fetcher.errors import ModelError, NoSpace
from fetcher.quantities import bytes_text
from fetcher.store.database import BALLAST_BYTES
from fetcher.store.footprint import MODELS, present

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from fetcher.store.holdings import Holdings

_GIB: Final = 1024**3
_MIB: Final = 1024**2

_RECORDS: Final = (
    "",
    "state.db",
    "state.db-wal",
    "state.db-shm",
    "state.db-ballast",
    "lock",
    "blobs",
    "blobs/sha256",
    "blobs/sha512",
    "models",
    "models/sha256",
    "models/sha512",
    "trash",
)
"""What is below the root besides contents and trees."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of the disk is the store's."""

    max_size: int | None = None
    """Bytes for everything below the root, never passed; None: as much as the disk has."""
    min_free: int = _GIB
    """Bytes that are left free on the disk."""
    high: int = 80
    """Percent of ``max_size``, else of the disk, above which the least recently used is evicted."""
    low: int = 70
    """Percent at which evicting ends."""


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system that the root is on."""

    free: int
    """Bytes that a process may take; what is left for root alone is not among them."""
    capacity: int
    """Bytes that are free or taken."""

    @classmethod
    def of(cls, root: Path) -> Disk:
        """Ask the file system. Raises :class:`ModelError`."""
        try:
            state = os.statvfs(root)
        except OSError as error:
            raise ModelError(f"{root} cannot be used: {error.strerror}", root=root) from error
        free = state.f_bavail * state.f_frsize
        return cls(free, free + (state.f_blocks - state.f_bfree) * state.f_frsize)


@dataclass(frozen=True, slots=True)
class Usage:
    """What is taken, in bytes, and by how many."""

    used: int
    """On the disk, as far as it is recorded."""
    reserved: int
    """Promised to what is worked on, and not written yet."""
    trash: int
    """Evicted and not removed yet; part of ``used``."""
    limit: int | None
    free: int
    capacity: int
    contents: int
    trees: int


@dataclass(frozen=True, slots=True)
class Shortage:
    """How many bytes are missing, and why."""

    bytes: int
    message: str
    needed: int
    free: int
    limit: int

    def error(self, what: str, advice: str) -> NoSpace:
        """What the user is told, with the figures."""
        return NoSpace(
            f"{what}: {self.message}{advice}",
            needed=self.needed,
            free=self.free,
            limit=self.limit,
        )


class Space:
    """The ledger of one store. Belongs to the trio thread; nothing here waits for anything."""

    def __init__(self, root: Path, holdings: Holdings, limits: Limits) -> None:
        self.root = root
        self.holdings = holdings
        self.limits = limits
        self._holders: Counter[str] = Counter()
        self._claimed: set[str] = set()
        """Of what is held: what may be written to."""
        self._written: dict[str, int] = {}
        """Of what is held: bytes that were on the disk when somebody looked."""
        self._watchers: list[set[str]] = []
        self.stuck: set[str] = set()
        """Names in the trash that could not be removed: they take room like what stays."""

    # -- what is worked on -------------------------------------------------------------------------

    @contextlib.contextmanager
    def held(self, names: Iterable[str]) -> Iterator[None]:
        """Work on these contents and trees: nothing of them is evicted inside the block."""
        names = frozenset(names)
        self._holders.update(names)
        for watcher in self._watchers:
            watcher.update(names)
        try:
            yield
        finally:
            self._holders.subtract(names)
            self._end(name for name in names if not self._holders[name])

    def _end(self, names: Iterable[str]) -> None:
        ended = list(names)
        if not ended:
            return
        for name in ended:
            del self._holders[name]
            self._claimed.discard(name)
            self._written.pop(name, None)
        with contextlib.suppress(NoSpace):
            # only decides who is evicted first: on a full disk that is not worth an error
            self.holdings.touch(ended)

    def holding(self) -> frozenset[str]:
        """The names of all that is worked on."""
        return frozenset(self._holders)

    @contextlib.contextmanager
    def watched(self) -> Iterator[set[str]]:
        """The names of what is worked on, or was at any moment inside the block."""
        watcher = set(self._holders)
        self._watchers.append(watcher)
        try:
            yield watcher
        finally:
            # not by equality: two of them may have seen the same
            self._watchers = [other for other in self._watchers if other is not watcher]

    def believe(self, measured: Mapping[str, int], worked_on: set[str]) -> None:
        """Take what was measured: of what was worked on as written so far, else as all there is."""
        for name, size in measured.items():
            if name in self._holders:
                self._written[name] = size
        # what was evicted since somebody looked is none of ours any more
        recorded = self.holdings.get(measured.keys() - worked_on)
        idle = {name: measured[name] for name in recorded}
        if not idle:
            return
        with contextlib.suppress(NoSpace):
            # the records keep what they have, which is more, until the disk takes better ones
            self.holdings.settle(idle)

    # -- what fits ---------------------------------------------------------------------------------

    def shortage(self, claims: Mapping[str, int]) -> Shortage | None:
        """What is missing for these names to take so many bytes each; None if it fits.

        What is in the trash does not count: whoever is told that it fits waits until that is gone
        before the first byte is written.
        """
        recorded = self.holdings.get(claims)
        needed = sum(max(size - recorded.get(name, 0), 0) for name, size in claims.items())
        if not needed:
            return None
        return self._worst(needed, claims)

    def overdrawn(self, claims: Mapping[str, int]) -> Shortage | None:
        """What is missing for claims that were made: part of the trash that they counted on stays.

        None if they fit all the same.
        """
        return self._worst(0, claims)

    def _worst(self, needed: int, claims: Mapping[str, int]) -> Shortage | None:
        found = [self._below_floor(needed, claims)]
        if self.limits.max_size is not None:
            found.append(self._below_cap(needed, self.limits.max_size))
        worst = max(found, key=lambda shortage: shortage.bytes)
        return worst if worst.bytes > 0 else None

    def _below_cap(self, needed: int, cap: int) -> Shortage:
        taken = self.totals()[0] + self._overhead()
        free = max(cap - taken, 0)
        missing = taken + needed - cap
        return Shortage(
            bytes=missing,
            message=f"it needs {bytes_text(needed or missing)} more below {self.root}, where "
            f"{bytes_text(free)} are left of the {bytes_text(cap)} that max-size allows",
            needed=needed,
            free=free,
            limit=cap,
        )

    def _below_floor(self, needed: int, claims: Mapping[str, int]) -> Shortage:
        disk = Disk.of(self.root)
        recorded = self.holdings.get(self._claimed.union(claims))
        promised = self._promised({**recorded, **_larger(claims, recorded)})
        room = disk.free + self.totals()[1] - self.limits.min_free
        free = max(room - (promised - needed), 0)
        missing = promised - room
        return Shortage(
            bytes=missing,
            message=f"it needs {bytes_text(needed or missing)} more below {self.root}, where "
            f"{bytes_text(free)} are left: {bytes_text(disk.free)} are free on the disk, "
            f"{bytes_text(promised - needed)} of them reserved, and min-free keeps "
            f"{bytes_text(self.limits.min_free)}",
            needed=needed,
            free=free,
            limit=disk.capacity,
        )

    def _promised(self, sizes: Mapping[str, int]) -> int:
        """Bytes of these sizes that were not on the disk when somebody looked."""
        return sum(max(size - self._written.get(name, 0), 0) for name, size in sizes.items())

    def never_fits(self, needed: int) -> Shortage | None:
        """Why a model that takes so many bytes can never fit, though all else were gone."""
        cap = self.limits.max_size
        if cap is not None and needed + self._overhead() > cap:
            return Shortage(
                bytes=needed + self._overhead() - cap,
                message=f"it takes {bytes_text(needed)}, and max-size allows {bytes_text(cap)} for "
                f"everything below {self.root}",
                needed=needed,
                free=max(cap - self._overhead(), 0),
                limit=cap,
            )
        room = Disk.of(self.root).capacity - self.limits.min_free
        if needed > room:
            return Shortage(
                bytes=needed - room,
                message=f"it takes {bytes_text(needed)}, and the disk of {self.root} has room for "
                f"{bytes_text(max(room, 0))} beside the {bytes_text(self.limits.min_free)} that "
                "min-free keeps",
                needed=needed,
                free=max(room, 0),
                limit=room + self.limits.min_free,
            )
        return None

    def claim(self, claims: Mapping[str, int]) -> None:
        """Record that these names may take so many bytes each. Raises :class:`ModelError`."""
        self.holdings.promise(claims)
        self._claimed.update(name for name in claims if name in self._holders)

    def is_claimed(self, name: str) -> bool:
        """Whether somebody who works on it has claimed what it may take."""
        return name in self._claimed

    def is_granted(self, claims: Mapping[str, int]) -> bool:
        """Whether those who work on these names have claimed as much."""
        recorded = self.holdings.get(self._claimed.intersection(claims))
        return all(recorded.get(name, -1) >= size for name, size in claims.items())

    def left(self) -> int | None:
        """Bytes that nobody has or was promised below the cap, though all of the trash were still
        there; None without a cap.
        """
        if self.limits.max_size is None:
            return None
        return self.limits.max_size - sum(self.totals()) - self._records()

    def totals(self) -> tuple[int, int]:
        """Bytes of what stays, and of what is about to be removed."""
        staying, trash = self.holdings.total()
        stuck = sum(self.holdings.get(self.stuck).values())
        return staying + stuck, trash - stuck

    def excess(self) -> int:
        """Bytes to evict by the watermarks and the floor; not positive while there is enough."""
        limits, disk = self.limits, Disk.of(self.root)
        total, trash = self.totals()
        if limits.max_size is None:
            taken, base = disk.capacity - disk.free - trash, disk.capacity
        else:
            taken, base = total + self._overhead(), limits.max_size
        above = taken - base * limits.low // 100 if taken > base * limits.high // 100 else 0
        return max(above, limits.min_free - disk.free - trash)

    def usage(self) -> Usage:
        """What is taken, as far as it is recorded."""
        disk = Disk.of(self.root)
        total, trash = self.holdings.total()
        reserved = self._promised(self.holdings.get(self._claimed))
        return Usage(
            used=total + trash - reserved + self._records(),
            reserved=reserved,
            trash=trash,
            limit=self.limits.max_size,
            free=disk.free,
            capacity=disk.capacity,
            contents=self.holdings.count("blobs"),
            trees=self.holdings.count(MODELS),
        )

    def _records(self) -> int:
        return sum(present(self.root / name) for name in _RECORDS)

    def _overhead(self) -> int:
        """What is not a content or a tree, with room for the records to grow until it is asked
        for again.
        """
        growth = min(max((self.limits.max_size or 0) // 64, _MIB), 16 * _MIB)
        ballast = BALLAST_BYTES - present(self.root / "state.db-ballast")
        return self._records() + growth + max(ballast, 0)


def _larger(claims: Mapping[str, int], recorded: Mapping[str, int]) -> dict[str, int]:
    return {name: max(size, recorded.get(name, 0)) for name, size in claims.items()}
