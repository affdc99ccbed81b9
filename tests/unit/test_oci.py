"""References, digests and manifests: what is read, and what is refused."""

import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fetcher.errors import InvalidArtifact, InvalidRequest
from fetcher.oci import (
    IMAGE_INDEX,
    MAX_MANIFEST_BYTES,
    Digest,
    Index,
    Manifest,
    Reference,
    parse_manifest,
)

A = "sha256:" + "a" * 64
SHA512 = "sha512:" + "b" * 128


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("qwen", "docker.io/library/qwen:latest"),
        ("acme/qwen", "docker.io/acme/qwen:latest"),
        ("index.docker.io/acme/qwen", "docker.io/acme/qwen:latest"),
        ("docker.io/qwen:v1", "docker.io/library/qwen:v1"),
        ("ghcr.io/acme/qwen3-8b:v1", "ghcr.io/acme/qwen3-8b:v1"),
        (f"ghcr.io/acme/qwen@{A}", f"ghcr.io/acme/qwen@{A}"),
        (f"ghcr.io/acme/qwen:v1@{SHA512}", f"ghcr.io/acme/qwen:v1@{SHA512}"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("127.0.0.1:5000/a/b/c:T.1-x_y", "127.0.0.1:5000/a/b/c:T.1-x_y"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        ("Registry.Example.COM/x", "registry.example.com/x:latest"),
        ("a__b/c.d-e--f:1", "docker.io/a__b/c.d-e--f:1"),
    ],
)
def test_reference(text: str, canonical: str) -> None:
    reference = Reference.parse(text)
    assert str(reference) == canonical
    assert Reference.parse(canonical) == reference


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("https://ghcr.io/acme/qwen", "scheme"),
        ("oci://ghcr.io/acme/qwen", "scheme"),
        ("ghcr.io/Acme/qwen", "lower-case"),
        ("Acme/qwen", "lower-case"),
        ("ghcr.io/acme/qwen:", "tag"),
        ("ghcr.io/acme/qwen:v1/x", "tag"),
        ("ghcr.io/acme/qwen:" + "t" * 129, "tag"),
        ("ghcr.io/acme/qwen@", "digest"),
        ("ghcr.io/acme/qwen@sha256:abc", "digest"),
        ("ghcr.io/acme/qwen@md5:" + "a" * 32, "digest"),
        ("ghcr.io/acme/qwen@SHA256:" + "a" * 64, "digest"),
        ("ghcr.io/", "missing"),
        ("ghcr.io", ""),
        ("ghcr.io//x", "repository"),
        ("ghcr.io/../x", "repository"),
        ("ghcr.io:0/x", "port"),
        ("ghcr.io:99999/x", "port"),
        ("-ghcr.io/x", "host"),
        ("a..b/x", "host"),
        ("ghcr.io/acme/qwen:v1 ", "white space"),
        ("ghcr.io/acme\n/qwen", "white space"),
        ("ghcr.io/acme\0/qwen", "control"),
        ("user:pass@ghcr.io/acme/qwen", "digest"),
        ("ghcr.io/" + "a" * 300, "255"),
        ("ghcr.io/" + "a" * 5000, "2048"),
    ],
)
def test_reference_that_is_none(text: str, why: str) -> None:
    if text == "ghcr.io":
        # a name without a host: it is a repository of Docker Hub, odd but right
        assert str(Reference.parse(text)) == "docker.io/library/ghcr.io:latest"
        return
    with pytest.raises(InvalidRequest, match=why) as caught:
        Reference.parse(text)
    assert len(caught.value.message) < 700


@given(st.text(max_size=60))
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except InvalidRequest:
        return
    assert Reference.parse(str(reference)) == reference
    allowed = string.ascii_lowercase + string.digits + "._-/"
    assert set(reference.repository) <= set(allowed)
    assert ".." not in reference.repository


@pytest.mark.parametrize(
    "text",
    ["", "sha256", "sha256:", "sha256:" + "A" * 64, "sha256:" + "g" * 64, "sha1:" + "a" * 40],
)
def test_digest_that_is_none(text: str) -> None:
    with pytest.raises(InvalidArtifact):
        Digest.parse(text)


def test_digest_knows_its_bytes() -> None:
    digest = Digest.of(b"model")
    assert digest.matches(b"model")
    assert not digest.matches(b"other")
    assert Digest.parse(str(digest)) == digest


def _descriptor(**changes: Any) -> dict[str, Any]:
    return {"mediaType": "application/x", "digest": A, "size": 3} | changes


def _manifest(**changes: Any) -> dict[str, Any]:
    document = {"schemaVersion": 2, "config": _descriptor(), "layers": [_descriptor()]} | changes
    return {key: value for key, value in document.items() if value is not None}


def test_manifest_is_read() -> None:
    body = json.dumps(_manifest(artifactType="application/y", unknown={"a": [1]})).encode()
    manifest = parse_manifest(body, None)
    assert isinstance(manifest, Manifest)
    assert manifest.digest == Digest.of(body)
    assert manifest.artifact_type == "application/y"
    assert [layer.size for layer in manifest.layers] == [3]


def test_index_is_read() -> None:
    platform = {"os": "linux", "architecture": "arm64", "variant": "v8"}
    document = {
        "schemaVersion": 2,
        "mediaType": IMAGE_INDEX,
        "manifests": [_descriptor(platform=platform)],
    }
    index = parse_manifest(json.dumps(document).encode(), IMAGE_INDEX)
    assert isinstance(index, Index)
    assert str(index.manifests[0].platform) == "linux/arm64/v8"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"text"',
        b"\xff\xfe\x00",
        b"<!DOCTYPE html><html><body>please log in</body></html>",
        b"  \n<html>",
        b'{"schemaVersion": 2',
        b'{"schemaVersion":2,"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b" " * (MAX_MANIFEST_BYTES + 1),
        json.dumps(_manifest(schemaVersion=1)).encode(),
        json.dumps(_manifest(schemaVersion="2")).encode(),
        json.dumps(_manifest(layers={})).encode(),
        json.dumps(_manifest(layers=[None])).encode(),
        json.dumps(_manifest(layers=None)).encode(),
        json.dumps(_manifest(config=None)).encode(),
        json.dumps(_manifest(manifests=[])).encode(),
        json.dumps(_manifest(mediaType=IMAGE_INDEX)).encode(),
        json.dumps(_manifest(config=_descriptor(size=-1))).encode(),
        json.dumps(_manifest(config=_descriptor(size=1 << 60))).encode(),
        json.dumps(_manifest(config=_descriptor(size=1.5))).encode(),
        json.dumps(_manifest(config=_descriptor(size="3"))).encode(),
        json.dumps(_manifest(config=_descriptor(digest="sha256:../../etc"))).encode(),
        json.dumps(_manifest(config=_descriptor(annotations={"a": 1}))).encode(),
        json.dumps(_manifest(layers=[_descriptor()] * 10_001)).encode(),
        json.dumps({"schemaVersion": 2, "manifests": [], "mediaType": "text/html"}).encode(),
    ],
)
def test_manifest_that_is_none(body: bytes) -> None:
    with pytest.raises(InvalidArtifact) as caught:
        parse_manifest(body, "application/vnd.oci.image.manifest.v1+json")
    assert len(caught.value.message) < 700


@given(st.binary(max_size=300))
def test_any_bytes_are_a_manifest_or_refused(body: bytes) -> None:
    try:
        parse_manifest(body, None)
    except InvalidArtifact:
        return
