"""What all peers bring together, against what one connection to the registry brings.

Each peer for itself is compared with the others; where all of them are slow, only the registry
shows it. Pure state; no I/O, time is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_LOOK_SECONDS: Final = 0.5
_MOST_DOUBTS: Final = 2
_FACTOR: Final = 4.0
"""In a crowd a registry has little left for each connection: only where it has much more for one
than all peers for this node, nobody is waited for by asking it.
"""
_NEWEST: Final = 0.5
_BELIEVED_SECONDS: Final = 60.0
"""How long it is known what a registry brings."""
_LITTLE: Final = 4 * 1024 * 1024
"""Bytes per second of all peers together, at which it is worth some bytes to know that."""
_TRIED_SECONDS: Final = 30.0
_FIRST_REST: Final = 60.0
_LONGEST_REST: Final = 480.0


@dataclass(slots=True)
class Harvest:
    """The bytes that came to a node lately. Belongs to the trio thread."""

    registry: float = 0.0
    """Bytes per second of one transfer from mirrors or a registry, lately."""
    rests_until: float = float("-inf")
    """Until when no peer is asked, as all of them together are too slow."""
    rests: int = 0
    """How often in a row they were."""
    answering: int = 0
    """Requests to peers whose answers have begun."""
    wants_trial: bool = False
    """Whether a part of what peers are to bring should come from the registry, to know its pace."""
    _since: float = float("-inf")
    _known_at: float = float("-inf")
    _tried_at: float = float("-inf")
    _of_peers: int = 0
    _least_answering: int = 0
    _doubts: int = 0

    def brought(self, count: int) -> None:
        """So many bytes came from peers."""
        self._of_peers += count

    def measured(self, speed: float, now: float) -> None:
        """A transfer from mirrors or a registry had so many bytes per second."""
        known = self.registry or speed
        self.registry, self._known_at = known + _NEWEST * (speed - known), now

    def is_poor(self, now: float) -> bool:
        """Whether peers that have answered bring so little that the registry alone is quicker."""
        self._least_answering = min(self._least_answering, self.answering)
        seconds = now - self._since
        if seconds < _LOOK_SECONDS:
            return False
        pace = self._of_peers / seconds
        if now >= self._known_at + _BELIEVED_SECONDS:
            self.registry = 0.0
        # who began or ended meanwhile says nothing, nor does a time when nobody looked
        is_telling = self._least_answering > 0 and seconds < 3 * _LOOK_SECONDS
        is_poor = is_telling and pace * _FACTOR < self.registry
        self._doubts = self._doubts + 1 if is_poor else 0
        if is_telling and not is_poor:
            self.rests = 0
        is_unknown = not self.registry and now >= self._tried_at + _TRIED_SECONDS
        self.wants_trial = is_telling and pace < _LITTLE and is_unknown
        if self.wants_trial:
            self._tried_at = now
        self._since, self._of_peers, self._least_answering = now, 0, self.answering
        return self._doubts >= _MOST_DOUBTS

    def rest(self, now: float) -> float:
        """Ask no peer for a while, longer each time: for how long."""
        seconds = min(_FIRST_REST * 2.0**self.rests, _LONGEST_REST)
        self.rests += 1
        self.rests_until = now + seconds
        return seconds

    def is_resting(self, now: float) -> bool:
        """Whether no peer is to be asked."""
        return now < self.rests_until
