"""What workers and agents tell each other, and the plan that both begin with."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from fetcher import agent_protocol, errors
from fetcher import lazy_protocol as protocol
from fetcher.lazy_plan import (
    LazyPlan,
    decode_plan,
    encode_plan,
    lock_path,
    mountpoint,
    plan_path,
)
from fetcher.lines import Malformed
from fetcher.oci import Digest

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "hunter2-and-more"

FROM_WORKER = [
    protocol.Want(1, "sha256:1", 0, 5),
    protocol.Want(2, "sha256:1", 7, 9, ahead=True),
    protocol.Index(3, "sha256:1"),
    protocol.Opened("sha256:1", 0, 5),
    protocol.Forget(3),
]
FROM_AGENT = [
    protocol.Here(1),
    protocol.Here(1, complete=True),
    protocol.Failed(1, "Unavailable", "no", transient=True),
    protocol.Spoiled("sha256:1", "why"),
    protocol.Ticket(SECRET),
]


@pytest.mark.parametrize("message", FROM_WORKER)
def test_what_a_worker_says_survives_the_wire(message: protocol.FromWorker) -> None:
    line = protocol.encode(message)
    assert line.endswith(b"\n")
    assert protocol.decode_from_worker(line[:-1]) == message


@pytest.mark.parametrize("message", FROM_AGENT)
def test_what_an_agent_says_survives_the_wire(message: protocol.FromAgent) -> None:
    assert protocol.decode_from_agent(protocol.encode(message)[:-1]) == message


def test_attaching_is_a_call() -> None:
    params = protocol.AttachParams(model="sha256:1", pid=7, ticket=SECRET)
    request = agent_protocol.decode_request(
        agent_protocol.encode_request(protocol.ATTACH, params)[:-1]
    )
    assert request.call == "attach"
    assert agent_protocol.decode_params(request, protocol.ATTACH) == params


def test_the_ticket_is_in_no_repr() -> None:
    shown = [
        protocol.AttachParams(model="sha256:1", pid=7, ticket=SECRET),
        protocol.AttachResult(ticket=SECRET),
        protocol.Ticket(SECRET),
    ]
    assert SECRET not in f"{shown!r} {shown}" + "".join(f"{one}" for one in shown)
    assert SECRET not in str([one.__rich_repr__() for one in shown])


def test_fields_of_a_newer_side_are_passed_over() -> None:
    line = b'{"type": "here", "id": 1, "complete": true, "more": 7}'
    assert protocol.decode_from_agent(line) == protocol.Here(1, complete=True)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"type": "unheard"}',
        b'{"type": "here"}',
        b'{"type": "want", "id": 1, "blob": "x", "start": -1, "stop": 2}',
        b'{"type": "want", "id": 1, "blob": "x", "start": 3, "stop": 2}',
        b'{"type": "opened", "blob": "x", "start": 3, "stop": 2}',
        b'{"type": "want", "id": 1, "blob": "' + b"x" * 300 + b'", "start": 1, "stop": 2}',
        b'{"type": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    ],
)
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(Malformed) as refused:
        protocol.decode_from_worker(line)
    assert len(str(refused.value)) < 300
    if b"want" not in line and b"opened" not in line:
        with pytest.raises(Malformed):
            protocol.decode_from_agent(line)


def test_a_refused_line_is_not_quoted() -> None:
    with pytest.raises(Malformed) as refused:
        protocol.decode_from_agent(b'{"type": "ticket", "ticket": ["' + SECRET.encode() + b'"]}')
    assert SECRET not in str(refused.value)


def test_a_failure_keeps_its_class_and_words() -> None:
    failed = protocol.Failed.of(3, errors.Unreachable("nobody there"))
    found = failed.error()
    assert (failed.id, failed.transient) == (3, True)
    assert (type(found), found.message) == (errors.Unreachable, "nobody there")


MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "artifactType": "application/vnd.cncf.model.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.cncf.model.config.v1+json",
            "digest": str(Digest.of(b"{}")),
            "size": 2,
        },
        "layers": [
            {
                "mediaType": "application/vnd.cncf.model.weight.v1.raw",
                "digest": str(Digest.of(b"x")),
                "size": 1,
                "annotations": {"org.cncf.model.filepath": "x.bin"},
            }
        ],
    }
).encode()
PLAN = LazyPlan(
    model=Digest.of(MANIFEST),
    manifest=MANIFEST,
    media_type="application/vnd.oci.image.manifest.v1+json",
    exclude_weights=True,
    exclude_patterns=("*.md", "!README.md"),
    prefetch="opened",
)


def test_a_plan_survives_the_disk() -> None:
    plan = decode_plan(encode_plan(PLAN))
    assert plan == PLAN
    assert plan.read_model().layers[0].path == "x.bin"
    assert plan.selection.exclude_patterns == ("*.md", "!README.md")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\0" * 100,
        b'{"version": 2}',
        b'{"version": 1}',
        encode_plan(PLAN)[:-1],
        encode_plan(dataclasses.replace(PLAN, model=Digest.of(b"other"))),
        encode_plan(dataclasses.replace(PLAN, exclude_patterns=("[",))),
        encode_plan(PLAN).replace(b'"manifest":"', b'"manifest":"?'),
    ],
)
def test_a_plan_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(errors.ModelError):
        decode_plan(content)


def test_where_things_lie(tmp_path: Path) -> None:
    model = Digest.of(b"m")
    assert mountpoint(tmp_path, model, "") == tmp_path / "lazy/sha256" / model.hex
    assert plan_path(tmp_path, model, "") == tmp_path / f"lazy/sha256/{model.hex}.json"
    assert plan_path(tmp_path, model, "abc") == tmp_path / f"lazy/sha256/{model.hex}.abc.json"
    assert lock_path(tmp_path, model, "abc") == tmp_path / f"lazy/sha256/{model.hex}.abc.lock"
