"""Peers that are broken, slow or lie: what they cost, and who is held to account."""

from __future__ import annotations

import contextlib
import os
import socketserver
import threading
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.chunk_lists import ChunkLists
from fetcher.excerpts import EXCERPT_BYTES
from fetcher.oci import Digest
from fetcher.peers.client import PeerClient, PeerClientSettings
from fetcher.peers.members import Members
from fetcher.peers.owners import Member
from fetcher.pull import Pulls, PullSettings
from tests.integration.test_chunk_proofs import files_of, indexed
from tests.support.proxy import BlobAnswer, Faults, Proxy, serve_proxy
from tests.support.sources import shown, write_hosts
from tests.support.stores import CHUNK, NO_FLOOR, QUICK, REGISTRIES, node_parts, pull, weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fetcher.peers.standings import Standings
    from fetcher.registry import RegistrySettings
    from tests.support.proxy import Rewrite
    from tests.support.registry import RegistryServer


class Always(list[object]):
    """What is done to every answer."""

    def pop(self, _: object = 0) -> object:
        return self[0]


@dataclass
class Done:
    files: dict[str, bytes]
    standings: Standings


def pulled_among(
    root: Path,
    reference: str,
    *addresses: str,
    registries: RegistrySettings = REGISTRIES,
    settings: PeerClientSettings = PeerClientSettings(),  # noqa: B008 - frozen
    chunk_size: int = CHUNK,
) -> Done:
    """Pull with peers at these addresses, which are named ``peer-0`` and so on."""

    async def main() -> Done:
        members = Members("me")
        members.replace(
            Member(f"peer-{number}", address) for number, address in enumerate(addresses)
        )
        client = PeerClient(members, None, settings, QUICK.transfer)
        with trio.fail_after(60), contextlib.closing(client):
            async with node_parts(
                root, NO_FLOOR, chunk_size=chunk_size, registries=registries, peers=client
            ) as node:
                lists = ChunkLists(node.store, node.registry, chunk_size)
                pulls = Pulls(
                    node.store, node.registry, node.jobs, PullSettings(), node.nursery, lists
                )
                files = shown(await pull(pulls, reference))
        return Done(files, client.standings)

    return trio.run(main)


@contextlib.contextmanager
def peers(registry: RegistryServer, count: int) -> Iterator[list[Proxy]]:
    """Servers that have all that the registry has."""
    with contextlib.ExitStack() as closing:
        yield [closing.enter_context(serve_proxy(registry.address)) for _ in range(count)]


def lying(have: str) -> Rewrite:
    """Flip a bit of each answer's first byte; ``have`` is what the peer says that it has."""

    def rewrite(answer: BlobAnswer) -> BlobAnswer:
        answer.headers["Model-Csi-Have"] = have
        answer.body = bytes([answer.body[0] ^ 1]) + answer.body[1:]
        return answer

    return rewrite


def honest(have: str) -> Rewrite:
    """``have`` is what the peer says that it has."""

    def rewrite(answer: BlobAnswer) -> BlobAnswer:
        answer.headers["Model-Csi-Have"] = have
        return answer

    return rewrite


def always(answer: Callable[[BlobAnswer], BlobAnswer]) -> Faults:
    faults = Faults()
    faults.rewrites = Always([answer])  # type: ignore[assignment]
    return faults


def statuses(status: int, headers: dict[str, str] | None = None) -> Faults:
    faults = Faults(extra_headers=headers or {})
    faults.statuses = Always([status])  # type: ignore[assignment]
    return faults


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(statuses(500), id="faults of their own"),
        pytest.param(statuses(404), id="nothing there"),
        pytest.param(statuses(429, {"Retry-After": "1"}), id="busy"),
        pytest.param(Faults(cut_after=1), id="ends early"),
    ],
)
def test_broken_peers_are_asked_few_times(
    faults: Faults, registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(96 * CHUNK)
    builder.push(registry, "faults/broken", "v1")
    with peers(registry, 4) as four:
        for one in four:
            one.faults = faults
        addresses = (one.address for one in four)
        done = pulled_among(tmp_path / "root", f"{home.address}/faults/broken:v1", *addresses)
    assert done.files == files_of(builder)
    assert home.counts.total <= 1.02 * 96 * CHUNK
    if faults.statuses != [404]:
        # they rest: most chunks were asked for at the registry at once
        assert done.standings.counts["requests"] < 96


def test_without_chunk_digests_what_peers_sent_is_compared(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(24 * CHUNK)
    builder.push(registry, "faults/liar", "v1")
    with peers(registry, 3) as (liar, *others):
        liar.faults = always(lying("all"))
        addresses = (liar.address, *(one.address for one in others))
        done = pulled_among(tmp_path / "root", f"{home.address}/faults/liar:v1", *addresses)
    assert done.files == files_of(builder)
    assert done.standings.of("peer-0").wrong == 1
    assert done.standings.of("peer-1").wrong == done.standings.of("peer-2").wrong == 0


def test_a_liar_is_found_out_by_its_first_chunk(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(24 * CHUNK)
    reference = indexed(registry, home.address, builder, "faults/indexed")
    with peers(registry, 3) as (liar, *others):
        liar.faults = always(lying("all"))
        addresses = (liar.address, *(one.address for one in others))
        done = pulled_among(tmp_path / "root", reference, *addresses)
    assert done.files == files_of(builder)
    assert done.standings.of("peer-0").wrong >= 1
    assert done.standings.counts["requests"] < 2 * 24


def test_who_only_passed_wrong_bytes_on_is_not_banned(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(24 * CHUNK)
    reference = indexed(registry, home.address, builder, "faults/deceived")
    with peers(registry, 1) as (deceived,):
        deceived.faults = always(lying(f"{CHUNK}:ffffff"))
        done = pulled_among(tmp_path / "root", reference, deceived.address)
    assert done.files == files_of(builder)
    assert done.standings.of("peer-0").wrong == 0
    assert done.standings.counts["wrong"] >= 1


class Listener(socketserver.ThreadingTCPServer):
    """A peer that has nothing, and keeps the heads of the requests that it gets."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Listening)
        self.heads: list[str] = []


class _Listening(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Listener

    def do_GET(self) -> None:
        self.server.heads.append(str(self.headers))
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_what_an_administrator_gave_for_a_registry_is_no_peers(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(4 * CHUNK)
    builder.push(registry, "faults/secret", "v1")
    text = f'server = "http://{home.address}"\n[header]\nAuthorization = "Bearer of-the-node"\n'
    write_hosts(tmp_path / "certs.d", home.address, text)
    registries = replace(REGISTRIES, hosts_dir=tmp_path / "certs.d")
    with Listener() as listener:
        threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        address = f"127.0.0.1:{listener.server_address[1]}"
        reference = f"{home.address}/faults/secret:v1"
        done = pulled_among(tmp_path / "root", reference, address, registries=registries)
        listener.shutdown()
        assert done.files == files_of(builder)
        assert listener.heads
        assert not any("of-the-node" in head for head in listener.heads)


def test_a_chunk_that_two_sent_and_that_is_wrong_begins_anew(
    registry: RegistryServer, home: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the registry sends behind a liar's bytes is not to land where they began."""
    builder = weights(8 * CHUNK)
    reference = indexed(registry, home.address, builder, "faults/halves")

    def half(answer: BlobAnswer) -> BlobAnswer:
        answer.headers["Model-Csi-Have"] = "all"
        answer.body = os.urandom(len(answer.body) // 2)
        return answer

    with peers(registry, 1) as (liar,):
        liar.faults = always(half)
        done = pulled_among(tmp_path / "root", reference, liar.address)
    assert done.files == files_of(builder)
    assert "contradict" not in caplog.text
    assert Digest.of(done.files["model-0.safetensors"]) in builder.blobs


def test_one_of_many_that_lies_costs_little_more_than_what_it_sent(
    registry: RegistryServer, home: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without chunk digests: a chunk of each sender tells who it was."""
    builder = weights(160 * CHUNK)
    builder.push(registry, "faults/sampled", "v1")
    with peers(registry, 5) as (liar, *others):
        liar.faults = always(lying("all"))
        for one in others:
            one.faults = always(honest("all"))
        addresses = (liar.address, *(one.address for one in others))
        done = pulled_among(tmp_path / "root", f"{home.address}/faults/sampled:v1", *addresses)
    assert done.files == files_of(builder)
    assert done.standings.of("peer-0").wrong == 1
    assert not any(done.standings.of(f"peer-{number}").wrong for number in range(1, 5))
    # samples, and what the registry was asked for anyway; the whole once more without them
    assert home.counts.total < 40 * CHUNK
    assert "fetching anew" not in caplog.text


def test_who_passed_on_what_a_liar_sent_is_told_apart_from_him(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(96 * CHUNK)
    builder.push(registry, "faults/passed-on", "v1")
    with peers(registry, 3) as (deceived, *others):
        deceived.faults = always(lying(f"{CHUNK}:{'ff' * 12}"))
        for one in others:
            one.faults = always(honest("all"))
        addresses = (deceived.address, *(one.address for one in others))
        done = pulled_among(tmp_path / "root", f"{home.address}/faults/passed-on:v1", *addresses)
    assert done.files == files_of(builder)
    assert not any(done.standings.of(f"peer-{number}").wrong for number in range(3))
    assert done.standings.counts["wrong"] >= 1


def test_a_liar_about_one_chunk_is_found_out_in_the_end(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(48 * CHUNK)
    builder.push(registry, "faults/one-chunk", "v1")
    with peers(registry, 3) as (liar, *others):
        liar.faults.rewrites = [honest("all")] * 3 + [lying("all")] + [honest("all")] * 200
        for one in others:
            one.faults = always(honest("all"))
        addresses = (liar.address, *(one.address for one in others))
        done = pulled_among(tmp_path / "root", f"{home.address}/faults/one-chunk:v1", *addresses)
    assert done.files == files_of(builder)
    assert done.standings.of("peer-0").wrong == 1
    assert not any(done.standings.of(f"peer-{number}").wrong for number in (1, 2))
    # never more than all of it
    assert home.counts.total <= 1.02 * 48 * CHUNK


def test_all_wrong_chunks_are_found_by_a_part_of_each(
    registry: RegistryServer, home: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nobody says that he has all: those that sent them may have been deceived."""
    large = 4 * EXCERPT_BYTES
    builder = weights(48 * large)
    builder.push(registry, "faults/rotten", "v1")

    def rotten(answer: BlobAnswer) -> BlobAnswer:
        answer.headers["Model-Csi-Have"] = f"{large}:{'ff' * 6}"
        body = bytearray(answer.body)
        body[:: EXCERPT_BYTES // 2] = bytes(one ^ 1 for one in body[:: EXCERPT_BYTES // 2])
        answer.body = bytes(body)
        return answer

    with peers(registry, 4) as (deceived, *others):
        deceived.faults = always(rotten)
        for one in others:
            one.faults = always(honest(f"{large}:{'ff' * 6}"))
        addresses = (deceived.address, *(one.address for one in others))
        reference = f"{home.address}/faults/rotten:v1"
        done = pulled_among(tmp_path / "root", reference, *addresses, chunk_size=large)
    assert done.files == files_of(builder)
    assert not any(done.standings.of(f"peer-{number}").wrong for number in range(4))
    assert done.standings.counts["wrong"] >= 1
    assert caplog.text.count("comparing") == 1
    # what it is to fetch in any case, a part of each chunk, and those that were wrong
    assert home.counts.total <= 0.8 * 48 * large
