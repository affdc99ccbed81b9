"""Reading the store again: what is not what it was is dropped, fetched anew and put right.

Damaged contents leave the store, and the trees that show them are given to no volume any more: the
next pull of such a model makes it whole again. That is done here at once for what is mounted, with
the node's own credentials, under the pods that read it. Every step can be the last one of a process
that is killed: the records say what is damaged until it has been put right.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fetcher.errors import InvalidArtifact, ModelError, NotFound
from fetcher.modelpack import Selection, read_model
from fetcher.oci import Reference
from fetcher.policy import PullPolicy
from fetcher.pull import Progress
from fetcher.store.collection import HeldContent, HeldTree, Plan
from fetcher.store.footprint import BLOBS, content_name, content_of, taken, tree_name, tree_of
from fetcher.store.integrity import Wanted, heal_tree, tree_problem
from fetcher.threads import run_stoppable

if TYPE_CHECKING:
    import threading
    from collections.abc import Collection, Iterable

    from fetcher.credentials import Keychain
    from fetcher.modelpack import Layer, Model
    from fetcher.oci import Digest
    from fetcher.pull import Pulls
    from fetcher.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is damaged."""

    name: str
    """The content's or the tree's, relative to the root."""
    problem: str
    outcome: str
    """What was done about it, in words."""
    repaired: bool
    """Whether nothing wrong is left of it."""


class Verifier:
    """Verifies the store. Belongs to the trio thread."""

    def __init__(self, store: Store, pulls: Pulls, keychain: Keychain) -> None:
        """``keychain`` is the node's own: what is mounted is fetched again with it."""
        self._store = store
        self._pulls = pulls
        self._keychain = keychain
        self._done = 0
        self._total = 0

    def progress(self) -> Progress:
        """Bytes that were read again, and bytes in all."""
        return Progress(self._done, self._total)

    async def verify(self, models: Collection[Digest] | None, *, repair: bool) -> list[Finding]:
        """Read all complete contents and trees again, or those of some models.

        Without ``repair`` it only tells. Raises :class:`ModelError` where it cannot go on.
        """
        contents = await self._check_contents(models)
        trees = await self._check_trees(models, contents)
        if not repair:
            found = {**contents, **trees}
            return [Finding(name, found[name], "left as it is", False) for name in found]
        return await self._repair(contents, trees)

    # -- looking -----------------------------------------------------------------------------------

    async def _check_contents(self, models: Collection[Digest] | None) -> dict[str, str]:
        """What is wrong with complete contents, by name. A download under way verifies itself."""
        store = self._store
        held = store.space.holdings.below(BLOBS)
        sizes = {holding.name: holding.bytes for holding in held if holding.settled}
        if models is not None:
            wanted = self._made_of(models)
            sizes = {name: size for name, size in sizes.items() if name in wanted}
        self._total = sum(sizes.values())
        found: dict[str, str] = {}
        for name, size in sizes.items():
            digest = content_of(name)
            if digest is not None and store.is_complete(digest):
                with store.held_content(digest):
                    problem = await run_stoppable(store.content_check(digest))
                if problem is not None:
                    found[name] = problem
            self._done += size
        return found

    def _made_of(self, models: Collection[Digest]) -> set[str]:
        """The contents of some models: by their manifests, and by the trees that are here."""
        layers = (layer for model in models for layer in self._store.catalog.layers(model))
        found = {content_name(layer) for layer in layers}
        for name, used in self._store.space.holdings.uses().items():
            tree = tree_of(name)
            if tree is not None and tree[0] in models:
                found |= used
        return found

    async def _check_trees(
        self, models: Collection[Digest] | None, contents: Collection[str]
    ) -> dict[str, str]:
        """What is wrong with trees, by name: a damaged content, or something of their own."""
        uses = self._store.space.holdings.uses()
        found: dict[str, str] = {}
        for digest, selection, _ in self._store.catalog.trees():
            if models is not None and digest not in models:
                continue
            name = tree_name(digest, selection)
            problem = None
            if uses.get(name, set()).intersection(contents):
                problem = "it shows a damaged content"
            elif (model := self._model(digest)) is not None:
                problem = await self._tree_problem(name, model)
            if problem is None and self._store.damages.has(name):
                problem = "it was damaged, and has not been put right"
            if problem is not None:
                found[name] = problem
        return found

    async def _tree_problem(self, name: str, model: Model) -> str | None:
        folder = self._store.root / name

        def look(stop: threading.Event) -> str | None:
            return tree_problem(self._wanted(name, model), folder, stop)

        with self._store.space.held([name]):
            return await run_stoppable(look)

    def _wanted(self, name: str, model: Model) -> Wanted:
        """What a tree has to be, for a worker thread."""
        here = tuple(layer for layer in model.layers if self._store.has_files(layer))
        wanted = Wanted.of(self._store.plan(replace(model, layers=here), Selection()))
        tree = tree_of(name)
        is_whole = tree is not None and not tree[1]
        return wanted if is_whole else wanted.found_in(self._store.root / name)

    def _model(self, digest: Digest) -> Model | None:
        """A model by its recorded manifest; None where that is not here."""
        manifest = self._store.catalog.manifest_of(digest)
        try:
            return None if manifest is None else read_model(manifest)
        except InvalidArtifact:
            return None

    # -- repairing ---------------------------------------------------------------------------------

    async def _repair(self, contents: dict[str, str], trees: dict[str, str]) -> list[Finding]:
        store = self._store
        # no checkpoint from here to the eviction: also trees that were built meanwhile, or belong
        # to models that were not asked for, show what is damaged
        trees = {**self._showing(contents), **trees}
        busy = store.space.holding()
        store.damages.add(trees)
        pinned = {tree_name(*tree) for tree in store.garbage.pinned()}
        gone = [name for name in trees if name not in pinned and name not in busy]
        victims: tuple[HeldTree | HeldContent, ...] = (
            # held or not: no download writes to what is complete, and who is about to link to it
            # must not; that pull fails, and is asked for again
            *(HeldContent(name, 0, 0.0) for name in contents),
            *(HeldTree(name, 0, 0.0, frozenset()) for name in gone),
        )
        store.garbage.evict(Plan(victims))
        await store.garbage.empty_trash()
        await self._measure(name for name in trees if name in pinned)
        dropped = "dropped; the next pull fetches it anew"
        findings = [Finding(name, problem, dropped, True) for name, problem in contents.items()]
        for name, problem in trees.items():
            if name in gone:
                findings.append(Finding(name, problem, dropped, True))
            else:
                findings.append(await self._restore(name, problem))
        return findings

    def _showing(self, contents: Collection[str]) -> dict[str, str]:
        """All trees that show damaged contents."""
        recorded = {tree_name(digest, key) for digest, key, _ in self._store.catalog.trees()}
        return {
            tree: "it shows a damaged content"
            for tree, used in self._store.space.holdings.uses().items()
            if tree in recorded and used.intersection(contents)
        }

    async def _measure(self, names: Iterable[str]) -> None:
        """Record what mounted trees take now: files that only they link to are theirs."""
        wanted = list(names)
        root = self._store.root
        measured = await run_stoppable(
            lambda stop: {name: taken(root, name, stop) for name in wanted}
        )
        self._store.space.holdings.settle(measured)

    async def _restore(self, name: str, problem: str) -> Finding:
        """Put a mounted tree right, with contents that are fetched anew."""
        try:
            await self._fetch_and_heal(name)
        except ModelError as error:
            logger.warning("%s is damaged and mounted: %s", name, error.message)
            outcome = f"mounted, and not put right: {error.message}"
            return Finding(name, problem, outcome, False)
        return Finding(name, problem, "put right, under the volumes that show it", True)

    async def _fetch_and_heal(self, name: str) -> None:
        tree = tree_of(name)
        model = self._model(tree[0]) if tree is not None else None
        if tree is None or model is None:
            raise NotFound("its manifest is not here: delete the pods that use it")
        uses = self._store.space.holdings.uses().get(name, set())
        layers = [one for one in model.layers if content_name(one.descriptor.digest) in uses]
        missing = [layer for layer in layers if not self._store.has_content(layer)]
        with self._store.space.held([name]):
            if missing:
                await self._fetch(tree[0], missing)
            folder = self._store.root / name
            await run_stoppable(lambda stop: heal_tree(self._wanted(name, model), folder, stop))
            self._store.damages.remove([name])
        await self._measure([name])

    async def _fetch(self, digest: Digest, layers: list[Layer]) -> None:
        """Fetch blobs of a model again, from any repository that it was pulled from."""
        known = [model for model in self._store.catalog.models() if model.digest == digest]
        references = {text for model in known for text in model.references}
        failure: ModelError = NotFound("no reference is known that it could be fetched by")
        for text in sorted(references):
            reference = Reference.parse(text).with_digest(digest)
            try:
                resolved = await self._pulls.resolve(reference, self._keychain, PullPolicy.ALWAYS)
                await self._pulls.fetch(resolved, layers)
            except ModelError as error:
                failure = error
            else:
                return
        raise failure
