"""Registry access when registries, networks and portals misbehave."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import ssl
import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import trio

from fetcher.credentials import Credentials, Keychain
from fetcher.errors import (
    AccessDenied,
    DigestMismatch,
    InvalidArtifact,
    ModelError,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from fetcher.exchange import _ClientKey
from fetcher.oci import Digest, Reference
from fetcher.proxies import Proxies
from fetcher.trust import Trust
from tests.support.faulty_registry import LOGIN_PAGE, FaultyRegistry, Reply, serve_faulty
from tests.support.registry import OCI_MANIFEST, RegistryServer, make_tls
from tests.support.registry_calls import (
    NOBODY,
    QUICK,
    ROBOT,
    WRONG,
    ask,
    call_by_name,
    manifest,
    manifest_of,
    opened,
    push_model,
)
from tests.support.token_server import PASSWORD

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fetcher.registry import Registry
    from tests.support.token_server import TokenServer


# Networks


def test_hosts_that_are_not_there() -> None:
    with pytest.raises(Unavailable, match=r"there is no host nowhere\.invalid"):
        manifest("nowhere.invalid/acme/model:v1")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(Unavailable, match=r"refuses connections.*after 2 attempts"):
        manifest(f"127.0.0.1:{port}/acme/model:v1", attempts=2)


def test_a_silent_host_is_given_up_on() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(Unavailable, match="fell silent"):
            manifest(f"{address}/acme/model:v1", stall_timeout=0.3, attempts=1)


def test_what_does_not_speak_http_is_said_to_be_none() -> None:
    async def main() -> None:
        async def greet(stream: trio.SocketStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

        async with trio.open_nursery() as nursery, opened(replace(QUICK, attempts=1)) as registry:
            serve = partial(trio.serve_tcp, greet, 0, host="127.0.0.1")
            (listener,) = await nursery.start(serve)
            port = listener.socket.getsockname()[1]
            with pytest.raises(Unavailable, match="does not speak HTTP"):
                await registry.manifest(Reference.parse(f"127.0.0.1:{port}/a/b"), NOBODY)
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("address", ["169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]"])
def test_a_reference_leads_nobody_to_link_local_addresses(address: str) -> None:
    with pytest.raises(AccessDenied, match="link-local"):
        manifest(f"{address}/latest/meta-data:v1")


def test_names_that_lead_home_are_refused_to_registries_elsewhere(
    faulty: FaultyRegistry, model: Digest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers are looked at once connected. This machine's own addresses stand for the link-local
    ones, which no test has; for what is refused see ``test_addresses``.
    """
    real = socket.getaddrinfo

    def look_up(host: Any, *rest: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return real("127.0.0.1" if name.endswith(".example") else host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    port, plain = faulty.port, ("registry.example", "inner.example")
    reference = f"registry.example:{port}/acme/model:v1"
    assert manifest(reference, plain_http=plain).digest == model
    inner = f"http://inner.example:{port}/v2/acme/model/manifests/v1"
    challenge = Reply(401, {"WWW-Authenticate": f'Bearer realm="{inner}"'})
    for reply in (Reply(307, {"Location": inner}), challenge):
        fault = faulty.add("/manifests/", reply, times=1)
        with pytest.raises(AccessDenied, match=r"inner\.example is at 127\.0\.0\.1, which is this"):
            manifest(reference, plain_http=plain)
        assert fault.times == 0


# Misbehaviour


@pytest.fixture
def model(registry: RegistryServer) -> Digest:
    return push_model(registry, "acme/model")


def test_an_answer_that_is_late_is_waited_for(faulty: FaultyRegistry, model: Digest) -> None:
    faulty.add("/manifests/", Reply(500), times=1)
    faulty.add("/manifests/", drop=True, times=1)
    assert manifest(faulty.reference("acme/model", "v1")).digest == model
    assert len(faulty.asked("/manifests/")) == 3


def test_a_registry_that_asks_to_slow_down_is_obeyed(faulty: FaultyRegistry, model: Digest) -> None:
    faulty.add("/manifests/", Reply(429, {"Retry-After": "1"}), times=1)
    started = time.monotonic()
    assert manifest(faulty.reference("acme/model", "v1")).digest == model
    assert time.monotonic() - started >= 1
    faulty.add("/manifests/", Reply(429, {"Retry-After": "86400"}), times=1)
    with pytest.raises(Unavailable, match="asks to slow down"):
        manifest(faulty.reference("acme/model", "v1"), max_retry_after=30)
    faulty.add("/manifests/", Reply(503, {"Retry-After": "nonsense"}), times=1)
    assert manifest(faulty.reference("acme/model", "v1")).digest == model


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, Unavailable),
        (401, Unauthenticated),
        (403, AccessDenied),
        (404, NotFound),
        (405, Unavailable),
        (418, Unavailable),
    ],
)
def test_a_refusal_is_asked_for_once(
    faulty: FaultyRegistry, status: int, error: type[ModelError]
) -> None:
    faulty.add("/manifests/", Reply(status))
    with pytest.raises(error) as caught:
        manifest(faulty.reference("acme/model", "v1"))
    assert type(caught.value) is error
    assert len(faulty.asked("/manifests/")) == 1


def test_trouble_that_stays_is_told_with_the_number_of_attempts(faulty: FaultyRegistry) -> None:
    faulty.add("/manifests/", Reply(503, body=b'{"errors":[{"code":"X","message":"y"}]}'))
    with pytest.raises(
        Unavailable, match=r"internal problem \(HTTP status 503\), after 3 attempts"
    ):
        manifest(faulty.reference("acme/model", "v1"))
    assert len(faulty.asked("/manifests/")) == 3


def test_a_captive_portal_is_called_one(faulty: FaultyRegistry, registry: RegistryServer) -> None:
    push_model(registry, "acme/model")
    page = Reply(200, {"Content-Type": "text/html; charset=utf-8"}, LOGIN_PAGE)
    faulty.add("/v2/", page)
    for call in ("manifest", "head_manifest", "resolve_model"):
        with pytest.raises(Unavailable, match="captive portal"):
            ask(
                partial(call_by_name, call, NOBODY),
                faulty.reference("acme/model", "v1"),
            )
    with pytest.raises(Unavailable, match="captive portal"):
        ask(
            lambda client, parsed: client.blob(parsed, Digest.of(b"{}"), 2, NOBODY),
            faulty.reference("acme/model", "v1"),
        )
    faulty.faults[:] = []
    faulty.add("/v2/", replace(page, headers={"Content-Type": "application/json"}))
    with pytest.raises(InvalidArtifact, match="captive portal"):
        manifest(faulty.reference("acme/model", "v1"))
    faulty.faults[:] = []
    faulty.add("/v2/", replace(page, status=404))
    with pytest.raises(NotFound, match="HTML page"):
        manifest(faulty.reference("acme/model", "v1"))


def test_bytes_that_are_not_what_their_digest_says(
    faulty: FaultyRegistry, registry: RegistryServer, model: Digest
) -> None:
    other = manifest_of(note="something else entirely")
    corrupt = faulty.add(
        "/manifests/", change=lambda reply: replace(reply, body=other), method="GET"
    )
    with pytest.raises(DigestMismatch):
        manifest(f"{faulty.address}/acme/model@{model}")
    with pytest.raises(DigestMismatch, match="calls sha256:"):
        manifest(faulty.reference("acme/model", "v1"))
    corrupt.times = 0
    faulty.add("/blobs/", change=lambda reply: replace(reply, body=b"[]"), method="GET")
    with pytest.raises(DigestMismatch, match="are not the blob"):
        ask(
            lambda client, parsed: client.blob(parsed, Digest.of(b"{}"), 2, NOBODY),
            faulty.reference("acme/model", "v1"),
        )
    lie = {"Docker-Content-Digest": str(Digest.of(b"lie"))}
    faulty.add("/manifests/", Reply(200, lie), method="HEAD")
    with pytest.raises(DigestMismatch, match="says that it is sha256:"):
        ask(
            lambda client, parsed: client.head_manifest(parsed, NOBODY),
            f"{faulty.address}/acme/model@{model}",
        )


def test_a_head_that_tells_no_digest_is_made_up_for(faulty: FaultyRegistry, model: Digest) -> None:
    for reply in (Reply(200), Reply(405)):
        fault = faulty.add("/manifests/", reply, method="HEAD")
        found = ask(
            lambda client, parsed: client.head_manifest(parsed, NOBODY),
            faulty.reference("acme/model", "v1"),
        )
        assert found == model
        fault.times = 0


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, {"Content-Type": OCI_MANIFEST}, b" " * (4 * 1024 * 1024 + 1)),
        Reply(200, {"Content-Type": OCI_MANIFEST}, endless=True),
    ],
    ids=["large", "endless"],
)
def test_a_huge_manifest_is_not_read(faulty: FaultyRegistry, reply: Reply) -> None:
    faulty.add("/manifests/", reply)
    with pytest.raises(InvalidArtifact, match="larger than"):
        manifest(faulty.reference("acme/model", "v1"))


def test_an_endless_error_is_cut(faulty: FaultyRegistry) -> None:
    faulty.add("/manifests/", Reply(404, endless=True))
    with pytest.raises(NotFound):
        manifest(faulty.reference("acme/model", "v1"))


def test_a_compressed_answer_is_not_unpacked(faulty: FaultyRegistry) -> None:
    faulty.add("/manifests/", Reply(200, {"Content-Encoding": "gzip"}, b"\x1f\x8b" + b"0" * 100))
    with pytest.raises(Unavailable, match="compressed"):
        manifest(faulty.reference("acme/model", "v1"))
    assert faulty.requests[0].headers["accept-encoding"] == "identity"


def test_an_answer_that_breaks_off_is_asked_for_again(
    faulty: FaultyRegistry, model: Digest
) -> None:
    faulty.add("/manifests/", change=lambda reply: replace(reply, cut=10), times=1)
    assert manifest(faulty.reference("acme/model", "v1")).digest == model


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"schemaVersion":2}',
        b"[" * 1_000_000,
        b'{"schemaVersion":2,"config":7,"layers":"x"}',
        b"\xff\xfe",
    ],
)
def test_what_is_no_manifest(faulty: FaultyRegistry, body: bytes) -> None:
    faulty.add("/manifests/", Reply(200, {"Content-Type": OCI_MANIFEST}, body))
    with pytest.raises(InvalidArtifact, match="acme/model"):
        manifest(faulty.reference("acme/model", "v1"))


def test_headers_that_make_no_sense(faulty: FaultyRegistry) -> None:
    nonsense = {"Docker-Content-Digest": "md5:\x7f../../etc/passwd", "Content-Type": "\x7f;;"}
    faulty.add("/manifests/", Reply(200, nonsense, manifest_of()))
    for call in ("manifest", "head_manifest"):
        with pytest.raises(InvalidArtifact, match="is not a digest"):
            ask(
                partial(call_by_name, call, NOBODY),
                faulty.reference("acme/model", "v1"),
            )


def test_a_registrys_words_are_shown_clean_and_short(faulty: FaultyRegistry) -> None:
    words = [{"code": "DENIED", "message": "\x1b[31mno\n\nway\x00 " + "x" * 5000}] * 50
    faulty.add("/manifests/", Reply(403, body=json.dumps({"errors": words}).encode()[:16000]))
    with pytest.raises(AccessDenied) as caught:
        manifest(faulty.reference("acme/model", "v1"))
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1000
    faulty.faults[:] = []
    faulty.add("/manifests/", Reply(403, body=json.dumps({"errors": words[:1]}).encode()))
    with pytest.raises(AccessDenied, match=r"DENIED: \[31mno way xxx"):
        manifest(faulty.reference("acme/model", "v1"))


# Redirects


def test_a_redirect_to_another_host_is_followed_without_the_password(
    guarded: RegistryServer, registry: RegistryServer
) -> None:
    push_model(guarded, "acme/elsewhere")
    digest = push_model(registry, "acme/elsewhere")
    with serve_faulty(guarded) as near, serve_faulty(registry) as far:
        target = f"http://{far.address}/v2/acme/elsewhere/manifests/v1?signature={PASSWORD}"
        authorized = near.add(
            "/manifests/",
            change=lambda reply: Reply(307, {"Location": target}) if reply.status == 200 else reply,
        )
        assert manifest(near.reference("acme/elsewhere", "v1"), ROBOT).digest == digest
        assert authorized.times < 1_000_000
        assert near.requests[-1].authorization is not None
        assert [noted.authorization for noted in far.requests] == [None]
        assert "cookie" not in far.requests[0].headers


def test_a_redirect_on_the_same_host_keeps_the_password(guarded: RegistryServer) -> None:
    digest = push_model(guarded, "acme/moved")
    with serve_faulty(guarded) as near:
        near.add(
            "/manifests/v1", Reply(302, {"Location": "/v2/acme/moved/manifests/./v1"}), times=1
        )
        found = manifest(near.reference("acme/moved", "v1"), ROBOT)
        assert found.digest == digest


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("http://169.254.169.254/latest/meta-data?x=s3cr3t", AccessDenied),
        ("http://[::ffff:a9fe:a9fe]/", AccessDenied),
        ("http://0.0.0.0/", AccessDenied),
        ("ftp://files.example/x", AccessDenied),
        ("file:///etc/passwd", AccessDenied),
        ("http://user:s3cr3t@127.0.0.1/", AccessDenied),
        ("http://[broken/", AccessDenied),
        ("http://127.0.0.1:0/", AccessDenied),
        ("http://127.0.0.1:99999/", AccessDenied),
        ("https://" + "a" * 300 + ".example/?x=s3cr3t", ModelError),
    ],
)
def test_redirects_that_are_not_followed(
    faulty: FaultyRegistry, location: str, error: type[ModelError]
) -> None:
    faulty.add("/manifests/", Reply(307, {"Location": location}))
    with pytest.raises(error) as caught:
        manifest(faulty.reference("acme/model", "v1"), attempts=1)
    assert "s3cr3t" not in str(caught.value)


def test_redirects_in_a_circle_end(faulty: FaultyRegistry) -> None:
    faulty.add("/v2/", Reply(307, {"Location": "/v2/again"}))
    with pytest.raises(Unavailable, match="redirects more than 5 times"):
        manifest(faulty.reference("acme/model", "v1"))
    assert len(faulty.requests) == 6


def test_tls_is_not_given_up_by_a_redirect(tmp_path: Path, faulty: FaultyRegistry) -> None:
    tls = make_tls(tmp_path / "tls")
    elsewhere = f"http://{faulty.address}/v2/acme/model/manifests/v1"
    with _tls_redirector(tls.certificate, tls.key, elsewhere) as address:
        with pytest.raises(AccessDenied, match="unencrypted"):
            manifest(f"{address}/acme/model:v1", https=("127.0.0.1",), ca_file=tls.ca)
        assert faulty.requests == []


def test_cookies_of_one_pod_do_not_come_back_with_anothers_request(
    faulty: FaultyRegistry, model: Digest
) -> None:
    faulty.add(
        "/manifests/",
        change=lambda reply: replace(reply, headers={**reply.headers, "Set-Cookie": "session=1"}),
    )

    async def call(client: Registry, reference: Reference) -> None:
        for _ in range(3):
            await client.manifest(reference, NOBODY)

    ask(call, faulty.reference("acme/model", "v1"))
    assert all("cookie" not in noted.headers for noted in faulty.requests)


def test_a_challenge_with_a_hostile_realm_gets_nothing(faulty: FaultyRegistry) -> None:
    for realm in ("http://169.254.169.254/token", "file:///etc/passwd", "x" * 5000):
        faulty.faults[:] = []
        faulty.add("/v2/", Reply(401, {"WWW-Authenticate": f'Bearer realm="{realm}"'}))
        with pytest.raises(AccessDenied):
            manifest(faulty.reference("acme/model", "v1"), ROBOT)


def test_this_machines_proxy_is_not_used_for_this_machine(
    registry: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = push_model(registry, "acme/unproxied")
    with serve_faulty() as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{proxy.address}")
            monkeypatch.setenv(name.lower(), f"http://{proxy.address}")
        proxies = Proxies.of_environment(os.environ)
        reference = registry.reference("acme/unproxied", "v1")
        assert manifest(reference, proxies=proxies).digest == digest
        assert proxy.requests == []
        # and every other host goes through it, so that nothing here is looked up or connected to
        proxy.add("http://mirror.lan", Reply(404))
        with pytest.raises(NotFound):
            manifest("mirror.lan/acme/model:v1", plain_http=("mirror.lan",), proxies=proxies)
        assert proxy.requests[0].path == "http://mirror.lan/v2/acme/model/manifests/v1"


# Secrets


def test_secrets_are_in_no_error_and_in_no_log(
    guarded: RegistryServer,
    token_registry: RegistryServer,
    tokens: TokenServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every way to fail, with everything logged at the lowest level."""
    caplog.set_level(logging.DEBUG)
    httpx_level = logging.getLogger("httpx").level
    push_model(guarded, "acme/model")
    push_model(token_registry, "acme/model")
    wrong = f"not-{PASSWORD}"
    basic = Credentials("robot", PASSWORD).basic
    told: list[str] = []

    def attempt(reference: str, keychain: Keychain) -> None:
        for call in ("manifest", "head_manifest", "resolve_model"):
            try:
                ask(
                    partial(call_by_name, call, keychain),
                    reference,
                    replace(QUICK, attempts=2 if call == "manifest" else 1),
                )
            except ModelError as error:
                told.append(f"{error!r} {error.context} {error.__cause__!r}")

    def echo_of(password: str) -> bytes:
        words = f"{Credentials('robot', password).basic} {password}"
        return json.dumps({"errors": [{"code": "DENIED", "message": words}]}).encode()

    echo = echo_of(PASSWORD)
    signed = f"http://127.0.0.1:1/x?signature={PASSWORD}"
    with serve_faulty(guarded) as near:
        for keychain, password in ((ROBOT, PASSWORD), (WRONG, wrong)):
            echo = echo_of(password)
            attempt(near.reference("acme/model", "nothing"), keychain)
            for status in (400, 401, 403, 404, 429, 500):
                fault = near.add("/manifests/", Reply(status, body=echo))
                attempt(near.reference("acme/model", "v1"), keychain)
                fault.times = 0
            redirect = near.add("/manifests/", Reply(307, {"Location": signed}))
            attempt(near.reference("acme/model", "v1"), keychain)
            redirect.times = 0
            attempt(near.reference("acme/model", "v1"), keychain)
    with serve_faulty(token_registry) as near:
        for answer in (None, (401, "text/plain", echo), (200, "application/json", echo)):
            tokens.answer = answer
            for keychain in (ROBOT, WRONG):
                attempt(near.reference("acme/model", "nothing"), keychain)
                attempt(near.reference("acme/model", "v1"), keychain)
        tokens.answer = None
        token = tokens.issued[-1]
        echoed = json.dumps({"errors": [{"code": "X", "message": "placeholder"}]})
        near.add(
            "/manifests/",
            change=lambda reply: (
                reply
                if reply.status == 401
                else Reply(403, body=echoed.replace("placeholder", tokens.issued[-1]).encode())
            ),
        )
        attempt(near.reference("acme/model", "v1"), ROBOT)
    assert len(told) > 30
    everything = "\n".join([*told, caplog.text, *(str(vars(one)) for one in caplog.records)])
    assert "trying again" in everything
    for secret in (PASSWORD, basic.removeprefix("Basic "), token, *tokens.issued):
        assert secret not in everything
    assert "signature" not in everything
    assert httpx_level in (logging.NOTSET, logging.WARNING)
    assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
    assert not logging.getLogger("httpcore").isEnabledFor(logging.DEBUG)


def test_this_version_of_httpx_can_be_guarded() -> None:
    """The guard reaches into httpx: a version that hides its pools has to fail here, not later."""

    async def main() -> None:
        async with opened() as registry, httpx.AsyncClient() as bare:
            key = _ClientKey(Trust(), plain=False, steered=True, proxy=None)
            client = registry._conversations._exchange._client(key)
            guarded_backend = client._transport._pool._network_backend  # type: ignore[attr-defined]
            assert type(guarded_backend).__name__ == "GuardedBackend"
            assert type(bare._transport._pool._network_backend).__name__ != "GuardedBackend"  # type: ignore[attr-defined]

    trio.run(main)


@contextlib.contextmanager
def _tls_redirector(certificate: Path, key: Path, location: str) -> Iterator[str]:
    """A TLS server that redirects everything to ``location``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    answer = f"HTTP/1.1 307 x\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            plain, _ = listener.accept()
            with context.wrap_socket(plain, server_side=True) as stream:
                stream.recv(65536)
                stream.sendall(answer)
                stream.recv(65536)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)
