"""``make bench-peers``: nodes that pull one model at one time, alone, apart and with peers.

Nodes are network namespaces with 100 Mbit/s links, the registry has 200 Mbit/s; see
:mod:`tests.support.networks`. Every scenario begins with empty nodes. Rows of a table in Markdown
are printed, and a graph of each node's progress is drawn.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.bench.graph import Axis, Line, draw
from tests.bench.measure import MIB, touch_memory
from tests.bench.models import Case, push
from tests.support.cluster import Cluster, Model, Node, Race, cluster, publish_chunk_digests
from tests.support.commands import wait_until
from tests.support.networks import MBIT
from tests.support.processors import Busy
from tests.support.registry import serve_registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.support.cluster import Sample
    from tests.support.registry import RegistryServer

_CASES: Final = (Case(256, 1), Case(64, 1), Case(64, 64))
_NODES: Final = 8
_VOID: Final = 0.8
"""Above this part of the processors a run measures Python, and says nothing of the design."""
_TRIES: Final = 3
_FILL_SECONDS: Final = 300.0
_MUCH: Final = 50
"""How much slower than others a peer is that is next to useless."""


@dataclass(frozen=True)
class Scenario:
    """What happens to how many nodes."""

    name: str
    nodes: int = _NODES
    peers: bool = True
    lazy: bool = False
    """Whether it is over for a node with the first byte that a pod reads, anywhere."""
    digests: bool = False
    """Whether the model has chunk digests; it keeps them for the scenarios that follow."""
    flags: tuple[str, ...] = ()
    """Of every node."""
    joining: bool = False
    """Whether nodes are started by ``prepare``, one after the other."""
    zones: tuple[str, ...] = ("a",)
    prepare: Callable[[Cluster, list[Node], str], list[Node]] | None = None
    """Gives the nodes that take part, when something happened to the others before."""
    disturb: Callable[[list[Node], float], list[Node]] | None = None
    """Done in the middle; gives the nodes that need not finish."""


@dataclass(frozen=True)
class Outcome:
    """One run."""

    scenario: Scenario
    seconds: dict[str, float]
    """Of every node that had to finish."""
    egress: float
    """What the registry sent, in times of the model."""
    between: float | None
    """What went over the link between the zones, likewise."""
    busy: float
    size: int
    samples: list[Sample] = field(repr=False)

    @property
    def slowest(self) -> float:
        return max(self.seconds.values())

    @property
    def is_void(self) -> bool:
        return self.busy > _VOID


class Failure(Exception):
    """A node did not come to the right files."""


def run(upstream: RegistryServer, model: Model, scenario: Scenario, mbit: float) -> Outcome:
    """One run of ``scenario`` with new nodes. Raises :class:`Failure`."""
    if scenario.digests:
        publish_chunk_digests(upstream, model)
    with cluster(upstream, *scenario.zones, mbit=mbit) as made:
        zones = scenario.zones
        nodes = [
            made.add(1, *scenario.flags, zone=zones[n % len(zones)])[0]
            for n in range(scenario.nodes)
        ]
        if scenario.peers:
            made.befriend(nodes)
        if not scenario.joining:
            made.start(nodes)
        reference = made.reference(model)
        if scenario.prepare is not None:
            nodes = scenario.prepare(made, nodes, reference)
        # no node of a cluster was started in the second before
        wait_until(lambda: all(map(Node.has_spare_worker, nodes)), "workers that wait")
        lost: list[Node] = []

        def disturb(race: Race) -> None:
            if scenario.disturb is not None:
                race.wait_for(len(nodes) * model.size // 3)
                lost.extend(scenario.disturb(nodes, mbit))
                race.wait_until_over([node for node in nodes if node not in lost])
                for node in lost:
                    node.driver.end(signal.SIGKILL)

        # what every node keeps of the model, and what passes through sockets
        touch_memory(len(nodes) * model.size + 512 * MIB)
        egress, busy = made.egress, Busy()
        race = Race(nodes, lambda node: _take_part(node, reference, lazy=scenario.lazy))
        race.run(disturb)
        if scenario.lazy:
            # the rest comes by itself
            everything = len(nodes) * model.size
            wait_until(lambda: sum(map(Node.stored, nodes)) >= everything, "all", _FILL_SECONDS)
        part = busy.part()
        for node in nodes:
            if node not in lost:
                _check(race, node, model)
        between = made.network.between() if len(zones) > 1 else None
        return Outcome(
            scenario,
            {node.name: race.seconds[node.name] for node in nodes if node not in lost},
            (made.egress - egress) / model.size,
            (between.sent + between.received) / model.size if between else None,
            part,
            model.size,
            race.samples,
        )


def _take_part(node: Node, reference: str, *, lazy: bool) -> None:
    if lazy:
        node.publish(reference, attributes={"mode": "lazy"})
        node.read_byte()
    else:
        node.publish(reference)


def _check(race: Race, node: Node, model: Model) -> None:
    if node.name in race.errors:
        raise Failure(f"{node.name}: {race.errors[node.name]}\n{node.log[-3000:]}")
    if node.shows() != model.digests:
        raise Failure(f"{node.name} shows other files")


# -- what may happen -------------------------------------------------------------------------------


def _one_after_another(made: Cluster, nodes: list[Node], reference: str) -> list[Node]:
    """All but the last one have it before the last one is started."""
    for node in nodes[:-1]:
        made.start([node])
        node.publish(reference)
    made.start(nodes[-1:])
    return nodes[-1:]


def _others_are_slow(made: Cluster, nodes: list[Node], reference: str) -> list[Node]:
    """All but the last one have it, and links that are next to useless."""
    for node in nodes[:-1]:
        made.start([node])
        node.publish(reference)
    for node in nodes[:-1]:
        node.host.limit(made.network.mbit / _MUCH)
    made.start(nodes[-1:])
    return nodes[-1:]


def _one_lies(made: Cluster, nodes: list[Node], reference: str) -> list[Node]:
    """The last one has it, and its disk turns every chunk into another."""
    liar = nodes[-1]
    liar.publish(reference)
    liar.rot()
    return nodes[:-1]


def _one_lies_from_the_start(made: Cluster, nodes: list[Node], reference: str) -> list[Node]:
    """As :func:`_one_lies`, before the others are started: they have nothing."""
    made.start(nodes[-1:])
    _one_lies(made, nodes, reference)
    made.start(nodes[:-1])
    return nodes[:-1]


def _all_others_lie(made: Cluster, nodes: list[Node], reference: str) -> list[Node]:
    """All but the first one have it, and disks that turn every chunk into another."""
    made.start(nodes[1:])
    Race(nodes[1:], lambda node: node.publish(reference)).run()
    for liar in nodes[1:]:
        liar.rot()
    made.start(nodes[:1])
    return nodes[:1]


def _three_die(nodes: list[Node], mbit: float) -> list[Node]:
    for node in nodes[-3:]:
        node.driver.end(signal.SIGKILL)
    return nodes[-3:]


def _one_is_silent(nodes: list[Node], mbit: float) -> list[Node]:
    nodes[-1].host.blackhole()
    return nodes[-1:]


def _one_is_slow(nodes: list[Node], mbit: float) -> list[Node]:
    nodes[-1].host.limit(mbit / 10)
    return nodes[-1:]


ALONE: Final = Scenario("one node alone", nodes=1, peers=False)
APART: Final = Scenario("8 nodes, no peers", peers=False)
TOGETHER: Final = Scenario("8 nodes, peers")
_NO_LISTS: Final = ("--chunk-digests", "ignore")
_OTHERS: Final = (
    Scenario("the ninth node", nodes=_NODES + 1, joining=True, prepare=_one_after_another),
    Scenario("8 nodes, 3 of them killed", disturb=_three_die),
    Scenario("8 nodes, one blackholed", disturb=_one_is_silent),
    Scenario("8 nodes, one at a tenth", disturb=_one_is_slow),
    Scenario("one node, 7 slow peers", joining=True, prepare=_others_are_slow),
    Scenario("8 nodes, one lies", prepare=_one_lies),
    Scenario(
        "8 nodes, one lies, no lists",
        joining=True,
        flags=_NO_LISTS,
        prepare=_one_lies_from_the_start,
    ),
    Scenario("one node, 7 liars", joining=True, prepare=_all_others_lie),
    Scenario("one node, 7 liars, no lists", joining=True, flags=_NO_LISTS, prepare=_all_others_lie),
    Scenario("8 nodes in two zones", zones=("a", "b")),
    Scenario("8 nodes, one lies, chunk digests", digests=True, prepare=_one_lies),
    # without them, each node asks the registry itself for what a pod waits for
    Scenario("8 nodes, lazy: first byte", digests=True, lazy=True),
)
SCENARIOS: Final = (ALONE, APART, TOGETHER, *_OTHERS)


# -- what is told ----------------------------------------------------------------------------------

_HEADS: Final = (
    *("model", "scenario", "slowest node", "fastest", "to one alone", "to undisturbed"),
    *("registry sent", "between zones", "processors busy"),
)


def heads() -> str:
    return f"| {' | '.join(_HEADS)} |\n|{' --- |' * len(_HEADS)}"


def row(case: Case, outcome: Outcome, all_of_case: Sequence[Outcome]) -> str:
    """One row; ratios are to those of the same case and the same program run."""
    cells = (
        case.name,
        outcome.scenario.name,
        f"{outcome.slowest:.1f} s",
        f"{min(outcome.seconds.values()):.1f} s",
        _ratio(outcome, ALONE, all_of_case),
        _ratio(outcome, TOGETHER, all_of_case),
        f"{outcome.egress:.3f}",
        "" if outcome.between is None else f"{outcome.between:.3f}",
        f"{outcome.busy:.0%}{' (void)' if outcome.is_void else ''}",
    )
    return f"| {' | '.join(cells)} |"


def _ratio(outcome: Outcome, scenario: Scenario, outcomes: Sequence[Outcome]) -> str:
    others = [one.slowest for one in outcomes if one.scenario is scenario]
    return f"{outcome.slowest / statistics.median(others):.2f}" if others else ""


def graph(outcomes: Sequence[Outcome]) -> str:
    """How much of the model each node had over time."""
    end = max(outcome.slowest for outcome in outcomes)
    lines = [line for outcome in outcomes for line in _lines(outcome, end)]
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if end / step <= 10)
    ticks = [(at / end, f"{at} s") for at in range(0, int(end) + 1, step)]
    axis = Axis("percent of the model", top=100, step=20, limit=100)
    return draw(lines, axis, "time since all began", ticks)


def _lines(outcome: Outcome, end: float) -> Iterator[Line]:
    name = outcome.scenario.name
    for node, seconds in outcome.seconds.items():
        points = [
            (sample.seconds / end, min(100, 100 * sample.stored[node] / outcome.size))
            for sample in outcome.samples
            if sample.seconds < seconds
        ]
        yield Line(name, [(0, 0), *points, (seconds / end, 100)])
        name = ""


def measure(
    upstream: RegistryServer, model: Model, scenario: Scenario, mbit: float, tries: int
) -> Outcome:
    """A run that counts; the last of several if none does."""
    for _ in range(tries - 1):
        outcome = run(upstream, model, scenario, mbit)
        if not outcome.is_void:
            return outcome
    return run(upstream, model, scenario, mbit)


def _case(text: str) -> Case:
    """``256x1``: MiB by layers."""
    mib, layers = text.split("x")
    return Case(int(mib), int(layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=_case, action="append", help=_case.__doc__)
    parser.add_argument(
        "--only", action="append", choices=[one.name for one in SCENARIOS], help="scenarios"
    )
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument(
        "--mbit", type=float, default=MBIT, help="of each node; less on slow machines"
    )
    parser.add_argument("--once", action="store_true", help="do not repeat runs that are void")
    parser.add_argument("--graph", type=Path, help="where to write the SVG of the first model")
    arguments = parser.parse_args()
    cases, tries = arguments.case or _CASES, 1 if arguments.once else _TRIES
    scenarios = [one for one in SCENARIOS if arguments.only is None or one.name in arguments.only]
    print(heads(), flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="bench-peers-") as folder,
        serve_registry(Path(folder) / "registry") as upstream,
    ):
        for number, case in enumerate(cases):
            pushed = push(upstream, case, Path(folder))
            digests = {one.name: one.digest.partition(":")[2] for one in pushed.layers}
            model = Model(pushed.repository, digests, case.size)
            outcomes: list[Outcome] = []
            for _ in range(arguments.runs):
                for scenario in scenarios if number == 0 else scenarios[:3]:
                    outcomes.append(measure(upstream, model, scenario, arguments.mbit, tries))
                    print(row(case, outcomes[-1], outcomes), flush=True)
            if arguments.graph and number == 0:
                drawn = [one for one in outcomes if one.scenario in (ALONE, APART, TOGETHER)]
                arguments.graph.write_text(graph(drawn[:3]))


if __name__ == "__main__":
    main()
