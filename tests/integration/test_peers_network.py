"""Nodes that serve each other, each a driver with a network of its own. Needs root.

What the registry may send is measured in ``make bench-peers``. These models are small, so that one
chunk that comes twice counts for much, and on a busy machine a peer may look dead and be passed
over: here it has to be far less than what as many nodes would fetch without peers.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import pytest

from fetcher.modelpack import Kind
from fetcher.peers.owners import Member, Owners
from tests.support.cluster import Cluster, Model, Node, Race, cluster, publish_chunk_digests
from tests.support.commands import ModelCsi
from tests.support.models import ModelBuilder
from tests.support.processors import Busy
from tests.support.sources import weights
from tests.support.token_server import PASSWORD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.networks import Host
    from tests.support.registry import RegistryServer

CHUNK = 256 * 1024
SMALL_CHUNKS = ("--chunk-size", str(CHUNK))
SIZES = (24 * CHUNK, 7 * CHUNK + 1, 1)
ROBOT = {"username": "robot", "password": PASSWORD}


@dataclass(frozen=True)
class Ran:
    """How nodes came to a model at one time."""

    sent: float
    """By the registry, in times of the model."""
    quiet: bool
    """Whether the processors had time to spare."""

    def bar(self, strict: float, loose: float) -> float:
        """What is asked for on a quiet machine, and on a busy one."""
        return strict if self.quiet else loose


def push(registry: RegistryServer, repository: str, *sizes: int) -> Model:
    builder, files = weights(*(sizes or SIZES))
    builder.push(registry, repository, "v1")
    return Model.of(repository, files)


def peers(made: Cluster, count: int) -> list[Node]:
    """Nodes of equal zones that know each other, and have nothing."""
    zones = made.network.zones
    nodes = [made.add(1, *SMALL_CHUNKS, zone=zones[n % len(zones)])[0] for n in range(count)]
    made.befriend(nodes)
    made.start(nodes)
    return nodes


def asked(node: Node) -> dict[str, int]:
    """What a node's status says of its peers."""
    done = ModelCsi(node.root, node.driver.folder).run("status", "--json")
    assert done.status == 0, done.errors
    told: dict[str, int] = json.loads(done.output)["asked"]
    return told


def compete(
    made: Cluster,
    nodes: list[Node],
    model: Model,
    disturb: Callable[[Race], list[Node]] = lambda race: [],
    pod: str = "one",
) -> Ran:
    """All publish at one time, and those that ``disturb`` does not give come to the right files."""
    reference, before, busy = made.reference(model), made.registry.counts.total, Busy()
    lost: list[Node] = []

    def meanwhile(race: Race) -> None:
        lost.extend(disturb(race))
        race.wait_until_over([node for node in nodes if node not in lost])
        for node in lost:
            node.driver.end(signal.SIGKILL)

    run = Race(nodes, lambda node: node.publish(reference, pod))
    run.run(meanwhile)
    for node in nodes:
        if node not in lost:
            assert node.name not in run.errors, f"{run.errors[node.name]}\n{node.log}"
    for node in nodes:
        if node not in lost:
            assert node.shows(pod) == model.digests
    sent = (made.registry.counts.total - before) / model.size
    return Ran(sent, busy.part() < 0.8)


@pytest.fixture(scope="module")
def friends(registry: RegistryServer) -> Iterator[tuple[Cluster, list[Node]]]:
    """Four nodes that are never harmed."""
    with cluster(registry) as made:
        yield made, peers(made, 4)


def test_nodes_that_start_together_fetch_everything_once(
    friends: tuple[Cluster, list[Node]], registry: RegistryServer
) -> None:
    made, nodes = friends
    model = push(registry, "peers/together")
    ran = compete(made, nodes, model)
    assert 1 <= ran.sent <= ran.bar(1.2, 2)


def test_many_small_layers_are_fetched_once(
    friends: tuple[Cluster, list[Node]], registry: RegistryServer
) -> None:
    made, nodes = friends
    model = push(registry, "peers/small", *[CHUNK // 4] * 32)
    ran = compete(made, nodes, model, pod="small")
    assert 1 <= ran.sent <= ran.bar(1.2, 2)


def sharing(registry: RegistryServer, nodes: list[Node], data: bytes, owner: Node) -> Model:
    """A model with these weights, of whose first chunk ``owner`` is the home."""
    members = [Member(one.name, "") for one in nodes]
    for number in itertools.count():
        builder, readme = ModelBuilder(), f"number {number}\n".encode()
        builder.add_raw("weights.bin", data)
        builder.add_raw("README.md", readme, Kind.DOC)
        home = Owners(str(builder.manifest().digest), members).home(0)
        if home is not None and home.name == owner.name:
            repository = f"peers/sharing-{owner.name}"
            builder.push(registry, repository, "v1")
            return Model.of(repository, {"weights.bin": data, "README.md": readme})
    raise AssertionError


def test_models_that_share_a_blob_do_not_wait_for_each_other(registry: RegistryServer) -> None:
    """Each of two nodes owns by the other's model what it is to ask that one for by its own."""
    data = os.urandom(12 * CHUNK)
    with cluster(registry) as made:
        nodes = peers(made, 2)
        models = {
            one.name: sharing(registry, nodes, data, other)
            for one, other in itertools.permutations(nodes, 2)
        }
        run = Race(nodes, lambda node: node.publish(made.reference(models[node.name])))
        run.run()
        for node in nodes:
            assert not run.errors, node.log
            assert node.shows("one") == models[node.name].digests
            # nobody has let the other one wait until that one left
            assert "fell silent" not in node.log
        assert made.registry.counts.total <= 2.2 * len(data)


def test_who_comes_last_gets_everything_from_the_others(registry: RegistryServer) -> None:
    model = push(registry, "peers/last")
    with cluster(registry) as made:
        nodes = made.add(3, *SMALL_CHUNKS)
        made.befriend(nodes)
        for node in nodes[:-1]:
            made.start([node])
            node.publish(made.reference(model))
        made.start(nodes[-1:])
        ran = compete(made, nodes[-1:], model)
        assert ran.sent <= ran.bar(0, 0.5)


def test_lazy_volumes_show_their_first_byte_at_once(
    friends: tuple[Cluster, list[Node]], registry: RegistryServer
) -> None:
    made, nodes = friends
    model = push(registry, "peers/lazy")
    publish_chunk_digests(registry, model, "--chunk-size", str(CHUNK))
    reference, before = made.reference(model), made.registry.counts.total

    def show(node: Node) -> None:
        node.publish(reference, "lazy", attributes={"mode": "lazy"})
        node.read_byte("lazy")

    busy, race = Busy(), Race(nodes, show)
    race.run()
    assert race.errors == {}
    for node in nodes:
        assert node.shows("lazy") == model.digests
        node.unpublish("lazy")
    ran = Ran((made.registry.counts.total - before) / model.size, busy.part() < 0.8)
    assert 1 <= ran.sent <= ran.bar(1.2, 2)
    assert max(race.seconds.values()) < ran.bar(2, 20)


def test_a_stranger_gets_nothing(
    friends: tuple[Cluster, list[Node]], registry: RegistryServer
) -> None:
    made, nodes = friends
    model = push(registry, "peers/strangers")
    nodes[0].publish(made.reference(model), "strangers")
    stranger = made.network.add("stranger")
    there, absent = next(iter(model.digests.values())), "0" * 64
    answers = [
        ask(made, stranger, nodes[0], digest, headers)
        for digest in (there, absent)
        for headers in ({}, {"Model-CSI-Peer": "guessed"}, {"Authorization": "Basic cjpy"})
    ]
    assert {status for status, _ in answers} == {401}
    assert len({body for _, body in answers}) == 1
    assert all(len(body) < 1000 for _, body in answers)


def ask(
    made: Cluster, stranger: Host, node: Node, digest: str, headers: dict[str, str]
) -> tuple[int, bytes]:
    """GET a blob from a node's peer server: status and body."""
    host, _, port = node.peer.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.sock = stranger.connect(host, int(port))
    try:
        path = f"/v2/peers/strangers/blobs/sha256:{digest}?ns={made.registry.address}"
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_a_node_without_credentials_gets_nothing_from_its_peers(guarded: RegistryServer) -> None:
    model = push(guarded, "peers/guarded")
    with cluster(guarded) as made:
        one, other = peers(made, 2)
        reference = made.reference(model)
        one.publish(reference, secrets=ROBOT)
        before = made.registry.counts.total
        for secrets in (None, {**ROBOT, "password": "guessed"}):
            with pytest.raises(grpc.RpcError) as caught:
                other.publish(reference, secrets=secrets)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            # it may well have fetched chunks for the other one
            assert other.shows() == {}
        other.publish(reference, secrets=ROBOT)
        assert other.shows() == model.digests
        assert made.registry.counts.total == before


# -- nodes that do harm ----------------------------------------------------------------------------


def slowly(made: Cluster) -> None:
    """So slow that something can happen in the middle."""
    for node in made.nodes:
        node.host.limit(20)


def test_nodes_that_are_killed_cost_the_others_little(registry: RegistryServer) -> None:
    model = push(registry, "peers/killed")
    with cluster(registry) as made:
        nodes = peers(made, 4)
        slowly(made)

        def disturb(race: Race) -> list[Node]:
            race.wait_for(model.size)
            for node in nodes[2:]:
                node.driver.end(signal.SIGKILL)
            return nodes[2:]

        compete(made, nodes, model, disturb)


def test_a_node_that_falls_silent_is_passed_over(registry: RegistryServer) -> None:
    model = push(registry, "peers/silent")
    with cluster(registry) as made:
        nodes = peers(made, 3)
        slowly(made)

        def disturb(race: Race) -> list[Node]:
            race.wait_for(model.size)
            nodes[-1].host.blackhole()
            return nodes[-1:]

        compete(made, nodes, model, disturb)


def test_a_slow_node_is_not_waited_for(registry: RegistryServer) -> None:
    model = push(registry, "peers/slow")
    with cluster(registry) as made:
        nodes = peers(made, 3)
        nodes[-1].host.limit(1)
        # by itself it would take more than a minute
        compete(made, nodes, model, lambda race: nodes[-1:])


def test_a_node_that_sends_wrong_bytes_spoils_nothing(registry: RegistryServer) -> None:
    model = push(registry, "peers/wrong")
    with cluster(registry) as made:
        *nodes, liar = peers(made, 3)
        liar.publish(made.reference(model))
        liar.rot()
        compete(made, nodes, model)
        told = [asked(node) for node in nodes]
        assert all(one["members"] == 2 for one in told)
        assert sum(one["wrong"] for one in told) >= 1
        assert sum(one["banned"] for one in told) >= 1


def test_each_byte_enters_a_zone_once(registry: RegistryServer) -> None:
    model = push(registry, "peers/zones")
    with cluster(registry, "a", "b") as made:
        nodes = peers(made, 4)
        ran = compete(made, nodes, model)
        assert 1 <= ran.sent <= ran.bar(1.2, 2)
        between = made.network.between()
        # what is not the model's: headers of packets, what is said of chunks, who is where
        bar = 1.3 * model.size + 300_000
        assert between.sent + between.received <= ran.bar(bar, 2 * bar)
