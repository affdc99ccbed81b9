"""``make simulate``: clusters that no development machine has, on the real owners and choices.

Rows in Markdown: how long the slowest node takes in times of one node alone at the rate of its
link, what the registry sends, and how many transfers and how much memory a node has at most.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc

from fetcher.peers.choice import BlobChoice
from fetcher.peers.members import Members
from fetcher.peers.owners import Member
from fetcher.peers.standings import Standings
from tests.simulate.cluster import MIB, Cluster, Scenario

_HEADS = (
    *("cluster", "model", "slowest node", "registry sent", "uploads of one", "downloads of one"),
    *("refused requests of one", "simulated in"),
)

SCENARIOS = {
    "8 nodes": Scenario(),
    "8 nodes, small blobs": Scenario(blobs=(MIB,) * 64),
    "8 nodes, no peers": Scenario(peers=False),
    "8 nodes, 3 killed": Scenario(killed=((1, 8.0), (3, 8.0), (5, 8.0))),
    "8 nodes, 2 zones": Scenario(zones=2),
    "100 nodes": Scenario(nodes=100, blobs=(64 * MIB,), registry=1000, step=0.05),
    "1,000 nodes": Scenario(nodes=1000, blobs=(64 * MIB,), registry=1000, step=0.1),
    "5,000 nodes, 5 zones": Scenario(
        nodes=5000, zones=5, blobs=(64 * MIB,), registry=1000, step=0.2
    ),
}


def row(name: str, scenario: Scenario) -> str:
    """One simulated pull."""
    started = time.monotonic()
    cluster = Cluster(scenario)
    cluster.run()
    size = sum(scenario.blobs) // MIB
    cells = (
        name,
        f"{size} MiB in {len(scenario.blobs)}",
        f"{cluster.slowest / cluster.alone:.2f}",
        f"{cluster.egress:.3f}",
        max(node.most_uploads for node in cluster.nodes),
        max(node.most_downloads for node in cluster.nodes),
        round(cluster.refused / scenario.nodes),
        f"{time.monotonic() - started:.0f} s",
    )
    return f"| {' | '.join(map(str, cells))} |"


def memory(count: int) -> int:
    """Bytes that one real node needs to know ``count`` members and a blob's owners among them."""
    tracemalloc.start()
    try:
        members = Members("node-0")
        members.replace(Member(f"node-{n}", f"10.0.{n // 256}.{n % 256}:1") for n in range(count))
        choice = BlobChoice("sha256:00", 4 * MIB, 1024 * MIB, members, Standings())
        for chunk in range(256):
            choice.line(chunk)
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=SCENARIOS, help="clusters")
    arguments = parser.parse_args()
    print(f"| {' | '.join(_HEADS)} |\n|{' --- |' * len(_HEADS)}", flush=True)
    for name, scenario in SCENARIOS.items():
        if arguments.only is None or name in arguments.only:
            print(row(name, scenario), flush=True)
    print(f"\nA node that knows 5,000 members keeps {memory(5000) / MIB:.1f} MiB of them.")


if __name__ == "__main__":
    main()
