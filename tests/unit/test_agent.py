"""The agent's socket and its client, with calls of a test's own behind them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import pytest
import trio
import trio.testing

from csi.agent import AgentServer, Watch, listening
from csi.agent_client import AgentClient, Patience, connect, take_over
from fetcher import agent_protocol as protocol
from fetcher.errors import AccessDenied, InProgress, ModelError, NotFound, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from msgspec import Struct

ParamsT = TypeVar("ParamsT", bound="Struct")
ResultT = TypeVar("ResultT", bound="Struct")

QUICK = Patience(lock=0.3, handover=0.3)


@dataclass
class Progress:
    done: int
    total: int


@dataclass
class Behaviour:
    """What the calls of one process do: answer at once unless told otherwise."""

    name: str = "agent"
    gate: trio.Event | None = None
    error: BaseException | None = None
    started: trio.Event = field(default_factory=trio.Event)
    cancelled: trio.Event = field(default_factory=trio.Event)
    progress: Progress | None = None
    calls: int = 0

    async def run(
        self, call: protocol.Call[ParamsT, ResultT], params: ParamsT, watch: Watch
    ) -> ResultT:
        self.calls += 1
        self.started.set()
        watch.follow(lambda: self.progress)
        if self.gate is not None:
            try:
                await self.gate.wait()
            except trio.Cancelled:
                self.cancelled.set()
                raise
        if self.error is not None:
            raise self.error
        if isinstance(params, protocol.PullParams):
            return cast("ResultT", pulled(self.name, params.reference))
        return cast("ResultT", protocol.PingResult(version=self.name, pid=os.getpid()))


def pulled(by: str, reference: str) -> protocol.PullResult:
    return protocol.PullResult(
        reference=reference, digest="d", path=by, size=1, files=1, fetched=0, seconds=0.0
    )


@contextlib.asynccontextmanager
async def locked(root: Path, calls: Behaviour) -> AsyncIterator[Behaviour]:
    """A store that is nothing but its lock."""
    with (root / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InProgress(f"the store at {root} is in use by process 4711") from error
        yield calls


@contextlib.asynccontextmanager
async def serving(
    root: Path, calls: Behaviour, hand_over: Callable[[], None] | None = None
) -> AsyncIterator[AgentServer]:
    with listening(root) as listener:
        server = AgentServer(calls, hand_over)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, listener)
            yield server
            nursery.cancel_scope.cancel()


def client(root: Path, calls: Behaviour, shown: list[tuple[int, int]] | None = None) -> AgentClient:
    return AgentClient(
        root,
        lambda: locked(root, calls),
        lambda done, total: None if shown is None else shown.append((done, total)),
        QUICK,
    )


async def connected(root: Path) -> trio.SocketStream:
    stream = await connect(root)
    assert stream is not None
    return stream


async def talk(root: Path, *lines: bytes) -> list[dict[str, object]]:
    """Send lines as they are, and read answers until as many ended or the connection does."""
    stream = await connected(root)
    answers: list[dict[str, object]] = []
    async with stream:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(b"".join(line + b"\n" for line in lines))
        ended, buffer = 0, b""
        while ended < len(lines):
            try:
                data = await stream.receive_some()
            except trio.BrokenResourceError:
                break
            if not data:
                break
            *complete, buffer = (buffer + data).split(b"\n")
            answers += [json.loads(line) for line in complete]
            ended = sum("progress" not in answer for answer in answers)
    return answers


def code_of(answer: dict[str, object]) -> object:
    error = answer["error"]
    assert isinstance(error, dict)
    return error["code"]


# -- the server ------------------------------------------------------------------------------------


def test_a_call_is_answered(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, Behaviour("one")):
            answers = await talk(tmp_path, b'{"call": "ping"}', b'{"call": "ping", "params": {}}')
        assert answers == [{"result": {"version": "one", "pid": os.getpid()}}] * 2

    trio.run(main)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"GET / HTTP/1.1",
        b'{"call": "format"}',
        b'{"call": "ping", "params": {"x": 1}}',
        b'{"call": "pull", "params": {"reference": 5}}',
        b'{"call": "pull", "params": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b"\xff\x00\xff",
    ],
)
def test_hostile_lines_get_an_error_and_the_connection_goes_on(tmp_path: Path, line: bytes) -> None:
    async def main() -> None:
        async with serving(tmp_path, Behaviour()):
            answers = await talk(tmp_path, line, b'{"call": "ping"}')
        assert code_of(answers[0]) == "InvalidRequest"
        assert "result" in answers[1]

    trio.run(main)


def test_a_line_without_end_is_refused_and_others_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, Behaviour()):
            [answer] = await talk(tmp_path, b"x" * (protocol.MAX_REQUEST_BYTES * 2))
            assert code_of(answer) == "InvalidRequest"
            assert len(await talk(tmp_path, b'{"call": "ping"}')) == 1

    trio.run(main)


def test_errors_reach_the_client_and_bugs_say_nothing_of_themselves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(tmp_path, Behaviour(error=NotFound("no such model", tag="v9"))):
            [answer] = await talk(tmp_path, b'{"call": "ping"}')
        assert answer["error"] == {
            "code": "NotFound",
            "message": "no such model",
            "context": {"tag": "v9"},
        }
        async with serving(tmp_path, Behaviour(error=ValueError("an inner matter"))):
            [answer] = await talk(tmp_path, b'{"call": "ping"}')
        assert "an inner matter" not in str(answer)
        assert code_of(answer) == "ModelError"

    trio.run(main)
    assert "an inner matter" in caplog.text


def test_progress_is_sent_while_it_changes(tmp_path: Path) -> None:
    async def main() -> None:
        gate = trio.Event()
        calls = Behaviour(gate=gate, progress=Progress(1, 10))
        answers: list[dict[str, object]] = []

        async def ask() -> None:
            answers.extend(await talk(tmp_path, b'{"call": "ping"}'))

        async with serving(tmp_path, calls), trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await calls.started.wait()
            await trio.sleep(0.35)
            calls.progress = Progress(7, 10)
            await trio.sleep(0.35)
            gate.set()
        assert answers[:-1] == [
            {"progress": {"done": 1, "total": 10}},
            {"progress": {"done": 7, "total": 10}},
        ]
        assert "result" in answers[-1]

    trio.run(main)


def test_a_client_that_leaves_cancels_its_wait_and_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        calls = Behaviour(gate=trio.Event(), progress=Progress(0, 1))
        async with serving(tmp_path, calls):
            stream = await connected(tmp_path)
            await stream.send_all(b'{"call": "ping"}\n')
            await calls.started.wait()
            await stream.aclose()
            with trio.fail_after(5):
                await calls.cancelled.wait()
            calls.gate = None
            assert len(await talk(tmp_path, b'{"call": "ping"}')) >= 1

    trio.run(main)


def test_a_client_that_floods_a_running_call_is_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        calls = Behaviour(gate=trio.Event())
        async with serving(tmp_path, calls):
            stream = await connected(tmp_path)
            async with stream:
                await stream.send_all(b'{"call": "ping"}\n')
                await calls.started.wait()
                with trio.fail_after(10), contextlib.suppress(trio.BrokenResourceError):
                    while True:
                        await stream.send_all(b"x" * 65536)
            await calls.cancelled.wait()

    trio.run(main)


def test_connections_are_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        with listening(tmp_path) as listener:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(AgentServer(Behaviour(), None, 3).serve, listener)
                streams = [await connected(tmp_path) for _ in range(3)]
                await trio.testing.wait_all_tasks_blocked(0.01)
                [refused] = await talk(tmp_path, b'{"call": "ping"}')
                assert code_of(refused) == "Unavailable"
                for stream in streams:
                    await stream.aclose()
                await trio.testing.wait_all_tasks_blocked(0.01)
                [answer] = await talk(tmp_path, b'{"call": "ping"}')
                assert "result" in answer
                nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


ASK_AS_NOBODY = """
import os, socket, sys
os.setuid(65534)
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
client.sendall(b'{"call": "ping"}\\n')
print(client.recv(4096).decode())
"""


@pytest.mark.parametrize(("mode", "words"), [(0o600, "PermissionError"), (0o666, "AccessDenied")])
def test_other_users_are_turned_away(open_folder: Path, mode: int, words: str) -> None:
    """By the socket's mode, and by the kernel's word on who they are, each on its own."""

    async def main() -> None:
        calls = Behaviour()
        async with serving(open_folder, calls):
            path = protocol.socket_path(open_folder)
            path.chmod(mode)
            done = await trio.run_process(
                [sys.executable, "-c", ASK_AS_NOBODY, str(path)],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        assert words in (done.stdout + done.stderr).decode()
        assert calls.calls == 0

    trio.run(main)


# -- the socket ------------------------------------------------------------------------------------


def test_the_socket_is_its_users_alone_and_gone_afterwards(tmp_path: Path) -> None:
    path = protocol.socket_path(tmp_path)

    async def main() -> None:
        async with serving(tmp_path, Behaviour()):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600

    trio.run(main)
    assert list(tmp_path.iterdir()) == []


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = protocol.socket_path(tmp_path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def main() -> None:
        assert await connect(tmp_path) is None
        async with serving(tmp_path, Behaviour()):
            assert len(await talk(tmp_path, b'{"call": "ping"}')) == 1

    trio.run(main)


def test_a_root_may_be_longer_than_a_sockets_name(tmp_path: Path) -> None:
    root = tmp_path / ("long" * 40) / ("longer" * 20)
    root.mkdir(parents=True)

    async def main() -> None:
        async with serving(root, Behaviour()):
            assert len(await talk(root, b'{"call": "ping"}')) == 1

    trio.run(main)


def test_without_a_root_there_is_no_agent(tmp_path: Path) -> None:
    async def main() -> None:
        assert await connect(tmp_path / "nothing" / "here") is None

    trio.run(main)


LISTEN_AS_NOBODY = """
import os, socket, sys
os.setuid(65534)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("listening", flush=True)
sys.stdin.read()
"""


def test_who_listens_must_be_root_or_oneself(open_folder: Path) -> None:
    """Credentials go over this socket: not to whoever managed to bind it."""
    open_folder.chmod(0o777)
    process = subprocess.Popen(
        [sys.executable, "-c", LISTEN_AS_NOBODY, str(protocol.socket_path(open_folder))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        with pytest.raises(AccessDenied, match="user 65534"):
            trio.run(connect, open_folder)
        assert process.stdin is not None
        process.stdin.close()


# -- connect, else become --------------------------------------------------------------------------


def test_a_running_agent_is_asked(tmp_path: Path) -> None:
    async def main() -> None:
        ours, theirs = Behaviour("ours"), Behaviour("theirs")
        async with serving(tmp_path, theirs):
            result = await client(tmp_path, ours).call(protocol.PING, protocol.NoParams())
        assert (result.version, ours.calls) == ("theirs", 0)

    trio.run(main)


def test_without_an_agent_the_command_is_it_and_others_join(tmp_path: Path) -> None:
    async def main() -> None:
        gate = trio.Event()
        first = Behaviour("first", gate=gate, progress=Progress(1, 2))
        second = Behaviour("second")
        shown: list[tuple[int, int]] = []
        results: list[str] = []

        async def run(calls: Behaviour) -> None:
            params = protocol.PullParams(reference="a/b")
            result = await client(tmp_path, calls, shown).call(protocol.PULL, params)
            results.append(result.path)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, first)
            await first.started.wait()
            nursery.start_soon(run, second)
            await trio.sleep(0.5)
            assert first.calls == 2
            gate.set()
        assert results == ["first", "first"]
        assert second.calls == 0
        assert shown == [(1, 2)] * 2
        assert not protocol.socket_path(tmp_path).exists()

    trio.run(main)


def test_an_error_of_ones_own_call_is_that_error(tmp_path: Path) -> None:
    async def main() -> None:
        calls = Behaviour(error=NotFound("no such model"))
        with pytest.raises(NotFound, match="no such model"):
            await client(tmp_path, calls).call(protocol.PING, protocol.NoParams())

    trio.run(main)


def test_an_error_of_the_agent_keeps_its_class(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, Behaviour(error=NotFound("no such model"))):
            with pytest.raises(NotFound, match="no such model"):
                await client(tmp_path, Behaviour()).call(protocol.PING, protocol.NoParams())

    trio.run(main)


def test_who_loses_the_agent_takes_over(tmp_path: Path) -> None:
    async def main() -> None:
        dying, ours = Behaviour("dying", gate=trio.Event()), Behaviour("ours")
        result: list[str] = []

        async def run() -> None:
            answer = await client(tmp_path, ours).call(protocol.PING, protocol.NoParams())
            result.append(answer.version)

        async with (
            trio.open_nursery() as nursery,
            locked(tmp_path, dying),
            serving(tmp_path, dying),
        ):
            nursery.start_soon(run)
            await dying.started.wait()
        assert result == ["ours"]

    trio.run(main)


def test_an_agent_that_always_dies_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        async def hang_up(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await stream.aclose()

        with listening(tmp_path) as listener:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, hang_up, [listener])
                with pytest.raises(Unavailable, match="before it answered"):
                    await client(tmp_path, Behaviour()).call(protocol.PING, protocol.NoParams())
                nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.02))


def test_nonsense_from_an_agent_is_an_error(tmp_path: Path) -> None:
    async def main() -> None:
        async def babble(stream: trio.SocketStream) -> None:
            await stream.send_all(b"HTTP/1.1 400 Bad Request\n")
            await stream.receive_some()

        with listening(tmp_path) as listener:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, babble, [listener])
                with pytest.raises(Unavailable, match="another version"):
                    await client(tmp_path, Behaviour()).call(protocol.PING, protocol.NoParams())
                nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_holder_that_does_not_listen_is_waited_for_and_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with locked(tmp_path, Behaviour()):
            with pytest.raises(InProgress, match=r"process 4711.*0 s"):
                await client(tmp_path, Behaviour()).call(protocol.PING, protocol.NoParams())

    trio.run(main)


def test_a_holder_that_leaves_in_time_is_followed(tmp_path: Path) -> None:
    async def main() -> None:
        ours = Behaviour("ours")

        async def hold() -> None:
            async with locked(tmp_path, Behaviour()):
                await trio.sleep(0.1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hold)
            await trio.sleep(0.02)
            result = await client(tmp_path, ours).call(protocol.PING, protocol.NoParams())
        assert result.version == "ours"

    trio.run(main)


def test_cancelling_a_call_leaves_nothing(tmp_path: Path) -> None:
    """At each of its checkpoints, as the agent and as a client of one."""

    async def cut(calls: Behaviour, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await client(tmp_path, calls).call(protocol.PING, protocol.NoParams())

    async def main() -> None:
        for step in range(20):
            await cut(Behaviour(gate=trio.Event()), step * 0.002)
            assert not protocol.socket_path(tmp_path).exists()
            async with locked(tmp_path, Behaviour()):
                pass
        theirs = Behaviour(gate=trio.Event())
        async with serving(tmp_path, theirs):
            for step in range(20):
                await cut(Behaviour(), step * 0.002)
        assert len(os.listdir("/proc/self/fd")) < before + 50

    before = len(os.listdir("/proc/self/fd"))
    trio.run(main)
    assert len(os.listdir("/proc/self/fd")) <= before


# -- handing over ----------------------------------------------------------------------------------


def test_a_serving_agent_gets_the_store_from_a_command(tmp_path: Path) -> None:
    async def main() -> None:
        command, served = Behaviour("command", gate=trio.Event()), Behaviour("served")
        result: list[str] = []
        answered = trio.Event()

        async def run() -> None:
            answer = await client(tmp_path, command).call(protocol.PING, protocol.NoParams())
            result.append(answer.version)
            answered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await command.started.wait()
            async with take_over(tmp_path, lambda: locked(tmp_path, served), QUICK) as calls:
                assert calls is served
                async with serving(tmp_path, calls):
                    with trio.fail_after(5):
                        await answered.wait()
        assert command.cancelled.is_set()
        assert result == ["served"]

    trio.run(main)


def test_a_serving_agent_keeps_its_store(tmp_path: Path) -> None:
    async def main() -> None:
        theirs = Behaviour("theirs")
        async with locked(tmp_path, theirs), serving(tmp_path, theirs):
            [answer] = await talk(tmp_path, b'{"call": "handover"}')
            assert code_of(answer) == "Conflict"
            with pytest.raises(InProgress, match="process 4711"):
                async with take_over(tmp_path, lambda: locked(tmp_path, Behaviour()), QUICK):
                    raise AssertionError("there are two agents")

    trio.run(main)


def test_a_root_that_cannot_be_listened_in_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "agent.sock").mkdir()
    with pytest.raises(ModelError, match="is no socket"), listening(tmp_path):
        raise AssertionError("it listens")


def test_the_protocol_needs_no_grpc() -> None:
    """The workers of lazy volumes import it, and never import gRPC."""
    program = "import sys, fetcher.agent_protocol; print('grpc' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
