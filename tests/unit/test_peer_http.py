"""What peers ask and answer: requests, ranges, what a node has, and how much it uploads."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fetcher.errors import (
    AccessDenied,
    ModelError,
    NoSpace,
    NotFound,
    OutOfRange,
    Unauthenticated,
    Unavailable,
)
from fetcher.modelpack import Position
from fetcher.oci import Digest
from fetcher.peers import requests
from fetcher.peers.owners import Deal
from fetcher.peers.protocol import MAX_HAVE_CHARACTERS, MOST_HOPS, Have
from fetcher.peers.requests import Refusal, Request
from fetcher.peers.uploads import Handed, Uploads
from fetcher.ranges import Range, content_range, requested_range

BLOB = Digest.of(b"blob")
NS = "registry.example.org:5000"


def read(target: str, method: str = "GET", **headers: str) -> requests.Asked | None:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.read(Request(method, target, named), namespace="")


def refused(target: str, method: str = "GET") -> tuple[int, str]:
    with pytest.raises(Refusal) as caught:
        read(target, method)
    return caught.value.status, caught.value.code


# -- requests ----------------------------------------------------------------------------------


def test_the_base() -> None:
    assert read("/v2/") is None
    assert read("/v2") is None
    assert read("/v2/?ns=x", "HEAD") is None


def test_a_blob() -> None:
    asked = read(
        f"/v2/acme/qwen/blobs/{BLOB}?ns={NS}",
        model_csi_from="node-7",
        model_csi_hops="1",
        model_csi_chunk="4194304",
        model_csi_layer="application/vnd.cncf.model.weight.v1.raw",
        model_csi_urgent="1",
        authorization="Bearer secret",
        range="bytes=0-9",
    )
    assert asked is not None
    assert (asked.kind, asked.digest, asked.reference.name) == ("blobs", BLOB, f"{NS}/acme/qwen")
    assert (asked.member, asked.hops, asked.chunk_size) == ("node-7", 1, 4194304)
    assert asked.urgent
    assert not asked.ready
    assert asked.authorization == "Bearer secret"
    assert asked.range == "bytes=0-9"
    assert "secret" not in repr(asked)


def test_a_manifest_by_tag_and_by_digest() -> None:
    by_tag = read(f"/v2/acme/qwen/manifests/v1?ns={NS}")
    by_digest = read(f"/v2/acme/qwen/manifests/{BLOB}?ns={NS}")
    assert by_tag is not None
    assert by_digest is not None
    assert (by_tag.reference.tag, by_tag.reference.digest) == ("v1", None)
    assert (by_digest.reference.tag, by_digest.digest) == (None, BLOB)


@pytest.mark.parametrize("name", ["docker.io", "index.docker.io", "registry-1.docker.io"])
def test_docker_hub_has_many_names(name: str) -> None:
    asked = read(f"/v2/library/busybox/manifests/1?ns={name}")
    assert asked is not None
    assert asked.reference.repository == "library/busybox"


@pytest.mark.parametrize(
    ("target", "method", "status", "code"),
    [
        ("/", "GET", 404, "NAME_UNKNOWN"),
        ("/v1/", "GET", 404, "NAME_UNKNOWN"),
        ("/v2/_catalog", "GET", 404, "NAME_UNKNOWN"),
        (f"/v2/a/tags/list?ns={NS}", "GET", 404, "NAME_UNKNOWN"),
        (f"/v2/a/blobs/{BLOB}", "GET", 404, "NAME_UNKNOWN"),
        (f"/v2/a/blobs/{BLOB}?ns=", "GET", 404, "NAME_UNKNOWN"),
        (f"/v2/a/blobs/{BLOB}?ns=not-a-host", "GET", 400, "NAME_INVALID"),
        (f"/v2/a/blobs/{BLOB}?ns=http://{NS}", "GET", 400, "NAME_INVALID"),
        (f"/v2/a/blobs/{BLOB}?ns={NS}/b", "GET", 400, "NAME_INVALID"),
        (f"/v2/a:tag/blobs/{BLOB}?ns={NS}", "GET", 400, "NAME_INVALID"),
        (f"/v2/../a/blobs/{BLOB}?ns={NS}", "GET", 400, "NAME_INVALID"),
        (f"/v2/A/blobs/{BLOB}?ns={NS}", "GET", 400, "NAME_INVALID"),
        (f"/v2/a/blobs/sha256:12?ns={NS}", "GET", 400, "DIGEST_INVALID"),
        (f"/v2/a/blobs/latest?ns={NS}", "GET", 400, "DIGEST_INVALID"),
        (f"/v2/a/manifests/.INVALID?ns={NS}", "GET", 404, "MANIFEST_UNKNOWN"),
        (f"/v2/a/blobs/{BLOB}?ns={NS}", "DELETE", 405, "UNSUPPORTED"),
        (f"/v2/a/blobs/uploads/?ns={NS}", "POST", 405, "UNSUPPORTED"),
        ("/v2/" + "a" * 3000, "GET", 404, "NAME_UNKNOWN"),
    ],
)
def test_what_is_refused(target: str, method: str, status: int, code: str) -> None:
    assert refused(target, method) == (status, code)


def test_requests_without_a_registry_mean_the_namespace() -> None:
    asked = requests.read(Request("GET", f"/v2/a/blobs/{BLOB}", {}), namespace=NS)
    assert asked is not None
    assert asked.reference.registry == NS


def test_hops_that_are_nonsense_go_no_further() -> None:
    target = f"/v2/a/blobs/{BLOB}?ns={NS}"
    for text in ("x", "-1", "9999"):
        asked = read(target, model_csi_hops=text)
        assert asked is not None
        assert asked.hops == MOST_HOPS


def test_the_model_that_a_blob_is_asked_for_as_a_layer_of() -> None:
    """By that its chunks are dealt out; where it makes no sense, as those of the blob alone."""
    target, model = f"/v2/a/blobs/{BLOB}?ns={NS}", Digest.of(b"manifest")
    asked = read(target, model_csi_model=f"{model} 17")
    assert asked is not None
    assert asked.position == Position(model, 17)
    assert asked.deal == Deal(str(model), 17)
    for text in ("", "17", f"{model}", f"{model} x", f"{model} -1", f"{model} 1234567", "a 1"):
        asked = read(target, model_csi_model=text)
        assert asked is not None
        assert asked.position is None
        assert asked.deal == Deal(str(BLOB))


def test_a_condition_on_a_range_gets_everything() -> None:
    asked = read(f"/v2/a/blobs/{BLOB}?ns={NS}", range="bytes=0-1", if_range='"x"')
    assert asked is not None
    assert asked.range == ""


@given(st.text(max_size=200), st.text(max_size=50))
def test_any_path_is_read_or_refused(path: str, namespace: str) -> None:
    try:
        asked = read(f"/v2/{path}?ns={namespace}")
    except Refusal:
        return
    assert asked is None or asked.reference.registry


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Unauthenticated("who are you"), 401, "UNAUTHORIZED"),
        (AccessDenied("not you"), 403, "DENIED"),
        (NotFound("nowhere"), 404, "BLOB_UNKNOWN"),
        (Unavailable("away"), 503, "TOOMANYREQUESTS"),
        (NoSpace("full"), 404, "BLOB_UNKNOWN"),
    ],
)
def test_errors_for_clients(error: ModelError, status: int, code: str) -> None:
    refusal = requests.refusal(error, "blobs")
    assert (refusal.status, refusal.code) == (status, code)
    assert error.message in refusal.body.decode()


# -- ranges ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("bytes=0-0", Range(0, 1)),
        ("bytes=5-", Range(5, 10)),
        ("Bytes = 5-99", Range(5, 10)),
        ("bytes=-3", Range(7, 10)),
        ("bytes=-99", Range(0, 10)),
        ("", None),
        ("bytes=", None),
        ("bytes=-", None),
        ("bytes=5-4", None),
        ("bytes=0-1,3-4", None),
        ("items=0-1", None),
        ("bytes=0x1-2", None),
    ],
)
def test_requested_ranges(text: str, part: Range | None) -> None:
    assert requested_range(text, 10) == part


@pytest.mark.parametrize("text", ["bytes=10-", "bytes=10-20", "bytes=-0"])
def test_ranges_without_a_byte(text: str) -> None:
    with pytest.raises(OutOfRange):
        requested_range(text, 10)


@given(st.integers(0, 20), st.integers(1, 20), st.integers(1, 20))
def test_a_range_is_answered_as_it_was_asked(start: int, length: int, size: int) -> None:
    asked = Range(start, start + length)
    try:
        part = requested_range(f"bytes={asked.http}", size)
    except OutOfRange:
        assert start >= size
    else:
        assert part == Range(start, min(start + length, size))
        assert content_range(part, size) == f"bytes {part.http}/{size}"


# -- what a node has ---------------------------------------------------------------------------


@given(st.integers(1, 200), st.data())
def test_have_is_read_as_it_was_written(count: int, data: st.DataObject) -> None:
    chunks = data.draw(st.sets(st.integers(0, count - 1)))
    text = Have.of(64, count, chunks).text
    assert text is not None
    have = Have.parse(text)
    assert have is not None
    assert {one for one in range(count) if have.has(Range(one * 64, one * 64 + 64))} == chunks


@given(st.binary(min_size=1, max_size=200))
def test_have_is_made_of_what_a_store_notes_of_chunks(states: bytes) -> None:
    there = [number for number, state in enumerate(states) if state]
    made = Have.of_states(64, states)
    assert made == Have.of(64, len(states), there)
    assert [one for one in range(len(states)) if made.bits >> one & 1] == there


def test_have_of_parts_that_touch_several_chunks() -> None:
    have = Have.of(10, 4, [1, 2])
    assert have.has(Range(10, 30))
    assert have.has(Range(15, 16))
    assert not have.has(Range(9, 11))
    assert not have.has(Range(29, 31))
    assert not have.has(Range(1000, 1001))


def test_have_that_is_too_long_is_left_out() -> None:
    chunks = 8 * MAX_HAVE_CHARACTERS
    assert Have.of(64, chunks, range(chunks)).text is None
    assert Have.all().text == "all"


@given(st.text(max_size=60))
def test_any_text_is_read_as_have_or_not(text: str) -> None:
    have = Have.parse(text)
    assert have is None or isinstance(have.has(Range(0, 1)), bool)


# -- uploads -----------------------------------------------------------------------------------


def test_no_more_uploads_than_allowed() -> None:
    uploads = Uploads(2)
    assert uploads.admit(10) is None
    assert uploads.admit(10) is None
    assert uploads.admit(10)
    uploads.leave(10)
    assert uploads.admit(10) is None


def test_who_would_wait_for_long_is_sent_away() -> None:
    uploads = Uploads(100, rate=1000)
    assert uploads.admit(1000) is None
    assert uploads.admit(1000) is None
    wait = uploads.admit(1000)
    assert wait == 2.0
    uploads.sent(1000, 0)
    uploads.leave(0)
    assert uploads.admit(1000) is None


def test_one_large_upload_keeps_nobody_out() -> None:
    uploads = Uploads(100, rate=1000)
    assert uploads.admit(10**12) is None
    assert uploads.admit(500) is None
    uploads.sent(400, 10**12 - 400)
    uploads.leave(500)
    uploads.leave(10**12 - 400)
    # all of it was given back
    assert uploads.admit(1000) is None
    assert uploads.admit(1000) is None
    assert uploads.admit(1000) == 2.0


def test_uploads_keep_the_rate() -> None:
    uploads, now = Uploads(1, rate=1000), 100.0
    uploads.admit(10_000)
    for _ in range(100):
        now += uploads.pause(100, now)
    assert 9.8 <= now - 100.0 <= 10.0


def test_uploads_without_a_rate_never_wait() -> None:
    uploads = Uploads(1)
    uploads.admit(1 << 40)
    assert uploads.pause(1 << 40, now=5.0) == 0.0


def test_who_has_been_given_a_part() -> None:
    handed, part = Handed(), Range(0, 10)
    assert handed.member(BLOB, part, "c") is None
    for name in ("a", "b", "c", "a"):
        handed.note(BLOB, part, name)
    named = {handed.member(BLOB, part, "c") for _ in range(6)}
    assert named == {"a", "b"}
    assert handed.member(BLOB, Range(10, 20), "c") is None


def test_what_was_handed_out_is_forgotten_in_time() -> None:
    handed = Handed()
    for number in itertools.count():
        handed.note(BLOB, Range(number, number + 1), "a")
        if handed.member(BLOB, Range(0, 1), "b") is None:
            break
    assert 1000 < number < 100_000
