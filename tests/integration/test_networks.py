"""What the tests of peers stand on: limited links, zones, hosts that go silent. Needs root."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.cluster import Model, Race, cluster
from tests.support.networks import network
from tests.support.sources import weights

if TYPE_CHECKING:
    from tests.support.networks import Host
    from tests.support.registry import RegistryServer

MB = 1_000_000


def send(source: Host, target: Host, size: int) -> float:
    """Send so many bytes over one connection: seconds."""
    with source.inside(lambda: socket.create_server((source.address, 0))) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(bytes(size))

        thread = threading.Thread(target=serve)
        thread.start()
        began, left = time.monotonic(), size
        with target.connect(source.address, listener.getsockname()[1]) as connection:
            while left:
                left -= len(connection.recv(left))
        thread.join()
        return time.monotonic() - began


def namespaces() -> list[str]:
    told = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return told.stdout.split()


def test_links_are_limited_both_ways_and_zones_are_counted_apart() -> None:
    with network("a", "b") as (made, registry):
        one, two = made.add("one", "a", mbit=16), made.add("two", "b")
        # what a queue holds besides is sent at once
        assert send(registry, one, 2 * MB) > 0.8
        assert send(one, registry, 2 * MB) > 0.8
        assert made.between().sent + made.between().received < MB / 10, "the registry is in no zone"
        one.limit(100)
        send(one, two, 2 * MB)
        between = made.between()
        assert 2 * MB < between.sent < 1.1 * 2 * MB
        assert between.received < MB / 4
        assert one.traffic().received > 2 * MB
        assert any(made.namespace("one") in found for found in namespaces())
    assert not any(made.namespace("one") in found for found in namespaces())


def test_a_host_that_is_silent_answers_nothing_until_it_is_back() -> None:
    with network() as (made, registry):
        one = made.add("one")
        with registry.inside(lambda: socket.create_server((registry.address, 0))) as listener:
            port = listener.getsockname()[1]
            one.connect(registry.address, port).close()
            one.blackhole()
            with pytest.raises(TimeoutError):
                one.connect(registry.address, port, seconds=0.5)
            one.restore()
            one.connect(registry.address, port).close()


def test_nodes_without_peers_each_fetch_everything(registry: RegistryServer) -> None:
    builder, files = weights(300_000, 200_000)
    builder.push(registry, "networks/apart", "v1")
    model = Model.of("networks/apart", files)
    with cluster(registry) as made:
        nodes = made.add(2)
        made.start(nodes)
        race = Race(nodes, lambda node: node.publish(made.reference(model)))
        race.run()
        assert race.errors == {}
        assert [node.shows() for node in nodes] == [model.digests] * 2
        assert 2.0 <= made.egress / model.size < 2.1
