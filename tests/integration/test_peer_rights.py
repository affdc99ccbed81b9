"""What a registry's word to one asker is worth for another question: never more than it said."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock

from fetcher.errors import AccessDenied, ModelError, NotFound, Unauthenticated, Unavailable
from fetcher.oci import Digest, Reference
from fetcher.peers.access import Asker, Rights
from fetcher.registry import Registry, RegistrySettings
from tests.support.faulty_registry import Reply
from tests.support.peer_server import OwnsAll, Setup, peer_node
from tests.support.proxy import serve_proxy
from tests.support.stores import CHUNK

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.support.faulty_registry import FaultyRegistry
    from tests.support.proxy import Proxy
    from tests.support.registry import RegistryServer
    from tests.support.token_server import TokenServer


def _run(main: Callable[[Rights, MockClock], Awaitable[None]]) -> None:
    """With a clock that stands still unless it is told to go on."""
    clock = MockClock()

    async def run() -> None:
        registry = Registry(RegistrySettings(attempts=1, retry_seconds=1))
        try:
            await main(Rights(registry, fresh=60.0, stale=600.0), clock)
        finally:
            await registry.aclose()

    trio.run(run, clock=clock)


def _asker(host: str, repository: str, digest: Digest, authorization: str | None) -> Asker:
    return Asker(Reference(host, repository, None, digest), authorization)


def _heads(proxy: Proxy) -> int:
    return sum(method == "HEAD" for method, _ in proxy.counts.requests)


@pytest.mark.parametrize("at_once", [False, True])
def test_askers_and_layers_are_added_and_not_multiplied(
    registry: RegistryServer, *, at_once: bool
) -> None:
    sizes = {registry.push_blob("rights/many", bytes(size)): size for size in range(1, 9)}
    shown = [None, *(f"Bearer {number}" for number in range(6))]

    async def main(rights: Rights, _: MockClock) -> None:
        async def ask(one: str | None, digest: Digest) -> None:
            asker = _asker(proxy.address, "rights/many", digest, one)
            assert await rights.blob(asker) == sizes[digest]

        async with trio.open_nursery() as nursery:
            for one in shown:
                for digest in sizes:
                    if at_once:
                        nursery.start_soon(ask, one, digest)
                    else:
                        await ask(one, digest)

    with serve_proxy(registry.address) as proxy:
        _run(main)
        assert max(len(shown), len(sizes)) <= _heads(proxy) < len(shown) + len(sizes)


def test_a_reader_of_one_repository_gets_no_blob_of_another(
    token_registry: RegistryServer, tokens: TokenServer, tmp_path: Path
) -> None:
    """Though the node has it, others were let read it, and he asks for it below either name."""
    secret, public = os.urandom(2 * CHUNK), os.urandom(CHUNK)
    theirs = token_registry.push_blob("rights/theirs", secret)
    ours = token_registry.push_blob("rights/ours", public)
    ns = token_registry.address

    def shows(repository: str) -> dict[str, str]:
        signed = tokens.sign("robot", f"repository:{repository}:pull", 300)
        return {"Authorization": f"Bearer {signed}"}

    async def main() -> None:
        async with peer_node(tmp_path / "root", Setup(ownership=OwnsAll())) as node:
            url = node.blob_url("rights/theirs", theirs, ns)
            owner, thief = shows("rights/theirs"), shows("rights/ours")
            assert (await node.client.get(url, headers=owner)).content == secret
            mine = node.blob_url("rights/ours", ours, ns)
            assert (await node.client.get(mine, headers=thief)).content == public
            assert (await node.client.get(url, headers=thief)).status_code in (401, 403)
            # nor is it known that this repository has it
            renamed = node.blob_url("rights/ours", theirs, ns)
            assert (await node.client.get(renamed, headers=thief)).status_code == 404
            # and that he has asked changes nothing for him or for others
            assert (await node.client.get(url, headers=thief)).status_code in (401, 403)
            assert (await node.client.get(url, headers=owner)).content == secret

    trio.run(main)


def test_rights_that_were_taken_away_last_as_long_as_a_word_does(
    registry: RegistryServer, faulty: FaultyRegistry
) -> None:
    """Other words that the registry gave meanwhile do not prolong them."""
    first, second, third = (registry.push_blob("rights/lost", bytes([one])) for one in range(3))
    lost, kept = "Bearer lost", "Bearer kept"

    def asker(digest: Digest, who: str) -> Asker:
        return _asker(faulty.address, "rights/lost", digest, who)

    async def main(rights: Rights, clock: MockClock) -> None:
        assert await rights.blob(asker(first, lost)) == 1
        faulty.add("/blobs/", Reply(401), shown=lost)
        clock.jump(50.0)
        for digest in (second, third):
            assert await rights.blob(asker(digest, kept)) == 1
        assert await rights.blob(asker(third, lost)) == 1
        clock.jump(10.0)
        for digest in (first, second, third):
            with pytest.raises(Unauthenticated):
                await rights.blob(asker(digest, lost))
            assert await rights.blob(asker(digest, kept)) == 1

    _run(main)


@pytest.mark.parametrize(("status", "error"), [(401, Unauthenticated), (403, AccessDenied)])
def test_one_refusal_ends_all_that_was_known_of_an_asker(
    registry: RegistryServer, faulty: FaultyRegistry, status: int, error: type[ModelError]
) -> None:
    """In that repository, at once, and of nobody else."""
    some, other = (registry.push_blob("rights/refused", bytes([one, one])) for one in range(2))
    lost, kept = "Bearer lost", "Bearer kept"

    def asker(digest: Digest, who: str) -> Asker:
        return _asker(faulty.address, "rights/refused", digest, who)

    async def main(rights: Rights, _: MockClock) -> None:
        for who in (lost, kept):
            assert await rights.blob(asker(some, who)) == 2
        faulty.add("/blobs/", Reply(status), shown=lost)
        for digest in (other, some):
            with pytest.raises(error):
                await rights.blob(asker(digest, lost))
        asked = len(faulty.requests)
        assert await rights.blob(asker(some, kept)) == 2
        assert len(faulty.requests) == asked

    _run(main)


def test_what_a_repository_has_no_more_is_forgotten(
    registry: RegistryServer, faulty: FaultyRegistry
) -> None:
    gone = registry.push_blob("rights/gone", b"gone")

    def asker(who: str) -> Asker:
        return _asker(faulty.address, "rights/gone", gone, who)

    async def main(rights: Rights, clock: MockClock) -> None:
        assert await rights.blob(asker("Bearer one")) == 4
        faulty.add("/blobs/", Reply(404))
        for who in ("Bearer two", "Bearer one"):
            with pytest.raises(NotFound):
                await rights.blob(asker(who))
        faulty.faults.clear()
        faulty.add("/blobs/", drop=True)
        with pytest.raises(Unavailable):
            await rights.blob(asker("Bearer one"))

    _run(main)


def test_while_the_registry_is_away_both_words_are_old_and_neither_is_made_up(
    registry: RegistryServer, faulty: FaultyRegistry
) -> None:
    some, other = (registry.push_blob("rights/away", bytes(3 + one)) for one in range(2))
    unseen = registry.push_blob("rights/away", b"unseen")

    def asker(digest: Digest, who: str) -> Asker:
        return _asker(faulty.address, "rights/away", digest, who)

    async def main(rights: Rights, clock: MockClock) -> None:
        assert await rights.blob(asker(some, "Bearer one")) == 3
        clock.jump(500.0)
        assert await rights.blob(asker(other, "Bearer two")) == 4
        faulty.add("/blobs/", drop=True)
        assert await rights.blob(asker(other, "Bearer one")) == 4
        for digest, who in ((unseen, "Bearer two"), (other, "Bearer three")):
            with pytest.raises(Unavailable):
                await rights.blob(asker(digest, who))
        clock.jump(100.0)
        with pytest.raises(Unavailable):
            await rights.blob(asker(other, "Bearer one"))

    _run(main)


def test_a_manifest_that_lists_a_blob_is_no_word_for_it(
    registry: RegistryServer, faulty: FaultyRegistry
) -> None:
    """Whoever may write one repository could name another one's blobs in it."""
    blob = registry.push_blob("rights/listed", b"listed")
    as_manifest = Asker(Reference(faulty.address, "rights/listed", None, blob), "Bearer one")

    async def main(rights: Rights, _: MockClock) -> None:
        said = Reply(headers={"Docker-Content-Digest": str(blob)})
        faulty.add("/manifests/", said)
        faulty.add("/blobs/", Reply(404))
        await rights.manifest(as_manifest)
        with pytest.raises(NotFound):
            await rights.blob(as_manifest)

    _run(main)
