"""Name servers that do not answer."""

from __future__ import annotations

import json
import os
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from csi.__main__ import open_registry
from csi.config import Config
from fetcher.credentials import Anonymous, Credentials, DockerConfig
from fetcher.errors import ModelError
from fetcher.oci import Reference
from tests.support.sources import weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fetcher.registry import Registry
    from tests.support.registry import RegistryServer

PODS = 60
"""More than trio has threads for everybody."""


class DeadNames:
    """Names below ``nowhere.example`` are looked up until the test is over."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.waiting: list[str] = []
        self._real = socket.getaddrinfo

    def getaddrinfo(self, host: Any, *rest: Any, **options: Any) -> Any:
        name = os.fsdecode(host)
        # trio asks without a thread whether it is an address
        numeric = (rest[4] if len(rest) > 4 else 0) & socket.AI_NUMERICHOST
        if not numeric and name.endswith("nowhere.example"):
            self.waiting.append(name)
            self.over.wait()
        return self._real(host, *rest, **options)

    async def waited_for(self, count: int) -> None:
        """Return when so many names are being looked up."""
        with trio.fail_after(20):
            while len(self.waiting) < count:  # noqa: ASYNC110 (threads have no event for it)
                await trio.sleep(0.01)


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeadNames]:
    names = DeadNames()
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    yield names
    names.over.set()


async def _ask_in_vain(registry: Registry, reference: str) -> None:
    with trio.move_on_after(60):
        try:
            await registry.resolve_model(Reference.parse(reference), Anonymous())
        except ModelError:
            return


def test_names_that_nobody_answers_for_hold_nothing_else_up(
    tmp_path: Path, registry: RegistryServer, dead: DeadNames
) -> None:
    """Not the files of mirrors and credentials, no process, and no other registry."""
    builder, _ = weights(1000)
    builder.push(registry, "names/model", "v1")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {"ghcr.io": {"username": "a", "password": "b"}}}))
    reference = Reference.parse(f"localhost:{registry.address.rpartition(':')[2]}/names/model:v1")

    async def main() -> None:
        async with (
            open_registry(Config(hosts_dir=tmp_path / "certs.d")) as opened,
            trio.open_nursery() as nursery,
        ):
            for number in range(PODS):
                name = f"r{number}.nowhere.example/a/b:v1"
                nursery.start_soon(_ask_in_vain, opened, name)
            await dead.waited_for(40)
            with trio.fail_after(20):
                await opened.resolve_model(reference, Anonymous())
                found = await DockerConfig(file).lookup("ghcr.io", "a/b")
                assert found == Credentials("a", "b")
                await trio.run_process(["true"])
            nursery.cancel_scope.cancel()
            dead.over.set()

    trio.run(main)


def test_one_name_takes_a_bounded_number_of_threads(dead: DeadNames) -> None:
    async def main() -> None:
        async with open_registry(Config()), trio.open_nursery() as nursery:
            look_up = partial(trio.socket.getaddrinfo, "one.nowhere.example", 80)
            for _ in range(PODS):
                nursery.start_soon(look_up)
            await dead.waited_for(8)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(dead.waiting) == 8
            # those that gave up leave their threads behind, and these count
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look_up)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(dead.waiting) == 8
            nursery.cancel_scope.cancel()
        dead.over.set()

    trio.run(main)
