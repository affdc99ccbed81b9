"""Volumes whose download takes long, and calls that come together. Needs root."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.errors import (
    AccessDenied,
    Conflict,
    DigestMismatch,
    InProgress,
    NotFound,
)
from fetcher.oci import Digest
from tests.support.mounts import (
    mounts_below,
)
from tests.support.node import MODEL, Node, running_node

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_node(tmp_path) as running:
        yield running


# -- long downloads --------------------------------------------------------------------------------


def test_a_download_that_takes_longer_than_the_call(node: Node) -> None:
    async def main() -> None:
        node.pulls.hold()
        for _ in range(2):
            with pytest.raises(InProgress, match=rf"{MODEL}:v1: 42 % \(42 B of 100 B\)"):
                await node.publish(wait=0)
        assert not node.target().exists()
        assert node.pulls.waiting == 0
        node.pulls.arrived.set()
        target = await node.publish()
        assert (target / "model.txt").read_bytes() == b"one"

    trio.run(main)


def test_a_tag_that_moves_meanwhile_does_not_change_the_volume(node: Node) -> None:
    async def main() -> None:
        node.pulls.hold()
        with pytest.raises(InProgress):
            await node.publish(wait=0)
        node.restart()
        await node.volumes.reconcile()
        node.pulls.tags |= {f"{MODEL}:v1": b"two", f"{MODEL}:old": b"one"}
        node.pulls.arrived.set()
        target = await node.publish()
        assert (target / "model.txt").read_bytes() == b"one"
        # each call proves that this pod may read it
        assert len(node.pulls.asked) == 2
        # a new volume takes what the tag names now
        other = await node.publish("two")
        assert (other / "model.txt").read_bytes() == b"two"

    trio.run(main)


def test_access_is_proven_again_by_the_call_that_shows_the_model(node: Node) -> None:
    async def main() -> None:
        node.pulls.hold()
        with pytest.raises(InProgress):
            await node.publish(wait=0)
        node.pulls.arrived.set()
        node.pulls.refused = True
        with pytest.raises(AccessDenied):
            await node.publish()
        assert mounts_below(node.pods) == []

    trio.run(main)


def test_a_pinned_digest_that_is_gone_is_let_go(node: Node) -> None:
    async def main() -> None:
        node.pulls.hold()
        with pytest.raises(InProgress):
            await node.publish(wait=0)
        node.pulls.tags[f"{MODEL}:v1"] = b"two"
        node.pulls.gone.add(Digest.of(b"one"))
        node.pulls.arrived.set()
        target = await node.publish()
        assert (target / "model.txt").read_bytes() == b"two"

    trio.run(main)


@pytest.mark.parametrize(
    "failure", [DigestMismatch("layer 1 is not its digest"), ValueError("bug")]
)
def test_a_failed_download_leaves_nothing(failure: Exception, node: Node) -> None:
    async def main() -> None:
        node.pulls.failure = failure
        with pytest.raises(type(failure)):
            await node.publish()
        node.assert_nothing_left()
        node.pulls.failure = None
        await node.publish()

    trio.run(main)


def test_a_model_that_is_not_there_leaves_nothing(node: Node) -> None:
    node.pulls.tags.clear()
    with pytest.raises(NotFound):
        trio.run(node.publish)
    node.assert_nothing_left()


def test_a_target_that_fills_up_during_the_download_stays(node: Node) -> None:
    async def main() -> None:
        node.pulls.hold()
        async with trio.open_nursery() as nursery:

            async def publish() -> None:
                with pytest.raises(Conflict, match="not empty"):
                    await node.publish()

            nursery.start_soon(publish)
            await node.pulls.waited_for(1)
            node.target().mkdir()
            (node.target() / "kept").write_text("x")
            node.pulls.arrived.set()
        assert (node.target() / "kept").exists()
        assert node.volumes.list() == []

    trio.run(main)


# -- calls at one time -----------------------------------------------------------------------------


def test_calls_for_one_volume_exclude_each_other_and_no_others(node: Node) -> None:
    async def main() -> None:
        node.pulls.hold()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.publish)
            await node.pulls.waited_for(1)
            with pytest.raises(InProgress, match="another call works on volume csi-one"):
                await node.publish()
            # other volumes, and the same volume for another pod, go their way
            shared = replace(node.request("two"), volume_id="csi-one")
            nursery.start_soon(node.volumes.publish, shared, 10)
            nursery.start_soon(node.publish, "three")
            await node.pulls.waited_for(3)
            await node.unpublish("three and a half")
            node.pulls.arrived.set()
        assert len(mounts_below(node.pods)) == 3

    trio.run(main)


def test_an_unpublish_does_not_wait_for_a_download(node: Node) -> None:
    async def main() -> None:
        node.pulls.hold()
        answers: list[str] = []

        async def publish() -> None:
            with pytest.raises(InProgress) as caught:
                await node.publish(wait=110)
            answers.append(caught.value.message)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish)
            await node.pulls.waited_for(1)
            with trio.fail_after(5):
                await node.unpublish()
        assert answers == ["volume csi-one is being unpublished"]
        assert node.pulls.waiting == 0
        node.assert_nothing_left()

    trio.run(main)


def test_many_calls_at_once_end_well(node: Node) -> None:
    async def main() -> None:
        async def again_and_again(pod: str) -> None:
            for _ in range(4):
                for call in (node.publish, node.unpublish, node.publish):
                    try:
                        await call(pod)
                    except InProgress:
                        await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(again_and_again, f"pod-{number % 3}")
        for number in range(3):
            await node.unpublish(f"pod-{number}")
        for number in range(3):
            node.assert_nothing_left(f"pod-{number}")

    trio.run(main)
