"""Waiting for a pull: what a call says when its time is up."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from csi.waiting import describe, wait_for_tree
from fetcher.errors import DigestMismatch, InProgress
from fetcher.oci import Digest
from fetcher.pull import Progress
from fetcher.store import ModelTree

GIB = 1 << 30
MIB = 1 << 20
TREE = ModelTree(Path("/models/x"), Digest.of(b"x"), size=GIB, files=3)


class ClockedPull:
    """A pull whose bytes arrive by trio's clock: ``rate`` a second, until ``stalls`` seconds."""

    def __init__(self, rate: float, total: int = GIB, stalls: float = float("inf")) -> None:
        self._rate = rate
        self._total = total
        self._stalls = stalls
        self._begin = trio.current_time()

    def progress(self) -> Progress:
        seconds = min(trio.current_time() - self._begin, self._stalls)
        return Progress(min(int(seconds * self._rate), self._total), self._total)

    async def wait(self) -> ModelTree:
        if self._stalls < self._total / self._rate:
            await trio.sleep_forever()
        await trio.sleep(self._begin + self._total / self._rate - trio.current_time())
        return TREE


class FailingPull:
    """A pull that failed."""

    def progress(self) -> Progress:
        return Progress(1, 2)

    async def wait(self) -> ModelTree:
        await trio.lowlevel.checkpoint()
        raise DigestMismatch("layer 3 is not what its digest says")


def told(rate: float, wait: float, *, total: int = GIB, stalls: float = float("inf")) -> str:
    """What a call with ``wait`` seconds answers; on a clock that only tests have."""

    async def main() -> str:
        pull = ClockedPull(rate, total, stalls)
        with pytest.raises(InProgress) as caught:
            await wait_for_tree(pull, "r.io/m:v1", trio.current_time() + wait)
        return caught.value.message

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_tree_that_is_there_in_time() -> None:
    async def main() -> None:
        pull = ClockedPull(rate=100 * MIB)
        assert await wait_for_tree(pull, "r.io/m:v1", trio.current_time() + 60) is TREE

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_there_may_be_no_deadline() -> None:
    async def main() -> None:
        assert await wait_for_tree(ClockedPull(rate=MIB), "r.io/m:v1", float("inf")) is TREE

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_call_without_time_still_gets_what_is_there() -> None:
    async def main() -> None:
        assert await wait_for_tree(ClockedPull(1e18), "r", trio.current_time() - 5) is TREE

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_progress_is_told() -> None:
    assert told(rate=8 * MIB, wait=30) == (
        "model r.io/m:v1: 23 % (240.0 MiB of 1.0 GiB), 8.0 MiB/s, about 98 s left"
    )


def test_the_rate_is_that_of_the_last_seconds() -> None:
    assert "nothing arrived lately" in told(rate=8 * MIB, wait=60, stalls=30)


def test_no_rate_is_made_up_from_an_instant() -> None:
    assert told(rate=8 * MIB, wait=0).endswith("0 % (1.6 MiB of 1.0 GiB)")


def test_a_failure_is_passed_on() -> None:
    async def main() -> None:
        with pytest.raises(DigestMismatch):
            await wait_for_tree(FailingPull(), "r", trio.current_time() + 5)

    trio.run(main)


@pytest.mark.parametrize(
    ("done", "total", "rate", "text"),
    [
        (0, 0, None, "being prepared"),
        (5, 5, 3.0, "100 % (5 B of 5 B), being verified and laid out"),
        (9, 5, None, "100 % (5 B of 5 B), being verified and laid out"),
        (999, 1000, 1.0, "99 % (999 B of 1000 B), 1 B/s, about 1 s left"),
        (0, GIB, float(MIB), "0 % (0 B of 1.0 GiB), 1.0 MiB/s, about 17 min left"),
        (0, 100 * GIB, float(MIB), "0 % (0 B of 100.0 GiB), 1.0 MiB/s, about 28 h left"),
    ],
)
def test_the_words(done: int, total: int, rate: float | None, text: str) -> None:
    assert describe(Progress(done, total), rate) == text
