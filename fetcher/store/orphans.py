"""What lies below the root without a record, as after a kill or a lost ``state.db``.

A partial content is adopted: its map says what is there. A complete one is not believed, as nothing
says that it was verified. A tree that is pinned is adopted, as it was complete when it got its name
and pods may read it; any other one is released.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fetcher.store.disk import disk_error
from fetcher.store.footprint import (
    BLOBS,
    MAP_SUFFIX,
    MODELS,
    TRASH,
    content_name,
    listing,
    measured_tree,
    taken,
    taken_with_links,
    tree_name,
    tree_of,
)
from fetcher.threads import run_stoppable

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from fetcher.store.catalog import Catalog
    from fetcher.store.garbage import Garbage
    from fetcher.store.rooms import Rooms
    from fetcher.store.space import Space

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Orphan:
    """Something without a record."""

    name: str
    suffixes: frozenset[str]
    """Which of its forms have none."""
    adopted: bool
    """Whether it is to get a record; else it is to go."""


@dataclass(frozen=True, slots=True)
class _Measured:
    bytes: int
    """On the disk."""
    size: int = 0
    files: int = 0
    """Both of a tree that is adopted."""


class Orphans:
    """Finds them and puts them in order. Belongs to the trio thread."""

    def __init__(self, catalog: Catalog, space: Space, garbage: Garbage, rooms: Rooms) -> None:
        self._catalog = catalog
        self._space = space
        self._garbage = garbage
        self._rooms = rooms

    async def bytes(self) -> int:
        """Bytes of what has no record now. Raises :class:`ModelError`."""
        return sum(measured.bytes for measured in (await self._find()).values())

    async def reconcile(self) -> None:
        """Settle the promises that a kill left, empty the trash, adopt or release all orphans, and
        tidy the records.

        Whatever a pull takes up meanwhile is left to it. Raises :class:`ModelError`.
        """
        await self._garbage.empty_trash()
        await self._rooms.settle()
        found = await self._find()
        # no checkpoint from the last look in there to here: nobody works on any of them
        trash = [orphan.name for orphan in found if orphan.name.startswith(f"{TRASH}/")]
        for orphan, measured in found.items():
            if orphan.name not in trash:
                self._settle(orphan, measured)
        if trash:
            failures = await run_stoppable(lambda stop: self._garbage.remove_trash(trash, stop))
            sizes = {one.name: measured.bytes for one, measured in found.items()}
            self._space.holdings.settle({name: sizes[name] for name in failures})
            self._garbage.removed_trash(trash, failures)
        await self._garbage.empty_trash()
        missing = await self._missing()
        await self._rooms.settle([*missing, *(one.name for one in found if one.name not in trash)])
        self._garbage.forget_missing(missing)
        await self._garbage.tidy_records()

    def _settle(self, orphan: Orphan, measured: _Measured) -> None:
        word = "adopted" if orphan.adopted else "released"
        logger.warning("%s %s, %d bytes without a record", word, orphan.name, measured.bytes)
        if not orphan.adopted:
            self._garbage.throw_away(orphan.name, measured.bytes, orphan.suffixes)
            return
        if (tree := tree_of(orphan.name)) is not None:
            contents = [content_name(layer) for layer in self._catalog.layers(tree[0])]
            self._space.holdings.use(orphan.name, contents)
            self._catalog.add_model(*tree, measured.size, measured.files)
        self._space.holdings.settle({orphan.name: measured.bytes})

    async def _missing(self) -> set[str]:
        """Names in the records of which nothing is there, as somebody removed it by hand."""
        listed = await run_stoppable(lambda _: _listed(self._space.root))
        holdings = self._space.holdings
        names = {holding.name for kind in (BLOBS, MODELS) for holding in holdings.below(kind)}
        names.update(content_name(digest) for digest in self._catalog.blobs())
        names.update(tree_name(digest, key) for digest, key, _ in self._catalog.trees())
        return names - listed.keys()

    async def _find(self) -> dict[Orphan, _Measured]:
        root = self._space.root
        listed = await run_stoppable(lambda _: _listed(root))
        suspects = list(self._judge(listed))
        unknown = {
            orphan.name
            for orphan in suspects
            if (tree := tree_of(orphan.name)) is not None and not self._catalog.layers(tree[0])
        }
        measured = await run_stoppable(
            lambda stop: {one: _measure(root, one, one.name in unknown, stop) for one in suspects}
        )
        # what was recorded or removed in the meantime is none any more
        still = set(self._judge(listed))
        return {one: size for one, size in measured.items() if one in still and size.bytes}

    def _judge(self, listed: Mapping[str, set[str]]) -> Iterator[Orphan]:
        contents = {holding.name for holding in self._space.holdings.below(BLOBS)}
        contents.update(content_name(digest) for digest in self._catalog.blobs())
        trees = {tree_name(digest, key) for digest, key, _ in self._catalog.trees()}
        pinned = {tree_name(*tree) for tree in self._garbage.pinned()}
        passed = self._space.holding() | self._garbage.trash() | contents
        for name in sorted(listed.keys() - passed):
            found = frozenset(listed[name])
            if name.startswith(f"{BLOBS}/"):
                yield Orphan(name, found, MAP_SUFFIX in found)
            elif name not in trees:
                yield Orphan(name, found, "" in found and name in pinned)
            elif found > {""}:
                # the scratch of a build that was killed, beside the tree that was built later
                yield Orphan(name, found - {""}, adopted=False)


def _listed(root: Path) -> dict[str, set[str]]:
    try:
        return listing(root, BLOBS) | listing(root, MODELS) | listing(root, TRASH)
    except OSError as error:
        raise disk_error(error, root) from error


def _measure(root: Path, orphan: Orphan, unknown: bool, stop: threading.Event) -> _Measured:
    """``unknown`` is a tree of a model whose contents are not known: all in it is its own."""
    path = root / orphan.name
    try:
        if unknown and orphan.adopted:
            size = taken_with_links(path, stop)
        else:
            size = taken(root, orphan.name, stop, orphan.suffixes)
        if orphan.adopted and orphan.name.startswith(f"{MODELS}/"):
            return _Measured(size, *measured_tree(path, stop))
    except OSError as error:
        raise disk_error(error, path) from error
    return _Measured(size)
