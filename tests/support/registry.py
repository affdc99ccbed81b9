"""A real registry for tests: Debian's ``docker-registry`` on a loopback port of its own."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import ssl
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

from fetcher.oci import Digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

READY_SECONDS = 30.0
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@dataclass(frozen=True)
class TlsFiles:
    """A throw-away certificate authority and one certificate for the loopback addresses."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class TokenAuth:
    """What a registry needs to know of the token server that signs for it."""

    realm: str
    service: str
    issuer: str
    certificate: Path


@dataclass(frozen=True)
class RegistryServer:
    """A running registry. ``address`` is ``127.0.0.1:PORT``."""

    address: str
    storage: Path
    log: Path
    pid: int
    tls: TlsFiles | None = None
    authorization: Callable[[str], str | None] = field(default=lambda repository: None, repr=False)
    """Gives the ``Authorization`` header with which the helpers below write to a repository."""

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address}"

    def reference(self, repository: str, tag: str = "latest") -> str:
        return f"{self.address}/{repository}:{tag}"

    def push_blob(self, repository: str, content: bytes | Path) -> Digest:
        """Upload a blob, streaming when it is a file; returns its digest."""
        digest = _digest_of(content)
        status, headers, _ = self.request("POST", repository, f"/v2/{repository}/blobs/uploads/")
        _expect(status, 202, "start of the upload")
        location = urlsplit(headers["location"])
        query = f"{location.query}&" if location.query else ""
        with _opened(content) as (body, size):
            status, _, answer = self.request(
                "PUT",
                repository,
                f"{location.path}?{query}digest={digest}",
                body,
                {"Content-Length": str(size), "Content-Type": "application/octet-stream"},
            )
        _expect(status, 201, f"upload of {digest}: {answer[:300]!r}")
        return digest

    def push_manifest(
        self, repository: str, tag: str, body: bytes, media_type: str = OCI_MANIFEST
    ) -> Digest:
        """Upload a manifest or an index under a tag (or a digest); returns its digest."""
        status, _, answer = self.request(
            "PUT",
            repository,
            f"/v2/{repository}/manifests/{tag}",
            io.BytesIO(body),
            {"Content-Length": str(len(body)), "Content-Type": media_type},
        )
        _expect(status, 201, f"upload of the manifest {tag}: {answer[:300]!r}")
        return Digest.of(body)

    def blob_path(self, digest: Digest) -> Path:
        """Where the registry keeps a blob's bytes: to corrupt or to remove them."""
        folder = self.storage / "docker/registry/v2/blobs" / digest.algorithm / digest.hex[:2]
        return folder / digest.hex / "data"

    def request(
        self,
        method: str,
        repository: str,
        target: str,
        body: BinaryIO | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """One plain request with the write credentials: status, headers in lower case, body."""
        authorization = self.authorization(repository)
        sent = {**(headers or {}), **({"Authorization": authorization} if authorization else {})}
        connection = _connect(self.address, self.tls)
        try:
            connection.request(method, target, body=body, headers=sent)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read()
        finally:
            connection.close()


@contextlib.contextmanager
def serve_registry(
    folder: Path,
    *,
    users: Mapping[str, str] | None = None,
    token: TokenAuth | None = None,
    tls: TlsFiles | None = None,
    read_only: bool = False,
    authorization: Callable[[str], str | None] | None = None,
) -> Iterator[RegistryServer]:
    """Run a registry that stores below ``folder`` until the block is left.

    ``users`` turns htpasswd authentication on, ``token`` token authentication, ``tls`` TLS. The
    kernel picks the port and the registry's log tells it, so parallel runs never collide.
    """
    folder.mkdir(parents=True, exist_ok=True)
    storage, log = folder / "storage", folder / "registry.log"
    config = folder / "config.yml"
    config.write_text(json.dumps(_config(folder, storage, users, token, tls, read_only)))
    if authorization is None and users:
        name, password = next(iter(users.items()))
        basic = base64.b64encode(f"{name}:{password}".encode()).decode()
        authorization = lambda repository: f"Basic {basic}"  # noqa: E731 -- a value, not a function
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "OTEL_TRACES_EXPORTER": "none"},
        )
    try:
        address = _wait_until_ready(process, log, tls)
        yield RegistryServer(
            address, storage, log, process.pid, tls, authorization or (lambda repository: None)
        )
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def make_tls(folder: Path) -> TlsFiles:
    """A certificate authority and a certificate for ``127.0.0.1``, ``::1`` and ``localhost``."""
    folder.mkdir(parents=True, exist_ok=True)
    ca, ca_key = folder / "ca.pem", folder / "ca.key"
    certificate, key = folder / "tls.pem", folder / "tls.key"
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:0:0:0:0:0:0:0:1"
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    _openssl(
        *("req", "-x509", *new_key, "-keyout", str(ca_key), "-out", str(ca), "-days", "2"),
        *("-subj", "/CN=model-csi test CA"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )
    _openssl(
        *("req", "-x509", *new_key, "-keyout", str(key), "-out", str(certificate), "-days", "2"),
        *("-subj", "/CN=localhost", "-addext", names, "-CA", str(ca), "-CAkey", str(ca_key)),
        *("-addext", "basicConstraints=critical,CA:FALSE"),
    )
    return TlsFiles(ca, certificate, key)


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]}: {done.stderr.decode(errors='replace')}")


def _config(
    folder: Path,
    storage: Path,
    users: Mapping[str, str] | None,
    token: TokenAuth | None,
    tls: TlsFiles | None,
    read_only: bool,
) -> dict[str, object]:
    serving: dict[str, object] = {"addr": "127.0.0.1:0"}
    if tls:
        serving["tls"] = {"certificate": str(tls.certificate), "key": str(tls.key)}
    config: dict[str, object] = {
        "version": "0.1",
        "log": {"level": "info", "accesslog": {"disabled": False}},
        "http": serving,
        "storage": {
            "filesystem": {"rootdirectory": str(storage), "maxthreads": 100},
            "delete": {"enabled": True},
            "maintenance": {
                "uploadpurging": {"enabled": False},
                "readonly": {"enabled": read_only},
            },
        },
    }
    if users:
        passwords = folder / "htpasswd"
        passwords.write_text("".join(_htpasswd(*user) for user in users.items()))
        config["auth"] = {"htpasswd": {"realm": "test registry", "path": str(passwords)}}
    if token:
        config["auth"] = {
            "token": {
                "realm": token.realm,
                "service": token.service,
                "issuer": token.issuer,
                "rootcertbundle": str(token.certificate),
            }
        }
    return config


def _htpasswd(name: str, password: str) -> str:
    done = subprocess.run(
        ["htpasswd", "-Bbn", name, password], capture_output=True, check=True, text=True
    )
    return done.stdout.strip() + "\n"


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, tls: TlsFiles | None) -> str:
    """The address from the log, once ``/v2/`` answers there."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        address = _address_in(log)
        if address and _answers(address, tls):
            return address
        if process.poll() is not None:
            break
        time.sleep(0.02)
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"docker-registry did not become ready; the end of its log:\n{tail}")


def _address_in(log: Path) -> str | None:
    for line in log.read_text(errors="replace").splitlines():
        _, found, rest = line.partition("listening on ")
        if found:
            return rest.split('"')[0].split(",")[0].strip()
    return None


def _answers(address: str, tls: TlsFiles | None) -> bool:
    connection = _connect(address, tls)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status in (200, 401)
    except OSError:
        return False
    finally:
        connection.close()


def _connect(address: str, tls: TlsFiles | None) -> http.client.HTTPConnection:
    if tls is None:
        return http.client.HTTPConnection(address, timeout=30)
    context = ssl.create_default_context(cafile=str(tls.ca))
    return http.client.HTTPSConnection(address, timeout=30, context=context)


def _digest_of(content: bytes | Path) -> Digest:
    if isinstance(content, bytes):
        return Digest.of(content)
    with content.open("rb") as file:
        return Digest("sha256", hashlib.file_digest(file, "sha256").hexdigest())


@contextlib.contextmanager
def _opened(content: bytes | Path) -> Iterator[tuple[BinaryIO, int]]:
    if isinstance(content, bytes):
        yield io.BytesIO(content), len(content)
        return
    with content.open("rb") as file:
        yield file, content.stat().st_size


def _expect(status: int, wanted: int, what: str) -> None:
    if status != wanted:
        raise AssertionError(f"{what}: the registry answered {status}, not {wanted}")
