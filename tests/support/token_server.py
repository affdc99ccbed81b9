"""A token server for a registry with token authentication, signing with ``openssl``.

It speaks the distribution project's "Token Authentication Specification" and its OAuth2 form, and
notes what it was asked. Tokens are JWTs in RS256, which the registry itself verifies.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import subprocess
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from tests.support.registry import TokenAuth

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

SERVICE = "registry under test"
PASSWORD = "s3cr3t-of-acme"
"""Of ``robot``, wherever a test needs one; it must never be seen anywhere."""

ISSUER = "token server of the tests"


@dataclass
class TokenServer:
    """Who may have tokens, for how long, and what was asked so far."""

    folder: Path
    users: dict[str, str]
    identity_tokens: set[str] = field(default_factory=set)
    anonymous: bool = False
    """Whether tokens for reading are given to strangers."""
    lifetime: int = 300
    told_lifetime: int | None = None
    """The ``expires_in`` of the answer, where it is not the truth."""
    delay: float = 0.0
    failures: int = 0
    """How many of the next requests are answered 503."""
    answer: tuple[int, str, bytes] | None = None
    """Status, content type and body that everybody gets instead of a token."""
    requests: list[TokenAsked] = field(default_factory=list)
    issued: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def realm(self) -> str:
        return f"http://127.0.0.1:{self.port}/token"

    @property
    def auth(self) -> TokenAuth:
        """What the registry is configured with."""
        return TokenAuth(self.realm, SERVICE, ISSUER, self.folder / "signer.pem")

    def authorization(self, repository: str) -> str:
        """The header with which the tests themselves write to a repository."""
        return "Bearer " + self.sign("tests", f"repository:{repository}:pull,push", 300)

    def sign(self, subject: str, scope: str, lifetime: int) -> str:
        """A token, signed with the server's key."""
        now = int(time.time())
        header = {"typ": "JWT", "alg": "RS256", "x5c": [self._certificate()]}
        claims = {
            "iss": ISSUER,
            "sub": subject,
            "aud": SERVICE,
            "exp": now + lifetime,
            "nbf": now - 5,
            "iat": now,
            "jti": secrets.token_hex(8),
            "access": _access(scope),
        }
        signed = f"{_encode(json.dumps(header).encode())}.{_encode(json.dumps(claims).encode())}"
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self.folder / "signer.key")],
            input=signed.encode(),
            capture_output=True,
            check=True,
        ).stdout
        return f"{signed}.{_encode(signature)}"

    def _certificate(self) -> str:
        lines = (self.folder / "signer.pem").read_text().splitlines()
        return "".join(line for line in lines if "-----" not in line)


@dataclass(frozen=True)
class TokenAsked:
    """One request to the token server."""

    method: str
    parameters: Mapping[str, str]
    authorization: str | None


@contextlib.contextmanager
def serve_tokens(folder: Path, users: Mapping[str, str]) -> Iterator[TokenServer]:
    """Run a token server until the block is left."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(folder / "signer.key"), "-out", str(folder / "signer.pem")),
            *("-subj", "/CN=token signer"),
        ],
        capture_output=True,
        check=True,
    )
    server = TokenServer(folder, dict(users))
    listener = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    server.port = listener.server_address[1]
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


def _handler(server: TokenServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(parse_qs(urlsplit(self.path).query))

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", "0"))
            self._answer(parse_qs(self.rfile.read(length).decode()))

        def _answer(self, query: dict[str, list[str]]) -> None:
            parameters = {key: values[0] for key, values in query.items()}
            authorization = self.headers.get("Authorization")
            server.requests.append(TokenAsked(self.command, parameters, authorization))
            time.sleep(server.delay)
            status, content_type, body = _reply(server, server.requests[-1])
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    return Handler


def _reply(server: TokenServer, asked: TokenAsked) -> tuple[int, str, bytes]:
    if server.failures:
        server.failures -= 1
        return 503, "text/plain", b"later"
    if server.answer is not None:
        return server.answer
    subject = _subject(server, asked)
    if subject is None:
        return 401, "application/json", b'{"errors":[{"code":"UNAUTHORIZED","message":"who?"}]}'
    token = server.sign(subject, asked.parameters.get("scope", ""), server.lifetime)
    server.issued.append(token)
    told = server.lifetime if server.told_lifetime is None else server.told_lifetime
    key = "access_token" if asked.method == "POST" else "token"
    return 200, "application/json", json.dumps({key: token, "expires_in": told}).encode()


def _subject(server: TokenServer, asked: TokenAsked) -> str | None:
    if asked.method == "POST":
        known = asked.parameters.get("refresh_token") in server.identity_tokens
        return "somebody" if known else None
    if asked.authorization is None:
        return "" if server.anonymous else None
    pair = base64.b64decode(asked.authorization.removeprefix("Basic ")).decode()
    name, _, password = pair.partition(":")
    return name if server.users.get(name) == password else None


def _access(scope: str) -> list[dict[str, object]]:
    if not scope:
        return []
    kind, name, actions = scope.split(":")
    return [{"type": kind, "name": name, "actions": actions.split(",")}]


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
