"""What to evict: a decision over rows, without I/O.

Least recent use decides. A tree goes with the contents that no other tree needs then; a content
that no tree needs, such as the begin of a download that nobody goes on with, goes by the time when
it was last worked on.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Set

EVERYTHING: Final = math.inf
"""More bytes than there can be."""


@dataclass(frozen=True, slots=True)
class HeldTree:
    """A tree, by its records."""

    name: str
    bytes: int
    """Its own: what it links to belongs to the contents."""
    used: float
    contents: frozenset[str]
    """What it is made of, or may be; names that the store does not hold do no harm."""


@dataclass(frozen=True, slots=True)
class HeldContent:
    """A content, whole or in part."""

    name: str
    bytes: int
    worked: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes, in this order."""

    victims: tuple[HeldTree | HeldContent, ...] = ()

    @property
    def bytes(self) -> int:
        """What that gives back."""
        return sum(victim.bytes for victim in self.victims)


def plan(
    trees: Iterable[HeldTree], contents: Iterable[HeldContent], kept: Set[str], wanted: float
) -> Plan:
    """What to evict so that ``wanted`` bytes come back, or all that may go if that is less.

    ``kept`` are names of trees and contents that stay whatever happens, the contents of kept trees
    among them. Trees that would give nothing back but their folders, as others keep their contents,
    go last.
    """
    if wanted <= 0:
        return Plan()
    return _Planning(list(trees), list(contents), kept).run(wanted)


class _Planning:
    def __init__(self, trees: list[HeldTree], contents: list[HeldContent], kept: Set[str]) -> None:
        self._kept = kept
        self._trees = [tree for tree in trees if tree.name not in kept]
        self._contents = {content.name: content for content in contents}
        self._needed = Counter(name for tree in trees for name in tree.contents)
        staying = [tree.contents for tree in trees if tree.name in kept]
        self._staying = frozenset(kept).union(*staying)
        self._evicted: list[HeldTree | HeldContent] = []
        self._freed = 0

    def run(self, wanted: float) -> Plan:
        for _, _, one in sorted(self._candidates(), key=lambda candidate: candidate[:2]):
            if self._freed >= wanted:
                break
            if isinstance(one, HeldTree):
                self._evict_tree(one)
            else:
                self._evict(one)
        return Plan(tuple(self._evicted))

    def _candidates(self) -> Iterable[tuple[bool, float, HeldTree | HeldContent]]:
        for tree in self._trees:
            held = tree.contents & self._contents.keys()
            yield bool(held) and held <= self._staying, tree.used, tree
        for content in self._contents.values():
            if not self._needed[content.name] and content.name not in self._kept:
                yield False, content.worked, content

    def _evict_tree(self, tree: HeldTree) -> None:
        self._evict(tree)
        for name in sorted(tree.contents):
            self._needed[name] -= 1
            content = self._contents.get(name)
            if content is not None and not self._needed[name] and name not in self._kept:
                self._evict(content)

    def _evict(self, one: HeldTree | HeldContent) -> None:
        self._evicted.append(one)
        self._freed += one.bytes
