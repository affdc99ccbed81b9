"""TLS, client certificates, proxies, redirects: one rule for control traffic and bulk bytes."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fetcher.answers import Piece
from fetcher.credentials import Credentials
from fetcher.errors import AccessDenied, ModelError, Unavailable
from fetcher.oci import Digest
from fetcher.proxies import Proxies
from fetcher.ranges import Range
from fetcher.registry import BlobAccess, RegistrySettings
from fetcher.routes import Hop, Route
from fetcher.transport import Connection, TransferSettings
from fetcher.trust import Trust
from tests.support.faulty_registry import Reply, serve_faulty
from tests.support.forward_proxy import serve_forward_proxy
from tests.support.proxy import serve_proxy
from tests.support.registry import TlsFiles, make_tls
from tests.support.sources import PIECE, Node, in_node, shown, weights, write_hosts

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.registry import RegistryServer

SETTINGS = RegistrySettings(attempts=1, retry_seconds=5, connect_timeout=2, stall_timeout=2)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """Of an authority that nobody was told of."""
    return make_tls(tmp_path_factory.mktemp("stranger"))


def _server(files: TlsFiles, clients: Path | None = None) -> ssl.SSLContext:
    """TLS of a server; with ``clients``, only for those whose certificate that authority signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cafile=clients)
    return context


def _closed() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


# Certificates


@pytest.mark.parametrize(
    ("table", "works"),
    [
        ('ca = "ours.pem"\nclient = [["client.pem", "client.key"]]', True),
        ('ca = ["stranger.pem", "ours.pem"]\nclient = [["client.pem", "client.key"]]', True),
        ('skip_verify = true\nclient = "both.pem"', True),
        ('client = "both.pem"', False),
        ('ca = "stranger.pem"\nclient = "both.pem"', False),
        ('ca = "ours.pem"', False),
        ('ca = "ours.pem"\nclient = "none.pem"', False),
        ('ca = "none.pem"\nclient = "both.pem"', False),
    ],
)
def test_a_mirror_that_wants_a_client_certificate(
    tmp_path: Path,
    registry: RegistryServer,
    tls: TlsFiles,
    stranger: TlsFiles,
    table: str,
    works: bool,
) -> None:
    """The registry is away: the manifest too comes from the mirror, or nothing does."""
    builder, files = weights(2 * PIECE)
    builder.push(registry, "certificates/model", "v1")
    home = _closed()
    with serve_proxy(registry.address, _server(tls, clients=tls.ca)) as mirror:
        folder = write_hosts(
            tmp_path / "certs.d", home, f'[host."https://{mirror.address}"]\n{table}\n'
        )
        for source, name in (
            (tls.ca, "ours.pem"),
            (stranger.ca, "stranger.pem"),
            (tls.certificate, "client.pem"),
            (tls.key, "client.key"),
        ):
            shutil.copy(source, folder / name)
        both = tls.certificate.read_bytes() + tls.key.read_bytes()
        (folder / "both.pem").write_bytes(both)

        async def work(node: Node) -> None:
            if works:
                assert shown(await node.pull(f"{home}/certificates/model:v1")) == files
                return
            with pytest.raises(Unavailable, match="no host that may resolve"):
                await node.pull(f"{home}/certificates/model:v1")

        in_node(tmp_path / "root", replace(SETTINGS, hosts_dir=tmp_path / "certs.d"), work)
        assert mirror.counts.total == (2 * PIECE if works else 0)


def test_a_certificate_that_is_wrong_costs_a_mirror_its_turn_and_no_more(
    tmp_path: Path, registry: RegistryServer, stranger: TlsFiles
) -> None:
    builder, files = weights(2 * PIECE)
    builder.push(registry, "certificates/fallback", "v1")
    with (
        serve_proxy(registry.address) as home,
        serve_proxy(registry.address, _server(stranger)) as mirror,
    ):
        for number, table in enumerate(('ca = "none.pem"', "", 'client = "none.pem"')):
            text = f'[host."https://{mirror.address}"]\ncapabilities = ["pull"]\n{table}\n'
            write_hosts(tmp_path / "certs.d", home.address, text)

            async def work(node: Node) -> None:
                assert shown(await node.pull(f"{home.address}/certificates/fallback:v1")) == files

            in_node(
                tmp_path / f"root{number}",
                replace(SETTINGS, hosts_dir=tmp_path / "certs.d"),
                work,
            )
            assert home.counts.total == (number + 1) * 2 * PIECE
        assert mirror.counts.total == 0


def test_certificates_in_dockers_form_for_the_registry_itself(
    tmp_path: Path, registry: RegistryServer, tls: TlsFiles
) -> None:
    builder, files = weights(2 * PIECE)
    builder.push(registry, "certificates/docker", "v1")
    with serve_proxy(registry.address, _server(tls, clients=tls.ca)) as home:
        folder = write_hosts(tmp_path / "certs.d", home.address, "")
        (folder / "hosts.toml").unlink()
        for source, name in (
            (tls.ca, "ca.crt"),
            (tls.certificate, "node.cert"),
            (tls.key, "node.key"),
        ):
            shutil.copy(source, folder / name)

        async def work(node: Node) -> None:
            assert shown(await node.pull(f"{home.address}/certificates/docker:v1")) == files

        in_node(tmp_path / "root", replace(SETTINGS, hosts_dir=tmp_path / "certs.d"), work)


def test_a_certificate_that_was_renewed_is_used_without_a_restart(
    tmp_path: Path, registry: RegistryServer, tls: TlsFiles, stranger: TlsFiles
) -> None:
    builder, files = weights(PIECE)
    builder.push(registry, "certificates/renewed", "v1")
    ca = tmp_path / "ca.pem"
    shutil.copy(tls.ca, ca)
    with serve_proxy(registry.address, _server(tls)) as home:
        settings = replace(SETTINGS, https=("127.0.0.1",), ca_file=ca)

        async def work(node: Node) -> None:
            shutil.copy(stranger.ca, ca)
            with pytest.raises(Unavailable, match="not trusted"):
                await node.pull(f"{home.address}/certificates/renewed:v1")
            shutil.copy(tls.ca, ca)
            assert shown(await node.pull(f"{home.address}/certificates/renewed:v1")) == files

        in_node(tmp_path / "root", settings, work)


# Proxies


@pytest.fixture(scope="module")
def named(tls: TlsFiles, tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """A certificate for ``registry.example``."""
    folder = tmp_path_factory.mktemp("named")
    certificate, key = folder / "tls.pem", folder / "tls.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
            *("ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=registry"),
            *("-keyout", str(key), "-out", str(certificate), "-CA", str(tls.ca)),
            *("-CAkey", str(tls.ca.with_name("ca.key"))),
            *("-addext", "subjectAltName=DNS:registry.example"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
        ],
        check=True,
        capture_output=True,
    )
    return TlsFiles(tls.ca, certificate, key)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_everything_goes_through_the_proxy_of_the_environment(
    tmp_path: Path, registry: RegistryServer, named: TlsFiles, scheme: str
) -> None:
    """Nobody but the proxy knows the registry's name."""
    builder, files = weights(3 * PIECE)
    builder.push(registry, "proxied/model", "v1")
    password = Credentials("name", "word").basic
    context = _server(named) if scheme == "https" else None
    with (
        serve_proxy(registry.address, context) as home,
        serve_forward_proxy(password) as forward,
    ):
        port = home.address.rpartition(":")[2]
        host = f"registry.example:{port}"
        environment = {f"{scheme.upper()}_PROXY": f"http://name:word@{forward.address}"}
        settings = replace(
            SETTINGS,
            proxies=Proxies.of_environment(environment),
            plain_http=("registry.example",) if scheme == "http" else (),
            ca_file=named.ca,
        )

        async def work(node: Node) -> None:
            assert shown(await node.pull(f"{host}/proxied/model:v1")) == files

        in_node(tmp_path / "root", settings, work)
        assert home.counts.total == 3 * PIECE
        if scheme == "http":
            assert len(forward.asked) == len(home.counts.requests)
            assert all(goal.startswith(f"http://{host}/v2/") for _, goal in forward.asked)
        else:
            assert set(forward.asked) == {("CONNECT", host)}
        excepted = Proxies.of_environment({**environment, "NO_PROXY": ".other,registry.example"})
        asked = len(forward.asked)

        async def straight(node: Node) -> None:
            with pytest.raises(Unavailable, match="there is no host"):
                await node.pull(f"{host}/proxied/model:v1")

        in_node(tmp_path / "straight", replace(settings, proxies=excepted), straight)
        wrong = Proxies.of_environment({name: f"http://{forward.address}" for name in environment})

        async def refused(node: Node) -> None:
            with pytest.raises(ModelError):
                await node.pull(f"{host}/proxied/model:v1")

        assert len(forward.asked) == asked
        in_node(tmp_path / "refused", replace(settings, proxies=wrong), refused)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("trusted", [True, False])
def test_a_proxy_with_tls_is_verified_by_the_systems_authorities_and_ours(
    tmp_path: Path,
    registry: RegistryServer,
    named: TlsFiles,
    tls: TlsFiles,
    stranger: TlsFiles,
    scheme: str,
    trusted: bool,
) -> None:
    """Its certificate counts even where that of the registry does not."""
    builder, files = weights(3 * PIECE)
    builder.push(registry, "proxied/tls", "v1")
    context = _server(named) if scheme == "https" else None
    with (
        serve_proxy(registry.address, context) as home,
        serve_forward_proxy(tls=_server(tls if trusted else stranger)) as forward,
    ):
        host = f"registry.example:{home.address.rpartition(':')[2]}"
        settings = replace(
            SETTINGS,
            proxies=Proxies.of_environment({"ALL_PROXY": f"https://{forward.address}"}),
            plain_http=("registry.example",) if scheme == "http" else (),
            insecure=("registry.example",) if scheme == "https" and not trusted else (),
            ca_file=tls.ca,
        )

        async def work(node: Node) -> None:
            if trusted:
                assert shown(await node.pull(f"{host}/proxied/tls:v1")) == files
                return
            with pytest.raises(Unavailable, match="not trusted"):
                await node.pull(f"{host}/proxied/tls:v1")

        in_node(tmp_path / "root", settings, work)
        assert home.counts.total == (3 * PIECE if trusted else 0)


def test_bulk_bytes_go_to_no_proxy_that_they_cannot_verify(
    registry: RegistryServer, tls: TlsFiles, stranger: TlsFiles
) -> None:
    data = b"some weights"
    digest = registry.push_blob("proxied/verified", data)
    host = f"registry.example:{registry.address.rpartition(':')[2]}"
    hop = Hop(f"http://{host}/v2/proxied/verified/blobs/{digest}", (), Trust(verify=False))
    for ca_file, works in ((tls.ca, True), (stranger.ca, False), (None, False)):
        with serve_forward_proxy(tls=_server(tls)) as forward:
            proxies = Proxies(http=f"https://{forward.address}")
            access = BlobAccess(hop, Route(host, host, proxies=proxies))
            settings = TransferSettings(connect_timeout=2, stall_timeout=2, ca_file=ca_file)
            with contextlib.closing(Connection(settings)) as connection:
                if works:
                    assert _fetched(access, digest, len(data), connection) == data
                else:
                    with pytest.raises(Unavailable):
                        _fetched(access, digest, len(data), connection)
            assert len(forward.asked) == works


def test_bulk_bytes_leave_a_host_of_no_proxy_alone(
    tmp_path: Path, registry: RegistryServer
) -> None:
    """What the environment says is for :mod:`fetcher.proxies` to read, and for nobody else."""
    data = b"some weights"
    digest = registry.push_blob("proxied/bulk", data)
    with serve_forward_proxy() as forward:
        host = f"registry.example:{registry.address.rpartition(':')[2]}"
        access = BlobAccess(
            Hop(f"http://{host}/v2/proxied/bulk/blobs/{digest}", (), Trust()),
            Route(host, host, proxies=Proxies(http=f"http://{forward.address}")),
        )
        assert _fetched(access, digest, len(data)) == data
        direct = replace(access, route=Route(host, host))
        with pytest.MonkeyPatch.context() as patch:
            for name in ("http_proxy", "ALL_PROXY", "all_proxy"):
                patch.setenv(name, f"http://{forward.address}")
            with pytest.raises(Unavailable, match="there is no host"):
                _fetched(direct, digest, len(data))
        assert len(forward.asked) == 1


# Redirects in bulk


class _Kept:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.data = b""

    def whole(self) -> bool:
        return True

    def __call__(self, data: memoryview) -> bool:
        self.data += data
        return True


def _fetched(
    access: BlobAccess, digest: Digest, size: int, connection: Connection | None = None
) -> bytes:
    used = connection or Connection(TransferSettings(connect_timeout=2, stall_timeout=2))
    sink = _Kept()
    try:
        used.fetch(access, Piece(digest, size, Range(0, size)), sink, threading.Event())
    finally:
        if connection is None:
            used.close()
    return sink.data


def _own_address() -> str:
    """An address of this machine that is none of the loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but its loopback's")
        return str(probe.getsockname()[0])


def test_a_redirect_onto_an_open_connection_is_looked_at_too(registry: RegistryServer) -> None:
    """A name that leads to this machine: allowed for who asks, and not for whom is redirected."""
    data = b"what listens on this machine only"
    digest = registry.push_blob("steered/model", data)
    path = f"/v2/steered/model/blobs/{digest}"
    own = _own_address()
    with serve_proxy(registry.address) as inner, serve_proxy(registry.address, host=own) as outer:
        # names below localhost are this machine's, without a question to DNS
        goal = f"inner.localhost:{inner.address.rpartition(':')[2]}"
        there = BlobAccess(Hop(f"http://{goal}{path}", (), Trust()), Route(goal, goal))
        outer.faults.signed_seconds = 60
        outer._signed[path] = (f"http://{goal}{path}", float("inf"))
        steered = BlobAccess(
            Hop(f"http://{outer.address}{path}", (), Trust()),
            Route(outer.address, outer.address),
        )
        connection = Connection(TransferSettings(connect_timeout=2, stall_timeout=2))
        try:
            for kept in (connection, None):
                assert _fetched(there, digest, len(data), kept) == data
                asked = len(inner.counts.requests)
                with pytest.raises(AccessDenied, match="this machine's own"):
                    _fetched(steered, digest, len(data), kept)
                assert len(inner.counts.requests) == asked
        finally:
            connection.close()


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("http://169.254.169.254/latest?s3cr3t", AccessDenied),
        ("http://[fe80::1]/s3cr3t", AccessDenied),
        ("file:///etc/passwd", AccessDenied),
        ("http://user:s3cr3t@127.0.0.1/", AccessDenied),
        ("http://127.0.0.1:0/s3cr3t", AccessDenied),
        ("/v2/again?s3cr3t", Unavailable),
    ],
)
def test_redirects_in_bulk_go_by_the_same_rules(location: str, error: type[ModelError]) -> None:
    digest = Digest.of(b"x")
    with serve_faulty() as faulty:
        faulty.add("/v2/", Reply(307, {"Location": location}))
        url = f"http://{faulty.address}/v2/a/blobs/{digest}"
        access = BlobAccess(Hop(url, (), Trust()), Route(faulty.address, faulty.address))
        with pytest.raises(error) as caught:
            _fetched(access, digest, 1)
    assert "s3cr3t" not in str(caught.value)


def test_what_is_secret_does_not_follow_a_redirect(registry: RegistryServer) -> None:
    data = b"bytes at another host"
    digest = registry.push_blob("redirected/model", data)
    path = f"/v2/redirected/model/blobs/{digest}"
    with serve_faulty(registry) as near, serve_faulty(registry) as far:
        near.add("/blobs/", Reply(307, {"Location": f"http://{far.address}{path}"}))
        headers = (("Authorization", "Basic s3cr3t"), ("X-Custom", "s3cr3t"))
        access = BlobAccess(
            Hop(f"http://{near.address}{path}", headers, Trust()),
            Route(near.address, near.address),
        )
        assert _fetched(access, digest, len(data)) == data
        assert near.requests[0].headers["x-custom"] == "s3cr3t"
        assert "s3cr3t" not in str(far.requests[0].headers)


def test_an_endless_error_is_not_read(registry: RegistryServer) -> None:
    with serve_faulty() as faulty:
        faulty.add("/v2/", Reply(503, {"Retry-After": "7"}, endless=True))
        url = f"http://{faulty.address}/v2/a/blobs/{Digest.of(b'x')}"
        access = BlobAccess(Hop(url, (), Trust()), Route(faulty.address, faulty.address))
        with pytest.raises(Unavailable, match="status 503") as caught:
            _fetched(access, Digest.of(b"x"), 1)
        assert caught.value.retry_after == 7
