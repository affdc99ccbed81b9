"""Downloads that converge whatever a registry, another asker or another registry does."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.credentials import Credentials, VolumeSecrets
from fetcher.download import DownloadSettings
from fetcher.errors import Unavailable
from fetcher.registry import RegistrySettings
from fetcher.store.places import WholeFile
from fetcher.transport import TransferSettings
from tests.support.models import ModelBuilder
from tests.support.proxy import BlobAnswer, Faults, Proxy, serve_proxy
from tests.support.sources import CHUNK, PIECE, QUICK, Node, in_node, open_node, shown, weights
from tests.support.token_server import PASSWORD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.proxy import Rewrite
    from tests.support.registry import RegistryServer
    from tests.support.token_server import TokenServer

SETTINGS = RegistrySettings(attempts=2, retry_seconds=5, connect_timeout=2, stall_timeout=2)
ROOT = Path(__file__).parents[2]
ONE_AT_A_TIME = replace(QUICK, connections=1)


@pytest.fixture
def elsewhere(registry: RegistryServer) -> Iterator[Proxy]:
    """Another registry with the same models."""
    with serve_proxy(registry.address) as running:
        yield running


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - threads and proxies have no event
            await trio.sleep(0.01)


def open_files() -> list[str]:
    """What the descriptors of this process are open on."""
    found = []
    for one in os.listdir("/proc/self/fd"):
        # the listing's own is gone
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{one}"))
    return found


# Credentials


def test_a_token_that_expires_while_others_are_served_is_renewed(
    tmp_path: Path, token_registry: RegistryServer, tokens: TokenServer
) -> None:
    builder, files = weights(*[PIECE] * 6)
    builder.push(token_registry, "tokens/queue", "v1")
    tokens.lifetime = 2
    with serve_proxy(token_registry.address) as home:
        home.faults = Faults(strict_tokens=True, bytes_per_second=PIECE)

        async def main() -> None:
            robot = VolumeSecrets.parse({"username": "robot", "password": PASSWORD}, home.address)
            with trio.fail_after(90):
                async with open_node(tmp_path / "root", SETTINGS, ONE_AT_A_TIME) as node:
                    tree = await node.pull(f"{home.address}/tokens/queue:v1", robot)
                    assert shown(tree) == files

        trio.run(main)
    assert len(tokens.issued) > 1
    assert {one.authorization for one in tokens.requests} == {Credentials("robot", PASSWORD).basic}


# Ranges, and none


def test_a_registry_that_cuts_every_whole_is_given_up(
    tmp_path: Path, registry: RegistryServer, home: Proxy
) -> None:
    size = 40 * CHUNK
    builder, _ = weights(size)
    builder.push(registry, "wholes/cut", "v1")
    home.faults = Faults(ignore_range=True, cut_after=size // 2)

    async def work(node: Node) -> None:
        with trio.fail_after(30), pytest.raises(Unavailable):
            await node.pull(f"{home.address}/wholes/cut:v1")

    in_node(tmp_path / "root", SETTINGS, work)
    # the first one brought something
    assert home.counts.blob_requests() <= 1 + QUICK.attempts


def test_wholes_that_come_further_each_time_arrive(
    tmp_path: Path, registry: RegistryServer, home: Proxy
) -> None:
    size = 40 * CHUNK
    builder, files = weights(size)
    builder.push(registry, "wholes/further", "v1")
    further = iter(range(4 * CHUNK, 2 * size, 4 * CHUNK + 99))

    def cut(answer: BlobAnswer) -> BlobAnswer:
        return replace(answer, body=answer.body[: next(further)])

    home.faults = Faults(ignore_range=True, rewrites=[cut] * 99)

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/wholes/further:v1")) == files

    in_node(tmp_path / "root", SETTINGS, work)


SIZE = 400 * CHUNK
SOMETIMES = {
    # a cache that answers the whole until it has it; one of many servers that knows no ranges
    "the first, cut": Faults(wholes=[0], cut_after=int(0.9 * SIZE), cuts_left=1),
    "one in the middle": Faults(wholes=[int(0.8 * SIZE)]),
    "two in the middle": Faults(wholes=[int(0.5 * SIZE), int(0.9 * SIZE)]),
}


@pytest.mark.parametrize("name", SOMETIMES)
def test_a_registry_that_ignores_ranges_now_and_then_costs_little(
    tmp_path: Path, registry: RegistryServer, home: Proxy, name: str
) -> None:
    builder, files = weights(SIZE)
    builder.push(registry, "wholes/sometimes", "v1")
    faults = SOMETIMES[name]
    home.faults = replace(faults, wholes=list(faults.wholes))

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/wholes/sometimes:v1")) == files

    in_node(tmp_path / "root", SETTINGS, work)
    assert not home.faults.wholes
    assert home.counts.total <= 1.1 * SIZE, home.counts.ranges


def test_files_that_cannot_be_closed_properly_fail_no_complete_blob(
    tmp_path: Path, registry: RegistryServer, home: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder, files = weights(4 * CHUNK)
    builder.push(registry, "closing/failing", "v1")
    close = WholeFile.close
    failed: list[WholeFile] = []

    def failing(place: WholeFile) -> None:
        close(place)
        failed.append(place)
        # as close(2) may say
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(place.path))

    monkeypatch.setattr(WholeFile, "close", failing)

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/closing/failing:v1")) == files
        assert len(failed) == 1
        # neither the blob nor its map is open
        assert not [one for one in open_files() if failed[0].path.name in one]

    in_node(tmp_path / "root", SETTINGS, work)


def test_half_a_chunk_of_an_earlier_process_may_be_wrong(
    tmp_path: Path, registry: RegistryServer, home: Proxy
) -> None:
    builder, files = weights(3 * CHUNK)
    builder.push(registry, "begun/chunk", "v1")

    def wrong_half(answer: BlobAnswer) -> BlobAnswer:
        return replace(answer, body=bytes(CHUNK // 2))

    def broken(answer: BlobAnswer) -> BlobAnswer:
        return BlobAnswer(500, {"Content-Length": "0"}, b"")

    home.faults = Faults(rewrites=[wrong_half, *[broken] * 99])

    async def stopped(node: Node) -> None:
        with pytest.raises(Unavailable):
            await node.pull(f"{home.address}/begun/chunk:v1")

    async def carries_on(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/begun/chunk:v1")) == files

    in_node(tmp_path / "root", SETTINGS, stopped)
    home.faults = Faults()
    in_node(tmp_path / "root", SETTINGS, carries_on)
    assert f"bytes={CHUNK // 2}-{3 * CHUNK - 1}" in home.counts.ranges


# Two who want one blob


def _two_models(registry: RegistryServer, size: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Two models with one blob in common, ``two/first`` and ``two/second``."""
    builder, files = weights(size)
    (data,) = files.values()
    builder.push(registry, "two/first", "v1")
    ModelBuilder().add_raw("other.safetensors", data).push(registry, "two/second", "v1")
    return files, {"other.safetensors": data}


def test_who_comes_second_with_a_worse_registry_spoils_nothing(
    tmp_path: Path, registry: RegistryServer, home: Proxy, elsewhere: Proxy
) -> None:
    size = 8 * PIECE
    first, second = _two_models(registry, size)
    home.faults = Faults(bytes_per_second=size / 3)
    elsewhere.faults = Faults(statuses=[404] * 999)

    async def work(node: Node) -> None:
        async def late() -> None:
            await until(lambda: home.counts.total >= PIECE)
            assert shown(await node.pull(f"{elsewhere.address}/two/second:v1")) == second

        async with trio.open_nursery() as nursery:
            nursery.start_soon(late)
            assert shown(await node.pull(f"{home.address}/two/first:v1")) == first

    in_node(tmp_path / "root", SETTINGS, work)
    assert home.counts.total == size


def _answers(status: int) -> Rewrite:
    return lambda answer: BlobAnswer(status, {"Content-Length": "0"}, b"")


FAILS: dict[str, Rewrite] = {
    "lacks it": _answers(404),
    "refuses": _answers(403),
    "is broken": _answers(500),
    "lies": lambda answer: replace(answer, body=bytes(len(answer.body))),
}


@pytest.mark.parametrize("name", FAILS)
def test_where_one_registry_fails_the_next_askers_is_tried(
    tmp_path: Path, registry: RegistryServer, home: Proxy, elsewhere: Proxy, name: str
) -> None:
    size = 3 * CHUNK
    first, second = _two_models(registry, size)
    both_are_here = threading.Event()

    def fail(answer: BlobAnswer) -> BlobAnswer:
        both_are_here.wait(60)
        return FAILS[name](answer)

    home.faults = Faults(rewrites=[fail] * 99)

    async def work(node: Node) -> None:
        async def late() -> None:
            await until(lambda: home.counts.blob_requests() > 0)
            assert shown(await node.pull(f"{elsewhere.address}/two/second:v1")) == second

        async def release() -> None:
            await until(lambda: sum(bool(pull.jobs) for pull in node.pulls.running()) == 2)
            both_are_here.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(late)
            nursery.start_soon(release)
            assert shown(await node.pull(f"{home.address}/two/first:v1")) == first

    downloads = replace(QUICK, transfer=TransferSettings(connect_timeout=2, stall_timeout=60))

    async def main() -> None:
        with trio.fail_after(90):
            async with open_node(tmp_path / "root", SETTINGS, downloads) as node:
                await work(node)

    try:
        trio.run(main)
    finally:
        both_are_here.set()
    assert elsewhere.counts.total == size


# Two registries


@pytest.mark.parametrize("ranges", [True, False])
def test_a_slow_registry_leaves_connections_to_a_fast_one(
    tmp_path: Path, registry: RegistryServer, home: Proxy, elsewhere: Proxy, ranges: bool
) -> None:
    size = 12 * PIECE
    slow, slow_files = weights(*[size] * 3)
    slow.push(registry, "fair/slow", "v1")
    fast, fast_files = weights(2 * PIECE)
    fast.push(registry, "fair/fast", "v1")
    home.faults = Faults(ignore_range=not ranges, bytes_per_second=PIECE / 8)

    async def work(node: Node) -> None:
        async def crawl() -> None:
            assert shown(await node.pull(f"{home.address}/fair/slow:v1")) == slow_files

        async with trio.open_nursery() as nursery:
            nursery.start_soon(crawl)
            await until(lambda: home.counts.blob_requests() >= QUICK.connections)
            tree = await node.pull(f"{elsewhere.address}/fair/fast:v1")
            assert shown(tree) == fast_files
            # no request of the slow one came to its end meanwhile
            assert home.counts.total < PIECE
            home.faults = Faults(ignore_range=not ranges)

    async def main() -> None:
        downloads = replace(QUICK, transfer=TransferSettings(stall_timeout=60))
        with trio.fail_after(90):
            async with open_node(tmp_path / "root", SETTINGS, downloads) as node:
                await work(node)

    trio.run(main)
    # a part is gone on with at its byte; a whole was not interrupted, but what a range asked for
    # besides may have begun to come
    assert home.counts.total <= (1.1 if ranges else 1.02) * 3 * size


def test_a_silent_registry_is_found_out_though_others_take_its_turns(
    tmp_path: Path, registry: RegistryServer, home: Proxy, elsewhere: Proxy
) -> None:
    silent, _ = weights(PIECE)
    silent.push(registry, "fair/silent", "v1")
    slow, _ = weights(100 * PIECE)
    slow.push(registry, "fair/crawls", "v1")
    awake = threading.Event()
    home.faults = Faults(stall=awake)
    elsewhere.faults = Faults(bytes_per_second=PIECE / 8)
    downloads = DownloadSettings(
        connections=1, attempts=1, transfer=TransferSettings(stall_timeout=8)
    )

    async def main() -> None:
        with trio.fail_after(90):
            async with (
                open_node(tmp_path / "root", SETTINGS, downloads) as node,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(node.pull, f"{elsewhere.address}/fair/crawls:v1")
                await until(lambda: elsewhere.counts.blob_requests() > 0)
                with pytest.raises(Unavailable, match="sent 0 bytes in"):
                    await node.pull(f"{home.address}/fair/silent:v1")
                nursery.cancel_scope.cancel()

    try:
        trio.run(main)
    finally:
        awake.set()


# The end

_LOOKS_UP = """
import socket, sys, threading
import trio
from fetcher.answers import Piece
from fetcher.oci import Digest
from fetcher.ranges import Range
from fetcher.registry import BlobAccess
from fetcher.routes import Hop, Route
from fetcher.transfers import Transfers
from fetcher.transport import TransferSettings
from fetcher.trust import Trust

class Nothing:
    def __call__(self, data): return True
    def whole(self): return False

async def main():
    name_server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    name_server.bind(("127.0.0.77", 53))
    transfers = Transfers(1, TransferSettings(connect_timeout=60))
    name = "registry.example.com"
    access = BlobAccess(Hop(f"http://{name}/v2/x", (), Trust()), Route(name, name))
    piece = Piece(Digest.of(b"x"), 10, Range(0, 10))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transfers.run, name, lambda slot: slot.fetch(access, piece, Nothing()))
        await trio.to_thread.run_sync(name_server.recv, 512)
        nursery.cancel_scope.cancel()
    before = set(threading.enumerate())
    transfers.close()
    print("left behind:", len(set(threading.enumerate()) - before))
    print("still looked up:", any(one.name == f"look up {name}" for one in before))

trio.run(main)
"""


def test_a_look_up_that_hangs_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """It takes two tries of ten seconds, in a thread that nobody waits for."""
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("nameserver 127.0.0.77\noptions timeout:10 attempts:2\n")
    script = tmp_path / "looks_up.py"
    script.write_text(_LOOKS_UP)
    inside = 'mount --bind "$0" /etc/resolv.conf && ip link set lo up && exec "$@"'
    done = subprocess.run(
        [
            *("unshare", "--mount", "--net", "sh", "-c", inside, str(resolver)),
            *(sys.executable, str(script)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "left behind: 0\nstill looked up: True\n"
