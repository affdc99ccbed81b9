"""A second, small implementation of the pulls that volumes need: real trees, made by hand.

What a test wants of a registry is said in plain attributes: what its tags name, who may read, how
long a download takes and how it ends.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from fetcher.errors import AccessDenied, NotFound
from fetcher.modelpack import Model
from fetcher.oci import Descriptor, Digest
from fetcher.policy import ReferencePolicy
from fetcher.pull import Progress, Resolved
from fetcher.store import ModelTree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fetcher.credentials import Keychain
    from fetcher.modelpack import Selection
    from fetcher.oci import Reference
    from fetcher.policy import PullPolicy


class HandMadePulls:
    """Models of one file, ``model.txt``, whose content a tag names."""

    def __init__(self, models_folder: Path) -> None:
        self.models_folder = models_folder
        self.tags: dict[str, bytes] = {}
        self.models: dict[bytes, Model] = {}
        """What the contents are that are manifests."""
        self.gone: set[Digest] = set()
        """Digests that the registry does not have any more."""
        self.refused = False
        self.failure: Exception | None = None
        """What every pull ends with instead of a tree."""
        self.arrived = trio.Event()
        """Set: downloads are complete at once. :meth:`hold` makes them wait."""
        self.arrived.set()
        self.progress = Progress(42, 100)
        self.policy = ReferencePolicy()
        self.asked: list[Reference] = []
        self.joined = 0
        self.waiting = 0
        self.holders: set[str] = set()
        self.damaged: set[tuple[str, str]] = set()

    def hold(self) -> None:
        """Let downloads hang until ``arrived`` is set again."""
        self.arrived = trio.Event()

    async def waited_for(self, count: int) -> None:
        """Return when so many calls wait for downloads."""
        with trio.fail_after(10):
            while self.waiting < count:  # noqa: ASYNC110 (volumes have no event for it)
                await trio.sleep(0.001)

    def check(self, reference: Reference) -> None:
        self.policy.check(reference)

    async def resolve(
        self, reference: Reference, keychain: Keychain, policy: PullPolicy
    ) -> Resolved:
        self.check(reference)
        self.asked.append(reference)
        await keychain.lookup(reference.registry, reference.repository)
        await trio.lowlevel.checkpoint()
        if self.refused:
            raise AccessDenied(f"{reference}: the registry refuses these credentials")
        content = self._content(reference)
        digest = Digest.of(content)
        empty = Descriptor("application/vnd.oci.empty.v1+json", Digest.of(b"{}"), 2)
        model = self.models.get(content) or Model(
            digest=digest, artifact_type="test", config=empty, layers=(), annotations={}
        )
        return Resolved(reference.with_digest(digest), model, keychain)

    def _content(self, reference: Reference) -> bytes:
        named = reference.tag and self.tags.get(f"{reference.name}:{reference.tag}")
        for content in self.tags.values() if reference.digest else [named]:
            if not content or Digest.of(content) in self.gone:
                continue
            if reference.digest in (None, Digest.of(content)):
                return content
        raise NotFound(f"{reference}: the registry does not have it")

    @contextmanager
    def join(
        self, resolved: Resolved, selection: Selection, holder: str | None = None
    ) -> Iterator[HandMadePull]:
        self.joined += 1
        self.waiting += 1
        try:
            yield HandMadePull(self, resolved, selection)
        finally:
            self.waiting -= 1
            if holder is not None:
                self.holders.add(holder)

    def release(self, holder: str) -> None:
        self.holders.discard(holder)

    def left(self, model: str, selection: str) -> None:
        """Nothing: these trees are never evicted."""

    def is_damaged(self, model: str, selection: str) -> bool:
        return (model, selection) in self.damaged


class HandMadePull:
    """One wait for one tree."""

    def __init__(self, pulls: HandMadePulls, resolved: Resolved, selection: Selection) -> None:
        self._pulls = pulls
        self._resolved = resolved
        self._selection = selection

    def progress(self) -> Progress:
        return self._pulls.progress

    async def wait(self) -> ModelTree:
        await self._pulls.arrived.wait()
        if self._pulls.failure is not None:
            raise self._pulls.failure
        digest = self._resolved.model.digest
        key = self._selection.key
        folder = self._pulls.models_folder / digest.algorithm
        tree = folder / (f"{digest.hex}.{key}" if key else digest.hex)
        if not tree.exists():
            tree.mkdir(parents=True)
            content = next(text for text in self._all() if Digest.of(text) == digest)
            (tree / "model.txt").write_bytes(content)
        size = (tree / "model.txt").stat().st_size
        return ModelTree(tree, digest, size=size, files=1)

    def _all(self) -> list[bytes]:
        return list(self._pulls.tags.values())
