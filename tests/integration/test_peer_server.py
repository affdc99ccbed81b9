"""The peer server with a real registry behind it: who gets what, and from where."""

from __future__ import annotations

import itertools
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import httpx
import pytest
import trio

from fetcher.modelpack import Kind, Packing, blob_layer
from fetcher.oci import Digest, Reference
from fetcher.peers.access import Asker
from fetcher.peers.http import HttpPatience
from fetcher.peers.server import PeerServerSettings
from fetcher.policy import ReferencePolicy
from fetcher.ranges import Range
from fetcher.store import Limits
from tests.support.models import ModelBuilder, tiny_model
from tests.support.peer_server import TOKEN, OwnsAll, PeerNode, Setup, peer_node
from tests.support.proxy import Proxy, serve_proxy
from tests.support.steps import cancelled_at
from tests.support.stores import CHUNK, QUICK, pull, weights

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.registry import RegistryServer

NOTHING = "sha256:" + 64 * "0"


def test_what_is_in_the_store_is_served_in_parts(registry: RegistryServer, tmp_path: Path) -> None:
    model = weights(5 * CHUNK + 3)
    reference = model.push(registry, "peers/stored")
    data = max(model.blobs.values(), key=len)
    digest = Digest.of(data)

    async def main() -> None:
        async with peer_node(tmp_path / "root") as node:
            await pull(node.pulls, reference)
            url = node.blob_url("peers/stored", digest, registry.address)
            whole = await node.client.get(url)
            assert whole.status_code == 200
            assert whole.content == data
            assert whole.headers["docker-content-digest"] == str(digest)
            assert whole.headers["model-csi-have"] == "all"
            part = await node.client.get(url, headers={"Range": f"bytes={CHUNK}-{2 * CHUNK - 1}"})
            assert part.status_code == 206
            assert part.content == data[CHUNK : 2 * CHUNK]
            assert part.headers["content-range"] == f"bytes {CHUNK}-{2 * CHUNK - 1}/{len(data)}"
            end = await node.client.get(url, headers={"Range": "bytes=-3"})
            assert end.content == data[-3:]
            beyond = await node.client.get(url, headers={"Range": f"bytes={len(data)}-"})
            assert beyond.status_code == 416
            assert beyond.headers["content-range"] == f"bytes */{len(data)}"
            head = await node.client.head(url)
            assert head.headers["content-length"] == str(len(data))
            assert head.content == b""
            assert node.served.from_store == 3

    trio.run(main)


def test_a_node_fetches_what_it_owns_and_says_no_to_the_rest(
    registry: RegistryServer, tmp_path: Path
) -> None:
    data = os.urandom(5 * CHUNK + 3)
    digest = registry.push_blob("peers/owned", data)

    async def main() -> None:
        async with peer_node(tmp_path / "other") as node:
            # not even the registry, of which there is none, is asked
            url = node.blob_url("peers/owned", digest, "127.0.0.1:1")
            first = {"Range": f"bytes=0-{CHUNK - 1}"}
            for asked in (first, {**first, "Model-CSI-Ready": "1"}):
                missing = await node.client.get(url, headers=asked)
                assert missing.status_code == 404
                assert missing.json()["errors"][0]["code"] == "BLOB_UNKNOWN"
                assert "model-csi-have" not in missing.headers
            assert node.served.lacking == 2
        async with peer_node(tmp_path / "owner", Setup(ownership=OwnsAll())) as node:
            url = node.blob_url("peers/owned", digest, registry.address)
            second = {"Range": f"bytes={CHUNK}-{2 * CHUNK - 1}"}
            found = await node.client.get(url, headers=second)
            assert (found.status_code, found.content) == (206, data[CHUNK : 2 * CHUNK])
            assert node.served.filled == 1
            again = await node.client.get(url, headers=second)
            assert again.content == found.content
            assert node.served.passed_on == 1
            job = node.jobs.running(digest)
            assert job is not None
            assert job.done == CHUNK
            assert again.headers["model-csi-have"] == f"{CHUNK}:40"
            # it has come through too many nodes: they may ask each other in circles
            third = {"Range": f"bytes={2 * CHUNK}-{3 * CHUNK - 1}", "Model-CSI-Hops": "4"}
            assert (await node.client.get(url, headers=third)).status_code == 404
            third["Model-CSI-Hops"] = "3"
            assert (await node.client.get(url, headers=third)).status_code == 206

    trio.run(main)


def test_foreign_clients_get_everything(registry: RegistryServer, tmp_path: Path) -> None:
    model = tiny_model()
    reference = model.push(registry, "peers/foreign")

    async def main() -> None:
        async with peer_node(tmp_path / "root") as node:
            del node.client.headers["Model-CSI-From"]
            ns = registry.address
            by_tag = await node.client.get(f"/v2/peers/foreign/manifests/latest?ns={ns}")
            assert by_tag.status_code == 200
            assert by_tag.content == model.manifest().body
            digest = by_tag.headers["docker-content-digest"]
            by_digest = await node.client.get(f"/v2/peers/foreign/manifests/{digest}?ns={ns}")
            assert by_digest.content == by_tag.content
            for blob, data in model.blobs.items():
                found = await node.client.get(node.blob_url("peers/foreign", blob, ns))
                assert found.content == data
            assert reference.endswith("latest")

    trio.run(main)


def test_archives_are_served_byte_for_byte(registry: RegistryServer, tmp_path: Path) -> None:
    files = {f"part-{number}.bin": os.urandom(CHUNK + number) for number in range(9)}
    model = ModelBuilder().add_tar(files, Packing.TAR, Kind.WEIGHT)
    reference = model.push(registry, "peers/tar")
    [layer] = model.layers
    digest = Digest.parse(layer["digest"])
    data = model.blobs[digest]

    async def main() -> None:
        async with peer_node(tmp_path / "root") as node:
            await pull(node.pulls, reference)
            assert not node.store.blob_path(digest).exists()
            url = node.blob_url("peers/tar", digest, registry.address)
            assert (await node.client.get(url)).content == data
            for start in range(0, len(data), 3 * CHUNK // 2):
                stop = min(start + 3 * CHUNK // 2, len(data))
                part = await node.client.get(url, headers={"Range": f"bytes={start}-{stop - 1}"})
                assert part.content == data[start:stop]

    trio.run(main)


class _AfterSome(threading.Event):
    """Lets some pieces of blobs pass, and the others once it is set."""

    def __init__(self) -> None:
        super().__init__()
        self._left = 3

    def wait(self, timeout: float | None = None) -> bool:
        self._left -= 1
        return self._left >= 0 or super().wait(timeout)


@pytest.mark.parametrize("packing", [Packing.RAW, Packing.TAR], ids=lambda one: one.value)
def test_what_arrives_is_passed_on_at_once(
    packing: Packing, registry: RegistryServer, tmp_path: Path
) -> None:
    """The first bytes of a chunk leave before its last have come, in order and unchanged."""
    files = {f"part-{number}.bin": os.urandom(CHUNK + number) for number in range(9)}
    builder = ModelBuilder()
    if packing is Packing.TAR:
        builder.add_tar(files, packing, Kind.WEIGHT)
    else:
        builder.add_raw("all.bin", b"".join(files.values()), Kind.WEIGHT)
    builder.push(registry, f"peers/{packing.value}-arriving")
    [layer] = builder.layers
    digest = Digest.parse(layer["digest"])
    data = builder.blobs[digest]

    async def main(proxy: Proxy) -> None:
        setup = Setup(ownership=OwnsAll(), chunk_size=8 * CHUNK)
        async with peer_node(tmp_path / "root", setup) as node:
            url = node.blob_url(f"peers/{packing.value}-arriving", digest, proxy.address)
            stall = proxy.faults.stall = _AfterSome()
            headers = {"Range": f"bytes=0-{len(data) - 1}", "Model-CSI-Layer": layer["mediaType"]}
            got = bytearray()
            async with node.client.stream("GET", url, headers=headers) as answer:
                async for piece in answer.aiter_raw():
                    got += piece
                    job = node.jobs.running(digest)
                    assert stall.is_set() or (job is not None and job.done < len(data))
                    stall.set()
            assert bytes(got) == data
            assert proxy.counts.total <= 1.02 * len(data)

    with serve_proxy(registry.address) as proxy:
        trio.run(main, proxy)


def test_all_who_want_a_chunk_share_one_fetch(registry: RegistryServer, tmp_path: Path) -> None:
    data = os.urandom(16 * CHUNK)
    digest = registry.push_blob("peers/shared", data)

    async def main(proxy: Proxy) -> None:
        async with peer_node(tmp_path / "root", Setup(ownership=OwnsAll())) as node:
            url = node.blob_url("peers/shared", digest, proxy.address)

            async def ask(number: int) -> None:
                start = number % 16 * CHUNK
                found = await node.client.get(
                    url, headers={"Range": f"bytes={start}-{start + CHUNK - 1}"}
                )
                assert found.content == data[start : start + CHUNK]

            async with trio.open_nursery() as nursery:
                for number in range(32):
                    nursery.start_soon(ask, number)
            assert proxy.counts.total == len(data)
            heads = [one for one in proxy.counts.requests if one[0] == "HEAD"]
            assert len(heads) == 1

    with serve_proxy(registry.address) as proxy:
        trio.run(main, proxy)


def test_a_fill_ends_when_nobody_asks_any_more(registry: RegistryServer, tmp_path: Path) -> None:
    data = os.urandom(4 * CHUNK)
    digest = registry.push_blob("peers/linger", data)

    async def main() -> None:
        setup = Setup(ownership=OwnsAll(), linger=0.1)
        async with peer_node(tmp_path / "root", setup) as node:
            url = node.blob_url("peers/linger", digest, registry.address)
            await node.client.get(url, headers={"Range": f"bytes=0-{CHUNK - 1}"})
            with trio.fail_after(10):
                while node.jobs.running(digest) is not None:  # noqa: ASYNC110 (no event for it)
                    await trio.sleep(0.01)
            whole = await node.client.get(url)
            assert whole.content == data

    trio.run(main)


def test_askers_may_leave_at_any_moment(registry: RegistryServer, tmp_path: Path) -> None:
    """Nothing stays behind that fetches, and who asks next gets what he asks for."""
    data = os.urandom(4 * CHUNK)
    digest = registry.push_blob("peers/leaving", data)
    layer = blob_layer(digest, len(data), "")
    asker = Asker(Reference(registry.address, "peers/leaving", None, digest), None)

    async def main() -> None:
        setup = Setup(ownership=OwnsAll(), linger=0.0)
        async with peer_node(tmp_path / "root", setup) as node:

            async def ask() -> None:
                ended = trio.Event()
                await node.rights.blob(asker)
                async with node.fills.filling(asker, layer) as job:
                    with node.fills.wanting(job, Range(0, CHUNK), ended.set) as wanting:
                        await ended.wait()
                assert wanting.failure is None

            for step in itertools.count():
                reached = await cancelled_at(step, ask)
                with trio.fail_after(20):
                    while node.jobs.running(digest) is not None:  # noqa: ASYNC110 (no event)
                        await trio.sleep(0.005)
                if not reached:
                    break
            assert step > 3
            whole = await node.client.get(node.blob_url("peers/leaving", digest, registry.address))
            assert whole.content == data

    trio.run(main)


def test_an_upstream_that_breaks_ends_the_answer_early(
    registry: RegistryServer, tmp_path: Path
) -> None:
    """What was sent is right, and nobody takes it for all."""
    data = os.urandom(8 * CHUNK)
    digest = registry.push_blob("peers/cut", data)

    async def main(proxy: Proxy) -> None:
        quick = replace(QUICK, attempts=1)
        setup = Setup(ownership=OwnsAll(), chunk_size=8 * CHUNK, download=quick)
        async with peer_node(tmp_path / "root", setup) as node:
            url = node.blob_url("peers/cut", digest, proxy.address)
            proxy.faults.cut_after = 5 * CHUNK
            proxy.faults.cuts_left = 1
            stall = proxy.faults.stall = _AfterSome()
            part = {"Range": f"bytes=0-{len(data) - 1}"}
            got = bytearray()

            async def read() -> None:
                async with node.client.stream("GET", url, headers=part) as answer:
                    proxy.faults.statuses = [503] * 50
                    stall.set()
                    async for piece in answer.aiter_raw():
                        got.extend(piece)

            with pytest.raises(httpx.RemoteProtocolError):
                await read()
            assert bytes(got) == data[: len(got)]
            proxy.faults.statuses = []
            again = await node.client.get(url, headers=part)
            assert again.content == data

    with serve_proxy(registry.address) as proxy:
        trio.run(main, proxy)


async def _end_of_uploads(node: PeerNode) -> None:
    with trio.fail_after(10):
        while node.served.uploads:  # noqa: ASYNC110 (no event for it)
            await trio.sleep(0.01)


def test_who_comes_when_it_is_busy_is_sent_elsewhere(
    registry: RegistryServer, tmp_path: Path
) -> None:
    data = os.urandom(64 * CHUNK)
    model = ModelBuilder().add_raw("all.bin", data, Kind.WEIGHT)
    reference = model.push(registry, "peers/busy")
    digest = Digest.of(data)

    async def main() -> None:
        async with peer_node(tmp_path / "root", Setup(uploads=1)) as node:
            await pull(node.pulls, reference)
            url = node.blob_url("peers/busy", digest, registry.address)
            part = {"Range": f"bytes=0-{CHUNK - 1}"}
            await node.client.get(url, headers={**part, "Model-CSI-From": "who-has-it"})
            whole = {"Range": f"bytes=0-{len(data) - 1}"}
            async with node.client.stream("GET", url, headers={**whole, "Model-CSI-From": "gone"}):
                # who has not been sent all of it is not named
                unnamed = await node.client.get(url, headers=whole)
            assert unnamed.status_code == 429
            assert "model-csi-try" not in unnamed.headers
            await _end_of_uploads(node)
            async with node.client.stream("GET", url):
                # more than sockets hold is on its way
                busy = await node.client.get(url, headers=part)
            assert busy.status_code == 429
            assert int(busy.headers["retry-after"]) >= 1
            assert busy.headers["model-csi-try"] == "who-has-it"
            assert busy.headers["model-csi-have"] == "all"
            assert busy.headers["model-csi-load"] == "1"
            assert busy.json()["errors"][0]["code"] == "TOOMANYREQUESTS"
            await _end_of_uploads(node)
            assert (await node.client.get(url, headers=part)).status_code == 206

    trio.run(main)


def test_uploads_keep_their_rate(registry: RegistryServer, tmp_path: Path) -> None:
    data = os.urandom(16 * CHUNK)
    model = ModelBuilder().add_raw("all.bin", data, Kind.WEIGHT)
    reference = model.push(registry, "peers/rate")

    async def main() -> None:
        async with peer_node(tmp_path / "root", Setup(rate=2 * len(data))) as node:
            await pull(node.pulls, reference)
            url = node.blob_url("peers/rate", Digest.of(data), registry.address)
            started = trio.current_time()
            assert (await node.client.get(url)).content == data
            assert trio.current_time() - started > 0.4

    trio.run(main)


def test_blobs_of_nothing_and_of_nowhere(registry: RegistryServer, tmp_path: Path) -> None:
    registry.push_blob("peers/nothing", b"something")
    empty = registry.push_blob("peers/nothing", b"")

    async def main() -> None:
        async with peer_node(tmp_path / "root", Setup(ownership=OwnsAll())) as node:
            found = await node.client.get(
                node.blob_url("peers/nothing", empty, registry.address),
                headers={"Range": "bytes=0-0"},
            )
            assert (found.status_code, found.content) == (200, b"")
            url = node.blob_url("peers/nothing", NOTHING, registry.address)
            missing = await node.client.get(url)
            assert missing.status_code == 404
            assert missing.json()["errors"][0]["code"] == "BLOB_UNKNOWN"
            assert (await node.client.head(url)).status_code == 404
            manifest = f"/v2/peers/nothing/manifests/{NOTHING}?ns={registry.address}"
            unknown = await node.client.get(manifest)
            assert unknown.json()["errors"][0]["code"] == "MANIFEST_UNKNOWN"
            assert (await node.client.post("/v2/a/blobs/uploads/", content=b"x")).status_code == 405
            assert (await node.client.get("/v2/")).status_code == 200

    trio.run(main)


def test_what_may_not_be_pulled_is_not_served(registry: RegistryServer, tmp_path: Path) -> None:
    digest = registry.push_blob("peers/forbidden", b"content")
    policy = ReferencePolicy.parse(["registry.example.org"], require_digest=False)

    async def main() -> None:
        async with peer_node(tmp_path / "root", Setup(ownership=OwnsAll(), policy=policy)) as node:
            refused = await node.client.get(
                node.blob_url("peers/forbidden", digest, registry.address)
            )
            assert refused.status_code == 403
            assert refused.json()["errors"][0]["code"] == "DENIED"
        async with peer_node(tmp_path / "other", Setup(ownership=OwnsAll())) as node:
            for address in ("169.254.169.254", "[fe80::1]:80", "100.100.100.200"):
                refused = await node.client.get(node.blob_url("a/b", digest, address))
                assert refused.status_code == 403
            unnamed = await node.client.get(f"/v2/peers/forbidden/blobs/{digest}")
            assert unnamed.status_code == 404

    trio.run(main)


def test_no_room_is_a_miss(registry: RegistryServer, tmp_path: Path) -> None:
    data = os.urandom(64 * CHUNK)
    digest = registry.push_blob("peers/full", data)

    async def main() -> None:
        limits = Limits(max_size=16 * CHUNK, min_free=0)
        async with peer_node(tmp_path / "root", Setup(ownership=OwnsAll(), limits=limits)) as node:
            url = node.blob_url("peers/full", digest, registry.address)
            missing = await node.client.get(url, headers={"Range": "bytes=0-9"})
            assert missing.status_code == 404

    trio.run(main)


# -- clients that are no good ------------------------------------------------------------------


async def _send(node: PeerNode, text: bytes) -> bytes:
    """What a raw connection gets until the server closes it."""
    stream = await trio.open_tcp_stream(*node.address)
    async with stream:
        await stream.send_all(text)
        got = bytearray()
        with trio.fail_after(10):
            try:
                while data := await stream.receive_some(65536):
                    got += data
            except trio.BrokenResourceError:
                pass
        return bytes(got)


def test_clients_that_are_slow_or_talk_nonsense(tmp_path: Path) -> None:
    async def main() -> None:
        async with peer_node(tmp_path / "root") as node:
            slow = await _send(node, b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            assert slow == b""
            assert (await _send(node, b"\x16\x03\x01 nonsense\r\n\r\n")).startswith(b"HTTP/1.1 400")
            long = b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 200_000
            assert (await _send(node, long)).startswith(b"HTTP/1.1 431")
            twice = (
                f"GET /v2/ HTTP/1.1\r\nHost: x\r\nModel-CSI-Peer: {TOKEN}\r\n"
                "Authorization: a\r\nAuthorization: b\r\n\r\n"
            )
            assert (await _send(node, twice.encode())).startswith(b"HTTP/1.1 400")
            body = (
                f"POST /v2/ HTTP/1.1\r\nHost: x\r\nModel-CSI-Peer: {TOKEN}\r\n"
                "Content-Length: 5\r\n\r\nhelloGET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"
            )
            answer = await _send(node, body.encode())
            assert answer.startswith(b"HTTP/1.1 405")
            assert answer.count(b"HTTP/1.1") == 1
            old = f"GET /v2/ HTTP/1.0\r\nModel-CSI-Peer: {TOKEN}\r\n\r\n"
            assert (await _send(node, old.encode())).startswith(b"HTTP/1.1 200")
            assert node.served.connections == 0

    trio.run(main)


def test_who_says_nothing_holds_no_connection(tmp_path: Path) -> None:
    async def main() -> None:
        server = PeerServerSettings(patience=HttpPatience(idle=600, head=0.2))
        async with peer_node(tmp_path / "root", Setup(server=server)) as node:
            with trio.fail_after(60):
                assert await _send(node, b"") == b""

    trio.run(main)


def test_an_authorization_that_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with peer_node(tmp_path / "root") as node:
            asked = (
                f"GET /v2/a/b/blobs/{NOTHING}?ns=127.0.0.1:9 HTTP/1.1\r\nHost: x\r\n"
                f"Model-CSI-Peer: {TOKEN}\r\nConnection: close\r\nAuthorization: Basic \xff\r\n\r\n"
            )
            answer = await _send(node, asked.encode("iso-8859-1"))
            assert answer.startswith(b"HTTP/1.1 400")

    trio.run(main)


def test_connections_have_a_limit(tmp_path: Path) -> None:
    async def main() -> None:
        server = PeerServerSettings(connections=3, connections_of_one=2)
        async with peer_node(tmp_path / "root", Setup(server=server)) as node:
            held = [await trio.open_tcp_stream(*node.address) for _ in range(2)]
            with trio.fail_after(10):
                while node.served.connections < 2:  # noqa: ASYNC110 (no event for it)
                    await trio.sleep(0.01)
            assert await _send(node, b"") == b""
            for one in held:
                await one.aclose()

    trio.run(main)


def test_who_takes_nothing_is_let_go(registry: RegistryServer, tmp_path: Path) -> None:
    data = os.urandom(256 * CHUNK)
    model = ModelBuilder().add_raw("all.bin", data, Kind.WEIGHT)
    reference = model.push(registry, "peers/lazy-client")

    async def main() -> None:
        server = PeerServerSettings(patience=HttpPatience(stall=0.3))
        async with peer_node(tmp_path / "root", Setup(server=server)) as node:
            await pull(node.pulls, reference)
            url = node.blob_url("peers/lazy-client", Digest.of(data), registry.address)
            request = f"GET {url} HTTP/1.1\r\nHost: x\r\nModel-CSI-Peer: {TOKEN}\r\n\r\n"
            async with await trio.open_tcp_stream(*node.address) as stream:
                await stream.send_all(request.encode())
                with trio.fail_after(10):
                    while not node.served.uploads:  # noqa: ASYNC110 (no event for it)
                        await trio.sleep(0.01)
                    while node.served.uploads:  # noqa: ASYNC110
                        await trio.sleep(0.01)
            # no more than what the sockets hold
            assert node.served.bytes < len(data)

    trio.run(main)
