"""Chunk digests from peers, where the registry has none: found, used, and never believed."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.chunk_digests import ChunkDigests
from fetcher.chunk_lists import ChunkLists
from fetcher.oci import Digest, Reference
from fetcher.peers.client import PeerClient, PeerClientSettings
from fetcher.peers.lists import PeerLists
from fetcher.peers.members import Members
from fetcher.peers.owners import Member
from fetcher.peers.trust import PeerToken
from fetcher.policy import PullPolicy
from fetcher.pull import Pulls, PullSettings
from fetcher.store.lists import ListRecord
from tests.integration.test_chunk_proofs import blob_of, chunks_of, files_of
from tests.support.keychains import Everywhere
from tests.support.peer_server import Setup, peer_node
from tests.support.proxy import BlobAnswer, serve_proxy
from tests.support.sources import shown
from tests.support.stores import CHUNK, NO_FLOOR, QUICK, node_parts, pull, weights
from tests.support.token_server import PASSWORD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from fetcher.peers.standings import Standings
    from tests.support.models import ModelBuilder
    from tests.support.peer_server import PeerNode
    from tests.support.proxy import Proxy
    from tests.support.registry import RegistryServer

COUNT = 48
LISTS = Setup(lists=True)


@contextlib.asynccontextmanager
async def asking(
    root: Path, token: Path, *addresses: str
) -> AsyncIterator[tuple[Pulls, Standings]]:
    """A node among peers at these addresses, which are named ``peer-0`` and so on."""
    members = Members("asker")
    members.replace(Member(f"peer-{number}", one) for number, one in enumerate(addresses))
    client = PeerClient(members, PeerToken(token), PeerClientSettings(), QUICK.transfer)
    with contextlib.closing(client):
        async with node_parts(root, NO_FLOOR, peers=client) as node:
            peers = PeerLists(client, node.registry)
            lists = ChunkLists(node.store, node.registry, CHUNK, peers=peers)
            pulls = Pulls(node.store, node.registry, node.jobs, PullSettings(), node.nursery, lists)
            yield pulls, client.standings


class _Always(list[object]):
    def pop(self, _: object = 0) -> object:
        return self[0]


@contextlib.contextmanager
def before(node: PeerNode, change: Callable[[BlobAnswer], BlobAnswer]) -> Iterator[Proxy]:
    """What stands before a node, and changes what it sends."""
    with serve_proxy(f"127.0.0.1:{node.address[1]}") as proxy:
        proxy.faults.rewrites = _Always([change])  # type: ignore[assignment]
        yield proxy


def slowly(answer: BlobAnswer) -> BlobAnswer:
    """So that something else can happen before the end."""
    time.sleep(0.05)
    return answer


def lying(answer: BlobAnswer) -> BlobAnswer:
    """Flip a bit of a chunk; lists, which are short, stay as they are."""
    slowly(answer)
    if len(answer.body) >= CHUNK:
        answer.body = bytes([answer.body[0] ^ 1]) + answer.body[1:]
    return answer


def forge(node: PeerNode, builder: ModelBuilder, reference: str) -> None:
    """Have a node offer a list that is wrong from one chunk on."""
    data = bytearray(blob_of(builder))
    data[5 * CHUNK] ^= 1
    wrong = chunks_of(bytes(data), digest=Digest.of(blob_of(builder)))
    body = ChunkDigests.over([wrong], CHUNK).encode()
    name = Reference.parse(reference).name
    node.store.lists.put(name, builder.digest, ListRecord(body, time.time()))


async def pulled_right(
    folder: Path, token: Path, reference: str, builder: ModelBuilder, *peers: Proxy
) -> Standings:
    """Pull a model among peers, and see that it is right; what is believed of them then."""
    addresses = (one.address for one in peers)
    async with asking(folder / "root", token, *addresses) as (pulls, standings):
        with trio.fail_after(30):
            assert shown(await pull(pulls, reference)) == files_of(builder)
        return standings


@pytest.fixture
def builder() -> ModelBuilder:
    return weights(COUNT * CHUNK)


def test_a_liar_is_found_out_by_the_list_of_one_that_completed_the_model(
    registry: RegistryServer,
    home: Proxy,
    builder: ModelBuilder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Though the registry has none, and whoever of the two is asked for it."""
    builder.push(registry, "lists/liar", "v1")
    reference = f"{home.address}/lists/liar:v1"

    async def main() -> None:
        async with (
            peer_node(tmp_path / "liar", LISTS) as liar,
            peer_node(tmp_path / "honest", LISTS) as honest,
        ):
            for node in (liar, honest):
                await pull(node.pulls, reference)
            sent = home.counts.total
            with before(liar, lying) as one, before(honest, slowly) as other:
                token = tmp_path / "liar.token"
                standings = await pulled_right(tmp_path, token, reference, builder, one, other)
            assert standings.of("peer-0").wrong >= 1
            assert standings.of("peer-1").wrong == 0
            assert home.counts.total - sent < COUNT * CHUNK / 2

    trio.run(main)
    assert "is not what its digest says" in caplog.text
    assert "comparing" not in caplog.text


def test_a_forged_list_costs_its_sender_and_nobody_else(
    registry: RegistryServer,
    home: Proxy,
    builder: ModelBuilder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    builder.push(registry, "lists/forged", "v1")
    reference = f"{home.address}/lists/forged:v1"

    async def main() -> None:
        async with (
            peer_node(tmp_path / "forger", LISTS) as forger,
            peer_node(tmp_path / "honest") as honest,
        ):
            for node in (forger, honest):
                await pull(node.pulls, reference)
            forge(forger, builder, reference)
            sent = home.counts.total
            with before(forger, slowly) as one, before(honest, slowly) as other:
                token = tmp_path / "forger.token"
                standings = await pulled_right(tmp_path, token, reference, builder, one, other)
            assert standings.of("peer-0").wrong == 1
            assert standings.of("peer-1").wrong == 0
            assert home.counts.total - sent < COUNT * CHUNK / 2

    trio.run(main)
    assert "sent chunk digests that are wrong" in caplog.text


def test_what_peers_answer_instead_of_a_list_keeps_no_pull(
    registry: RegistryServer, home: Proxy, builder: ModelBuilder, tmp_path: Path
) -> None:
    builder.push(registry, "lists/nonsense", "v1")
    reference = f"{home.address}/lists/nonsense:v1"

    async def main() -> None:
        async with peer_node(tmp_path / "peer", LISTS) as peer:
            await pull(peer.pulls, reference)
            sent = home.counts.total

            def short(answer: BlobAnswer) -> BlobAnswer:
                slowly(answer)
                if len(answer.body) < CHUNK:
                    answer.body = b"{}" + answer.body[2:]
                return answer

            with before(peer, short) as one:
                token = tmp_path / "peer.token"
                standings = await pulled_right(tmp_path, token, reference, builder, one)
            assert standings.of("peer-0").wrong == 0
            assert home.counts.total == sent

    trio.run(main)


def test_who_may_not_read_the_model_gets_no_list(
    guarded: RegistryServer, builder: ModelBuilder, tmp_path: Path
) -> None:
    reference = builder.push(guarded, "lists/guarded", "v1")
    name = Reference.parse(reference).name

    async def main() -> None:
        async with peer_node(tmp_path / "peer") as peer:
            body = ChunkDigests.over([chunks_of(blob_of(builder))], CHUNK).encode()
            peer.store.lists.put(name, builder.digest, ListRecord(body, time.time()))
            robot = Everywhere("robot", PASSWORD)
            await peer.pulls.resolve(Reference.parse(reference), robot, PullPolicy.ALWAYS)
            path = f"/v2/lists/guarded/referrers/{builder.digest}?ns={guarded.address}"
            assert (await peer.client.get(path)).status_code == 401

    trio.run(main)
