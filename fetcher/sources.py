"""Which host is asked next: pure policy over what is known of hosts. No I/O; time is passed in.

A host is known by the address of its API. Mirrors are an optimisation: one that fails rests, for
everybody and twice as long each time; one that lacks or spoils a blob is not asked for that blob
again. The registry is the last in every order and never rests, so that a pull fails only where the
registry itself does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_FIRST_REST: Final = 1.0
_LONGEST_REST: Final = 60.0
_LONGEST_WISH: Final = 600.0
"""The longest rest that a ``Retry-After`` gets."""
_REST_OF_LIARS: Final = 300.0
_WITHOUT_RANGES: Final = 600.0
_AWAY: Final = 60.0
_WORTH_WAITING: Final = 5.0
"""How long a mirror's rest is waited for, rather than for a registry that is away."""
_MAX_HOSTS: Final = 4096
_BEGUN: Final = 0.1
"""The part of a blob from which on it is not fetched again from its first byte."""


@dataclass(slots=True)
class _Known:
    """What is known of one host. Times are those of the clock that callers pass in."""

    failures: int = 0
    failed_at: float = float("-inf")
    rests_until: float = float("-inf")
    without_ranges_until: float = float("-inf")
    away_until: float = float("-inf")


class Health:
    """What is known of all hosts, whoever found out."""

    def __init__(self) -> None:
        self._hosts: dict[str, _Known] = {}

    def failed(
        self, host: str, now: float, started: float, retry_after: float | None = None
    ) -> float:
        """A request that began at ``started`` failed by the host's fault. How long it rests.

        Several that were under way together and failed together count once.
        """
        known = self._of(host)
        if started >= known.failed_at:
            known.failures += 1
            known.failed_at = now
            rest = min(_FIRST_REST * 2.0 ** (known.failures - 1), _LONGEST_REST)
            known.rests_until = max(known.rests_until, now + rest)
        if retry_after is not None:
            known.rests_until = max(known.rests_until, now + min(retry_after, _LONGEST_WISH))
        return max(known.rests_until - now, 0.0)

    def succeeded(self, host: str) -> None:
        """A request was answered to its end."""
        known = self._hosts.get(host)
        if known is not None:
            known.failures = 0
            known.away_until = float("-inf")

    def lied(self, host: str, now: float) -> float:
        """The host sent wrong bytes. How long it rests."""
        known = self._of(host)
        known.rests_until = max(known.rests_until, now + _REST_OF_LIARS)
        return known.rests_until - now

    def ignored_range(self, host: str, now: float) -> None:
        """The host answered the whole where a range was asked for."""
        self._of(host).without_ranges_until = now + _WITHOUT_RANGES

    def answered_range(self, host: str) -> None:
        """The host answered a range with that range."""
        known = self._hosts.get(host)
        if known is not None:
            known.without_ranges_until = float("-inf")

    def left(self, registry: str, now: float) -> None:
        """The registry cannot be reached."""
        self._of(registry).away_until = now + _AWAY

    def rest(self, host: str, now: float) -> float:
        """Seconds that the host still rests."""
        known = self._hosts.get(host)
        return max(known.rests_until - now, 0.0) if known else 0.0

    def knows_ranges(self, host: str, now: float) -> bool:
        """Whether a range is worth asking for."""
        known = self._hosts.get(host)
        return known is None or known.without_ranges_until <= now

    def is_away(self, registry: str, now: float) -> bool:
        """Whether the registry could not be reached a short while ago."""
        known = self._hosts.get(registry)
        return known is not None and known.away_until > now

    def order(self, hosts: Sequence[str], now: float) -> list[str]:
        """The hosts as they came, but those that rest after the others, the least tired first."""
        return sorted(dict.fromkeys(hosts), key=lambda host: self.rest(host, now))

    def _of(self, host: str) -> _Known:
        known = self._hosts.setdefault(host, _Known())
        if len(self._hosts) > _MAX_HOSTS:
            # pods name registries: what they name must not fill the memory
            del self._hosts[next(iter(self._hosts))]
        return known


@dataclass(frozen=True, slots=True)
class Choice:
    """Whom to ask, and how."""

    host: str
    whole: bool = False
    """For the whole blob over one connection: it is known to ignore ranges."""
    wait: float = 0.0
    """Choose again after so many seconds, rather than to ask now."""


@dataclass(slots=True)
class BlobSources:
    """The sources of one blob that is being fetched."""

    health: Health
    attempts: int = 6
    """Failures in a row, without a byte between them, after which a mirror is given up."""
    _lacking: set[str] = field(default_factory=set)
    _contributors: set[str] = field(default_factory=set)
    _failures: dict[str, int] = field(default_factory=dict)
    _failed_at: dict[str, float] = field(default_factory=dict)

    def choose(self, mirrors: Sequence[str], registry: str, now: float, begun: float) -> Choice:
        """The next host to ask; ``begun`` is the part of the blob that is there.

        Mirrors in their order, those first that know ranges; one that does not is of use only for
        a blob that starts, as it sends everything each time.
        """
        health = self.health
        usable = [one for one in mirrors if one not in self._lacking]
        awake = [one for one in usable if not health.rest(one, now)]
        ranged = [one for one in awake if health.knows_ranges(one, now)]
        if ranged:
            return Choice(ranged[0])
        by_ranges = health.knows_ranges(registry, now)
        if awake and (begun < _BEGUN or not by_ranges):
            return Choice(awake[0], whole=True)
        # the registry as it is now would cost more than a short rest
        costly = health.is_away(registry, now) or (begun >= _BEGUN and not by_ranges)
        if usable and costly:
            wait = min(health.rest(one, now) for one in usable)
            if 0 < wait <= _WORTH_WAITING:
                return Choice(registry, wait=wait)
        return Choice(registry, whole=not by_ranges)

    def lacks(self, host: str) -> None:
        """The blob is not to be had there, whatever the reason."""
        self._lacking.add(host)

    def failed(
        self, mirror: str, now: float, started: float, retry_after: float | None = None
    ) -> float:
        """A request for this blob failed by the mirror's fault. How long the mirror rests.

        One that fails again and again at this blob, and at this blob only, would be waited for
        without end.
        """
        if started >= self._failed_at.get(mirror, float("-inf")):
            self._failed_at[mirror] = now
            self._failures[mirror] = self._failures.get(mirror, 0) + 1
            if self._failures[mirror] >= self.attempts:
                self.lacks(mirror)
        return self.health.failed(mirror, now, started, retry_after)

    def brought(self, host: str) -> None:
        """Some of the bytes came from there."""
        self._contributors.add(host)
        self._failures.pop(host, None)

    def lied(self, host: str, now: float) -> None:
        """A chunk that came from there was wrong: it is asked no more for this blob."""
        self._lacking.add(host)
        self._contributors.discard(host)
        self.health.lied(host, now)

    def moved(self) -> None:
        """The blob is asked for by another name: what mirrors lacked, they may have by that one."""
        self._lacking.clear()
        self._failures.clear()

    def distrust(self, registry: str, now: float) -> list[str]:
        """What came was wrong: the mirrors that may have sent it, which are asked no more.

        None means that it was the registry itself.
        """
        liars = sorted(self._contributors - {registry})
        self._contributors.clear()
        for one in liars:
            self.health.lied(one, now)
            self._lacking.add(one)
        return liars
