"""The gRPC edge: real sockets, real gRPC clients in threads, the trio loop in this one."""

from __future__ import annotations

import logging
import os
import re
import socket
import stat
import threading
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import pytest
import trio
import trio.testing

from csi.server import MAX_DETAILS_BYTES, MAX_REQUEST_BYTES, Server
from fetcher import errors
from proto import csi_pb2
from tests.support import edge
from tests.support.csi_client import CsiClient, capability
from tests.support.edge import failure, in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from csi.bridge import Call

    Behaviour: TypeAlias = Callable[[csi_pb2.NodeUnpublishVolumeRequest, Call], Awaitable[None]]

SECRET = "correct horse battery staple"


class Unpublisher:
    """A node service with one RPC, of which each test says what it does."""

    descriptor = csi_pb2.DESCRIPTOR.services_by_name["Node"]

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

    async def NodeUnpublishVolume(
        self, request: csi_pb2.NodeUnpublishVolumeRequest, call: Call
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        await self._behaviour(request, call)
        return csi_pb2.NodeUnpublishVolumeResponse()

    async def NodePublishVolume(
        self, request: csi_pb2.NodePublishVolumeRequest, call: Call
    ) -> csi_pb2.NodePublishVolumeResponse:
        return csi_pb2.NodePublishVolumeResponse()


class Sleeper:
    """Calls that sleep until they are cancelled, and what became of them."""

    def __init__(self) -> None:
        self.started = 0
        self.cancelled = 0
        self.changed = trio.Event()
        self.time_remaining: float | None = -1.0

    async def __call__(self, request: csi_pb2.NodeUnpublishVolumeRequest, call: Call) -> None:
        self.started += 1
        self.time_remaining = call.time_remaining
        self._change()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled += 1
            self._change()

    def _change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(10):
            while not condition():
                await self.changed.wait()


async def succeed(request: csi_pb2.NodeUnpublishVolumeRequest, call: Call) -> None:
    await trio.lowlevel.checkpoint()


def failing(error: Exception) -> Behaviour:
    async def fail(request: csi_pb2.NodeUnpublishVolumeRequest, call: Call) -> None:
        raise error

    return fail


def serving(path: Path, behaviour: Behaviour = succeed) -> AbstractAsyncContextManager[Server]:
    return edge.serving(path, [Unpublisher(behaviour)])


@pytest.fixture
def endpoint(tmp_path: Path) -> Path:
    return tmp_path / "csi" / "csi.sock"


@pytest.fixture
def client(endpoint: Path) -> Iterator[CsiClient]:
    with CsiClient(endpoint, timeout=20) as client:
        yield client


def unpublish(client: CsiClient, timeout: float | None = 20, volume_id: str = "v") -> None:
    request = csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume_id, target_path="/t")
    client.node.NodeUnpublishVolume(request, timeout=timeout)


# -- answers and errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequest("the model reference is empty"), "INVALID_ARGUMENT"),
        (errors.InProgress("model x: 42 % (1.2 GiB of 2.9 GiB)"), "ABORTED"),
        (errors.Conflict("volume x is there with other attributes: mode"), "ALREADY_EXISTS"),
        (errors.ModelError("state.db cannot be used"), "INTERNAL"),
        (errors.NotFound("kein Modell „ü“ …"), "NOT_FOUND"),
    ],
)
def test_an_error_of_ours_reaches_the_caller_in_its_words(
    endpoint: Path, client: CsiClient, error: errors.ModelError, code: str
) -> None:
    async def main() -> None:
        async with serving(endpoint, failing(error)):
            answer = await in_thread(lambda: failure(lambda: unpublish(client)))
        assert answer == (grpc.StatusCode[code], error.message)

    trio.run(main)


def test_a_bug_is_internal_with_its_stack_in_the_log_alone(
    endpoint: Path, client: CsiClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(endpoint, failing(KeyError("what only we should see"))):
            code, details = await in_thread(lambda: failure(lambda: unpublish(client)))
            assert code is grpc.StatusCode.INTERNAL
            # and the driver goes on
            await in_thread(lambda: client.publish("v", endpoint.parent / "t", {}))
        match = re.fullmatch(r"internal error \(id ([0-9a-f]{8})\), see the driver's log", details)
        assert match
        (record,) = [record for record in caplog.records if record.exc_info]
        assert match[1] in record.getMessage()
        assert "what only we should see" in caplog.text
        assert "Traceback" in caplog.text

    trio.run(main)


def test_a_message_is_bounded_as_headers_are(endpoint: Path, client: CsiClient) -> None:
    async def main() -> None:
        async with serving(endpoint, failing(errors.NotFound("ü\ud800" * 10_000))):
            code, details = await in_thread(lambda: failure(lambda: unpublish(client)))
        assert code is grpc.StatusCode.NOT_FOUND
        assert 0 < len(details.encode()) <= MAX_DETAILS_BYTES + 3

    trio.run(main)


def test_an_rpc_that_a_service_lacks_is_unimplemented(endpoint: Path, client: CsiClient) -> None:
    async def main() -> None:
        async with serving(endpoint):
            stage = csi_pb2.NodeStageVolumeRequest()
            code, _ = await in_thread(lambda: failure(lambda: client.node.NodeStageVolume(stage)))
            assert code is grpc.StatusCode.UNIMPLEMENTED
            other = csi_pb2.ControllerGetCapabilitiesRequest()
            code, _ = await in_thread(
                lambda: failure(lambda: client.controller.ControllerGetCapabilities(other))
            )
            assert code is grpc.StatusCode.UNIMPLEMENTED

    trio.run(main)


def test_requests_that_are_too_large_or_no_requests_are_refused(
    endpoint: Path, client: CsiClient
) -> None:
    def refused(body: bytes) -> tuple[grpc.StatusCode, str]:
        with grpc.insecure_channel(f"unix://{endpoint}") as channel:
            send: Callable[..., Any] = channel.unary_unary("/csi.v1.Node/NodeUnpublishVolume")
            return failure(lambda: send(body, timeout=20))

    async def main() -> None:
        async with serving(endpoint):
            code, _ = await in_thread(lambda: refused(b"\n\xff\xff\xff\xff"))
            assert code is grpc.StatusCode.INTERNAL
            # volume_id that is not UTF-8
            code, _ = await in_thread(lambda: refused(b"\n\x02\xff\xfe"))
            assert code is grpc.StatusCode.INTERNAL
            code, _ = await in_thread(lambda: refused(bytes(MAX_REQUEST_BYTES + 1)))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            await in_thread(lambda: unpublish(client))

    trio.run(main)


# -- deadlines and cancellation --------------------------------------------------------------------


def test_a_call_knows_how_long_its_caller_waits(endpoint: Path, client: CsiClient) -> None:
    seen: list[float | None] = []

    async def note(request: csi_pb2.NodeUnpublishVolumeRequest, call: Call) -> None:
        seen.append(call.time_remaining)

    async def main() -> None:
        async with serving(endpoint, note):
            await in_thread(lambda: unpublish(client, timeout=120))
            await in_thread(lambda: unpublish(client, timeout=None))
        assert seen[0] is not None
        # gRPC sends three digits of it, rounded up
        assert 110 < seen[0] < 122
        assert seen[1] is None

    trio.run(main)


def test_the_deadline_of_a_call_ends_its_work(endpoint: Path, client: CsiClient) -> None:
    async def main() -> None:
        sleeper = Sleeper()
        async with serving(endpoint, sleeper):
            code, _ = await in_thread(lambda: failure(lambda: unpublish(client, timeout=0.3)))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            await sleeper.until(lambda: sleeper.cancelled == 1)

    trio.run(main)


def test_a_call_that_outlives_its_deadline_here_is_told_so(
    endpoint: Path, client: CsiClient
) -> None:
    async def main() -> None:
        async with serving(endpoint, Sleeper()):
            answer = await in_thread(lambda: failure(lambda: unpublish(client, timeout=60)))
        assert answer == (grpc.StatusCode.DEADLINE_EXCEEDED, "the call's deadline passed")

    # so that the deadline comes here before it comes to the caller
    trio.run(main, clock=trio.testing.MockClock(rate=200))


def test_a_caller_that_goes_away_ends_its_work(endpoint: Path, client: CsiClient) -> None:
    async def main() -> None:
        sleeper = Sleeper()
        async with serving(endpoint, sleeper):
            request = csi_pb2.NodeUnpublishVolumeRequest(volume_id="v")
            call = client.node.NodeUnpublishVolume.future(request)
            await sleeper.until(lambda: sleeper.started == 1)
            call.cancel()
            await sleeper.until(lambda: sleeper.cancelled == 1)

    trio.run(main)


def test_long_calls_take_nothing_from_others(endpoint: Path, client: CsiClient) -> None:
    async def main() -> None:
        sleeper = Sleeper()
        async with serving(endpoint, sleeper):
            request = csi_pb2.NodeUnpublishVolumeRequest(volume_id="v")
            calls = [client.node.NodeUnpublishVolume.future(request) for _ in range(200)]
            await sleeper.until(lambda: sleeper.started == len(calls))
            publish = csi_pb2.NodePublishVolumeRequest(volume_capability=capability())
            await in_thread(lambda: client.node.NodePublishVolume(publish, timeout=5))
            for call in calls:
                call.cancel()
            await sleeper.until(lambda: sleeper.cancelled == len(calls))

    trio.run(main)


# -- the end ---------------------------------------------------------------------------------------


def test_calls_under_way_are_told_when_the_server_is_cancelled(
    endpoint: Path, client: CsiClient
) -> None:
    async def main() -> None:
        sleeper = Sleeper()
        async with serving(endpoint, sleeper):
            request = csi_pb2.NodeUnpublishVolumeRequest(volume_id="v")
            call = client.node.NodeUnpublishVolume.future(request, timeout=30)
            await sleeper.until(lambda: sleeper.started == 1)
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        assert call.details() == "the driver is stopping: ask again"

    trio.run(main)


def test_calls_after_the_end_fail_at_once(endpoint: Path, client: CsiClient) -> None:
    async def main() -> None:
        async with serving(endpoint):
            await in_thread(lambda: unpublish(client))

    trio.run(main)
    code, _ = failure(lambda: unpublish(client))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert not endpoint.exists()


def test_calls_do_not_hang_when_the_loop_crashes(endpoint: Path, client: CsiClient) -> None:
    request = csi_pb2.NodeUnpublishVolumeRequest(volume_id="v")
    calls = []

    async def main() -> None:
        sleeper = Sleeper()
        async with serving(endpoint, sleeper):
            calls.append(client.node.NodeUnpublishVolume.future(request, timeout=30))
            await sleeper.until(lambda: sleeper.started == 1)
            raise ValueError("something else in the process")

    with pytest.raises(ExceptionGroup):
        trio.run(main)
    assert calls[0].code() is grpc.StatusCode.UNAVAILABLE


def test_a_graceful_stop_lets_calls_end_and_takes_no_new_ones(
    endpoint: Path, client: CsiClient
) -> None:
    begun, proceed = trio.Event(), trio.Event()

    async def wait(request: csi_pb2.NodeUnpublishVolumeRequest, call: Call) -> None:
        begun.set()
        await proceed.wait()

    async def main() -> None:
        server = Server(endpoint, [Unpublisher(wait)])
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            request = csi_pb2.NodeUnpublishVolumeRequest(volume_id="v")
            call = client.node.NodeUnpublishVolume.future(request, timeout=30)
            await begun.wait()
            server.stop(grace=20)
            await trio.testing.wait_all_tasks_blocked()
            code, _ = await in_thread(lambda: failure(lambda: unpublish(client)))
            # gRPC cancels what arrives while it stops; whoever asks asks again after both
            assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            proceed.set()
        assert await in_thread(call.result) == csi_pb2.NodeUnpublishVolumeResponse()

    trio.run(main)


def test_a_graceful_stop_ends_with_its_grace(endpoint: Path, client: CsiClient) -> None:
    async def main() -> None:
        sleeper = Sleeper()
        server = Server(endpoint, [Unpublisher(sleeper)])
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            request = csi_pb2.NodeUnpublishVolumeRequest(volume_id="v")
            call = client.node.NodeUnpublishVolume.future(request, timeout=60)
            await sleeper.until(lambda: sleeper.started == 1)
            server.stop(grace=0.2)
            with trio.fail_after(10):
                await sleeper.until(lambda: sleeper.cancelled == 1)
        assert await in_thread(call.code) is grpc.StatusCode.UNAVAILABLE

    trio.run(main)


# -- the log ---------------------------------------------------------------------------------------


def test_each_call_is_one_line_without_secrets(
    endpoint: Path, client: CsiClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        async with serving(endpoint):
            await in_thread(
                lambda: client.publish_inline(
                    "csi-1",
                    endpoint.parent / "t",
                    {"a/reference": "r", "csi.storage.k8s.io/serviceAccount.tokens": SECRET},
                    secrets={"username": "somebody", "password": SECRET},
                )
            )

    trio.run(main)
    (record,) = [record for record in caplog.records if "NodePublishVolume" in record.getMessage()]
    line = record.getMessage()
    assert line.startswith("NodePublishVolume csi-1: OK in 0.")
    assert "\n" not in line
    assert "a/reference" in line
    assert SECRET not in caplog.text
    assert "somebody" not in caplog.text


def test_a_line_of_the_log_cannot_be_forged(
    endpoint: Path, client: CsiClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        async with serving(endpoint, failing(errors.NotFound("no such\nERROR root: forged"))):
            name = "x\nERROR root: forged\x1b[2J"
            await in_thread(lambda: failure(lambda: unpublish(client, volume_id=name)))

    trio.run(main)
    (record,) = [record for record in caplog.records if "Unpublish" in record.getMessage()]
    assert record.levelno == logging.WARNING
    assert record.getMessage().isprintable()


# -- the socket ------------------------------------------------------------------------------------


def test_only_root_can_connect_whatever_the_umask(endpoint: Path, client: CsiClient) -> None:
    def check() -> None:
        status = endpoint.stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert stat.S_IMODE(endpoint.parent.stat().st_mode) == 0o700
        assert [path.name for path in endpoint.parent.iterdir()] == [endpoint.name]

    async def main() -> None:
        async with serving(endpoint):
            await in_thread(check)

    before = os.umask(0)
    try:
        trio.run(main)
    finally:
        os.umask(before)
    assert list(endpoint.parent.iterdir()) == []


def test_a_stale_socket_is_replaced(endpoint: Path, client: CsiClient) -> None:
    endpoint.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(os.fspath(endpoint))

    async def main() -> None:
        async with serving(endpoint):
            await in_thread(lambda: unpublish(client))

    trio.run(main)


def test_a_socket_that_somebody_listens_on_is_left_alone(endpoint: Path, client: CsiClient) -> None:
    async def main() -> None:
        async with serving(endpoint):
            with pytest.raises(errors.Conflict, match="another process listens"):
                await Server(endpoint, []).serve()
            await in_thread(lambda: unpublish(client))

    trio.run(main)


def test_what_is_no_socket_is_left_alone(endpoint: Path) -> None:
    endpoint.parent.mkdir()
    endpoint.write_text("precious")

    with pytest.raises(errors.Conflict, match="is no socket"):
        trio.run(Server(endpoint, []).serve)
    assert endpoint.read_text() == "precious"
    assert list(endpoint.parent.iterdir()) == [endpoint]


def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(errors.InvalidRequest, match="cannot listen on"):
        trio.run(Server(tmp_path / "file" / "csi.sock", []).serve)


def test_a_socket_may_have_the_longest_path(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * (107 - len(os.fspath(tmp_path)) - len("//csi.sock")))
    endpoint = folder / "csi.sock"
    assert len(os.fspath(endpoint)) == 107

    async def main() -> None:
        async with serving(endpoint):
            with CsiClient(endpoint) as client:
                await in_thread(lambda: unpublish(client))

    trio.run(main)


def test_a_server_that_ends_late_leaves_the_socket_of_its_successor(
    endpoint: Path,
) -> None:
    def succeed_it() -> None:
        # what a successor does that found the socket stale
        endpoint.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(os.fspath(endpoint))

    async def main() -> None:
        async with serving(endpoint):
            await in_thread(succeed_it)

    trio.run(main)
    assert endpoint.exists()


def test_no_thread_is_left(endpoint: Path, client: CsiClient) -> None:
    async def main() -> None:
        async with serving(endpoint):
            await in_thread(lambda: unpublish(client))

    trio.run(main)
    for thread in threading.enumerate():
        if thread.name.startswith("grpc_"):
            thread.join(10)
            assert not thread.is_alive()
