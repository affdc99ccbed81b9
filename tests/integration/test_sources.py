"""Pulls from a registry and its mirrors, each behind a proxy that does its worst."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.credentials import Credentials, DockerConfig, VolumeSecrets
from fetcher.errors import DigestMismatch, ModelError, NotFound, Unauthenticated, Unavailable
from fetcher.modelpack import Selection
from fetcher.oci import Reference
from fetcher.policy import PullPolicy
from fetcher.registry import Registry, RegistrySettings
from tests.support.commands import ModelCsi
from tests.support.faulty_registry import FaultyRegistry, Reply, serve_faulty
from tests.support.forward_proxy import serve_forward_proxy
from tests.support.models import ModelBuilder
from tests.support.proxy import BlobAnswer, Faults, Proxy, serve_proxy
from tests.support.registry import serve_registry
from tests.support.registry_calls import NOBODY
from tests.support.sources import (
    CHUNK,
    PATIENT,
    PIECE,
    Node,
    in_node,
    mirrors_toml,
    open_node,
    shown,
    weights,
    write_hosts,
)
from tests.support.steps import cancelled_at
from tests.support.token_server import PASSWORD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.proxy import Rewrite
    from tests.support.registry import RegistryServer
    from tests.support.token_server import TokenServer

SETTINGS = RegistrySettings(attempts=2, retry_seconds=5, connect_timeout=2, stall_timeout=2)


@pytest.fixture
def second(registry: RegistryServer) -> Iterator[Proxy]:
    """Another one."""
    with serve_proxy(registry.address) as running:
        yield running


@contextlib.contextmanager
def listening() -> Iterator[str]:
    """An address that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def closed() -> str:
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def settings(tmp_path: Path, registry: str, text: str) -> RegistrySettings:
    write_hosts(tmp_path / "certs.d", registry, text)
    return replace(SETTINGS, hosts_dir=tmp_path / "certs.d")


# Who is asked for what


def test_a_mirror_serves_the_bytes_and_the_registry_the_proof(
    tmp_path: Path, registry: RegistryServer, home: Proxy, mirror: Proxy
) -> None:
    builder, files = weights(5 * PIECE + 7, 3)
    builder.push(registry, "mirrored/all", "v1")

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/mirrored/all:v1")) == files

    in_node(tmp_path / "root", settings(tmp_path, home.address, mirrors_toml(mirror.address)), work)
    assert home.counts.total == 0
    assert [method for method, _ in home.counts.requests] == ["GET"]
    assert mirror.counts.total == 5 * PIECE + 10
    assert all(path.endswith(f"?ns={home.address}") for _, path in mirror.counts.requests)
    assert all("/blobs/" in path for _, path in mirror.counts.requests)


FAULTS: dict[str, tuple[Faults, float, float]] = {
    # what the mirror does; what the registry may send at most, and both together, of the blob
    "missing": (Faults(statuses=[404] * 99), 1.0, 1.0),
    "wants credentials": (Faults(statuses=[401] * 99), 1.0, 1.0),
    "forbids": (Faults(statuses=[403] * 99), 1.0, 1.0),
    "broken": (Faults(statuses=[500] * 99), 1.0, 1.0),
    "asks to wait": (Faults(statuses=[429] * 99, extra_headers={"Retry-After": "99"}), 1.0, 1.0),
    "breaks once": (Faults(statuses=[502]), 1.0, 1.0),
    "cut once": (Faults(cut_after=3 * CHUNK + 77, cuts_left=1), 0.99, 1.0),
    "always cut": (Faults(cut_after=3 * CHUNK + 77), 0.99, 1.0),
    "cut at once": (Faults(cut_after=0), 1.0, 1.0),
    "ignores ranges": (Faults(ignore_range=True), 0.0, 1.0),
    "ignores ranges and is cut": (Faults(ignore_range=True, cut_after=20 * CHUNK + 5), 1.0, 1.02),
    "signed addresses": (Faults(signed_seconds=60), 0.0, 1.0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_mirror_that_fails_costs_no_byte_twice(
    tmp_path: Path, registry: RegistryServer, home: Proxy, mirror: Proxy, name: str
) -> None:
    size = 48 * CHUNK + 5
    builder, files = weights(size)
    builder.push(registry, "mirrored/faulty", "v1")
    faults, most_at_home, most = FAULTS[name]
    mirror.faults = replace(faults, statuses=list(faults.statuses))

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/mirrored/faulty:v1")) == files

    in_node(tmp_path / "root", settings(tmp_path, home.address, mirrors_toml(mirror.address)), work)
    assert home.counts.total <= most_at_home * size
    assert home.counts.total + mirror.counts.total <= most * size, mirror.counts.ranges


def test_mirrors_that_are_not_there_are_passed_over(
    tmp_path: Path, registry: RegistryServer, home: Proxy, mirror: Proxy
) -> None:
    builder, files = weights(4 * PIECE)
    builder.push(registry, "mirrored/away", "v1")

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/mirrored/away:v1")) == files

    with listening() as silent:
        text = mirrors_toml(closed(), silent, mirror.address)
        in_node(tmp_path / "root", settings(tmp_path, home.address, text), work)
    assert home.counts.total == 0
    assert mirror.counts.total == 4 * PIECE


def test_a_mirror_that_answers_and_falls_silent_is_left(
    tmp_path: Path, registry: RegistryServer, home: Proxy, mirror: Proxy
) -> None:
    builder, files = weights(4 * PIECE)
    builder.push(registry, "mirrored/silent", "v1")
    awake = threading.Event()
    mirror.faults = Faults(stall=awake)

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/mirrored/silent:v1")) == files

    try:
        text = mirrors_toml(mirror.address)
        in_node(tmp_path / "root", settings(tmp_path, home.address, text), work)
        assert home.counts.total == 4 * PIECE
        assert mirror.counts.ranges
    finally:
        awake.set()


def test_one_task_finds_out_whether_a_mirror_is_back_and_the_others_go_on(
    tmp_path: Path, registry: RegistryServer, home: Proxy, mirror: Proxy
) -> None:
    size = 16 * PIECE
    builder, files = weights(size)
    builder.push(registry, "mirrored/hangs", "v1")
    awake = threading.Event()
    home.faults = Faults(bytes_per_second=size / 3)
    mirror.faults = Faults(statuses=[503], stall=awake)

    async def main() -> None:
        both = settings(tmp_path, home.address, mirrors_toml(mirror.address))
        reference = Reference.parse(f"{home.address}/mirrored/hangs:v1")
        async with open_node(tmp_path / "root", both, PATIENT) as node:
            resolved = await node.pulls.resolve(reference, NOBODY, PullPolicy.ALWAYS)
            with node.pulls.join(resolved, Selection()) as joined:
                while (  # noqa: ASYNC110 - threads move bytes, no event tells
                    len(mirror.counts.ranges) < 2 or joined.progress().done < size - PIECE
                ):
                    await trio.sleep(0.01)
                # the request that hangs is still waited for, by nobody but itself
                base = f"http://{mirror.address}/v2"
                assert not node.registry.health.rest(base, trio.current_time())
                awake.set()
                assert shown(await joined.wait()) == files

    try:
        trio.run(main)
    finally:
        awake.set()
    assert mirror.counts.total + home.counts.total == size


def test_a_mirror_that_breaks_off_is_left_at_the_byte_where_it_stopped(
    tmp_path: Path, registry: RegistryServer, home: Proxy, mirror: Proxy
) -> None:
    builder, files = weights(8 * PIECE)
    builder.push(registry, "mirrored/stalls", "v1")

    def half(answer: BlobAnswer) -> BlobAnswer:
        body = answer.body[: len(answer.body) // 2]
        return replace(answer, body=body)

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/mirrored/stalls:v1")) == files

    mirror.faults = Faults(rewrites=[half] * 99)
    in_node(tmp_path / "root", settings(tmp_path, home.address, mirrors_toml(mirror.address)), work)
    total = home.counts.total + mirror.counts.total
    assert 0 < mirror.counts.total < total == 8 * PIECE


def test_a_mirror_that_sends_wrong_bytes_is_found_out(
    tmp_path: Path,
    registry: RegistryServer,
    home: Proxy,
    mirror: Proxy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    size = 4 * PIECE
    builder, files = weights(size)
    builder.push(registry, "mirrored/lies", "v1")
    other, others = weights(size)
    other.push(registry, "mirrored/lies", "v2")
    mirror.faults = Faults(corrupt_at=CHUNK + 1)

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/mirrored/lies:v1")) == files
        assert (home.counts.total, mirror.counts.total) == (size, size)
        assert shown(await node.pull(f"{home.address}/mirrored/lies:v2")) == others
        assert (home.counts.total, mirror.counts.total) == (2 * size, size)

    with caplog.at_level(logging.WARNING):
        in_node(
            tmp_path / "root", settings(tmp_path, home.address, mirrors_toml(mirror.address)), work
        )
    lines = [one.getMessage() for one in caplog.records if mirror.address in one.getMessage()]
    assert len(lines) == 1
    assert "wrong bytes" in lines[0]


def test_a_registry_that_sends_wrong_bytes_is_a_loss_of_data(
    tmp_path: Path, registry: RegistryServer, home: Proxy, mirror: Proxy
) -> None:
    builder, _ = weights(2 * PIECE)
    builder.push(registry, "mirrored/both-lie", "v1")
    home.faults = mirror.faults = Faults(corrupt_at=1)

    async def work(node: Node) -> None:
        with pytest.raises(DigestMismatch, match="another digest"):
            await node.pull(f"{home.address}/mirrored/both-lie:v1")

    in_node(tmp_path / "root", settings(tmp_path, home.address, mirrors_toml(mirror.address)), work)
    assert home.counts.total == mirror.counts.total == 2 * PIECE


def test_a_mirror_without_ranges_is_asked_once_for_the_whole_and_then_by_no_range(
    tmp_path: Path, registry: RegistryServer, home: Proxy, mirror: Proxy, second: Proxy
) -> None:
    size = 4 * PIECE
    models = [weights(size) for _ in range(3)]
    for number, (builder, _) in enumerate(models):
        builder.push(registry, "mirrored/whole", f"v{number}")
    mirror.faults = Faults(ignore_range=True)
    both = settings(tmp_path, home.address, mirrors_toml(mirror.address))

    async def work(node: Node) -> None:
        for number in range(3):
            if number == 2:
                text = mirrors_toml(mirror.address, second.address)
                write_hosts(tmp_path / "certs.d", home.address, text)
                await _has_mirrors(node, f"{home.address}/mirrored/whole:v2", 2)
            tree = await node.pull(f"{home.address}/mirrored/whole:v{number}")
            assert shown(tree) == models[number][1]

    in_node(tmp_path / "root", both, work)
    assert mirror.counts.ranges == [f"bytes=0-{PIECE - 1}", f"bytes=0-{size - 1}"]
    assert mirror.counts.total == 2 * size
    assert home.counts.total == 0
    # a mirror that knows ranges is worth more than one that does not, wherever it stands
    assert second.counts.total == size
    assert f"bytes=0-{size - 1}" not in second.counts.ranges


async def _has_mirrors(node: Node, reference: str, count: int) -> None:
    """Wait until a changed file is taken up, which needs no restart."""
    named = Reference.parse(reference)
    while len((await node.registry.hosts(named)).mirrors) != count:  # noqa: ASYNC110 - a file
        await trio.sleep(0.05)


# The registry away


def test_a_mirror_that_may_resolve_speaks_for_a_registry_that_is_away(
    tmp_path: Path, registry: RegistryServer, mirror: Proxy
) -> None:
    builder, files = weights(2 * PIECE)
    builder.push(registry, "resolved/model", "v1")
    other, others = weights(PIECE)
    other.push(registry, "resolved/model", "v2")
    text = mirrors_toml(mirror.address, capabilities='"pull", "resolve"')

    home = closed()

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home}/resolved/model:v1")) == files
        # remembered: an island does not wait at each publish
        assert node.registry.health.is_away(f"http://{home}/v2", trio.current_time())
        assert shown(await node.pull(f"{home}/resolved/model:v2")) == others
        with pytest.raises(Unavailable, match="no host that may resolve") as caught:
            await node.pull(f"{home}/resolved/nothing:v1")
        assert "does not have" in caught.value.message

    in_node(tmp_path / "root", settings(tmp_path, home, text), work)


def test_a_mirror_that_may_resolve_speaks_for_a_registry_that_has_a_fault(
    tmp_path: Path, registry: RegistryServer, mirror: Proxy
) -> None:
    builder, files = weights(2 * PIECE)
    builder.push(registry, "resolved/fault", "v1")
    text = mirrors_toml(mirror.address, capabilities='"pull", "resolve"')
    with serve_faulty() as home:
        home.add("/v2/", Reply(503))

        async def work(node: Node) -> None:
            assert shown(await node.pull(f"{home.address}/resolved/fault:v1")) == files
            # one fault, of one repository perhaps, is no reason not to ask it again
            asked = len(home.requests)
            assert shown(await node.pull(f"{home.address}/resolved/fault:v1")) == files
            assert len(home.requests) > asked

        in_node(tmp_path / "root", settings(tmp_path, home.address, text), work)


def test_a_registry_that_is_silent_is_not_waited_for_long(
    tmp_path: Path, registry: RegistryServer, mirror: Proxy
) -> None:
    builder, files = weights(PIECE)
    builder.push(registry, "resolved/silent", "v1")
    text = mirrors_toml(mirror.address, capabilities='"pull", "resolve"')
    with listening() as home:
        hurried = replace(settings(tmp_path, home, text), stall_timeout=0.5, retry_seconds=600)

        async def work(node: Node) -> None:
            assert shown(await node.pull(f"{home}/resolved/silent:v1")) == files

        in_node(tmp_path / "root", replace(hurried, attempts=1000), work)


def test_a_mirror_that_may_only_pull_decides_nothing(
    tmp_path: Path, registry: RegistryServer, mirror: Proxy
) -> None:
    builder, _ = weights(CHUNK)
    builder.push(registry, "resolved/closed", "v1")
    home = closed()

    async def work(node: Node) -> None:
        with pytest.raises(Unavailable, match="refuses connections"):
            await node.pull(f"{home}/resolved/closed:v1")

    in_node(tmp_path / "root", settings(tmp_path, home, mirrors_toml(mirror.address)), work)
    assert mirror.counts.requests == []


@pytest.mark.parametrize(("status", "error"), [(401, Unauthenticated), (404, NotFound)])
def test_what_the_registry_refuses_no_mirror_gives(
    tmp_path: Path, registry: RegistryServer, mirror: Proxy, status: int, error: type[ModelError]
) -> None:
    builder, _ = weights(CHUNK)
    builder.push(registry, "resolved/refused", "v1")
    text = mirrors_toml(mirror.address, capabilities='"pull", "resolve"')
    with serve_faulty(registry) as home:
        home.add("/manifests/", Reply(status))

        async def work(node: Node) -> None:
            with pytest.raises(error):
                await node.pull(f"{home.address}/resolved/refused:v1")

        in_node(tmp_path / "root", settings(tmp_path, home.address, text), work)
    assert mirror.counts.requests == []


# Credentials and headers


def _headers_of(faulty: FaultyRegistry) -> list[tuple[str | None, str | None]]:
    return [(one.authorization, one.headers.get("x-hop")) for one in faulty.requests]


def test_each_host_gets_its_own_credentials_and_its_own_headers(
    tmp_path: Path, guarded: RegistryServer
) -> None:
    builder, files = weights(PIECE)
    builder.push(guarded, "private/model", "v1")
    with (
        serve_registry(tmp_path / "other", users={"mirror-user": PASSWORD}) as other,
        serve_faulty(guarded) as home,
        serve_faulty(other) as mirror,
    ):
        builder.push(other, "private/model", "v1")
        text = (
            mirrors_toml(mirror.address) + f'[host."http://{mirror.address}".header]\nX-Hop="m"\n'
        )
        both = settings(tmp_path, home.address, text)
        secret = VolumeSecrets.parse({"username": "robot", "password": PASSWORD}, home.address)

        async def bare(node: Node) -> None:
            tree = await node.pull(f"{home.address}/private/model:v1", secret)
            assert shown(tree) == files

        in_node(tmp_path / "one", both, bare)
        assert set(_headers_of(mirror)) == {(None, "m")}
        assert len(home.asked("/blobs/")) == 1
        auths = {
            host: {"username": name, "password": PASSWORD}
            for host, name in ((home.address, "robot"), (mirror.address, "mirror-user"))
        }
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"auths": auths}))

        async def configured(node: Node) -> None:
            tree = await node.pull(f"{home.address}/private/model:v1", DockerConfig(config))
            assert shown(tree) == files

        mirror.requests.clear()
        in_node(tmp_path / "two", both, configured)
        assert mirror.requests[-1].authorization == Credentials("mirror-user", PASSWORD).basic
        assert len(home.asked("/blobs/")) == 1
        assert {hop for _, hop in _headers_of(mirror)} == {"m"}
        assert all("x-hop" not in one.headers for one in home.requests)
        robot = Credentials("robot", PASSWORD).basic
        assert all(one.authorization in (None, robot) for one in home.requests)


def test_tokens_that_expire_and_passwords_that_change_in_mid_pull(
    tmp_path: Path, token_registry: RegistryServer, tokens: TokenServer
) -> None:
    size = 16 * PIECE
    builder, files = weights(size)
    builder.push(token_registry, "tokens/model", "v1")
    # the registry allows a minute for clocks that differ: these tokens are good for 3 seconds
    tokens.lifetime, tokens.told_lifetime = -57, 300
    config = tmp_path / "config.json"

    with serve_proxy(token_registry.address) as home:

        def write(password: str) -> None:
            tokens.users["robot"] = password
            entry = {"username": "robot", "password": password}
            fresh = config.with_suffix(".new")
            fresh.write_text(json.dumps({"auths": {home.address: entry}}))
            fresh.replace(config)

        def rotate(answer: BlobAnswer) -> BlobAnswer:
            write("after")
            return answer

        home.faults = Faults(bytes_per_second=size / 7)
        write("before")

        async def work(node: Node) -> None:
            pulled = await node.pull(f"{home.address}/tokens/model:v1", DockerConfig(config))
            assert shown(pulled) == files

        home.faults.rewrites = [rotate]
        in_node(tmp_path / "root", SETTINGS, work)
        # the bodies of refusals are counted too
        assert size <= home.counts.total <= 1.01 * size
    used = {asked.authorization for asked in tokens.requests}
    assert used == {Credentials("robot", word).basic for word in ("before", "after")}


# As the driver and its commands are run


def test_a_command_reads_the_folder_and_the_proxies_that_it_is_told_of(
    tmp_path: Path, registry: RegistryServer, mirror: Proxy
) -> None:
    builder, files = weights(2 * PIECE)
    builder.push(registry, "command/model", "v1")
    home = f"registry.example:{registry.address.rpartition(':')[2]}"
    write_hosts(tmp_path / "certs.d", home, mirrors_toml(mirror.address))
    with serve_forward_proxy() as forward:
        cli = ModelCsi(
            tmp_path / "root",
            tmp_path,
            {
                "MODEL_CSI_HOSTS_DIR": str(tmp_path / "certs.d"),
                "MODEL_CSI_PLAIN_HTTP": "registry.example",
                "http_proxy": f"http://{forward.address}",
            },
        )
        done = cli.run("pull", f"{home}/command/model:v1", "--json")
    assert done.status == 0, done.errors
    tree = Path(done.json["path"])
    assert {one.name: one.read_bytes() for one in tree.iterdir()} == files
    assert mirror.counts.total == 2 * PIECE
    assert all("/manifests/" in goal for _, goal in forward.asked)
    assert {method for method, _ in forward.asked} == {"GET"}


def test_cancelling_at_any_checkpoint_leaves_hosts_that_can_be_asked(
    tmp_path: Path, registry: RegistryServer, mirror: Proxy
) -> None:
    builder, _ = weights(CHUNK)
    builder.push(registry, "cancelled/model", "v1")
    text = mirrors_toml(mirror.address, capabilities='"pull", "resolve"')
    with serve_faulty() as home:
        home.add("/v2/", drop=True)
        both = replace(settings(tmp_path, home.address, text), attempts=1)
        reference = Reference.parse(f"{home.address}/cancelled/model:v1")

        async def main(step: int) -> bool:
            client = Registry(both)
            try:
                came = await cancelled_at(step, lambda: client.resolve_model(reference, NOBODY))
                assert await client.head_manifest(reference, NOBODY) == builder.digest
            finally:
                await client.aclose()
            return came

        step = 0
        while trio.run(main, step):
            step += 3
        assert step > 20


# What registries do


def test_signed_addresses_that_expire_in_mid_pull(
    tmp_path: Path, registry: RegistryServer, home: Proxy
) -> None:
    size = 16 * PIECE
    builder, files = weights(size)
    builder.push(registry, "signed/model", "v1")
    home.faults = Faults(signed_seconds=1, bytes_per_second=size / 4)

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/signed/model:v1")) == files

    in_node(tmp_path / "root", SETTINGS, work)
    assert home.counts.refused_addresses > 0
    assert home.counts.total == size


def _chunked(answer: BlobAnswer) -> BlobAnswer:
    """Without a length, in pieces, as dynamic servers and some proxies send."""
    head = "".join(
        f"{name}: {value}\r\n" for name, value in answer.headers.items() if name != "Content-Length"
    )
    cut = len(answer.body) // 3 or 1
    pieces = [answer.body[at : at + cut] for at in range(0, len(answer.body), cut)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    status = f"HTTP/1.1 {answer.status} OK\r\nTransfer-Encoding: chunked\r\n"
    return replace(answer, raw=f"{status}{head}\r\n".encode() + body)


def _until_closed(answer: BlobAnswer) -> BlobAnswer:
    kept = {name: value for name, value in answer.headers.items() if name != "Content-Length"}
    return replace(answer, headers=kept)


def _with(answer: BlobAnswer, **headers: str) -> BlobAnswer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return replace(answer, headers={**answer.headers, **named})


def _shorter_than_said(answer: BlobAnswer) -> BlobAnswer:
    return replace(answer, body=answer.body[: len(answer.body) // 2])


def _said_too_short(answer: BlobAnswer) -> BlobAnswer:
    half = max(1, len(answer.body) // 2)
    return _with(replace(answer, body=answer.body[:half]), Content_Length=str(half))


def _longer(answer: BlobAnswer) -> BlobAnswer:
    return replace(_until_closed(answer), body=answer.body + b"tail")


def _less_of_the_range(answer: BlobAnswer) -> BlobAnswer:
    text = answer.headers["Content-Range"]
    start = int(text.partition(" ")[2].partition("-")[0])
    half = max(1, len(answer.body) // 2)
    part = f"bytes {start}-{start + half - 1}/{text.rpartition('/')[2]}"
    shorter = replace(answer, body=answer.body[:half])
    return _with(shorter, Content_Range=part, Content_Length=str(half))


def _ten(answer: BlobAnswer, content_range: str) -> BlobAnswer:
    few = replace(answer, body=b"0123456789")
    return _with(few, Content_Range=content_range, Content_Length="10")


ALWAYS: dict[str, Rewrite] = {
    "chunked": _chunked,
    "until closed": _until_closed,
    "longer than said": _longer,
    "less of the range": _less_of_the_range,
    "length too small": _said_too_short,
    "encoding in name only": lambda answer: _with(answer, Content_Encoding="gzip"),
}
ONCE: dict[str, Rewrite] = {
    "body too short": _shorter_than_said,
    "another range": lambda answer: _ten(answer, "bytes 1-10/70"),
    "no range at all": lambda answer: _ten(answer, "what?"),
    "another size": lambda answer: _ten(answer, "bytes 0-9/10"),
    "out of range": lambda answer: replace(answer, status=416, body=b""),
    "empty": lambda answer: replace(_until_closed(answer), body=b""),
    "no content": lambda answer: BlobAnswer(204, {}, b""),
    "compressed": lambda answer: _with(
        replace(_until_closed(answer), body=b"\x1f\x8b123"), Content_Encoding="gzip"
    ),
    "a portal": lambda answer: BlobAnswer(200, {"Content-Type": "text/html"}, b"<html>sign in"),
    "another length": lambda answer: BlobAnswer(200, {"Content-Length": "7"}, b"1234567"),
    "garbage": lambda answer: replace(answer, raw=b"\x00\xff" * 600),
    "nothing": lambda answer: replace(answer, raw=b""),
    "endless headers": lambda answer: replace(
        answer, raw=b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000
    ),
}


@pytest.mark.parametrize("name", [*ALWAYS, *ONCE])
def test_answers_that_are_not_as_they_should_be(
    tmp_path: Path, registry: RegistryServer, home: Proxy, name: str
) -> None:
    """From the registry itself, with no mirror to go to."""
    size = 6 * PIECE + 11
    builder, files = weights(size)
    builder.push(registry, "strange/model", "v1")
    rewrites = [ALWAYS[name]] * 200 if name in ALWAYS else [ONCE[name]] * 3
    home.faults = Faults(rewrites=rewrites)

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/strange/model:v1")) == files

    in_node(tmp_path / "root", SETTINGS, work)
    assert home.counts.total <= 1.02 * size


@pytest.mark.parametrize("name", ["chunked", "until closed"])
def test_a_whole_answer_without_a_length(
    tmp_path: Path, registry: RegistryServer, home: Proxy, name: str
) -> None:
    size = 6 * PIECE + 11
    builder, files = weights(size)
    builder.push(registry, "strange/whole", "v1")
    home.faults = Faults(rewrites=[ALWAYS[name]] * 99, ignore_range=True)

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/strange/whole:v1")) == files

    in_node(tmp_path / "root", SETTINGS, work)
    assert len(home.counts.ranges) == 1


def test_a_part_that_nobody_asked_for_is_not_asked_for_for_ever(
    tmp_path: Path, registry: RegistryServer, home: Proxy
) -> None:
    """A registry that answers ranges with the whole, and the whole with a part."""
    builder, _ = weights(4 * PIECE)
    builder.push(registry, "strange/parts", "v1")

    def part(answer: BlobAnswer) -> BlobAnswer:
        few = BlobAnswer(206, answer.headers, answer.body[:CHUNK])
        said = f"bytes 0-{CHUNK - 1}/{4 * PIECE}"
        return _with(few, Content_Range=said, Content_Length=str(CHUNK))

    home.faults = Faults(ignore_range=True, rewrites=[_shorter_than_said, *[part] * 99])

    async def work(node: Node) -> None:
        with pytest.raises(Unavailable, match="answered with bytes 0 to"):
            await node.pull(f"{home.address}/strange/parts:v1")

    in_node(tmp_path / "root", SETTINGS, work)


def test_a_small_file_has_no_ranges_to_ask_for(
    tmp_path: Path, registry: RegistryServer, home: Proxy
) -> None:
    ModelBuilder().add_raw("empty.txt", b"").add_raw("a.txt", b"a").push(registry, "tiny/it", "v1")

    async def work(node: Node) -> None:
        assert shown(await node.pull(f"{home.address}/tiny/it:v1")) == {
            "empty.txt": b"",
            "a.txt": b"a",
        }

    in_node(tmp_path / "root", SETTINGS, work)
