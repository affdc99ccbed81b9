"""Waiting for a pull as long as a call may, and saying how far it is when the time is up."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

import trio

from fetcher.errors import InProgress
from fetcher.quantities import bytes_text

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from fetcher.credentials import Keychain
    from fetcher.modelpack import Selection
    from fetcher.oci import Reference
    from fetcher.policy import PullPolicy
    from fetcher.pull import Progress, Resolved
    from fetcher.store import ModelTree

SAMPLE_SECONDS: Final = 1.0
SAMPLES: Final = 11
"""The rate is that of the last ten seconds: an average over minutes would hide a stall."""

LEAST_WAIT: Final = 0.2
"""Seconds for a pull that has nothing to do to say so, though the call has no time to wait."""


class RunningPull(Protocol):
    """A pull that somebody waits for."""

    def progress(self) -> Progress:
        """Bytes that are here, and bytes in all."""

    async def wait(self) -> ModelTree:
        """The tree, or what the pull failed with; leaving the wait does not stop the pull."""


class PullService(Protocol):
    """What is needed of :class:`fetcher.pull.Pulls`."""

    def check(self, reference: Reference) -> None:
        """Raise :class:`AccessDenied` for a reference that the node's policy does not allow."""

    async def resolve(
        self, reference: Reference, keychain: Keychain, policy: PullPolicy
    ) -> Resolved:
        """The model, proven to be readable with ``keychain``."""

    def join(
        self, resolved: Resolved, selection: Selection, holder: str | None = None
    ) -> AbstractContextManager[RunningPull]:
        """The pull of the model, started or joined; leaving the block stops waiting for it.

        It goes on for a ``holder`` that leaves, until :meth:`release` or for some minutes.
        """

    def release(self, holder: str) -> None:
        """``holder`` does not come again."""

    def left(self, model: str, selection: str) -> None:
        """A volume does not show this tree any more: it was used until now."""

    def is_damaged(self, model: str, selection: str) -> bool:
        """Whether this tree was found to be damaged, and has not been put right since."""


async def wait_for_tree(pull: RunningPull, reference: str, deadline: float) -> ModelTree:
    """The tree of ``pull``, if it is there before ``deadline`` of trio's clock.

    Else raises :class:`InProgress` with percent, bytes, rate and time left. Raises what the pull
    failed with. Leaving does not stop the pull.
    """
    deadline = max(deadline, trio.current_time() + LEAST_WAIT)
    samples = deque([(trio.current_time(), pull.progress().done)], maxlen=SAMPLES)
    while (now := trio.current_time()) < deadline:
        with trio.move_on_at(min(deadline, now + SAMPLE_SECONDS)):
            return await pull.wait()
        samples.append((trio.current_time(), pull.progress().done))
    progress = pull.progress()
    raise InProgress(
        f"model {reference}: {describe(progress, _rate(samples))}",
        done=progress.done,
        total=progress.total,
    )


def describe(progress: Progress, rate: float | None) -> str:
    """``42 % (1.2 GiB of 2.9 GiB), 85.0 MiB/s, about 20 s left``; ``rate`` in bytes per second."""
    if progress.total <= 0:
        return "being prepared"
    done = min(progress.done, progress.total)
    shares = (
        f"{100 * done // progress.total} % ({bytes_text(done)} of {bytes_text(progress.total)})"
    )
    if done == progress.total:
        return f"{shares}, being verified and laid out"
    if rate is None:
        return shares
    if rate < 1:
        return f"{shares}, nothing arrived lately"
    return f"{shares}, {bytes_text(rate)}/s, about {_duration((progress.total - done) / rate)} left"


def _rate(samples: deque[tuple[float, int]]) -> float | None:
    (begin, first), (end, last) = samples[0], samples[-1]
    if end - begin < SAMPLE_SECONDS:
        return None
    return max(last - first, 0) / (end - begin)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
