"""Evicting: what may go, and how it goes so that nobody ever finds the half of it.

Rows are removed in one transaction, then the paths are renamed into the trash, without a checkpoint
between: a pull that starts right afterwards finds nothing of it. The bytes stay in the records,
under the trash's name, until a thread has removed the files. A kill at any moment leaves either a
name in the trash, or files without a record, which are orphans (:mod:`fetcher.store.orphans`).
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from typing import TYPE_CHECKING, Final

import trio

from fetcher.errors import Conflict, InProgress, NoSpace, NotFound
from fetcher.store.catalog import forget_model
from fetcher.store.collection import EVERYTHING, HeldContent, HeldTree, Plan, plan
from fetcher.store.disk import disk_error
from fetcher.store.footprint import (
    BLOBS,
    MODELS,
    TRASH,
    content_name,
    content_of,
    move,
    remove,
    rename,
    suffixes,
    tree_name,
    tree_of,
)
from fetcher.store.holdings import discard
from fetcher.store.trash import Trash
from fetcher.threads import run_stoppable

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Collection, Iterable, Mapping

    from fetcher.errors import ModelError
    from fetcher.oci import Digest
    from fetcher.store.catalog import Catalog
    from fetcher.store.database import Database
    from fetcher.store.space import Space

    Pins = Callable[[], set[tuple[Digest, str]]]
    """Model and selection of every tree that somebody outside of the store needs."""

logger = logging.getLogger(__name__)

_GRACE: Final = 120.0
"""Seconds for which a model that was resolved is known, whatever becomes of it."""

_SHOWN: Final = 10
"""Trees that a log line names."""


class Garbage:
    """Evicts contents and trees. Belongs to the trio thread."""

    def __init__(self, database: Database, catalog: Catalog, space: Space) -> None:
        self._database = database
        self._catalog = catalog
        self._space = space
        self._holdings = space.holdings
        self._root = space.root
        self._trash = Trash(space.root)
        self._pins: list[Pins] = []
        self._asked = trio.Event()

    def pin(self, source: Pins) -> None:
        """Ask ``source``, whenever something is to be evicted, what has to stay.

        When it raises, nothing is evicted.
        """
        self._pins.append(source)

    # -- when --------------------------------------------------------------------------------------

    def ask(self) -> None:
        """Say that something has ended: a pull, a volume. It is time to look."""
        self._asked.set()

    async def asked(self) -> None:
        """Return when :meth:`ask` was called since this last returned."""
        await self._asked.wait()
        self._asked = trio.Event()

    # -- what --------------------------------------------------------------------------------------

    def pinned(self) -> set[tuple[Digest, str]]:
        """Model and selection of the trees that are pinned. Raises what a source raises."""
        return {tree for source in self._pins for tree in source()}

    def plan(self, wanted: float) -> Plan:
        """What to evict for ``wanted`` bytes, or all that may go if that is less."""
        if wanted <= 0:
            return Plan()
        trees = self._trees()
        return plan(trees, self._contents(), self._kept(trees), wanted)

    def by_watermarks(self) -> Plan:
        """What to evict as the watermarks and the floor of free space want it."""
        return self.plan(self._space.excess())

    def _trees(self) -> list[HeldTree]:
        sizes = {holding.name: holding.bytes for holding in self._holdings.below(MODELS)}
        uses = self._holdings.uses()
        return [
            HeldTree(name, sizes.get(name, 0), used, frozenset(uses.get(name, ())))
            for digest, selection, used in self._catalog.trees()
            for name in (tree_name(digest, selection),)
        ]

    def _contents(self) -> list[HeldContent]:
        return [
            HeldContent(holding.name, holding.bytes, holding.worked)
            for holding in self._holdings.below(BLOBS)
        ]

    def _kept(self, trees: Iterable[HeldTree]) -> set[str]:
        """Names that stay: what is worked on, what is pinned, and what a pinned tree will need."""
        built = {tree.name for tree in trees}
        kept = set(self._space.holding())
        for digest, selection in self.pinned():
            name = tree_name(digest, selection)
            kept.add(name)
            if name not in built:
                kept.update(content_name(layer) for layer in self._catalog.layers(digest))
        return kept

    # -- how ---------------------------------------------------------------------------------------

    def evict(self, planned: Plan) -> None:
        """Take all of a plan out of the records and into the trash. Raises :class:`ModelError`."""
        if not planned.victims:
            return
        tokens = {victim.name: _token() for victim in planned.victims}
        try:
            self._forget(tokens)
        except NoSpace:
            # the records cannot be written for lack of the very space that this gives back
            gone = self._remove_first(planned, tokens)
            self._forget(gone)
            if len(gone) < len(tokens):
                raise
        for name, token in tokens.items():
            self._move(name, token, suffixes(name))
        trees = [name for name in tokens if name.startswith(f"{MODELS}/")]
        shown = ", ".join(trees[:_SHOWN]) + (", …" if len(trees) > _SHOWN else "")
        logger.info(
            "evicted %d bytes: %d trees, %d contents%s",
            planned.bytes,
            len(trees),
            len(tokens) - len(trees),
            f" ({shown})" if shown else "",
        )

    def _remove_first(self, planned: Plan, tokens: dict[str, str]) -> dict[str, str]:
        """Remove what goes before its rows do; gives that.

        Whole, by a rename, so that a kill never leaves the half of it under its name; one by one,
        so that the trash needs no block for its names. What cannot be renamed stays, and with a
        tree the contents that it is made of.
        """
        gone: dict[str, str] = {}
        staying: set[str] = set()
        for victim in planned.victims:
            name, token = victim.name, tokens[victim.name]
            if name in staying:
                continue
            try:
                rename(self._root, name, token, suffixes(name))
            except OSError:
                staying.update(victim.contents if isinstance(victim, HeldTree) else ())
                continue
            gone[name] = token
            with contextlib.suppress(OSError):
                # it is in the trash: if it cannot be removed now, then later
                for suffix in suffixes(name):
                    remove(self._root / f"{token}{suffix}")
        return gone

    def forget_missing(self, names: Iterable[str]) -> None:
        """Forget contents and trees that somebody removed by hand, or a kill from under them.

        Not those that have come back since somebody looked.
        """
        names = frozenset(names) - self._space.holding()
        names -= self._holdings.get(names).keys()
        if names:
            self._forget({name: _token() for name in names})

    def _forget(self, tokens: dict[str, str]) -> None:
        staying = {digest for digest, _ in self.pinned()}
        staying.update(tree[0] for name in self._space.holding() if (tree := tree_of(name)))
        with self._database.transaction() as connection:
            for name, token in tokens.items():
                discard(connection, name, token)
                if (content := content_of(name)) is not None:
                    self._catalog.forget_blob(connection, content)
                elif (tree := tree_of(name)) is not None:
                    self._catalog.forget_tree(connection, *tree, keep=tree[0] in staying)

    def throw_away(self, name: str, size: int, found: Iterable[str]) -> None:
        """Move what has a name and no record, and takes ``size`` bytes, into the trash.

        ``found`` are the suffixes to move. Raises :class:`ModelError`.
        """
        token = _token()
        self._holdings.settle({token: size})
        self._move(name, token, found)

    def _move(self, name: str, token: str, found: Iterable[str]) -> None:
        try:
            move(self._root, name, token, found)
        except OSError as error:
            raise disk_error(error, self._root / name) from error

    # -- the records -------------------------------------------------------------------------------

    async def tidy_records(self) -> None:
        """Forget manifests that led to no tree, with what led to them, and give back the disk that
        the records do not need any more.

        A pull that failed leaves such a manifest, and so does whoever only resolves. What is
        pinned, worked on, or begun stays, and what was resolved a moment ago. Raises
        :class:`ModelError`.
        """
        # one at a time: each may have megabytes
        while (stray := self._stray()) is not None:
            with self._database.transaction() as connection:
                forget_model(connection, stray)
            await trio.lowlevel.checkpoint()
        while self._database.shrink():
            await trio.lowlevel.checkpoint()

    def _stray(self) -> Digest | None:
        strays = self._catalog.strays(time.time() - _GRACE)
        if not strays:
            return None
        wanted = {digest for digest, _ in self.pinned()}
        wanted.update(tree[0] for name in self._space.holding() if (tree := tree_of(name)))
        used = set().union(*self._holdings.uses().values())
        for digest in strays:
            layers = {content_name(layer) for layer in self._catalog.layers(digest)}
            if digest not in wanted and not self._holdings.get(layers - used):
                return digest
        return None

    # -- the trash ---------------------------------------------------------------------------------

    def trash(self) -> frozenset[str]:
        """Names in the trash, by the records."""
        return frozenset(holding.name for holding in self._holdings.below(TRASH))

    async def empty_trash(self) -> None:
        """Remove what was evicted, in a thread. What cannot be removed takes room until it can.

        Raises :class:`ModelError`.
        """
        names = self.trash()
        if names:
            failures = await run_stoppable(lambda stop: self.remove_trash(names, stop))
            self.removed_trash(names, failures)

    def remove_trash(self, names: Collection[str], stop: threading.Event) -> dict[str, ModelError]:
        """Remove the files of these names of the trash; gives those that stay, and why.

        For a worker thread; then comes :meth:`removed_trash`. Raises :class:`ModelError`.
        """
        return self._trash.empty(names.__contains__, stop)

    def removed_trash(self, names: Collection[str], failures: Mapping[str, ModelError]) -> None:
        """Forget names of the trash whose files are gone, and count those that stay as taken."""
        for name in failures.keys() - self._space.stuck:
            logger.warning("what was evicted cannot be removed: %s", failures[name].message)
        gone = [name for name in names if name not in failures]
        self._space.stuck.update(failures)
        self._space.stuck.difference_update(gone)
        self._holdings.forget(gone)

    # -- one model ---------------------------------------------------------------------------------

    def plan_removal(self, digest: Digest) -> Plan:
        """All trees of a model and what only they need.

        Raises :class:`Conflict` while one of them is pinned, :class:`InProgress` while it is worked
        on, and :class:`NotFound` when nothing of it is here.
        """
        selections = {selection for model, selection in self.pinned() if model == digest}
        if selections:
            raise Conflict(f"model {digest} is mounted: unmount it first", digest=digest)
        trees, contents = self._trees(), self._contents()
        own = [tree for tree in trees if _is_of(tree.name, digest)]
        if any(_is_of(name, digest) for name in self._space.holding()):
            raise InProgress(f"model {digest} is being pulled: try again later", digest=digest)
        parts = {content_name(layer) for layer in self._catalog.layers(digest)}
        parts.update(*(tree.contents for tree in own))
        others = {tree.name for tree in trees} - {tree.name for tree in own}
        wanted = [content for content in contents if content.name in parts]
        if not own and not wanted:
            raise NotFound(f"nothing of model {digest} is in the store", digest=digest)
        return plan(trees, wanted, self._kept(trees) | others, EVERYTHING)


def _is_of(name: str, digest: Digest) -> bool:
    tree = tree_of(name)
    return tree is not None and tree[0] == digest


def _token() -> str:
    return f"{TRASH}/{uuid.uuid4().hex}"
