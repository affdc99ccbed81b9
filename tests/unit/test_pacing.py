"""Transfers that give way, in real threads."""

from __future__ import annotations

import threading
import time

import pytest

from fetcher.pacing import PacedSink, Pacing
from fetcher.schedule import Demand, Urgency

STILL = threading.Event()
"""Never set."""


def transfer(pacing: Pacing, demand: Demand, count: int, stop: threading.Event = STILL) -> float:
    """How long it takes until the next bytes are read."""
    begin = time.monotonic()
    pacing.took(demand, count, stop)
    return time.monotonic() - begin


def test_who_is_waited_for_has_the_line_for_himself_and_others_creep() -> None:
    pacing = Pacing()
    urgent, other = Demand(Urgency.URGENT), Demand(Urgency.BACKGROUND)
    assert transfer(pacing, other, 1) < 0.2
    pacing.begin(urgent)
    paused = transfer(pacing, other, 1)
    assert paused > 0.5
    assert transfer(pacing, urgent, 1) < 0.2
    pacing.end(urgent)
    assert transfer(pacing, other, 1) < 0.2


@pytest.mark.parametrize("end", ["over", "stopped", "wanted"])
def test_who_pauses_goes_on_when_it_is_over_or_stopped_or_wanted_itself(end: str) -> None:
    pacing, stop = Pacing(), threading.Event()
    urgent, other = Demand(Urgency.AHEAD), Demand(Urgency.WHOLE)
    pacing.begin(urgent)
    thread = threading.Thread(target=pacing.took, args=(other, 1, stop))
    thread.start()
    if end == "over":
        pacing.end(urgent)
    elif end == "stopped":
        stop.set()
    else:
        other.urgency = Urgency.URGENT
        pacing.begin(other)
    thread.join(10)
    assert not thread.is_alive()


def test_only_what_nobody_waits_for_is_held_to_the_rate() -> None:
    pacing = Pacing(rate=1000)
    background, whole = Demand(Urgency.BACKGROUND), Demand(Urgency.WHOLE)
    transfer(pacing, background, 1)
    assert transfer(pacing, whole, 10**9) < 0.2
    begin = time.monotonic()
    threads = [threading.Thread(target=transfer, args=(pacing, background, 500)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # all together, less what may be made up for
    assert time.monotonic() - begin > 1.3


def test_a_sink_takes_first_and_waits_then() -> None:
    pacing, stop = Pacing(), threading.Event()
    pacing.begin(Demand(Urgency.URGENT))
    taken: list[bytes] = []

    class Sink:
        def whole(self) -> bool:
            return True

        def __call__(self, data: memoryview) -> bool:
            taken.append(bytes(data))
            stop.set()
            return False

    sink = PacedSink(Sink(), Demand(Urgency.BACKGROUND), pacing, stop)
    assert sink.whole()
    assert not sink(memoryview(b"bytes"))
    assert taken == [b"bytes"]
