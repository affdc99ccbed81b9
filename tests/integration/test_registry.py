"""Registry access against a real registry, alone and behind a proxy that misbehaves."""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio

from fetcher.credentials import Credentials, VolumeSecrets
from fetcher.errors import (
    InvalidArtifact,
    InvalidRequest,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from fetcher.exchange import endpoint
from fetcher.oci import IMAGE_INDEX, Digest, Index, Manifest, Reference
from fetcher.registry import BlobAccess, Registry, RegistrySettings
from tests.support.faulty_registry import LOGIN_PAGE
from tests.support.registry import OCI_MANIFEST, RegistryServer, make_tls, serve_registry
from tests.support.registry_calls import (
    NOBODY,
    QUICK,
    ROBOT,
    WRONG,
    ask,
    call_by_name,
    manifest,
    opened,
    push_model,
    resolve,
)
from tests.support.token_server import PASSWORD

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.token_server import TokenServer

MODEL_TYPE = "application/vnd.cncf.model.manifest.v1+json"


# Reading


def test_a_manifest_is_read_by_tag_and_by_digest(registry: RegistryServer) -> None:
    digest = push_model(registry, "read/model")
    by_tag = manifest(registry.reference("read/model", "v1"))
    by_digest = manifest(f"{registry.address}/read/model@{digest}")
    assert isinstance(by_tag, Manifest)
    assert by_tag == by_digest
    assert by_tag.digest == digest
    assert by_tag.artifact_type == MODEL_TYPE


def test_a_head_finds_the_digest_and_a_small_blob_is_read(registry: RegistryServer) -> None:
    digest = push_model(registry, "read/head")

    async def call(client: Registry, reference: Reference) -> None:
        assert await client.head_manifest(reference, NOBODY) == digest
        assert await client.head_manifest(reference.with_digest(digest), NOBODY) == digest
        assert await client.blob(reference, Digest.of(b"{}"), 2, NOBODY) == b"{}"
        with pytest.raises(NotFound, match="blob sha256:"):
            await client.blob(reference, Digest.of(b"other"), 5, NOBODY)
        with pytest.raises(InvalidArtifact, match="bytes"):
            await client.blob(reference, Digest.of(b"{}"), 5 << 20, NOBODY)

    ask(call, registry.reference("read/head", "v1"))


def test_what_is_not_there_is_said_to_be_missing(registry: RegistryServer) -> None:
    push_model(registry, "read/missing")
    with pytest.raises(NotFound, match="read/missing with the tag v9: check the spelling"):
        manifest(registry.reference("read/missing", "v9"))
    with pytest.raises(NotFound, match="no/such/model"):
        manifest(registry.reference("no/such/model"))
    absent = Digest.of(b"absent")
    with pytest.raises(NotFound, match=f"with the digest {absent}"):
        manifest(f"{registry.address}/read/missing@{absent}")
    with pytest.raises(NotFound):
        ask(
            lambda client, reference: client.head_manifest(reference, NOBODY),
            registry.reference("read/missing", "v9"),
        )


def test_the_transport_is_told_where_a_blob_is(registry: RegistryServer) -> None:
    push_model(registry, "read/access")
    digest = Digest.of(b"{}")

    async def call(client: Registry, reference: Reference) -> BlobAccess:
        first = await client.blob_access(reference, digest, NOBODY)
        assert await client.blob_access(reference, digest, NOBODY, renew=True) == first
        with pytest.raises(NotFound):
            await client.blob_access(reference, Digest.of(b"absent"), NOBODY, renew=True)
        return first

    access = ask(call, registry.reference("read/access", "v1"))
    assert access.hop.url == f"{registry.url}/v2/read/access/blobs/{digest}"
    assert access.hop.headers == ()
    assert access.hop.trust.verify


def test_many_tasks_share_one_registry(registry: RegistryServer) -> None:
    digest = push_model(registry, "read/many")

    async def call(client: Registry, reference: Reference) -> None:
        async def one() -> None:
            assert (await client.manifest(reference, NOBODY)).digest == digest

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(one)

    ask(call, registry.reference("read/many", "v1"))


# Indexes


def push_index(server: RegistryServer, repository: str, *manifests: dict[str, Any]) -> Digest:
    body = json.dumps(
        {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": list(manifests)}
    ).encode()
    return server.push_manifest(repository, "index", body, IMAGE_INDEX)


def described(server: RegistryServer, repository: str, note: str, **more: Any) -> dict[str, Any]:
    digest = push_model(server, repository, tag=note, note=note)
    body = server.blob_path(digest).read_bytes()
    return {"mediaType": OCI_MANIFEST, "digest": str(digest), "size": len(body), **more}


HERE = "arm64" if platform.machine() == "aarch64" else "amd64"


def linux(architecture: str) -> dict[str, Any]:
    return {"platform": {"os": "linux", "architecture": architecture}}


def picked(server: RegistryServer, repository: str) -> tuple[str, Digest]:
    found, top = resolve(server.reference(repository, "index"))
    return found.annotations["note"], top


def test_an_index_gives_the_manifest_of_this_platform(registry: RegistryServer) -> None:
    name = "index/platform"
    index = push_index(
        registry,
        name,
        described(registry, name, "other", **linux("riscv64")),
        described(registry, name, "windows", platform={"os": "windows", "architecture": HERE}),
        described(registry, name, "here", **linux(HERE)),
        described(registry, name, "here-too", **linux(HERE)),
    )
    assert picked(registry, name) == ("here", index)


def test_an_index_of_one_needs_no_platform(registry: RegistryServer) -> None:
    name = "index/single"
    unknown = {"platform": {"os": "unknown", "architecture": "unknown"}}
    index = push_index(
        registry,
        name,
        described(registry, name, "only", **linux("riscv64")),
        described(registry, name, "attestation", **unknown),
    )
    assert picked(registry, name) == ("only", index)


def test_an_index_with_one_model_gives_it(registry: RegistryServer) -> None:
    name = "index/model"
    push_index(
        registry,
        name,
        described(registry, name, "image"),
        described(registry, name, "model", artifactType=MODEL_TYPE),
        described(registry, name, "chart", artifactType="application/x.chart"),
    )
    assert picked(registry, name)[0] == "model"


def test_an_index_that_leaves_nothing_to_pick_is_listed(registry: RegistryServer) -> None:
    name = "index/none"
    push_index(
        registry,
        name,
        described(registry, name, "one", **linux("riscv64")),
        described(registry, name, "two", artifactType="application/x.chart"),
    )
    with pytest.raises(InvalidArtifact, match=r"linux/riscv64.*application/x\.chart"):
        resolve(registry.reference(name, "index"))


def test_indexes_in_indexes_end_somewhere(registry: RegistryServer) -> None:
    name = "index/nested"
    inner = push_index(registry, name, described(registry, name, "deep"))
    for depth in range(2):
        size = len(registry.blob_path(inner).read_bytes())
        inner = push_index(
            registry, name, {"mediaType": IMAGE_INDEX, "digest": str(inner), "size": size}
        )
        if depth == 0:
            assert picked(registry, name) == ("deep", inner)
    with pytest.raises(InvalidArtifact, match="indexes lie in each other"):
        resolve(registry.reference(name, "index"))


def test_a_pinned_index_is_a_pinned_index(registry: RegistryServer) -> None:
    name = "index/pinned"
    index = push_index(registry, name, described(registry, name, "it"))
    found, top = resolve(f"{registry.address}/{name}:gone@{index}")
    assert top == index
    assert found.annotations["note"] == "it"
    assert isinstance(manifest(f"{registry.address}/{name}@{index}"), Index)


# Names and passwords


def test_a_password_opens_a_registry(guarded: RegistryServer) -> None:
    digest = push_model(guarded, "acme/model")
    found, top = resolve(guarded.reference("acme/model", "v1"), ROBOT)
    assert (found.digest, top) == (digest, digest)

    async def call(client: Registry, reference: Reference) -> BlobAccess:
        await client.blob_access(reference, Digest.of(b"{}"), ROBOT)
        return await client.blob_access(reference, Digest.of(b"{}"), ROBOT)

    access = ask(call, guarded.reference("acme/model", "v1"))
    assert access.hop.headers == (("Authorization", Credentials("robot", PASSWORD).basic),)
    assert access.hop.headers[0][1] not in repr(access)


def test_without_a_password_and_with_a_wrong_one(guarded: RegistryServer) -> None:
    push_model(guarded, "acme/closed")
    reference = guarded.reference("acme/closed", "v1")
    with pytest.raises(Unauthenticated, match="without credentials, and none were found"):
        manifest(reference)
    with pytest.raises(Unauthenticated, match="does not accept the credentials"):
        manifest(reference, WRONG)


def test_one_pods_access_is_not_anothers(guarded: RegistryServer) -> None:
    push_model(guarded, "acme/private")

    async def call(client: Registry, reference: Reference) -> None:
        for _ in range(2):
            assert isinstance(await client.head_manifest(reference, ROBOT), Digest)
            for keychain in (NOBODY, WRONG):
                with pytest.raises(Unauthenticated):
                    await client.head_manifest(reference, keychain)
                with pytest.raises(Unauthenticated):
                    await client.blob_access(reference, Digest.of(b"{}"), keychain, renew=True)

    ask(call, guarded.reference("acme/private", "v1"))


# Tokens


def test_a_token_opens_a_registry_and_is_used_again(
    token_registry: RegistryServer, tokens: TokenServer
) -> None:
    digest = push_model(token_registry, "acme/model")

    async def call(client: Registry, reference: Reference) -> None:
        for _ in range(3):
            assert (await client.manifest(reference, ROBOT)).digest == digest
            access = await client.blob_access(reference, Digest.of(b"{}"), ROBOT)
            assert access.hop.headers == (("Authorization", f"Bearer {tokens.issued[0]}"),)

    ask(call, token_registry.reference("acme/model", "v1"))
    (asked,) = tokens.requests
    assert asked.method == "GET"
    assert asked.parameters == {
        "service": "registry under test",
        "scope": "repository:acme/model:pull",
    }


def test_tokens_for_strangers_wrong_passwords_and_identities(
    token_registry: RegistryServer, tokens: TokenServer
) -> None:
    push_model(token_registry, "acme/model")
    reference = token_registry.reference("acme/model", "v1")
    with pytest.raises(Unauthenticated, match="none were found"):
        manifest(reference)
    with pytest.raises(Unauthenticated, match="does not accept"):
        manifest(reference, WRONG)
    tokens.anonymous = True
    assert manifest(reference)
    tokens.identity_tokens.add("refresh-me")
    auths = {"auths": {token_registry.address: {"identitytoken": "refresh-me"}}}
    keychain = VolumeSecrets.parse({".dockerconfigjson": json.dumps(auths)}, "unrelated.example")
    assert manifest(reference, keychain)
    assert tokens.requests[-1].method == "POST"
    assert tokens.requests[-1].authorization is None


def test_a_token_that_expired_is_renewed(
    token_registry: RegistryServer, tokens: TokenServer
) -> None:
    digest = push_model(token_registry, "acme/model")
    # the registry allows a minute for clocks that differ, so this token has expired for it already
    tokens.lifetime, tokens.told_lifetime = -120, 300

    async def call(client: Registry, reference: Reference) -> None:
        with pytest.raises(Unauthenticated):
            await client.manifest(reference, ROBOT)
        tokens.lifetime = 300
        assert (await client.manifest(reference, ROBOT)).digest == digest
        fresh = tokens.issued[-1]
        access = await client.blob_access(reference, Digest.of(b"{}"), ROBOT, renew=True)
        assert access.hop.headers == (("Authorization", f"Bearer {fresh}"),)

    ask(call, token_registry.reference("acme/model", "v1"))


def test_connections_that_are_refused_together_cost_one_token(
    token_registry: RegistryServer, tokens: TokenServer
) -> None:
    push_model(token_registry, "acme/model")

    async def call(client: Registry, reference: Reference) -> None:
        await client.manifest(reference, ROBOT)
        tokens.delay = 0.2
        accesses: list[BlobAccess] = []

        async def renew() -> None:
            accesses.append(
                await client.blob_access(reference, Digest.of(b"{}"), ROBOT, renew=True)
            )

        client._conversations._tokens._kept.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(renew)
        assert len(set(accesses)) == 1

    ask(call, token_registry.reference("acme/model", "v1"))
    assert len(tokens.requests) == 2


def test_a_token_server_in_trouble(token_registry: RegistryServer, tokens: TokenServer) -> None:
    push_model(token_registry, "acme/model")
    reference = token_registry.reference("acme/model", "v1")
    tokens.failures = 1
    assert manifest(reference, ROBOT)
    tokens.answer = (200, "text/html", LOGIN_PAGE)
    with pytest.raises(Unavailable, match="answered with a page"):
        manifest(reference, ROBOT)
    tokens.answer = (200, "application/json", b" " * 300_000)
    with pytest.raises(InvalidArtifact, match="larger than"):
        manifest(reference, ROBOT)
    tokens.answer = (302, "text/plain", b"")
    with pytest.raises(Unavailable, match="answered 302"):
        manifest(reference, ROBOT)


# TLS


def test_tls_is_verified_unless_told_otherwise(tmp_path: Path) -> None:
    tls = make_tls(tmp_path / "tls")
    with serve_registry(tmp_path / "registry", tls=tls) as server:
        push_model(server, "acme/model")
        reference = server.reference("acme/model", "v1")
        assert manifest(reference, https=("127.0.0.1",), ca_file=tls.ca)
        assert manifest(reference, https=(server.address,), ca_file=tls.ca)
        assert manifest(reference, insecure=("127.0.0.1",))
        with pytest.raises(Unavailable, match=r"is not trusted.*CA file"):
            manifest(reference, https=("127.0.0.1",))
        access = ask(
            lambda client, parsed: client.blob_access(parsed, Digest.of(b"{}"), NOBODY),
            reference,
            replace(QUICK, insecure=("127.0.0.1",)),
        )
        assert access.hop.url.startswith("https://")
        assert not access.hop.trust.verify


def test_a_ca_file_that_is_none(tmp_path: Path) -> None:
    for content in (None, b"nonsense"):
        path = tmp_path / "ca.pem"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InvalidRequest, match=r"ca\.pem cannot be used"):
            Registry(RegistrySettings(ca_file=path))


def test_plain_http_where_tls_is_expected_and_the_other_way_round(
    registry: RegistryServer, tmp_path: Path
) -> None:
    with pytest.raises(Unavailable, match="does not speak TLS"):
        manifest(registry.reference("acme/model"), https=("127.0.0.1",))
    tls = make_tls(tmp_path / "tls")
    with (
        serve_registry(tmp_path / "registry", tls=tls) as server,
        pytest.raises(Unavailable, match="HTTP status 400"),
    ):
        manifest(server.reference("acme/model"))


@pytest.mark.parametrize(
    ("registry_name", "settings", "url", "verify"),
    [
        ("ghcr.io", {}, "https://ghcr.io", True),
        ("docker.io", {}, "https://registry-1.docker.io", True),
        ("localhost", {}, "http://localhost", True),
        ("localhost:5000", {}, "http://localhost:5000", True),
        ("127.0.0.1:5000", {}, "http://127.0.0.1:5000", True),
        ("[::1]:5000", {}, "http://[::1]:5000", True),
        ("127.0.0.1:5000", {"https": ("127.0.0.1:5000",)}, "https://127.0.0.1:5000", True),
        ("127.0.0.1:5001", {"https": ("127.0.0.1:5000",)}, "http://127.0.0.1:5001", True),
        ("localhost:5000", {"insecure": ("localhost",)}, "https://localhost:5000", False),
        ("mirror.lan:80", {"plain_http": ("mirror.lan:80",)}, "http://mirror.lan:80", True),
        ("mirror.lan:81", {"plain_http": ("mirror.lan:80",)}, "https://mirror.lan:81", True),
        ("mirror.lan:81", {"plain_http": ("mirror.lan",)}, "http://mirror.lan:81", True),
        ("evil-mirror.lan", {"plain_http": ("mirror.lan",)}, "https://evil-mirror.lan", True),
        ("localhost.evil.example", {}, "https://localhost.evil.example", True),
    ],
)
def test_where_requests_go(
    registry_name: str, settings: dict[str, Any], url: str, verify: bool
) -> None:
    found = endpoint(registry_name, RegistrySettings(**settings))
    assert (found.url, found.verify) == (url, verify)


# Cancellation


class CancelAt(trio.abc.Instrument):
    """Cancels ``scope`` when ``task`` is about to take its step number ``step``."""

    def __init__(self, task: trio.lowlevel.Task, scope: trio.CancelScope, step: int) -> None:
        self._task, self._scope, self._left = task, scope, step

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self._scope.cancel()


def test_cancelling_at_any_checkpoint_leaves_a_registry_that_works(
    token_registry: RegistryServer,
) -> None:
    digest = push_model(token_registry, "acme/model")
    reference = Reference.parse(token_registry.reference("acme/model", "v1"))

    async def main(name: str, step: int) -> bool:
        async with opened() as registry:
            with trio.CancelScope() as scope:
                instrument = CancelAt(trio.lowlevel.current_task(), scope, step)
                trio.lowlevel.add_instrument(instrument)
                try:
                    await call_by_name(name, ROBOT, registry, reference)
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            assert registry._conversations._tokens._flights == {}
            assert (await registry.manifest(reference, ROBOT)).digest == digest
        return scope.cancelled_caught

    for name in ("resolve_model", "head_manifest"):
        steps = 1
        while trio.run(main, name, steps):
            steps += 1
        assert steps > 10
