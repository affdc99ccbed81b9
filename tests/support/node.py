"""A node's driver for tests: volumes on a folder, with downloads made by hand."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from csi.attributes import VolumeAttributes
from csi.mount_table import mount_at
from csi.state import VolumeRecord, VolumeRecords, VolumeState
from csi.volumes import PublishRequest, Volumes
from fetcher.credentials import Anonymous
from fetcher.oci import Reference
from fetcher.store.database import Database
from tests.support.mounts import detach_below, mounts_below
from tests.support.pulls import HandMadePulls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODEL = "r.example.org/acme/m"


class Node:
    """One node's driver on a folder, as it is after a start; start it again for a restart."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pods = folder / "pods"
        self.models = folder / "models"
        for made in (self.pods, self.models):
            made.mkdir(exist_ok=True)
        self.pulls = HandMadePulls(self.models)
        self.pulls.tags[f"{MODEL}:v1"] = b"one"
        self.start()

    def start(self) -> None:
        self.database = Database(self.folder / "state.db")
        self.records = VolumeRecords(self.database)
        self.volumes = Volumes(self.records, self.pulls, self.folder, self.pods)

    def restart(self) -> None:
        """As after a kill: the database is opened again, nothing is undone."""
        self.database.close()
        self.start()

    def lose_state(self) -> None:
        self.database.close()
        for file in self.folder.glob("state.db*"):
            file.unlink()
        self.start()

    def target(self, pod: str = "one") -> Path:
        (self.pods / pod).mkdir(exist_ok=True)
        return self.pods / pod / "mount"

    def request(self, pod: str = "one", **changes: object) -> PublishRequest:
        attributes = VolumeAttributes(Reference("r.example.org", "acme/m", "v1"))
        return PublishRequest(
            volume_id=f"csi-{pod}",
            target=self.target(pod),
            attributes=replace(attributes, **changes),  # type: ignore[arg-type]
            keychain=Anonymous(),
            pod=f"default/{pod}",
        )

    async def publish(self, pod: str = "one", wait: float | None = 10, **changes: object) -> Path:
        request = self.request(pod, **changes)
        await self.volumes.publish(request, wait)
        return request.target

    async def unpublish(self, pod: str = "one") -> None:
        await self.volumes.unpublish(f"csi-{pod}", self.target(pod))

    def record(self, pod: str = "one") -> VolumeRecord | None:
        return self.records.get(f"csi-{pod}", self.target(pod))

    def assert_nothing_left(self, pod: str = "one") -> None:
        assert self.volumes.list() == []
        assert mounts_below(self.pods) == []
        assert not self.target(pod).exists()


@contextmanager
def running_node(folder: Path) -> Iterator[Node]:
    """A node on ``folder``; nothing is mounted there afterwards, whatever happened."""
    node = Node(folder.resolve())
    try:
        yield node
    finally:
        node.database.close()
        detach_below(node.folder)


def assert_consistent(node: Node) -> None:
    """A mount is recorded as published, or nothing is mounted and nobody thinks otherwise."""
    record, mount = node.record(), mount_at(node.target())
    if mount is not None:
        assert mount.locked
        assert record is not None
    if record is None:
        assert mount is None
    elif record.state is VolumeState.PUBLISHED:
        assert mount is not None
        assert record.origin == mount.origin
    elif record.state is VolumeState.PUBLISHING:
        assert mount is None


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """What is in ``folder``, and mounted there, is the same after the block."""

    def everything() -> list[tuple[str, int, int]]:
        return [
            (path, os.lstat(path).st_ino, os.lstat(path).st_mode)
            for base, folders, files in os.walk(folder)
            for path in (os.path.join(base, name) for name in sorted(folders + files))
        ]

    before, mounts = everything(), mounts_below(folder)
    yield
    assert everything() == before
    assert mounts_below(folder) == mounts
