"""The agent's protocol: messages, errors and lines, without a socket."""

from __future__ import annotations

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from fetcher import agent_protocol as protocol
from fetcher import errors
from fetcher.lines import ConnectionLost, Lines, LineTooLong, Malformed

SECRET = "hunter2-and-more"


ERRORS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.ModelError)
]


def test_a_request_survives_the_wire() -> None:
    login = protocol.Login(username="u", password=SECRET)
    params = protocol.PullParams(reference="a/b:c", exclude_patterns=("*.bin",), login=login)
    request = protocol.decode_request(protocol.encode_request(protocol.PULL, params))
    assert request.call == "pull"
    assert protocol.decode_params(request, protocol.PULL) == params


def test_a_result_survives_the_wire() -> None:
    result = protocol.PingResult(version="1", pid=2)
    answer = protocol.decode_answer(protocol.encode_result(result))
    assert protocol.decode_result(answer, protocol.PING) == result


def test_progress_survives_the_wire() -> None:
    answer = protocol.decode_answer(protocol.encode_progress(3, 7))
    assert answer == protocol.Answer(progress=protocol.ProgressBody(3, 7))


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_keeps_its_class_and_words(kind: type[errors.ModelError]) -> None:
    raised = kind("what went wrong", digest="sha256:1")
    body = protocol.decode_answer(protocol.encode_error(raised)).error
    assert body is not None
    found = protocol.error_of(body)
    assert type(found) is kind
    assert (found.message, found.context) == ("what went wrong", {"digest": "sha256:1"})


def test_an_unknown_error_is_an_error_all_the_same() -> None:
    found = protocol.error_of(protocol.ErrorBody("FromTheFuture", "no", {}))
    assert type(found) is errors.ModelError
    assert found.message == "no"


def test_nothing_secret_is_in_a_repr() -> None:
    login = protocol.Login(username=SECRET, password=SECRET, identity_token=SECRET)
    params = protocol.MountParams(reference="a/b", target="/x", login=login)
    request = protocol.decode_request(protocol.encode_request(protocol.MOUNT, params))
    assert SECRET not in f"{login!r} {login} {params!r} {request!r}"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"call": 1}',
        b'{"call": "pull", "params": {}, "more": 1}',
        b'{"call": "' + b"x" * 65 + b'"}',
        b'{"call": "pull", "params": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b"\0" * 100,
    ],
)
def test_what_is_no_request_is_refused(line: bytes) -> None:
    with pytest.raises(Malformed):
        protocol.decode_request(line)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"reference": 1},
        {"reference": "x" * 4097},
        {"reference": "x", "unknown": 1},
        {"reference": "x", "exclude_patterns": ["x"] * 1001},
        {"reference": "x", "login": {"password": {"deep": SECRET}}},
        {"reference": "x", "login": SECRET},
        {"reference": "x", "login": {"password": SECRET, "other": SECRET}},
        [],
        None,
    ],
)
def test_bad_parameters_are_refused_and_never_quoted(params: object) -> None:
    line = msgspec.json.encode({"call": "pull", "params": params})
    with pytest.raises(Malformed) as caught:
        protocol.decode_params(protocol.decode_request(line), protocol.PULL)
    assert SECRET not in str(caught.value)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reading_of_requests(line: bytes) -> None:
    try:
        request = protocol.decode_request(line)
        protocol.decode_params(request, protocol.PULL)
    except Malformed:
        return


# -- lines -----------------------------------------------------------------------------------------


@given(
    lines=st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), max_size=6),
    cut=st.integers(min_value=1, max_value=7),
)
def test_lines_arrive_whole_however_they_are_cut(lines: list[bytes], cut: int) -> None:
    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        received: list[bytes] = []

        async def send() -> None:
            content = b"".join(line + b"\n" for line in lines)
            for start in range(0, len(content), cut):
                await theirs.send_all(content[start : start + cut])
            await theirs.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            reader = Lines(ours, 30)
            while (line := await reader.receive()) is not None:
                received.append(line)
        assert received == lines

    trio.run(main)


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_beyond_the_limit_is_refused(end: bytes) -> None:
    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        await theirs.send_all(b"x" * 11 + end)
        with pytest.raises(LineTooLong):
            await Lines(ours, 10).receive()

    trio.run(main)


def test_a_line_of_exactly_the_limit_is_fine() -> None:
    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        await theirs.send_all(b"x" * 10 + b"\n" + b"y\n")
        lines = Lines(ours, 10)
        assert await lines.receive() == b"x" * 10
        assert await lines.receive() == b"y"

    trio.run(main)


def test_an_end_inside_a_line_is_a_lost_connection() -> None:
    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        await theirs.send_all(b"half")
        await theirs.aclose()
        with pytest.raises(ConnectionLost):
            await Lines(ours, 10).receive()

    trio.run(main)


def test_waiting_for_the_end_keeps_what_arrives() -> None:
    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        lines = Lines(ours, 10)
        with trio.move_on_after(0.01):
            await theirs.send_all(b"next\n")
            await lines.wait_closed()
        assert await lines.receive() == b"next"
        await theirs.aclose()
        await lines.wait_closed()

    trio.run(main)


def test_waiting_for_the_end_holds_no_more_than_a_line() -> None:
    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        await theirs.send_all(b"x" * 100)
        with pytest.raises(LineTooLong):
            await Lines(ours, 10).wait_closed()

    trio.run(main)


def test_sending_to_nobody_is_a_lost_connection() -> None:
    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        await theirs.aclose()
        with pytest.raises(ConnectionLost):
            await Lines(ours, 10).send(b"x\n")

    trio.run(main)
