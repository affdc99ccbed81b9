"""Which references a policy allows: a pattern must never match what only looks like it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fetcher.errors import AccessDenied, InvalidRequest, ModelError
from fetcher.oci import Digest, Reference
from fetcher.policy import ModelPattern, ReferencePolicy

DIGEST = Digest.of(b"model")


def allows(pattern: str, reference: str) -> bool:
    policy = ReferencePolicy.parse([pattern], require_digest=False)
    try:
        policy.check(Reference.parse(reference))
    except AccessDenied:
        return False
    return True


@pytest.mark.parametrize(
    ("pattern", "reference"),
    [
        ("ghcr.io", "ghcr.io/acme/x:v1"),
        ("GHCR.io", "ghcr.io/a/b/c@" + str(DIGEST)),
        ("ghcr.io/acme", "ghcr.io/acme"),
        ("ghcr.io/acme/*", "ghcr.io/acme/x"),
        ("ghcr.io/acme/*", "GHCR.IO/acme/x:v1"),
        ("ghcr.io/*/x", "ghcr.io/acme/x"),
        ("ghcr.io/acme/llama-*-instruct", "ghcr.io/acme/llama-3.1-8b-instruct"),
        ("ghcr.io/acme/llama*", "ghcr.io/acme/llama"),
        ("ghcr.io/acme/**", "ghcr.io/acme/x"),
        ("ghcr.io/acme/**", "ghcr.io/acme/x/y/z"),
        ("ghcr.io/**", "ghcr.io/x"),
        ("registry.example.org:5000/team/**", "registry.example.org:5000/team/x"),
        ("localhost", "localhost/x"),
        ("[::1]:5000/x", "[::1]:5000/x"),
        ("docker.io", "model"),
        ("docker.io", "acme/model"),
        ("docker.io", "index.docker.io/acme/model"),
        ("docker.io", "registry-1.docker.io/acme/model"),
        ("index.docker.io/acme/*", "acme/model"),
        ("docker.io/model", "model"),
        ("docker.io/model", "docker.io/library/model"),
        ("docker.io/library/*", "model"),
        ("docker.io/*", "model"),
        ("docker.io/**", "acme/model"),
    ],
)
def test_what_a_pattern_is_for(pattern: str, reference: str) -> None:
    assert allows(pattern, reference)


@pytest.mark.parametrize(
    ("pattern", "reference"),
    [
        ("ghcr.io", "ghcr.io.evil.org/acme/x"),
        ("ghcr.io", "evil-ghcr.io/acme/x"),
        ("ghcr.io", "sub.ghcr.io/acme/x"),
        ("ghcr.io", "ghcr.io:443/acme/x"),
        ("ghcr.io", "ghcr-io/acme/x"),
        ("ghcr.io", "evil.org/ghcr.io/acme/x"),
        ("ghcr.io/acme/*", "ghcr.io/acme-evil/x"),
        ("ghcr.io/acme/*", "ghcr.io/acme"),
        ("ghcr.io/acme/*", "ghcr.io/acme/x/y"),
        ("ghcr.io/acme/*", "ghcr.io/evil/acme/x"),
        ("ghcr.io/acme/**", "ghcr.io/acme"),
        ("ghcr.io/acme/**", "ghcr.io/acme-evil/x"),
        ("ghcr.io/acme", "ghcr.io/acme/x"),
        ("ghcr.io/acme/a.c", "ghcr.io/acme/abc"),
        ("ghcr.io/a-z/x", "ghcr.io/b/x"),
        ("registry.example.org:5000", "registry.example.org/x"),
        ("registry.example.org:5000", "registry.example.org:50001/x"),
        ("[::1]:5000", "[::2]:5000/x"),
        ("docker.io/acme/*", "ghcr.io/acme/x"),
        ("docker.io/acme/*", "model"),
        ("docker.io/*", "acme/model"),
        ("localhost", "localhost:5000/x"),
    ],
)
def test_what_only_looks_like_it(pattern: str, reference: str) -> None:
    assert not allows(pattern, reference)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "**",
        "*.io",
        "*/acme",
        "acme",
        "acme/model",
        "ghcr.io/",
        "ghcr.io/acme/",
        "ghcr.io//acme",
        "/acme",
        "https://ghcr.io/acme",
        "ghcr.io/acme:v1",
        f"ghcr.io/acme@{DIGEST}",
        "ghcr.io/Acme",
        "ghcr.io/acme/[ab]",
        "ghcr.io/ac?e",
        "ghcr.io/a b",
        "ghcr.io/../acme",
        "ghcr.io/**/x",
        "ghcr.io/x**",
        "ghcr.io/**/**",
        "ghcr.io/***",
        "ghcr.io:0/x",
        "ghcr.io:http/x",
        "ghcr.io/" + "a" * 600,
        "ghcr.io@evil.org",
        "ghcr.io\n",
    ],
)
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(InvalidRequest, match="pattern of models"):
        ModelPattern.parse(text)


LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,5}[a-z0-9])?", fullmatch=True)
HOST = st.builds(lambda labels: ".".join(labels), st.lists(LABEL, min_size=2, max_size=4))
PART = st.from_regex(r"[a-z0-9]+([._-][a-z0-9]+)?", fullmatch=True)
PARTS = st.lists(PART, min_size=1, max_size=4)


@given(HOST, PARTS)
def test_a_pattern_without_wildcards_is_for_itself_alone(host: str, parts: list[str]) -> None:
    assume(not host.endswith("docker.io"))
    name = "/".join([host, *parts])
    pattern = ModelPattern.parse(name)
    reference = Reference.parse(name)
    assert pattern.matches(reference)
    for other in (
        replace(reference, registry=f"{host}.evil.org"),
        replace(reference, registry=f"evil.{host}"),
        replace(reference, registry=f"{host}:5000"),
        replace(reference, registry=host[:-1]),
        replace(reference, repository=f"{reference.repository}-evil"),
        replace(reference, repository=f"{reference.repository}/evil"),
        replace(reference, repository=f"evil/{reference.repository}"),
        replace(reference, repository=f"evil-{reference.repository}"),
    ):
        assert not pattern.matches(other)


PATTERN_PARTS = st.lists(st.one_of(PART, st.sampled_from(["*", "a*"])), max_size=4)


@given(HOST, PATTERN_PARTS, PARTS, st.booleans())
def test_a_pattern_is_what_its_page_says(
    host: str, patterns: list[str], parts: list[str], deep: bool
) -> None:
    """Against the words of the page, put as one regular expression."""
    assume(not host.endswith("docker.io"))
    if deep:
        patterns = [*patterns, "**"]
    expected = "/".join(
        "[^/]+(/[^/]+)*" if part == "**" else re.escape(part).replace(r"\*", "[^/]*")
        for part in patterns
    )
    pattern = ModelPattern.parse("/".join([host, *patterns]))
    reference = Reference(host, "/".join(parts), "v1")
    meant = not patterns or re.fullmatch(expected, reference.repository) is not None
    assert pattern.matches(reference) is meant


@given(st.text(max_size=80))
def test_any_text_is_a_pattern_or_refused(text: str) -> None:
    try:
        pattern = ModelPattern.parse(text)
    except InvalidRequest:
        return
    assert ModelPattern.parse(str(pattern)) == pattern


@given(st.text(max_size=80), st.text(max_size=80))
def test_what_is_allowed_begins_as_its_pattern_does(pattern: str, reference: str) -> None:
    try:
        parsed, asked = ModelPattern.parse(pattern), Reference.parse(reference)
    except ModelError:
        return
    if parsed.matches(asked) and parsed.registry != "docker.io":
        assert asked.registry == parsed.registry


def test_the_refusal_says_all() -> None:
    policy = ReferencePolicy.parse(["ghcr.io/acme/*", "docker.io/model"], require_digest=False)
    with pytest.raises(AccessDenied) as caught:
        policy.check(Reference.parse("evil.org/acme/x:v1"))
    assert caught.value.message == (
        "evil.org/acme/x:v1 is refused by this node's policy: evil.org/acme/x is not among the "
        "models that it may pull (setting allowed-models: ghcr.io/acme/*, docker.io/library/model)"
    )


def test_a_long_list_is_not_repeated_in_whole() -> None:
    policy = ReferencePolicy.parse([f"r{n}.example.org" for n in range(500)], require_digest=False)
    with pytest.raises(AccessDenied, match="and 490 more") as caught:
        policy.check(Reference.parse("evil.org/acme/x:v1"))
    assert len(caught.value.message) < 700


def test_a_digest_can_be_required() -> None:
    policy = ReferencePolicy(require_digest=True)
    policy.check(Reference.parse(f"ghcr.io/acme/x@{DIGEST}"))
    policy.check(Reference.parse(f"ghcr.io/acme/x:v1@{DIGEST}"))
    for text in ("ghcr.io/acme/x", "ghcr.io/acme/x:v1"):
        with pytest.raises(AccessDenied, match=r"require-digest\).*write ghcr.io/acme/x@sha256:…"):
            policy.check(Reference.parse(text))


def test_nothing_said_allows_everything() -> None:
    ReferencePolicy().check(Reference.parse("anything"))
