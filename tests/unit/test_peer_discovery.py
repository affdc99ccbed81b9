"""How nodes find each other: lists, names of the DNS, EndpointSlices."""

from __future__ import annotations

import functools
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import dns.asyncresolver
import pytest
import trio

import fetcher.peers.dns_peers
import fetcher.peers.kubernetes_peers
from fetcher.peers.discovery import Gathering, StaticPeers, is_own, parse_peers
from fetcher.peers.dns_peers import DnsPeers
from fetcher.peers.kubernetes_peers import KubernetesPeers
from fetcher.peers.members import Members
from fetcher.peers.owners import Member
from tests.support.name_server import NameServer
from tests.support.slices import SlicesApi

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from fetcher.peers.discovery import Discovery


@asynccontextmanager
async def discovering(way: Discovery) -> AsyncIterator[Callable[[], dict[str, Member]]]:
    """What ``way`` has found so far, by name."""
    latest: dict[str, Member] = {}

    def found(members: tuple[Member, ...]) -> None:
        latest.clear()
        latest.update((one.name, one) for one in members)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(way.run, found)
        yield lambda: latest
        nursery.cancel_scope.cancel()


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """A test that runs in a loop of its own."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        trio.run(functools.partial(test, **fixtures))

    return run


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - of another thread's making
            await trio.sleep(0.01)


# -- lists -----------------------------------------------------------------------------------------


def test_a_list_names_members_addresses_and_zones() -> None:
    assert parse_peers(["a=10.0.0.1:8401@z1", "10.0.0.2:8401", "[fd00::1]:8401"]) == (
        Member("a", "10.0.0.1:8401", "z1"),
        Member("10.0.0.2:8401", "10.0.0.2:8401"),
        Member("[fd00::1]:8401", "[fd00::1]:8401"),
    )


@pytest.mark.parametrize(
    "texts", [["a"], ["a=b"], ["a=b:0"], ["a=b:99999"], ["a=b:1@"], ["a=b:1", "a=c:1"], ["a b:1"]]
)
def test_what_is_no_list_is_refused(texts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"peer|name=host:port"):
        parse_peers(texts)


@in_loop
async def test_all_ways_together_make_the_members() -> None:
    members = Members("b", "")
    gathering = Gathering(members, None)
    await gathering.run(StaticPeers(["a=10.0.0.1:1@x", "b=10.0.0.2:1@y"]))
    await gathering.run(StaticPeers(["c=10.0.0.3:1@y"]))
    assert members.myself == Member("b", "10.0.0.2:1", "y")
    assert members.serves
    assert members.any
    assert members.nearby == [Member("c", "10.0.0.3:1", "y")]
    assert members.find("b") is None
    version = members.version
    await gathering.run(StaticPeers(["d=10.0.0.3:1"]))
    assert members.version > version


@in_loop
async def test_a_node_knows_itself_by_its_address() -> None:
    members = Members("node-7", "zone")
    await Gathering(members, 8401).run(StaticPeers(["192.0.2.1:8401", "127.0.0.1:8401"]))
    assert members.myself == Member("127.0.0.1:8401", "127.0.0.1:8401", "zone")
    assert members.serves
    await Gathering(members, None).run(StaticPeers(["192.0.2.1:8401", "127.0.0.1:8401"]))
    assert members.myself == Member("node-7", "", "zone")
    assert not members.serves


def test_only_addresses_of_this_machine_are_its_own() -> None:
    assert is_own("127.0.0.1:1")
    assert not is_own("192.0.2.1:1")
    assert not is_own("localhost:1")


# -- DNS -------------------------------------------------------------------------------------------


@pytest.fixture
def names() -> Iterator[NameServer]:
    server = NameServer()
    with server.serving():
        yield server


def resolver(names: NameServer) -> dns.asyncresolver.Resolver:
    found = dns.asyncresolver.Resolver(configure=False)
    found.nameservers, found.port = ["127.0.0.1"], names.port
    return found


@in_loop
async def test_each_address_of_a_name_is_a_member(names: NameServer) -> None:
    names.addresses["peers.models.svc"] = ["10.0.0.2", "10.0.0.1", "fd00::1"]
    found = await DnsPeers("peers.models.svc:8401", resolver(names)).look_up()
    expected = ("10.0.0.1:8401", "10.0.0.2:8401", "[fd00::1]:8401")
    assert found == tuple(Member(one, one) for one in expected)


@in_loop
async def test_large_answers_come_over_tcp(names: NameServer) -> None:
    names.addresses["many.example"] = [f"10.1.{n // 250}.{n % 250}" for n in range(1000)]
    found = await DnsPeers("many.example:1", resolver(names)).look_up()
    assert len(found) == 1000
    assert names.over_tcp == 1


# a question that is cancelled on its way leaves dnspython's socket to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@in_loop
async def test_names_are_looked_up_again(
    names: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher.peers.dns_peers, "_AGAIN_SECONDS", 0.02)
    async with discovering(DnsPeers("peers.example:1", resolver(names))) as found:
        names.addresses["peers.example"] = ["10.0.0.1"]
        await until(lambda: list(found()) == ["10.0.0.1:1"])
        names.addresses["peers.example"] = ["10.0.0.1", "10.0.0.2"]
        await until(lambda: list(found()) == ["10.0.0.1:1", "10.0.0.2:1"])
        # a name server that fails takes nobody away; a name without addresses does
        names.is_broken = True
        await trio.sleep(0.1)
        assert len(found()) == 2
        names.is_broken = False
        del names.addresses["peers.example"]
        await until(lambda: not found())


# -- EndpointSlices --------------------------------------------------------------------------------


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlicesApi]:
    monkeypatch.setattr(fetcher.peers.kubernetes_peers, "_FIRST_PAUSE", 0.02)
    server = SlicesApi(tmp_path)
    with server.serving():
        yield server


def endpoint(number: int, zone: str = "z", ready: bool | None = True) -> dict[str, Any]:
    return {
        "addresses": [f"10.0.0.{number}"],
        "conditions": {} if ready is None else {"ready": ready},
        "nodeName": f"node-{number}",
        "zone": zone,
    }


def watching(api: SlicesApi) -> KubernetesPeers:
    return KubernetesPeers("models/peers", api.environment, api.account)


@in_loop
async def test_ready_endpoints_are_members_in_their_zones(api: SlicesApi) -> None:
    api.put("one", endpoint(1, "a"), endpoint(2, "b", ready=None), endpoint(3, ready=False))
    api.put("two", {"addresses": ["not an address"]}, {"addresses": ["10.0.0.9"]})
    async with discovering(watching(api)) as found:
        await until(lambda: bool(found()))
        assert set(found().values()) == {
            Member("node-1", "10.0.0.1:8401", "a"),
            Member("node-2", "10.0.0.2:8401", "b"),
            Member("10.0.0.9:8401", "10.0.0.9:8401"),
        }


@in_loop
async def test_changes_are_watched(api: SlicesApi) -> None:
    api.put("one", endpoint(1))
    async with discovering(watching(api)) as found:
        await until(lambda: set(found()) == {"node-1"})
        api.put("one", endpoint(1), endpoint(2))
        api.put("two", endpoint(3))
        await until(lambda: set(found()) == {"node-1", "node-2", "node-3"})
        api.delete("one")
        await until(lambda: set(found()) == {"node-3"})
        lists = sum("watch" not in one for one in api.asked)
        assert lists == 1


@in_loop
async def test_a_watch_goes_on_where_it_ended(api: SlicesApi) -> None:
    api.put("one", endpoint(1))
    async with discovering(watching(api)) as found:
        await until(lambda: set(found()) == {"node-1"})
        for number in (2, 3):
            watches = sum("watch" in one for one in api.asked)
            api.hang_up()
            await until(functools.partial(_more_watches, api, watches))
            api.put("one", endpoint(number))
            await until(functools.partial(_only, found, f"node-{number}"))


def _more_watches(api: SlicesApi, before: int) -> bool:
    return sum("watch" in one for one in api.asked) > before


def _only(found: Callable[[], dict[str, Member]], name: str) -> bool:
    return set(found()) == {name}


@in_loop
async def test_everything_is_listed_again_where_a_version_is_gone(api: SlicesApi) -> None:
    api.put("one", endpoint(1))
    async with discovering(watching(api)) as found:
        await until(lambda: set(found()) == {"node-1"})
        await until(lambda: any("watch" in one for one in api.asked))
        api.forget()
        api.put("two", endpoint(2))
        await until(lambda: set(found()) == {"node-1", "node-2"})
        assert sum("watch" not in one for one in api.asked) >= 2


@in_loop
async def test_lists_come_in_pages(api: SlicesApi) -> None:
    api.page = 2
    for number in range(5):
        api.put(f"slice-{number}", endpoint(number))
    async with discovering(watching(api)) as found:
        await until(lambda: len(found()) == 5)
        assert [one.get("continue") for one in api.asked[:3]] == [None, "2", "4"]


@in_loop
async def test_a_token_is_read_again_and_an_api_that_refuses_takes_nobody_away(
    api: SlicesApi,
) -> None:
    api.put("one", endpoint(1))
    async with discovering(watching(api)) as found:
        await until(lambda: set(found()) == {"node-1"})
        api.token = "second"
        api.hang_up()
        await until(lambda: api.refused > 0)
        assert set(found()) == {"node-1"}
        api.rotate("second")
        api.put("one", endpoint(2))
        await until(lambda: set(found()) == {"node-2"})
