"""What workers and the agent say to each other, over the agent's own socket."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from csi.agent import AgentServer, listening
from fetcher import agent_protocol as protocol
from fetcher.credentials import VolumeSecrets
from fetcher.errors import NotFound
from fetcher.lazy_protocol import (
    ATTACH,
    MAX_LINE_BYTES,
    AttachParams,
    Failed,
    Forget,
    Here,
    Index,
    Opened,
    Spoiled,
    Ticket,
    Want,
    decode_from_agent,
    encode,
)
from fetcher.lazy_sessions import LazySessions
from fetcher.lines import ConnectionLost, Lines
from fetcher.modelpack import Packing
from fetcher.schedule import Prefetch
from fetcher.store import Store
from tests.support.lazy_models import in_lazy_node, until
from tests.support.proxy import Faults, serve_proxy
from tests.support.stores import CHUNK, weights
from tests.support.token_server import PASSWORD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fetcher.lazy import LazyModel
    from fetcher.lazy_protocol import FromAgent, FromWorker
    from tests.support.lazy_models import LazyNode
    from tests.support.registry import RegistryServer


class NoCalls:
    """An agent that answers nothing but workers."""

    async def run(self, call: object, params: object, watch: object) -> object:
        raise NotFound("no such call")


class Worker:
    """The other end, as a worker's process has it."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    async def attach(self, model: LazyModel, ticket: str = "") -> protocol.Answer:
        params = AttachParams(
            model=str(model.digest), selection=model.selection.key, pid=1, ticket=ticket
        )
        await self._lines.send(protocol.encode_request(ATTACH, params))
        line = await self._lines.receive()
        assert line is not None
        return protocol.decode_answer(line)

    async def send(self, line: bytes) -> None:
        await self._lines.send(line)

    async def say(self, message: FromWorker) -> None:
        await self._lines.send(encode(message))

    async def hear(self) -> FromAgent:
        with trio.fail_after(30):
            line = await self._lines.receive()
        assert line is not None
        return decode_from_agent(line)


@contextlib.asynccontextmanager
async def agent(node: LazyNode) -> AsyncIterator[None]:
    """Serve the agent's socket of a node."""
    with listening(node.store.root) as listener:
        async with trio.open_nursery() as nursery:
            sessions = LazySessions(node.models)
            server = AgentServer(NoCalls(), hand_over=None, sessions=sessions)  # type: ignore[arg-type]
            nursery.start_soon(server.serve, listener)
            yield
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def worker(node: LazyNode) -> AsyncIterator[Worker]:
    """Connect to it."""
    stream = await trio.open_unix_socket(str(protocol.socket_path(node.store.root)))
    async with stream:
        yield Worker(Lines(stream, MAX_LINE_BYTES))


def test_questions_are_answered_in_any_order(tmp_path: Path, registry: RegistryServer) -> None:
    builder = weights(16 * CHUNK).add_tar({"a": b"b"}, Packing.TAR_GZIP)
    builder.push(registry, "sessions/questions", "v1")
    raw, archive = (str(layer.digest) for layer in builder.manifest().layers)

    async def work(node: LazyNode) -> None:
        model = await node.open(registry.reference("sessions/questions", "v1"))
        async with agent(node), worker(node) as one:
            assert (await one.attach(model)).error is None
            await one.say(Want(id=1, blob=raw, start=5, stop=6))
            await one.say(Index(id=2, blob=archive))
            await one.say(Want(id=3, blob=raw, start=0, stop=17 * CHUNK))
            await one.say(Want(id=4, blob="sha256:none", start=0, stop=1))
            await one.say(Want(id=5, blob=raw, start=CHUNK, stop=2 * CHUNK, ahead=True))
            answers = {}
            for _ in range(5):
                message = await one.hear()
                assert isinstance(message, Here | Failed)
                answers[message.id] = message
            assert answers[1] == Here(id=1)
            assert answers[2] == Here(id=2, complete=True)
            assert isinstance(answers[3], Failed)
            assert isinstance(answers[4], Failed)
            assert answers[5] == Here(id=5)
            await one.say(Opened(blob=raw, start=0, stop=16 * CHUNK))
            await until(lambda: not model.blob(raw).is_waited_for)

    in_lazy_node(tmp_path / "root", work)


def test_a_worker_may_be_there_before_there_is_room(
    tmp_path: Path, registry: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent was started again: what it went on with is known, and how much fits is not yet."""
    builder = weights(16 * CHUNK)
    builder.push(registry, "sessions/early", "v1")
    [blob] = (str(layer.digest) for layer in builder.manifest().layers)
    opened: list[LazyModel] = []
    begun, reserve = trio.Event(), Store.reserve

    async def late(*arguments: Any) -> None:
        await begun.wait()
        await reserve(*arguments)

    async def first(node: LazyNode) -> None:
        opened.append(await node.open(registry.reference("sessions/early", "v1")))

    async def again(node: LazyNode) -> None:
        monkeypatch.setattr(Store, "reserve", late)
        model = await node.models.restore(opened[0].digest, "")
        async with agent(node), worker(node) as one:
            assert (await one.attach(model)).error is None
            await one.say(Want(id=1, blob=blob, start=5, stop=6))
            await trio.testing.wait_all_tasks_blocked(0.05)
            begun.set()
            assert await one.hear() == Here(id=1)

    in_lazy_node(tmp_path / "root", first)
    in_lazy_node(tmp_path / "root", again)


def test_what_is_forgotten_is_not_waited_for(tmp_path: Path, registry: RegistryServer) -> None:
    builder = weights(16 * CHUNK)
    builder.push(registry, "sessions/forget", "v1")
    [raw] = (str(layer.digest) for layer in builder.manifest().layers)

    async def work(node: LazyNode) -> None:
        with serve_proxy(registry.address) as proxy:
            model = await node.open(f"{proxy.address}/sessions/forget:v1")
            proxy.faults = Faults(statuses=[503] * 1000)
            before = len(model.listeners)
            async with agent(node):
                async with worker(node) as one:
                    await one.attach(model)
                    await one.say(Want(id=1, blob=raw, start=0, stop=1))
                    await until(lambda: model.blob(raw).is_waited_for)
                    await one.say(Forget(id=1))
                    await until(lambda: not model.blob(raw).is_waited_for)
                    await one.say(Want(id=2, blob=raw, start=0, stop=1))
                    await until(lambda: model.blob(raw).is_waited_for)
                # and what a worker asked that left is not either
                await until(lambda: not model.blob(raw).is_waited_for)
                assert len(model.listeners) == before

    in_lazy_node(tmp_path / "root", work)


def test_a_model_that_nobody_opened_has_no_worker(tmp_path: Path, registry: RegistryServer) -> None:
    builder = weights(CHUNK)
    builder.push(registry, "sessions/unknown", "v1")

    async def work(node: LazyNode) -> None:
        model = await node.open(registry.reference("sessions/unknown", "v1"))
        await node.models.close(model.digest, "")
        async with agent(node), worker(node) as one:
            answer = await one.attach(model)
            assert answer.error is not None
            assert answer.error.code == "NotFound"

    in_lazy_node(tmp_path / "root", work)


def test_a_worker_is_told_what_is_spoiled_and_who_to_be(
    tmp_path: Path, guarded: RegistryServer
) -> None:
    builder = weights(16 * CHUNK)
    builder.push(guarded, "sessions/told", "v1")
    [raw] = (str(layer.digest) for layer in builder.manifest().layers)

    async def work(node: LazyNode) -> None:
        with serve_proxy(guarded.address) as proxy:
            secrets = VolumeSecrets.parse(
                {"username": "robot", "password": PASSWORD}, proxy.address
            )
            reference = f"{proxy.address}/sessions/told:v1"
            model = await node.open(reference, keychain=secrets)
            proxy.faults = Faults(corrupt_at=3)
            async with agent(node), worker(node) as one:
                answer = await one.attach(model)
                assert PASSWORD in str(protocol.decode_result(answer, ATTACH).ticket)
                assert PASSWORD not in repr(protocol.decode_result(answer, ATTACH))
                again = VolumeSecrets.parse({"username": "robot", "password": "x"}, proxy.address)
                with pytest.raises(Exception, match="credentials"):
                    await node.open(reference, keychain=again)
                await one.say(Opened(blob=raw, start=0, stop=16 * CHUNK))
                model = await node.open(reference, Prefetch.ALL, keychain=secrets)
                message = await one.hear()
                assert isinstance(message, Spoiled)
                assert message.blob == raw
            async with agent(node), worker(node) as late:
                await late.attach(model)
                assert isinstance(await late.hear(), Spoiled)
                model.ticket = ""
                await node.open(reference, keychain=secrets)
                assert isinstance(await late.hear(), Ticket)

    in_lazy_node(tmp_path / "root", work)


def test_what_is_not_understood_is_passed_over_and_too_much_ends_one_session(
    tmp_path: Path, registry: RegistryServer
) -> None:
    builder = weights(16 * CHUNK)
    builder.push(registry, "sessions/nonsense", "v1")
    [raw] = (str(layer.digest) for layer in builder.manifest().layers)

    async def work(node: LazyNode) -> None:
        model = await node.open(registry.reference("sessions/nonsense", "v1"))
        async with agent(node), worker(node) as good:
            await good.attach(model)
            await good.send(b'{"type": "nothing"}\n')
            await good.send(b"\xff\xfe\n")
            async with worker(node) as bad:
                await bad.attach(model)
                with contextlib.suppress(ConnectionLost):
                    while True:
                        await bad.send(b"x" * CHUNK)
            await good.say(Want(id=1, blob=raw, start=0, stop=1))
            assert await good.hear() == Here(id=1)

    in_lazy_node(tmp_path / "root", work)
