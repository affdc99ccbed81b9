"""Keychains: matching as kubelet does, and secrets that never show."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import stat
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from fetcher.credential_helper import ask_helper
from fetcher.credentials import (
    ANONYMOUS,
    Anonymous,
    Chain,
    Credentials,
    DockerConfig,
    Keychain,
    VolumeSecrets,
    docker_config_path,
    fingerprint,
    match,
)
from fetcher.errors import InvalidRequest
from fetcher.glances import GLANCE_SECONDS
from tests.support.clocks import HandClock
from tests.support.commands import wait_until

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "s3cr3t-of-acme"


def lookup(keychain: Keychain, registry: str, repository: str = "acme/qwen") -> Credentials | None:
    return trio.run(keychain.lookup, registry, repository)


def entry(name: str = "robot", password: str = SECRET) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{name}:{password}".encode()).decode()}


def secret(**auths: dict[str, str]) -> VolumeSecrets:
    return VolumeSecrets.parse({".dockerconfigjson": json.dumps({"auths": auths})}, "ghcr.io")


@pytest.mark.parametrize(
    ("key", "registry", "repository", "matches"),
    [
        ("ghcr.io", "ghcr.io", "acme/qwen", True),
        ("https://ghcr.io", "ghcr.io", "acme/qwen", True),
        ("https://ghcr.io/", "ghcr.io", "acme/qwen", True),
        ("https://ghcr.io/v2/", "ghcr.io", "acme/qwen", True),
        ("http://GHCR.io/v1", "ghcr.io", "acme/qwen", True),
        ("ghcr.io/acme", "ghcr.io", "acme/qwen", True),
        ("ghcr.io/acme/", "ghcr.io", "acme/qwen", True),
        ("ghcr.io/acme/qwen", "ghcr.io", "acme/qwen", True),
        ("ghcr.io/acme", "ghcr.io", "acme-two/qwen", False),
        ("ghcr.io/acme/qwen", "ghcr.io", "acme/qwen-2", False),
        ("ghcr.io", "ghcr.io.evil.example", "acme/qwen", False),
        ("ghcr.io", "evil-ghcr.io", "acme/qwen", False),
        ("ghcr.io", "ghcr.io:8443", "acme/qwen", False),
        ("ghcr.io:8443", "ghcr.io:8443", "acme/qwen", True),
        ("ghcr.io:8443", "ghcr.io", "acme/qwen", False),
        ("*.dkr.ecr.eu-west-1.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com", "a", True),
        ("*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com", "a", True),
        ("*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com", "a", False),
        ("*.io", "ghcr.io", "acme/qwen", True),
        ("*", "ghcr.io", "acme/qwen", False),
        ("*.azurecr.io/team", "one.azurecr.io", "team/model", True),
        ("https://index.docker.io/v1/", "docker.io", "library/model", True),
        ("docker.io", "docker.io", "library/model", True),
        ("index.docker.io", "docker.io", "acme/model", True),
        ("https://index.docker.io/v1/", "ghcr.io", "acme/model", False),
        ("[::1]:5000", "[::1]:5000", "acme/model", True),
        ("127.0.0.1:5000", "127.0.0.1:5000", "acme/model", True),
        ("", "ghcr.io", "acme/model", False),
    ],
)
def test_an_entry_is_for_these_repositories(
    key: str, registry: str, repository: str, matches: bool
) -> None:
    assert (match({key: "found"}, registry, repository) == "found") is matches


def test_the_most_specific_entry_is_taken_whatever_the_order() -> None:
    entries = {
        "*.io": "any",
        "ghcr.io": "host",
        "ghcr.io/acme": "team",
        "ghcr.io/acme/qwen": "model",
    }
    for keys in (list(entries), list(reversed(entries))):
        shuffled = {key: entries[key] for key in keys}
        assert match(shuffled, "ghcr.io", "acme/qwen") == "model"
        assert match(shuffled, "ghcr.io", "acme/other") == "team"
        assert match(shuffled, "ghcr.io", "else/other") == "host"
        assert match(shuffled, "quay.io", "else/other") == "any"


def test_a_docker_config_secret_is_read_in_all_its_forms() -> None:
    keychain = VolumeSecrets.parse(
        {
            ".dockerconfigjson": json.dumps(
                {
                    "auths": {
                        "one.example": entry("robot", "a:b"),
                        "two.example": {"username": "robot", "password": SECRET},
                        "three.example": {"auth": entry()["auth"].rstrip("=")},
                        "four.example": {"identitytoken": SECRET},
                        "five.example": {},
                    },
                    "credsStore": "never-asked",
                    "somethingNew": [1, 2],
                }
            )
        },
        "six.example",
    )
    assert lookup(keychain, "one.example") == Credentials("robot", "a:b")
    assert lookup(keychain, "two.example") == Credentials("robot", SECRET)
    assert lookup(keychain, "three.example") == Credentials("robot", SECRET)
    assert lookup(keychain, "four.example") == Credentials("", "", SECRET)
    assert lookup(keychain, "five.example") is None
    assert lookup(keychain, "six.example") is None


def test_the_older_form_of_a_secret_is_read() -> None:
    keychain = VolumeSecrets.parse({".dockercfg": json.dumps({"one.example": entry()})}, "ghcr.io")
    assert lookup(keychain, "one.example") == Credentials("robot", SECRET)


def test_a_bare_user_name_is_for_the_volumes_own_registry_alone() -> None:
    bare = {"username": "robot\n", "password": f"{SECRET}\n", "unrelated": "x"}
    keychain = VolumeSecrets.parse(bare, "ghcr.io")
    assert lookup(keychain, "ghcr.io") == Credentials("robot", SECRET)
    assert lookup(keychain, "evil.example") is None


def test_a_volume_without_a_secret_has_no_credentials() -> None:
    assert lookup(VolumeSecrets.parse({}, "ghcr.io"), "ghcr.io") is None
    assert lookup(Anonymous(), "ghcr.io") is None


MALFORMED = [
    {".dockerconfigjson": SECRET},
    {".dockerconfigjson": ""},
    {".dockerconfigjson": json.dumps([SECRET])},
    {".dockerconfigjson": json.dumps({"auths": SECRET})},
    {".dockerconfigjson": json.dumps({"auths": {"ghcr.io": SECRET}})},
    {".dockerconfigjson": json.dumps({"auths": {"ghcr.io": {"auth": SECRET}}})},
    {".dockerconfigjson": json.dumps({"auths": {"ghcr.io": {"auth": 7, "password": SECRET}}})},
    {".dockerconfigjson": json.dumps({"auths": {"ghcr.io": {"auth": "czNjcjN0"}}})},
    {".dockerconfigjson": json.dumps({"auths": {"ghcr.io": {"auth": "/////w=="}}})},
    {".dockerconfigjson": json.dumps({"auths": {"ghcr.io": {"auth": "é" + SECRET}}})},
    {".dockerconfigjson": "[" * 100_000},
    {".dockerconfigjson": json.dumps({"auths": {}, "pad": SECRET * 100_000})},
    {".dockercfg": json.dumps({"ghcr.io": SECRET})},
    {"username": "", "password": SECRET},
    {"username": SECRET, "password": ""},
    {"username": f"{SECRET}:x", "password": SECRET},
    {"username": SECRET},
    {"token": SECRET},
]


@pytest.mark.parametrize("secrets", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_secret_is_named_and_never_quoted(secrets: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        VolumeSecrets.parse(secrets, "ghcr.io")
    told = "".join(map(repr, (caught.value, caught.value.context, caught.value.__cause__)))
    assert SECRET not in told
    assert "czNjcjN0" not in told
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@given(st.text(max_size=200))
def test_no_text_makes_a_secret_fail_otherwise(text: str) -> None:
    with contextlib.suppress(InvalidRequest):
        VolumeSecrets.parse({".dockerconfigjson": text}, "ghcr.io")


def test_credentials_do_not_show() -> None:
    credentials = Credentials(SECRET, SECRET, SECRET)
    keychain = VolumeSecrets.parse({"username": SECRET, "password": SECRET}, "ghcr.io")
    config = secret(**{"ghcr.io": entry()})
    told = f"{credentials} {credentials!r} {keychain!r} {config!r} {Chain(config)!r}"
    assert SECRET not in told
    assert "robot" not in told


def test_the_first_keychain_that_has_something_decides() -> None:
    first = secret(**{"ghcr.io": entry("first")})
    second = secret(**{"ghcr.io": entry("second"), "quay.io": entry("second")})
    chain = Chain(first, second)
    assert lookup(chain, "ghcr.io") == Credentials("first", SECRET)
    assert lookup(chain, "quay.io") == Credentials("second", SECRET)
    assert lookup(chain, "docker.io") is None


def test_docker_says_where_its_config_is(tmp_path: Path) -> None:
    assert docker_config_path({"DOCKER_CONFIG": str(tmp_path)}) == tmp_path / "config.json"
    assert docker_config_path({"HOME": str(tmp_path)}) == tmp_path / ".docker" / "config.json"


def test_the_nodes_config_is_read_again_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.json"
    clock = HandClock()
    keychain = DockerConfig(path, clock)

    def lookup_later() -> Credentials | None:
        clock.pass_by(GLANCE_SECONDS)
        return lookup(keychain, "ghcr.io")

    assert lookup_later() is None
    path.write_text(json.dumps({"auths": {"ghcr.io": entry("one")}}))
    assert lookup_later() == Credentials("one", SECRET)
    fresh = tmp_path / "fresh.json"
    fresh.write_text(json.dumps({"auths": {"ghcr.io": entry("two")}}))
    os.replace(fresh, path)
    assert lookup(keychain, "ghcr.io") == Credentials("one", SECRET)
    assert lookup_later() == Credentials("two", SECRET)
    path.write_text(f"{{{SECRET}")
    assert lookup_later() is None
    assert lookup_later() is None
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    assert SECRET not in caplog.text
    path.unlink()
    assert lookup_later() is None


@pytest.fixture
def helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    return folder


def helper(folder: Path, name: str, script: str) -> None:
    path = folder / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


ECHO = """
read server
[ "$1" = get ] || exit 3
printf '{"ServerURL":"%s","Username":"%s","Secret":"from-helper"}' "$server" "$server"
"""


def config(tmp_path: Path, **document: object) -> DockerConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    return DockerConfig(path)


def test_helpers_are_asked_before_the_file_and_the_store_after_it(
    tmp_path: Path, helpers: Path
) -> None:
    helper(helpers, "echo", ECHO)
    helper(helpers, "store", 'printf \'{"Username":"store","Secret":"x"}\'')
    helper(helpers, "none", "echo credentials not found in native keychain; exit 1")
    keychain = config(
        tmp_path,
        auths={"ghcr.io": entry(), "quay.io": entry("file"), "none.example": entry("file")},
        credHelpers={"ghcr.io": "echo", "docker.io": "echo", "none.example": "none"},
        credsStore="store",
    )
    assert lookup(keychain, "ghcr.io") == Credentials("ghcr.io", "from-helper")
    assert lookup(keychain, "docker.io") == Credentials(
        "https://index.docker.io/v1/", "from-helper"
    )
    assert lookup(keychain, "quay.io") == Credentials("file", SECRET)
    assert lookup(keychain, "none.example") == Credentials("file", SECRET)
    assert lookup(keychain, "other.example") == Credentials("store", "x")


def test_a_helper_may_answer_with_an_identity_token(tmp_path: Path, helpers: Path) -> None:
    helper(helpers, "token", 'printf \'{"Username":"<token>","Secret":"refresh"}\'')
    keychain = config(tmp_path, credsStore="token")
    assert lookup(keychain, "ghcr.io") == Credentials("", "", "refresh")


def test_a_helper_sees_its_cloud_settings_and_no_secrets(helpers: Path) -> None:
    script = 'printf \'{"Username":"%s","Secret":"x%s"}\' "$AWS_REGION" "$AWS_SECRET_ACCESS_KEY"'
    helper(helpers, "env", script)
    assert trio.run(ask_helper, "env", "ghcr.io") == ("eu-west-1", "x")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (f"echo {SECRET}; echo {SECRET} >&2; exit 1", "exit status 1"),
        (f"echo {SECRET}", "not its protocol"),
        (f'printf \'{{"Username":"{SECRET}"}}\'', "not its protocol"),
        ("exec head -c 400000 /dev/zero", "more than"),
        ("exec yes", "more than"),
    ],
)
def test_a_helper_that_fails_is_a_warning_without_its_output(
    helpers: Path, caplog: pytest.LogCaptureFixture, script: str, words: str
) -> None:
    helper(helpers, "bad", script)
    assert trio.run(ask_helper, "bad", "ghcr.io") is None
    assert words in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("name", ["missing", "../../bin/sh", "", "a b", "x" * 100])
def test_a_helper_that_is_no_program_is_a_warning(
    helpers: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    assert trio.run(ask_helper, name, "ghcr.io") is None
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING


def test_a_helper_that_hangs_is_killed_with_its_children(
    helpers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pids = tmp_path / "pids"
    helper(helpers, "slow", f"sleep 1000 & echo $$ $! > {pids}; wait")
    monkeypatch.setattr("fetcher.credential_helper.HELPER_SECONDS", 0.5)
    assert trio.run(ask_helper, "slow", "ghcr.io") is None
    assert "did not answer" in caplog.text
    both = [int(pid) for pid in pids.read_text().split()]
    assert len(both) == 2
    # the helper itself was waited for; its child ends as soon as the machine comes to it
    wait_until(lambda: not any(map(_runs, both)), "the end of the helper's child")


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def test_cancelling_a_lookup_kills_the_helper(helpers: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    helper(helpers, "slow", f"mkfifo {started}.fifo; echo $$ > {started}; exec sleep 1000")

    async def main() -> None:
        with trio.move_on_after(1.0) as scope:
            await ask_helper("slow", "ghcr.io")
        assert scope.cancelled_caught

    trio.run(main)
    assert not _runs(int(started.read_text()))


def test_a_fingerprint_tells_credentials_apart_and_does_not_tell_them() -> None:
    async def main() -> None:
        salt = b"of this node"
        one = await fingerprint([Credentials("ab", "c")], salt)
        assert one == await fingerprint([Credentials("ab", "c")], salt)
        others = [
            await fingerprint([Credentials("a", "bc")], salt),
            await fingerprint([Credentials("ab", "", "c")], salt),
            await fingerprint([Credentials("", "", "")], salt),
            await fingerprint([Credentials("ab", "c")], b"of another node"),
            await fingerprint([None, Credentials("ab", "c")], salt),
            await fingerprint([Credentials("ab", "c"), Credentials("ab", "c")], salt),
        ]
        assert len({one, *others, await fingerprint([None], salt)}) == 8
        # a host to which nothing is shown makes no difference
        assert one == await fingerprint([Credentials("ab", "c"), None], salt)
        assert await fingerprint([None, None], salt) == ANONYMOUS
        assert all(len(text) == 64 and int(text, 16) for text in (one, *others))

    trio.run(main)
