"""Challenges, the conversation, tokens, and the addresses that nobody is sent to. No network."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from fetcher.addresses import check_host, refused
from fetcher.auth import (
    Asked,
    Attempt,
    Basic,
    Bearer,
    Challenge,
    Outcome,
    TokenKey,
    TokenWanted,
    check_realm,
    choose,
    converse,
    parse_challenges,
    token_request,
)
from fetcher.credentials import Credentials
from fetcher.errors import AccessDenied, Unauthenticated, Unavailable
from fetcher.tokens import Tokens, read_token

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

REALM = "https://auth.example/token"
ASKED = Asked("registry.example", "registry.example", plain=False, repository="acme/qwen")
PLAIN = Asked("127.0.0.1:5000", "127.0.0.1:5000", plain=True, repository="acme/qwen")
ROBOT = Credentials("robot", "s3cr3t-of-acme")
BEARER = f'Bearer realm="{REALM}",service="registry",scope="repository:acme/qwen:pull"'


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (BEARER, [("bearer", {"realm": REALM, "service": "registry",
                              "scope": "repository:acme/qwen:pull"})]),
        ('Basic realm="a"', [("basic", {"realm": "a"})]),
        ("basic", [("basic", {})]),
        ("Negotiate", [("negotiate", {})]),
        ('BEARER  realm = "a" , service=b', [("bearer", {"realm": "a", "service": "b"})]),
        ('Bearer realm="a",service="b", Basic realm="c"',
         [("bearer", {"realm": "a", "service": "b"}), ("basic", {"realm": "c"})]),
        ('Basic realm="c", Bearer realm="a"',
         [("basic", {"realm": "c"}), ("bearer", {"realm": "a"})]),
        ("Negotiate abc==, Basic realm=c", [("negotiate", {}), ("basic", {"realm": "c"})]),
        ("Negotiate a/b+c=, Basic realm=c", [("negotiate", {}), ("basic", {"realm": "c"})]),
        (r'Basic realm="a \"b\", c"', [("basic", {"realm": 'a "b", c'})]),
        ('Bearer realm="a,b",,, service="x"', [("bearer", {"realm": "a,b", "service": "x"})]),
        ('Bearer realm="a", realm="evil"', [("bearer", {"realm": "a"})]),
        ('Bearer realm="open', [("bearer", {})]),
        ('Bearer realm=, Basic realm="x"', [("bearer", {}), ("basic", {"realm": "x"})]),
        ("", []),
        (", ,", []),
        ('="x"', []),
    ],
)  # fmt: skip
def test_challenges_are_read_as_rfc_9110_has_them(
    header: str, expected: list[tuple[str, dict[str, str]]]
) -> None:
    assert [(one.scheme, one.parameters) for one in parse_challenges([header])] == expected


def test_several_headers_are_several_challenges_and_all_are_bounded() -> None:
    assert [one.scheme for one in parse_challenges(["Basic", "Bearer realm=a"])] == [
        "basic",
        "bearer",
    ]
    assert len(parse_challenges(["Basic realm=a"] * 10_000)) <= 16
    assert parse_challenges(["Basic realm=" + "a" * 1_000_000])


@given(st.lists(st.text(max_size=300), max_size=4))
def test_no_header_breaks_the_reader(headers: list[str]) -> None:
    parse_challenges(headers)


@given(st.text(alphabet='ab ,="\\/+\t', max_size=60))
def test_no_arrangement_of_separators_breaks_the_reader(header: str) -> None:
    for challenge in parse_challenges([header]):
        assert challenge.scheme


# What a conversation does


def test_a_registry_that_asks_for_nothing_is_told_nothing() -> None:
    talk = converse(ASKED, ROBOT, None)
    assert next(talk) == Attempt(None)
    assert _end(talk, Outcome(200)) is None


def test_a_token_is_fetched_for_a_challenge_and_for_reading_alone() -> None:
    talk = converse(ASKED, ROBOT, None)
    next(talk)
    wanted = talk.send(Outcome(401, (BEARER,)))
    assert wanted == TokenWanted(TokenKey(ASKED, REALM, "registry", ROBOT), None)
    assert wanted.key.asked.scope == "repository:acme/qwen:pull"
    assert talk.send("token") == Attempt("Bearer token")
    assert _end(talk, Outcome(200)) == Bearer(REALM, "registry")


def test_what_a_registry_wants_is_remembered_and_a_stale_token_renewed_once() -> None:
    talk = converse(ASKED, ROBOT, Bearer(REALM, "registry"))
    assert next(talk) == TokenWanted(TokenKey(ASKED, REALM, "registry", ROBOT), None)
    assert talk.send("old") == Attempt("Bearer old")
    again = talk.send(Outcome(401, (BEARER,)))
    assert again == TokenWanted(TokenKey(ASKED, REALM, "registry", ROBOT), "Bearer old")
    assert talk.send("new") == Attempt("Bearer new")
    _end(talk, Outcome(401, (BEARER,)))


def test_a_password_is_sent_where_basic_is_all_there_is() -> None:
    talk = converse(ASKED, ROBOT, None)
    next(talk)
    assert talk.send(Outcome(401, ('Basic realm="x"',))) == Attempt(ROBOT.basic)
    assert _end(talk, Outcome(200)) == Basic()
    talk = converse(ASKED, ROBOT, Basic())
    assert next(talk) == Attempt(ROBOT.basic)
    _end(talk, Outcome(401, ('Basic realm="x"',)))


def test_nobody_is_not_sent_as_a_password() -> None:
    for credentials in (None, Credentials("", "", "identity")):
        talk = converse(ASKED, credentials, None)
        next(talk)
        _end(talk, Outcome(401, ('Basic realm="x"',)))


def test_a_refusal_without_a_challenge_is_the_end() -> None:
    for status in (401, 403, 404, 500):
        talk = converse(ASKED, ROBOT, None)
        next(talk)
        _end(talk, Outcome(status))


def test_a_way_that_changed_is_found_again() -> None:
    talk = converse(ASKED, ROBOT, Basic())
    assert next(talk) == Attempt(ROBOT.basic)
    wanted = talk.send(Outcome(401, (BEARER,)))
    assert isinstance(wanted, TokenWanted)


def _end(talk: object, outcome: Outcome) -> object:
    with pytest.raises(StopIteration) as caught:
        talk.send(outcome)  # type: ignore[attr-defined]  # a generator of any kind
    return caught.value.value


# Where credentials go


@pytest.mark.parametrize(
    "realm",
    [
        "http://auth.example/token",
        "ftp://auth.example/token",
        "//auth.example/token",
        "auth.example",
        "https://",
        "https://[::1/token",
        "https://auth.example:99999/token",
        "https://user:password@auth.example/token",
        "https://auth.example/to ken",
        "https://auth.example/\r\nX: y",
        "https://" + "a" * 3000,
        "https://169.254.169.254/token",
        "https://[fe80::1]/token",
        "https://[::ffff:169.254.169.254]/token",
        "https://[64:ff9b::a9fe:a9fe]/token",
        "https://[fd00:ec2::254]/token",
        "https://0.0.0.0/token",
        "https://127.0.0.1/token",
        "https://localhost/token",
        "https://[::1]/token",
    ],
)
def test_a_realm_that_gets_no_credentials(realm: str) -> None:
    with pytest.raises(AccessDenied) as caught:
        check_realm(ASKED, realm)
    assert "password" not in caught.value.message or "with a password in it" in caught.value.message
    challenge = Challenge("bearer", {"realm": realm})
    with pytest.raises(AccessDenied):
        choose(ASKED, (challenge,), ROBOT)


def test_realms_that_do() -> None:
    check_realm(ASKED, REALM)
    check_realm(ASKED, "https://registry.example/token?x=y")
    check_realm(PLAIN, "http://127.0.0.1:6000/token")
    check_realm(PLAIN, "https://auth.example/token")


def test_even_a_plain_registry_leads_nobody_to_link_local_addresses() -> None:
    with pytest.raises(AccessDenied, match="link-local"):
        check_realm(PLAIN, "http://169.254.169.254/latest/meta-data")


@pytest.mark.parametrize(
    "address",
    [
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
        "fd00:c1::a9fe:a9fe",
        "fd00:42::42",
        "fd00:a9fe:a9fe::1",
        "fd00:100::100:200",
        "[FD20:00CE:0::254]",
        "::a9fe:a9fe",
        "::169.254.169.254",
        "::ffff:100.100.100.200",
        "::6464:64c8",
        "64:ff9b::a83f:8110",
        "2002:a9fe:a9fe::",
    ],
)
def test_where_clouds_keep_the_credentials_of_machines(address: str) -> None:
    assert refused(address)


def test_addresses() -> None:
    assert refused("fd00:ec3::254") is None
    assert refused("fd20:ce::253") is None
    assert refused("::a00:1") is None
    assert refused("::1") is None
    assert refused("::1", steered=True)
    assert refused("::127.0.0.1", steered=True)
    assert refused("::")
    assert refused("169.254.1.1")
    assert refused("fe80::1%eth0")
    assert refused("100.100.100.200")
    assert refused("224.0.0.1")
    assert refused("2002:a9fe:a9fe::1")
    assert refused("10.0.0.1") is None
    assert refused("127.0.0.1") is None
    assert refused("127.0.0.1", steered=True)
    assert refused("::ffff:127.0.0.1", steered=True)
    assert refused("ghcr.io", steered=True) is None
    check_host("127.0.0.1", asked_by="localhost")
    with pytest.raises(AccessDenied, match=r"registry\.example leads to localhost"):
        check_host("localhost", asked_by="registry.example")


# Tokens


def test_a_token_is_asked_for_with_the_password() -> None:
    request = token_request(TokenKey(ASKED, REALM + "?a=b#c", "the registry", ROBOT), "model-csi")
    assert request.method == "GET"
    assert request.authorization == ROBOT.basic
    assert parse_qs(urlsplit(request.url).query) == {
        "a": ["b"],
        "service": ["the registry"],
        "scope": ["repository:acme/qwen:pull"],
    }
    assert ROBOT.password not in request.url
    assert ROBOT.password not in repr(request)
    anonymous = token_request(TokenKey(ASKED, REALM, None, None), "model-csi")
    assert anonymous.authorization is None


def test_an_identity_token_is_sent_in_a_form() -> None:
    credentials = Credentials("", "", "refresh&me")
    request = token_request(TokenKey(ASKED, REALM, "registry", credentials), "model-csi")
    assert (request.method, request.url, request.authorization) == ("POST", REALM, None)
    assert parse_qs((request.form or b"").decode()) == {
        "grant_type": ["refresh_token"],
        "client_id": ["model-csi"],
        "service": ["registry"],
        "scope": ["repository:acme/qwen:pull"],
        "refresh_token": ["refresh&me"],
    }
    assert "refresh&me" not in repr(request)


KEY = TokenKey(ASKED, REALM, "registry", ROBOT)
NOW = datetime.datetime(2026, 5, 4, 12, 0, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("document", "lifetime"),
    [
        ({"token": "t"}, 60),
        ({"access_token": "t"}, 60),
        ({"token": "t", "expires_in": 300}, 300),
        ({"token": "t", "expires_in": "300"}, 300),
        ({"token": "t", "expires_in": None, "issued_at": None}, 60),
        ({"token": "t", "expires_in": 300, "issued_at": "2026-05-04T11:59:00Z"}, 240),
        ({"token": "t", "expires_in": 300, "issued_at": "2026-05-04T11:59:00.123456789Z"}, 240),
        ({"token": "t", "expires_in": 300, "issued_at": "2026-05-04T13:59:00+02:00"}, 240),
        ({"token": "t", "expires_in": 300, "issued_at": "2026-05-04T15:00:00Z"}, 300),
        ({"token": "t", "expires_in": 300, "issued_at": "2020-01-01T00:00:00"}, 0),
        ({"token": "t", "expires_in": 300, "issued_at": "yesterday"}, 300),
        ({"token": "t", "expires_in": -5}, 0),
        ({"token": "t", "expires_in": 1e300}, 86_400),
    ],
)
def test_how_long_a_token_is_of_use(document: dict[str, object], lifetime: float) -> None:
    token = read_token(KEY, 200, json.dumps(document).encode(), NOW)
    assert token.value == "t"
    assert token.lifetime == pytest.approx(lifetime, abs=1)
    assert "'t'" not in repr(token)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b""),
        (200, b"{}"),
        (200, b"[]"),
        (200, b"<html>"),
        (200, b'{"token":7}'),
        (200, b'{"token":""}'),
        (200, b'{"token":"two words"}'),
        (200, b'{"token":"a\\r\\nHost: b"}'),
        (200, b'{"token":"' + b"a" * 40_000 + b'"}'),
        (200, b"[" * 100_000),
        (200, b'{"token":"\xff"}'),
        (204, b""),
        (302, b""),
        (404, b""),
        (500, b""),
    ],
)
def test_a_token_server_that_makes_no_sense(status: int, body: bytes) -> None:
    with pytest.raises(Unavailable, match=r"token server auth\.example"):
        read_token(KEY, status, body, NOW)


def test_a_token_server_that_refuses() -> None:
    with pytest.raises(Unauthenticated, match="does not accept the credentials"):
        read_token(KEY, 401, b"", NOW)
    stranger = TokenKey(ASKED, REALM, "registry", None)
    with pytest.raises(Unauthenticated, match="none were found"):
        read_token(stranger, 403, b"", NOW)


# One token for all who wait


@dataclass
class Server:
    """A token server as the cache sees it, that counts."""

    lifetime: float = 300
    takes: float = 1
    status: int = 200
    asked: int = 0
    running: int = 0
    keys: list[TokenKey] = field(default_factory=list)

    async def __call__(self, key: TokenKey) -> tuple[int, bytes]:
        self.asked += 1
        self.keys.append(key)
        number = self.asked
        self.running += 1
        try:
            assert self.running <= len(set(self.keys))
            await trio.sleep(self.takes)
        finally:
            self.running -= 1
        document = {"token": f"token-{number}", "expires_in": self.lifetime}
        return self.status, json.dumps(document).encode()


def with_fake_time(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_many_who_ask_at_once_share_one_token() -> None:
    async def main() -> None:
        server = Server()
        tokens, found = Tokens(server), list[str]()

        async def ask() -> None:
            found.append(await tokens.get(KEY))

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(ask)
        assert found == ["token-1"] * 100
        assert server.asked == 1
        assert tokens._flights == {}

    with_fake_time(main)


def test_a_first_caller_who_is_cancelled_fails_nobody_else() -> None:
    async def main() -> None:
        server = Server(takes=10)
        tokens, found = Tokens(server), list[str]()

        async def ask() -> None:
            found.append(await tokens.get(KEY))

        async def ask_and_leave(scope: trio.CancelScope) -> None:
            with scope:
                await ask()

        first = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_and_leave, first)
            await trio.sleep(1)
            for _ in range(5):
                nursery.start_soon(ask)
            await trio.sleep(1)
            first.cancel()
        assert found == ["token-2"] * 5
        assert server.asked == 2
        assert tokens._flights == {}

    with_fake_time(main)


def test_cancelling_at_any_moment_leaves_nothing_behind() -> None:
    async def main() -> None:
        for moment in (0.0, 0.5, 1.0, 1.5):
            tokens = Tokens(Server())
            with trio.move_on_after(moment):
                await tokens.get(KEY)
            assert tokens._flights == {}
            assert (await tokens.get(KEY)).startswith("token-")

    with_fake_time(main)


def test_a_failure_is_told_to_all_who_waited_and_not_kept() -> None:
    async def main() -> None:
        server = Server(status=401)
        tokens, failures = Tokens(server), list[Unauthenticated]()

        async def ask() -> None:
            try:
                await tokens.get(KEY)
            except Unauthenticated as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask)
        assert len(failures) == 20
        assert len({id(error) for error in failures}) == 20
        assert server.asked == 1
        server.status = 200
        assert await tokens.get(KEY) == "token-2"

    with_fake_time(main)


def test_a_token_is_renewed_before_it_expires() -> None:
    async def main() -> None:
        server = Server(lifetime=300, takes=0)
        tokens = Tokens(server)
        assert await tokens.get(KEY) == "token-1"
        await trio.sleep(260)
        assert await tokens.get(KEY) == "token-1"
        await trio.sleep(15)
        assert await tokens.get(KEY) == "token-2"

    with_fake_time(main)


def test_a_token_that_was_refused_is_renewed_once_for_all() -> None:
    async def main() -> None:
        server = Server()
        tokens = Tokens(server)
        old = await tokens.get(KEY)

        async def renew() -> None:
            assert await tokens.get(KEY, f"Bearer {old}") == "token-2"

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(renew)
        assert server.asked == 2

    with_fake_time(main)


def test_tokens_are_kept_apart_by_all_that_they_are_good_for() -> None:
    async def main() -> None:
        server = Server(takes=0)
        tokens = Tokens(server)
        keys = [
            KEY,
            TokenKey(ASKED, REALM + "2", "registry", ROBOT),
            TokenKey(ASKED, REALM, "other", ROBOT),
            TokenKey(ASKED, REALM, "registry", None),
            TokenKey(ASKED, REALM, "registry", Credentials("robot", "other")),
            TokenKey(PLAIN, REALM, "registry", ROBOT),
            TokenKey(
                Asked("registry.example", "registry.example", False, "acme/other"),
                REALM,
                "registry",
                ROBOT,
            ),
        ]
        first = [await tokens.get(key) for key in keys]
        assert len(set(first)) == len(keys)
        assert [await tokens.get(key) for key in keys] == first

    with_fake_time(main)
