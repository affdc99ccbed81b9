"""What this node knows of its peers: how they answer, how fast, and whether they are to be asked.

Pure state; no I/O, time is passed in. Peers are an optimisation: one that fails rests, twice as
long each time; one that is busy is left alone as long as it says; one whose bytes proved wrong is
banned; one that is much slower than the others is passed over for a while, and then tried again.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fetcher.peers.beginnings import Beginnings
from fetcher.peers.harvest import Harvest

if TYPE_CHECKING:
    from collections.abc import Iterable

_FIRST_REST: Final = 1.0
_LONGEST_REST: Final = 60.0
_BAN: Final = 600.0
_LONGEST_BUSY: Final = 30.0
_DEFAULT_BUSY: Final = 1.0
_SLOW_REST: Final = 30.0
_MUCH_SLOWER: Final = 8.0
_SHORT_SECONDS: Final = 2.0
"""What takes no longer is waited for, however slow it is."""
_MOST_LOAD: Final = 64
"""Uploads that are believed: what a peer says must not excuse it from everything."""
_MOST_SILENCES: Final = 3
_NEWEST: Final = 0.3
"""The part that the newest measurement has in what is believed."""
_TELLING_BYTES: Final = 256 * 1024
"""Less is over before its pace shows."""
_LEAST_GUESS_PAUSE: Final = 0.05
_LONGEST_GUESS_PAUSE: Final = 1.6
"""Between two guesses of the node: each costs both sides a request."""
_MAX_PEERS: Final = 20_000
_NEVER: Final = float("-inf")


@dataclass(slots=True)
class Standing:
    """One peer. Times are those of the clock that callers pass in."""

    under_way: int = 0
    """Our requests to it."""
    load: int = 0
    """Uploads of which it told last, to whomever."""
    has_told: bool = False
    has_answered: bool = False
    """Whether it ever did."""
    latency: float = 0.0
    """Seconds to the first byte."""
    speed: float = 0.0
    """Bytes per second of one transfer, lately; 0 while unknown."""
    failures: int = 0
    silences: int = 0
    """Requests since the last success that it let wait in vain for the first byte."""
    failed_at: float = _NEVER
    rests_until: float = _NEVER
    busy_until: float = _NEVER
    busy_times: int = 0
    """In a row."""
    slow_until: float = _NEVER
    slow_times: int = 0
    banned_until: float = _NEVER
    wrong: int = 0
    """How often its bytes proved wrong."""


@dataclass(slots=True)
class Standings:
    """All peers, and the registries to compare them with. Belongs to the trio thread."""

    speed: float = 0.0
    """Bytes per second of one transfer from a peer; 0 while unknown."""
    under_way: int = 0
    """Our requests to all peers."""
    of_registry: int = 0
    """Our requests for chunks that come from mirrors and the registry, as no peer is asked."""
    served_at: float = _NEVER
    """When a peer began to send something last."""
    beginnings: Beginnings = field(default_factory=Beginnings)
    guessed_at: float = _NEVER
    """When a member was asked for a chunk that it might have."""
    guess_pause: float = _LEAST_GUESS_PAUSE
    """Seconds after which another one may be, the longer the less comes of it."""
    harvest: Harvest = field(default_factory=Harvest)
    counts: Counter[str] = field(default_factory=Counter)
    """What happened, for those who look: bytes, requests, failures, busy, slow, wrong, banned."""
    _peers: dict[str, Standing] = field(default_factory=dict)

    def of(self, name: str) -> Standing:
        """What is known of a peer."""
        found = self._peers.get(name)
        if found is None:
            found = self._peers[name] = Standing()
            if len(self._peers) > _MAX_PEERS:
                del self._peers[next(iter(self._peers))]
        return found

    def is_usable(self, name: str, now: float) -> bool:
        """Whether the peer may be asked at all; it may be busy."""
        one = self._peers.get(name)
        return one is None or now >= max(one.rests_until, one.banned_until)

    def is_tried(self, name: str) -> bool:
        """Whether one request is to show if a peer that failed is better now: the others are not to
        wait for it.
        """
        one = self._peers.get(name)
        return one is not None and one.failures > 0 and one.under_way > 0

    def is_busy(self, name: str, now: float) -> bool:
        """Whether it asked to be left alone for a moment."""
        one = self._peers.get(name)
        return one is not None and now < one.busy_until

    def is_slow(self, name: str, now: float) -> bool:
        """Whether it is passed over as others are much faster."""
        one = self._peers.get(name)
        return one is not None and now < one.slow_until

    def began(self, name: str) -> None:
        """A request to it begins."""
        self.of(name).under_way += 1
        self.under_way += 1
        self.counts["requests"] += 1

    def ended(self, name: str) -> None:
        """It ended, however."""
        self.of(name).under_way -= 1
        self.under_way -= 1

    def told(self, name: str, load: int) -> None:
        """So many uploads are under way there."""
        one = self.of(name)
        one.load, one.has_told = min(load, _MOST_LOAD), True

    def answered(self, name: str, seconds: float) -> None:
        """Its first byte took so long. Whether the others come is to be seen."""
        one = self.of(name)
        one.busy_times, one.has_answered = 0, True
        one.latency = seconds if not one.latency else _blend(one.latency, seconds)

    def succeeded(self, name: str) -> None:
        """It brought all that it was asked for: what was held against it is forgiven."""
        one = self.of(name)
        one.failures = one.silences = 0

    def guessed(self, *, found: bool) -> None:
        """A member that might have had a chunk was asked: whether it had some of it."""
        pause = self.guess_pause / 2 if found else self.guess_pause * 2
        self.guess_pause = min(max(pause, _LEAST_GUESS_PAUSE), _LONGEST_GUESS_PAUSE)

    def measured(self, name: str | None, got: int, seconds: float, now: float) -> None:
        """A transfer brought ``got`` bytes in ``seconds``; without a name from a registry."""
        if seconds <= 0 or not got:
            return
        speed = got / seconds
        if name is None:
            self.harvest.measured(speed, now)
            return
        self.speed = _blend(self.speed or speed, speed)
        if got >= _TELLING_BYTES:
            one = self.of(name)
            one.speed = _blend(one.speed or speed, speed)

    def is_sluggish(self, name: str) -> bool:
        """Whether what the peer brought lately took it much longer than it takes others."""
        return 0 < self.of(name).speed * _MUCH_SLOWER < self.speed

    def is_dull(self, name: str, got: int, left: int, seconds: float) -> bool:
        """Whether a transfer that brought ``got`` bytes lately shows a peer that is much slower
        than others, and what is left of it would take long.

        Than the registry a peer may be slower by as much as it has others to send to: in a crowd
        that is no fault of it, and all would go to the registry.
        """
        speed, one = got / seconds, self.of(name)
        if left < speed * _SHORT_SECONDS:
            return False
        sharers = max(one.load, one.under_way, 1)
        slower = speed * _MUCH_SLOWER
        return slower < self.speed or slower * sharers < self.harvest.registry

    def slow(self, name: str, now: float) -> None:
        """It was much slower than others for some time: it is passed over, longer each time."""
        one = self.of(name)
        if now >= one.slow_until:
            one.slow_times += 1
            self.counts["slow"] += 1
            one.slow_until = now + _SLOW_REST * 2.0 ** min(one.slow_times - 1, 4)
            one.speed = 0.0

    def spare(self, names: Iterable[str]) -> int | None:
        """More uploads than this a peer among these need not have: there are less busy ones.

        None while none of them has told of its own.
        """
        known = (one for name in names if (one := self._peers.get(name)) is not None)
        loads = [one.load for one in known if one.has_told]
        return round(sum(loads) / len(loads)) + 1 if loads else None

    def failed(self, name: str, now: float, started: float) -> float:
        """A request that began at ``started`` failed by the peer's fault. How long it rests.

        Several that were under way together and failed together count once.
        """
        one = self.of(name)
        self.counts["failures"] += 1
        if started >= one.failed_at:
            one.failures += 1
            one.failed_at = now
            rest = min(_FIRST_REST * 2.0 ** (one.failures - 1), _LONGEST_REST)
            one.rests_until = max(one.rests_until, now + rest)
        return max(one.rests_until - now, 0.0)

    def is_excused(self, name: str) -> bool:
        """Whether silence before the first byte is no failure yet: it has sent some before, and may
        wait itself for what it fetches.
        """
        one = self.of(name)
        one.silences += 1
        return one.has_answered and not one.failures and one.silences <= _MOST_SILENCES

    def busy(self, name: str, now: float, retry_after: float | None) -> None:
        """It has no room for another upload, and says for how long."""
        one = self.of(name)
        one.busy_times += 1
        pause = _DEFAULT_BUSY if retry_after is None else retry_after
        # a thousand askers are not to come again together, nor as often as at first
        spread = random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        pause *= 2.0 ** min(one.busy_times - 1, 5) * spread
        one.busy_until = now + min(pause, _LONGEST_BUSY)
        self.counts["busy"] += 1

    def lied(self, name: str, now: float) -> float:
        """Bytes that it sent proved wrong. How long it is banned."""
        one = self.of(name)
        one.wrong += 1
        self.counts["wrong"] += 1
        self.counts["banned"] += 1
        one.banned_until = now + _BAN * 2.0 ** min(one.wrong - 1, 8)
        return one.banned_until - now


def _blend(known: float, newest: float) -> float:
    return known + _NEWEST * (newest - known)
