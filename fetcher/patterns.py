"""Patterns as in ``.gitignore`` files, matched in bounded time. No I/O.

Both sides of a match come from strangers: the pattern from a pod, the path from an artifact.
``pathspec`` turns a pattern into a backtracking regular expression that a single name of 255
characters keeps busy for ten seconds with four stars, the interpreter lock held; so patterns are
matched here, without backtracking, with ``pathspec``'s meaning (a test compares the two).
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fetcher.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_PATTERNS: Final = 256
MAX_PATTERN_CHARACTERS: Final = 1024

_ANY_DEPTH: Final = "**"


class _Reach(enum.IntEnum):
    """How a pattern matches a path; the greater one decides."""

    NOT = 0
    FOLDER = 1
    """It matches one of the path's folders, and so all that is in it."""
    ITSELF = 2


@dataclass(frozen=True, slots=True)
class _Pattern:
    excludes: bool
    segments: tuple[re.Pattern[str] | None, ...]
    """One per component; ``None`` stands for any number of components."""
    below: _Reach | None
    """How it matches what lies below ``segments``, if it does not match their own path."""

    def reach(self, components: list[str]) -> _Reach:
        """Run all ways to match at once: their number never exceeds that of the segments."""
        end = len(self.segments)
        states = self._skip({0})
        best = _Reach.NOT
        for number, component in enumerate(components):
            if end in states:
                best = max(best, self.below or _Reach.FOLDER)
            elif not states:
                break
            states = self._advance(states, component)
            if number == len(components) - 1 and end in states and self.below is None:
                return _Reach.ITSELF
        return best

    def _advance(self, states: set[int], component: str) -> set[int]:
        following = set()
        for state in states:
            if state == len(self.segments):
                continue
            segment = self.segments[state]
            if segment is None:
                following.add(state)
            elif segment.fullmatch(component):
                following.add(state + 1)
        return self._skip(following)

    def _skip(self, states: set[int]) -> set[int]:
        reached = set(states)
        for state in states:
            while state < len(self.segments) and self.segments[state] is None:
                state += 1
                reached.add(state)
        return reached


class Patterns:
    """An ordered list of patterns. The last one that matches the file itself decides; if there is
    none, the last one that matches one of its folders.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        """Read ``lines``. Raises :class:`InvalidRequest` quoting the line that is no pattern."""
        lines = tuple(lines)
        if len(lines) > MAX_PATTERNS:
            raise InvalidRequest(f"{len(lines)} patterns were given; at most {MAX_PATTERNS} may be")
        self._patterns = [pattern for pattern in map(_parse, lines) if pattern is not None]

    @property
    def keeps_any(self) -> bool:
        """Whether some pattern is negated, so that it may keep what something else excludes."""
        return any(not pattern.excludes for pattern in self._patterns)

    def excludes(self, path: str) -> bool | None:
        """Whether the file at ``path`` is excluded; ``None`` if no pattern matches it."""
        components = path.split("/")
        verdict, best = None, _Reach.NOT
        for pattern in reversed(self._patterns):
            reach = pattern.reach(components)
            if reach > best:
                verdict, best = pattern.excludes, reach
            if best is _Reach.ITSELF:
                break
        return verdict


def _parse(line: str) -> _Pattern | None:
    """Read a line as gitignore(5), "PATTERN FORMAT", has it; ``None``: a blank or a comment."""
    if len(line) > MAX_PATTERN_CHARACTERS:
        raise _bad(line, f"it has more than {MAX_PATTERN_CHARACTERS} characters")
    text = line if line.endswith("\\ ") else line.rstrip()
    if not text or text.startswith("#"):
        return None
    excludes = not text.startswith("!")
    names = text.removeprefix("!").split("/")
    folders_only = len(names) > 1 and not names[-1]
    anchored = len(names) - folders_only > 1
    names = names[:-1] if folders_only else names
    names = names[1:] if anchored and not names[0] else names
    if not all(names):
        raise _bad(line, "a component is empty")
    if not anchored and names != [_ANY_DEPTH]:
        names = [_ANY_DEPTH, *names]
    below = _Reach.FOLDER if folders_only else None
    if names[-1] == _ANY_DEPTH:
        while names and names[-1] == _ANY_DEPTH:
            names.pop()
        below = below or _Reach.ITSELF
        if folders_only and not names:
            names = ["*"]
    segments = tuple(None if name == _ANY_DEPTH else _segment(name, line) for name in names)
    return _Pattern(excludes, segments, below)


def _segment(name: str, line: str) -> re.Pattern[str]:
    """One component's pattern.

    After each star the shortest match of what follows, up to the next star, is as good as any
    other; atomic groups keep ``re`` from trying the others, which is what takes exponential time.
    """
    runs = [""]
    position = 0
    while position < len(name):
        character = name[position]
        position += 1
        if character == "*":
            runs.append("")
        elif character == "?":
            runs[-1] += "."
        elif character == "[":
            translated, position = _set(name, position, line)
            runs[-1] += translated
        else:
            if character == "\\":
                if position == len(name):
                    raise _bad(line, "it ends in a backslash")
                character = name[position]
                position += 1
            runs[-1] += re.escape(character)
    first, *rest = runs
    if not rest:
        return re.compile(first, re.DOTALL)
    *middle, last = rest
    between = "".join(f"(?>.*?{run})" for run in middle if run)
    return re.compile(f"{first}{between}.*{last}", re.DOTALL)


def _set(name: str, start: int, line: str) -> tuple[str, int]:
    """A bracket expression whose ``[`` is just before ``start``, and where it ends."""
    negated = name[start : start + 1] in ("!", "^")
    first = start + negated
    end = name.find("]", first + 1)
    if end < 0:
        raise _bad(line, "a bracket is not closed")
    members = ""
    position = first
    while position < end:
        low = high = name[position]
        if name[position + 1 : position + 2] == "-" and position + 2 < end:
            high = name[position + 2]
            position += 2
        position += 1
        if low > high:
            raise _bad(line, f"the range {low}-{high} is empty")
        members += f"{re.escape(low)}-{re.escape(high)}" if low != high else re.escape(low)
    return f"[{'^' if negated else ''}{members}]", end + 1


def _bad(line: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{line[:200]!r} is not a file pattern: {why}")
