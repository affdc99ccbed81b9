"""What is cached is shown to those only whose own registry lets them read it, by its own name."""

from __future__ import annotations

import sqlite3
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher import registry as registries
from fetcher.credentials import Anonymous, Credentials
from fetcher.errors import (
    AccessDenied,
    DigestMismatch,
    ModelError,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from fetcher.oci import Digest, Reference
from fetcher.policy import PullPolicy
from fetcher.registry import RegistrySettings
from tests.support.faulty_registry import FaultyRegistry, Reply, serve_faulty
from tests.support.models import ModelBuilder
from tests.support.proxy import Faults, serve_proxy
from tests.support.sources import (
    CHUNK,
    NOBODY,
    PIECE,
    Node,
    in_node,
    mirrors_toml,
    shown,
    weights,
    write_hosts,
)
from tests.support.token_server import PASSWORD

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fetcher.credentials import Keychain
    from tests.support.proxy import Proxy
    from tests.support.registry import RegistryServer
    from tests.support.token_server import TokenServer

SETTINGS = RegistrySettings(attempts=2, retry_seconds=5, connect_timeout=2, stall_timeout=2)


class Robot:
    """Credentials for some registries, and for no other."""

    def __init__(self, *registries: str) -> None:
        self._registries = registries

    async def lookup(self, registry: str, repository: str) -> Credentials | None:
        return Credentials("robot", PASSWORD) if registry in self._registries else None


def manifest_of(builder: ModelBuilder) -> Reply:
    """What a registry answers that has the manifest of a model, whatever it is asked for."""
    headers = {
        "Docker-Content-Digest": str(builder.digest),
        "Content-Type": builder.document["mediaType"],
    }
    return Reply(200, headers, builder.body)


@contextmanager
def evil_registry(manifest: Reply) -> Iterator[FaultyRegistry]:
    """A registry of somebody who has no more than ``manifest``."""
    with serve_faulty() as evil:
        evil.add("/manifests/", manifest)
        yield evil


async def running(node: Node, reference: str, keychain: Keychain = NOBODY) -> None:
    """Return once something of a model has come."""
    while not any(  # noqa: ASYNC110 - threads move bytes, no event tells
        pull.progress().done and str(pull.resolved.reference).startswith(reference)
        for pull in node.pulls.running()
    ):
        await trio.sleep(0.01)


# Bytes and manifests of others


def test_a_digest_is_no_key_to_a_model(tmp_path: Path, guarded: RegistryServer) -> None:
    builder, files = weights(CHUNK)
    builder.push(guarded, "access/digest", "v1")
    told = {"Docker-Content-Digest": str(builder.digest)}

    with evil_registry(Reply(200, told)) as evil:

        async def work(node: Node) -> None:
            reference = f"{guarded.address}/access/digest:v1"
            assert shown(await node.pull(reference, Robot(guarded.address))) == files
            for name in (":v1", f"@{builder.digest}"):
                with pytest.raises(DigestMismatch):
                    await node.pull(f"{evil.address}/any/thing{name}")

        in_node(tmp_path / "root", SETTINGS, work)
        assert [one.method for one in evil.requests] == ["GET", "GET"]


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, NotFound), (401, Unauthenticated), (403, AccessDenied), (405, Unavailable)],
)
def test_a_layers_digest_is_no_key_to_its_bytes(
    tmp_path: Path, guarded: RegistryServer, status: int, error: type[ModelError]
) -> None:
    builder, files = weights(CHUNK)
    builder.push(guarded, "access/layer", "v1")
    thief = ModelBuilder()
    annotations = {"org.cncf.model.filepath": "loot"}
    thief.layers.append({**builder.layers[0], "annotations": annotations})

    with evil_registry(manifest_of(thief)) as evil:
        evil.add("/blobs/", Reply(status))

        async def work(node: Node) -> None:
            reference = f"{guarded.address}/access/layer:v1"
            assert shown(await node.pull(reference, Robot(guarded.address))) == files
            for _ in range(2):
                with pytest.raises(error):
                    await node.pull(f"{evil.address}/any/thing:v1")

        in_node(tmp_path / "root", SETTINGS, work)
        assert {one.method for one in evil.asked("/blobs/")} == {"HEAD"}


def test_who_joins_a_pull_under_another_name_is_asked_about_by_that_name(
    tmp_path: Path, guarded: RegistryServer
) -> None:
    builder, files = weights(4 * PIECE)
    builder.push(guarded, "access/joined", "v1")

    with evil_registry(manifest_of(builder)) as evil, serve_proxy(guarded.address) as home:
        home.faults = Faults(bytes_per_second=PIECE)

        async def work(node: Node) -> None:
            reference = f"{home.address}/access/joined:v1"
            stolen: list[type[ModelError]] = []

            async def steal() -> None:
                try:
                    await node.pull(f"{evil.address}/any/thing:v1")
                except ModelError as failure:
                    stolen.append(type(failure))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(node.pull, reference, Robot(home.address))
                await running(node, home.address)
                nursery.start_soon(steal)
                while not evil.requests:  # noqa: ASYNC110 - its thread answers, no event tells
                    await trio.sleep(0.01)
                home.faults = Faults()
                assert shown(await node.pull(reference, Robot(home.address))) == files
            assert stolen == [NotFound]
            assert evil.asked("/blobs/")
            # and with all of it there
            with pytest.raises(NotFound):
                await node.pull(f"{evil.address}/any/thing:v1")

        in_node(tmp_path / "root", SETTINGS, work)


def test_each_name_is_asked_once_for_what_another_one_brought(
    tmp_path: Path, registry: RegistryServer
) -> None:
    builder, files = weights(CHUNK, 3, 5)
    for name in ("access/one", "access/two"):
        builder.push(registry, name, "v1")

    with serve_proxy(registry.address) as home:

        async def work(node: Node) -> None:
            assert shown(await node.pull(f"{home.address}/access/one:v1")) == files
            sent = home.counts.total
            for _ in range(2):
                assert shown(await node.pull(f"{home.address}/access/one:v1")) == files
            assert not [path for method, path in blobs(home) if method == "HEAD"]
            for _ in range(2):
                assert shown(await node.pull(f"{home.address}/access/two:v1")) == files
            heads = [path for method, path in blobs(home) if method == "HEAD"]
            assert len(heads) == len(set(heads)) == 3
            assert all("/access/two/" in path for path in heads)
            assert home.counts.total == sent

        in_node(tmp_path / "root", SETTINGS, work)
        names = [f"{home.address}/access/{name}:v1" for name in ("one", "two")]

    async def offline(node: Node) -> None:
        for name in names:
            assert shown(await node.pull(name)) == files

    in_node(tmp_path / "root", SETTINGS, offline)
    # a store of a version that did not ask
    with sqlite3.connect(tmp_path / "root/state.db") as database:
        database.execute("DROP TABLE proofs")
    database.close()
    in_node(tmp_path / "root", SETTINGS, offline)


def blobs(proxy: Proxy) -> list[tuple[str, str]]:
    """Method and path of the requests for blobs."""
    return [(method, path) for method, path in proxy.counts.requests if "/blobs/" in path]


def test_a_worse_source_takes_nothing_from_a_pull(tmp_path: Path, registry: RegistryServer) -> None:
    builder, files = weights(4 * PIECE, 3 * PIECE)
    builder.push(registry, "access/sources", "v1")

    with serve_proxy(registry.address) as home, serve_faulty(registry) as worse:
        home.faults = Faults(bytes_per_second=PIECE)
        worse.add("/blobs/", Reply(404))

        async def work(node: Node) -> None:
            reference = f"{home.address}/access/sources:v1"
            trees: list[dict[str, bytes]] = []

            async def first() -> None:
                trees.append(shown(await node.pull(reference)))

            async def other() -> None:
                # it has no such bytes, so it shows none, and that is its own trouble
                with pytest.raises(NotFound):
                    await node.pull(f"{worse.address}/access/sources:v1")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(first)
                await running(node, home.address)
                nursery.start_soon(other)
                while not worse.requests:  # noqa: ASYNC110 - its thread answers
                    await trio.sleep(0.01)
                home.faults = Faults()
            assert trees == [files]

        in_node(tmp_path / "root", SETTINGS, work)


# Whose word, and for whom


def test_access_is_of_the_credentials_that_were_shown(
    tmp_path: Path, guarded: RegistryServer
) -> None:
    builder, files = weights(CHUNK)
    builder.push(guarded, "access/alias", "v1")
    folder = tmp_path / "certs.d/models.example"
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(f'server = "http://{guarded.address}"\n')

    async def work(node: Node) -> None:
        reference = Reference.parse("models.example/access/alias:v1")
        tree = await node.pull(str(reference), Robot(guarded.address))
        assert shown(tree) == files
        with pytest.raises(Unauthenticated):
            await node.pull(str(reference))
        # whom these are for is not asked
        for keychain in (NOBODY, Robot("models.example")):
            with pytest.raises(NotFound):
                await node.pulls.resolve(reference, keychain, PullPolicy.NEVER)
        await node.pulls.resolve(reference, Robot(guarded.address), PullPolicy.NEVER)

    in_node(tmp_path / "root", replace(SETTINGS, hosts_dir=tmp_path / "certs.d"), work)


def test_a_manifest_is_sent_once_and_only_named_afterwards(
    tmp_path: Path, guarded: RegistryServer
) -> None:
    builder, files = weights(CHUNK)
    newer, newer_files = weights(CHUNK)
    builder.push(guarded, "access/sent", "v1")
    with serve_faulty(guarded) as home:

        async def work(node: Node) -> None:
            tag = f"{home.address}/access/sent:v1"
            robot = Robot(home.address)

            async def pulled(reference: str, keychain: Keychain) -> tuple[object, list[str]]:
                home.requests.clear()
                tree = shown(await node.pull(reference, keychain))
                asked = [one for one in home.asked("/manifests/") if "authorization" in one.headers]
                return tree, [one.method for one in asked]

            assert await pulled(tag, robot) == (files, ["GET"])
            assert await pulled(tag, robot) == (files, ["HEAD"])
            # what is here is no proof for whoever asks next: the registry is asked in his name
            with pytest.raises(Unauthenticated):
                await node.pull(tag)
            pinned = f"{home.address}/access/sent@{builder.digest}"
            assert await pulled(pinned, robot) == (files, ["HEAD"])
            newer.push(guarded, "access/sent", "v1")
            assert await pulled(tag, robot) == (newer_files, ["HEAD", "GET"])
            # and by another name it is sent again
            newer.push(guarded, "access/other", "v1")
            other = f"{home.address}/access/other@{newer.digest}"
            assert await pulled(other, robot) == (newer_files, ["GET"])

        in_node(tmp_path / "root", SETTINGS, work)


def test_a_refusal_ends_all_that_was_recorded_for_these_credentials(
    tmp_path: Path, tokens: TokenServer, token_registry: RegistryServer
) -> None:
    builder, _ = weights(CHUNK)
    builder.push(token_registry, "access/revoked", "v1")
    with serve_faulty(token_registry) as home:

        async def work(node: Node) -> None:
            reference = Reference.parse(f"{home.address}/access/revoked:v1")
            robot = Robot(home.address)
            await node.pull(str(reference), robot)
            await node.pulls.resolve(reference, robot, PullPolicy.NEVER)
            home.add("/manifests/v1", Reply(403))
            with pytest.raises(AccessDenied):
                await node.pull(str(reference), robot)
            for one in (reference, reference.with_digest(builder.digest)):
                with pytest.raises(NotFound):
                    await node.pulls.resolve(one, robot, PullPolicy.NEVER)

        in_node(tmp_path / "root", SETTINGS, work)


def test_a_fault_of_one_repository_does_not_make_the_registry_away(
    tmp_path: Path, guarded: RegistryServer, registry: RegistryServer
) -> None:
    builder, _ = weights(CHUNK)
    for one in (guarded, registry):
        builder.push(one, "access/away", "v1")
    with serve_faulty(guarded) as home:
        home.add("/v2/thief/", Reply(500))
        open_mirror = mirrors_toml(registry.address, capabilities='"pull", "resolve"')
        write_hosts(tmp_path / "certs.d", home.address, open_mirror)

        async def work(node: Node) -> None:
            reference = f"{home.address}/access/away:v1"
            with pytest.raises(Unavailable):
                await node.pull(f"{home.address}/thief/any:v1")
            with pytest.raises(Unauthenticated):
                await node.pull(reference)

        in_node(tmp_path / "root", replace(SETTINGS, hosts_dir=tmp_path / "certs.d"), work)


def test_what_a_mirror_says_of_a_registry_that_is_away_is_for_now(
    tmp_path: Path, guarded: RegistryServer, registry: RegistryServer
) -> None:
    builder, files = weights(CHUNK)
    for one in (guarded, registry):
        builder.push(one, "access/now", "v1")
    with serve_faulty(guarded) as home:
        open_mirror = mirrors_toml(registry.address, capabilities='"pull", "resolve"')
        write_hosts(tmp_path / "certs.d", home.address, open_mirror)

        async def work(node: Node) -> None:
            reference = Reference.parse(f"{home.address}/access/now:v1")
            fault = home.add("/v2/", Reply(503))
            assert shown(await node.pull(str(reference))) == files
            with pytest.raises(NotFound):
                await node.pulls.resolve(reference, Anonymous(), PullPolicy.NEVER)
            home.faults.remove(fault)
            with pytest.raises(Unauthenticated):
                await node.pull(str(reference))

        in_node(tmp_path / "root", replace(SETTINGS, hosts_dir=tmp_path / "certs.d"), work)


def test_a_slow_registry_is_waited_for_where_nobody_else_answers(
    tmp_path: Path, registry: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # seconds: what a registry with mirrors gets at first
    hurried = replace(registries._MOST_HURRIED, stall_timeout=0.2)
    monkeypatch.setattr(registries, "_MOST_HURRIED", hurried)
    builder, files = weights(CHUNK)
    builder.push(registry, "access/slow", "v1")

    def slow(reply: Reply) -> Reply:
        time.sleep(1)
        return reply

    with serve_faulty(registry) as home, serve_faulty() as mirror:
        home.add("/manifests/", change=slow)
        home.add("/blobs/", change=slow, method="HEAD")
        both = mirrors_toml(mirror.address, capabilities='"pull", "resolve"')
        write_hosts(tmp_path / "certs.d", home.address, both)

        async def work(node: Node) -> None:
            reference = Reference.parse(f"{home.address}/access/slow:v1")
            assert shown(await node.pull(str(reference))) == files
            # as when a token has expired in the middle
            blob = Digest.parse(builder.layers[0]["digest"])
            await node.registry.blob_access(reference, blob, NOBODY, renew=True)

        in_node(tmp_path / "root", replace(SETTINGS, hosts_dir=tmp_path / "certs.d"), work)
