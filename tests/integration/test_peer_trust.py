"""Who gets something from a peer: who belongs to the peers, and whom the registry lets read it."""

from __future__ import annotations

import base64
import logging
import os
import ssl
from typing import TYPE_CHECKING

import httpx
import pytest
import trio

from csi.config import Config
from csi.peering import peer_client
from fetcher.credentials import Credentials
from fetcher.errors import AccessDenied, InvalidRequest, Unavailable
from fetcher.glances import GLANCE_SECONDS
from fetcher.oci import Digest, Reference
from fetcher.peers.access import Asker, Rights
from fetcher.peers.trust import PeerFiles, PeerTls, PeerToken
from fetcher.policy import PullPolicy
from fetcher.registry import Registry, RegistrySettings
from fetcher.transport import TransferSettings
from tests.support.clocks import HandClock
from tests.support.faulty_registry import FaultyRegistry, Reply
from tests.support.keychains import Everywhere
from tests.support.peer_server import TOKEN, OwnsAll, Setup, peer_node
from tests.support.proxy import Proxy, serve_proxy
from tests.support.registry import RegistryServer, make_tls
from tests.support.stores import CHUNK, EVERYTHING, weights
from tests.support.token_server import PASSWORD

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.registry import TlsFiles
    from tests.support.token_server import TokenServer

OTHER_TOKEN = "another-token-of-the-peers"
ROBOT = Everywhere("robot", PASSWORD)
BASIC = "Basic " + base64.b64encode(f"robot:{PASSWORD}".encode()).decode()


# -- strangers ---------------------------------------------------------------------------------


def test_strangers_get_nothing(registry: RegistryServer, tmp_path: Path) -> None:
    model = weights(2 * CHUNK)
    model.push(registry, "peers/strangers")
    digest = max(model.blobs, key=lambda one: len(model.blobs[one]))
    manifest = model.digest

    async def main() -> None:
        async with peer_node(tmp_path / "root", Setup(ownership=OwnsAll())) as node:
            url = node.blob_url("peers/strangers", digest, registry.address)
            assert (await node.client.get(url)).status_code == 200
            told: set[bytes] = set()
            for token in (None, "", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), f"Bearer {TOKEN}"):
                headers = {} if token is None else {"Model-CSI-Peer": token}
                async with httpx.AsyncClient(base_url=node.url, headers=headers) as stranger:
                    for method, path in (
                        ("GET", "/v2/"),
                        ("GET", url),
                        ("HEAD", url),
                        ("GET", f"/v2/peers/strangers/manifests/{manifest}"),
                        ("GET", "/nothing"),
                        ("POST", "/v2/a/blobs/uploads/"),
                    ):
                        refused = await stranger.request(method, path)
                        assert refused.status_code == 401
                        assert refused.headers["connection"] == "close"
                        told.add(refused.content)
            assert len(told - {b""}) == 1
            assert node.served.strangers == 36

    trio.run(main)


def test_the_token_changes_without_a_gap(tmp_path: Path) -> None:
    """Old and new are accepted for as long as both are in the file."""
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n")
    clock = HandClock()
    token = PeerToken(file, clock)
    steps = [
        (f"{TOKEN}\n{OTHER_TOKEN}\n", TOKEN, {TOKEN, OTHER_TOKEN}),
        (f"{OTHER_TOKEN}\n{TOKEN}\n", OTHER_TOKEN, {TOKEN, OTHER_TOKEN}),
        (f"\n  {OTHER_TOKEN}  \n\n", OTHER_TOKEN, {OTHER_TOKEN}),
        # what cannot be used changes nothing
        ("short\n", OTHER_TOKEN, {OTHER_TOKEN}),
        ("", OTHER_TOKEN, {OTHER_TOKEN}),
    ]
    for number, (content, shown, accepted) in enumerate(steps):
        fresh = tmp_path / f"tokens-{number}"
        fresh.write_text(content)
        before = token.shown
        fresh.replace(file)
        assert token.shown == before
        clock.pass_by(GLANCE_SECONDS)
        assert token.shown == shown
        assert {one for one in (TOKEN, OTHER_TOKEN) if token.accepts(one)} == accepted
    file.unlink()
    clock.pass_by(GLANCE_SECONDS)
    assert token.accepts(OTHER_TOKEN)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"short", b"\xff" * 20, b"x" * 70_000])
def test_a_file_without_a_usable_token(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_bytes(content)
    with pytest.raises(InvalidRequest, match="tokens cannot be used"):
        PeerToken(tmp_path / "tokens")


@pytest.mark.parametrize(
    ("files", "setting"),
    [
        (lambda one: PeerFiles(), "peer-token-file"),
        (lambda one: PeerFiles(certificate=one, key=one), "peer-token-file"),
        (lambda one: PeerFiles(token=one, certificate=one), "peer-key"),
        (lambda one: PeerFiles(token=one, authorities=one), "peer-cert"),
    ],
)
def test_what_would_let_strangers_in_does_not_start(
    files: Callable[[Path], PeerFiles], setting: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=setting):
        files(tmp_path / "file").check()


def test_everybody_is_a_peer_only_where_that_is_said(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            peer_node(tmp_path / "root", Setup(files=PeerFiles(insecure=True))) as node,
            httpx.AsyncClient(base_url=node.url) as anybody,
        ):
            assert (await anybody.get("/v2/")).status_code == 200

    trio.run(main)


# -- certificates ------------------------------------------------------------------------------


def _showing(files: TlsFiles | None, ca: TlsFiles) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca.ca)
    if files is not None:
        context.load_cert_chain(files.certificate, files.key)
    return context


def test_peers_show_certificates_of_their_authority(
    registry: RegistryServer, tmp_path: Path
) -> None:
    ours, theirs = make_tls(tmp_path / "ours"), make_tls(tmp_path / "theirs")
    data = os.urandom(20 * CHUNK)
    digest = registry.push_blob("peers/tls", data)
    files = PeerFiles(certificate=ours.certificate, key=ours.key, authorities=ours.ca)

    async def main() -> None:
        setup = Setup(files=files, ownership=OwnsAll(), verify=_showing(ours, ours))
        async with peer_node(tmp_path / "root", setup) as node:
            url = node.blob_url("peers/tls", digest, registry.address)
            assert (await node.client.get(url)).content == data
            part = await node.client.get(url, headers={"Range": "bytes=5-70000"})
            assert part.content == data[5:70001]
            for shown in (None, theirs):
                async with httpx.AsyncClient(
                    base_url=node.url, verify=_showing(shown, ours), headers=node.client.headers
                ) as stranger:
                    with pytest.raises(httpx.TransportError):
                        await stranger.get("/v2/")
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{node.address[1]}") as plain:
                with pytest.raises(httpx.TransportError):
                    await plain.get("/v2/", headers={"Model-CSI-Peer": TOKEN})
            with trio.fail_after(10):
                while node.served.strangers < 3:  # noqa: ASYNC110 (no event for it)
                    await trio.sleep(0.01)

    trio.run(main)


def test_only_the_peers_authority_is_believed(tmp_path: Path) -> None:
    files = make_tls(tmp_path / "tls")
    config = Config(
        root=tmp_path,
        node_id="me",
        peers=("a=127.0.0.1:1",),
        peer_cert=files.certificate,
        peer_key=files.key,
        peer_ca=files.ca,
    )
    client = peer_client(config, TransferSettings())
    assert client is not None
    assert client.settings.trust is not None
    context = client.settings.trust.context()
    assert context.cert_store_stats()["x509"] == 1
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED


def test_a_certificate_changes_without_a_restart(tmp_path: Path) -> None:
    before, after = make_tls(tmp_path / "before"), make_tls(tmp_path / "after")
    shown, key = tmp_path / "shown.pem", tmp_path / "shown.key"
    shown.write_bytes(before.certificate.read_bytes())
    key.write_bytes(before.key.read_bytes())
    files = PeerFiles(certificate=shown, key=key, insecure=True)
    tls = PeerTls(files)
    first = tls.context()
    # in between the two halves do not fit, and the old pair stays
    shown.write_bytes(after.certificate.read_bytes())
    assert tls.context() is first
    key.write_bytes(after.key.read_bytes())

    async def main() -> None:
        assert tls.context() is not first
        setup = Setup(files=files, verify=_showing(None, after))
        async with peer_node(tmp_path / "root", setup) as node:
            assert (await node.client.get("/v2/")).status_code == 200

    trio.run(main)


# -- what the registry lets an asker read ------------------------------------------------------


def test_a_node_without_credentials_gets_nothing(guarded: RegistryServer, tmp_path: Path) -> None:
    """Though its peer holds the model, and whatever it shows that the registry does not know."""
    model = weights(3 * CHUNK)
    reference = Reference.parse(model.push(guarded, "peers/private"))
    [digest] = [one for one, data in model.blobs.items() if len(data) == 3 * CHUNK]
    data = model.blobs[digest]
    ns = guarded.address

    async def main() -> None:
        async with peer_node(tmp_path / "root", Setup(ownership=OwnsAll())) as node:
            url = node.blob_url("peers/private", digest, ns)
            manifest = f"/v2/peers/private/manifests/{model.digest}?ns={ns}"
            tag = f"/v2/peers/private/manifests/latest?ns={ns}"
            wrong = "Basic " + base64.b64encode(b"robot:wrong").decode()
            for known in (False, True):
                if known:
                    resolved = await node.pulls.resolve(reference, ROBOT, PullPolicy.ALWAYS)
                    with node.pulls.join(resolved, EVERYTHING) as joined:
                        await joined.wait()
                for shown in ({}, {"Authorization": wrong}, {"Authorization": "Bearer nonsense"}):
                    for path in (url, manifest, tag):
                        refused = await node.client.get(path, headers=shown)
                        assert refused.status_code == 401, (path, shown, known)
                        assert refused.json()["errors"][0]["code"] == "UNAUTHORIZED"
                        assert PASSWORD not in refused.text
                right = {"Authorization": BASIC}
                assert (await node.client.get(url, headers=right)).content == data
                found = await node.client.get(manifest, headers=right)
                assert found.content == model.manifest().body
            # another repository's blob is not to be had below this name
            other = await node.client.get(
                node.blob_url("peers/other", digest, ns), headers={"Authorization": BASIC}
            )
            assert other.status_code in (403, 404)

    trio.run(main)


def test_the_registry_is_asked_once_a_minute(guarded: RegistryServer, tmp_path: Path) -> None:
    data = os.urandom(CHUNK)
    digest = guarded.push_blob("peers/asked", data)

    async def main(proxy: Proxy) -> None:
        async with peer_node(tmp_path / "root", Setup(ownership=OwnsAll())) as node:
            url = node.blob_url("peers/asked", digest, proxy.address)
            shown = {"Authorization": BASIC}
            for _ in range(5):
                assert (await node.client.get(url, headers=shown)).content == data
            heads = [one for one in proxy.counts.requests if one[0] == "HEAD"]
            assert len(heads) == 1
            assert (await node.client.get(url)).status_code == 401

    with serve_proxy(guarded.address) as proxy:
        trio.run(main, proxy)


def test_a_token_is_shown_as_it_is_and_never_renewed(
    token_registry: RegistryServer, tokens: TokenServer, tmp_path: Path
) -> None:
    data = os.urandom(4 * CHUNK)
    digest = token_registry.push_blob("peers/token", data)
    pull = tokens.sign("robot", "repository:peers/token:pull", 300)

    async def main() -> None:
        async with peer_node(tmp_path / "root", Setup(ownership=OwnsAll())) as node:
            url = node.blob_url("peers/token", digest, token_registry.address)
            before = len(tokens.requests)
            found = await node.client.get(url, headers={"Authorization": f"Bearer {pull}"})
            assert found.content == data
            stale = tokens.sign("robot", "repository:peers/token:pull", -300)
            refused = await node.client.get(url, headers={"Authorization": f"Bearer {stale}"})
            assert refused.status_code == 401
            assert len(tokens.requests) == before

    trio.run(main)


def test_a_token_that_expires_during_a_fill_is_the_askers_to_renew(
    token_registry: RegistryServer, tokens: TokenServer, tmp_path: Path
) -> None:
    data = os.urandom(8 * CHUNK)
    digest = token_registry.push_blob("peers/expiring", data)

    def token(seconds: int) -> dict[str, str]:
        signed = tokens.sign("robot", "repository:peers/expiring:pull", seconds)
        return {"Authorization": f"Bearer {signed}"}

    async def main(proxy: Proxy) -> None:
        proxy.faults.strict_tokens = True
        async with peer_node(tmp_path / "root", Setup(ownership=OwnsAll())) as node:
            url = node.blob_url("peers/expiring", digest, proxy.address)
            short = token(3)
            first = {"Range": f"bytes=0-{CHUNK - 1}"}
            assert (await node.client.get(url, headers={**short, **first})).status_code == 206
            await trio.sleep(3.2)
            # the registry's word for it is still remembered, and no use any more
            second = {"Range": f"bytes={CHUNK}-{2 * CHUNK - 1}"}
            refused = await node.client.get(url, headers={**short, **second})
            assert refused.status_code == 401, refused.text
            renewed = await node.client.get(url, headers={**token(300), **second})
            assert renewed.content == data[CHUNK : 2 * CHUNK]

    with serve_proxy(token_registry.address) as proxy:
        trio.run(main, proxy)


def test_what_the_registry_said_outlasts_it_for_a_while(
    registry: RegistryServer, faulty: FaultyRegistry
) -> None:
    """Never without its word, and not for a word that it has taken back."""
    digest = registry.push_blob("peers/away", b"content")
    reference = Reference(faulty.address, "peers/away", None, digest)
    known, unknown = Asker(reference, "Bearer known"), Asker(reference, "Bearer unknown")

    async def main() -> None:
        asked = Registry(RegistrySettings(attempts=1, retry_seconds=1))
        patient, strict = Rights(asked, fresh=0.0), Rights(asked, fresh=0.0, stale=0.0)
        for rights in (patient, strict):
            assert await rights.blob(known) == len(b"content")
        away = faulty.add("/blobs/", drop=True)
        assert await patient.blob(known) == len(b"content")
        for rights, asker in ((patient, unknown), (strict, known)):
            with pytest.raises(Unavailable):
                await rights.blob(asker)
        faulty.faults.remove(away)
        refusing = faulty.add("/blobs/", Reply(403))
        with pytest.raises(AccessDenied):
            await patient.blob(known)
        faulty.faults.remove(refusing)
        faulty.add("/blobs/", drop=True)
        with pytest.raises(Unavailable):
            await patient.blob(known)
        await asked.aclose()

    trio.run(main)


def test_secrets_are_not_told(
    guarded: RegistryServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    digest = guarded.push_blob("peers/secret", os.urandom(CHUNK))

    async def main() -> None:
        async with peer_node(tmp_path / "root", Setup(ownership=OwnsAll())) as node:
            url = node.blob_url("peers/secret", digest, guarded.address)
            assert (await node.client.get(url, headers={"Authorization": BASIC})).is_success
            missing = node.blob_url("peers/secret", Digest.of(b"?"), guarded.address)
            await node.client.get(missing, headers={"Authorization": BASIC})

    trio.run(main)
    secret = BASIC.partition(" ")[2]
    told = "\n".join(
        record.getMessage() for record in caplog.records if record.name.startswith("fetcher")
    )
    assert secret not in told
    assert TOKEN not in told
    assert secret not in repr(Asker(Reference("r", "m"), BASIC))
    assert secret not in repr(Credentials("", passed=BASIC))
