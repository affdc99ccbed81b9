"""Patterns mean what pathspec's do, and take no time over hostile names."""

from __future__ import annotations

import time

import pathspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fetcher.errors import InvalidRequest
from fetcher.patterns import MAX_PATTERNS, Patterns


@pytest.mark.parametrize(
    ("lines", "path", "excluded"),
    [
        (["*.bin"], "a.bin", True),
        (["*.bin"], "sub/deep/a.bin", True),
        (["*.bin"], "a.bin.json", None),
        (["/*.bin"], "sub/a.bin", None),
        (["sub/*.bin"], "sub/a.bin", True),
        (["sub/*.bin"], "other/sub/a.bin", None),
        (["sub/"], "sub/a", True),
        (["sub/"], "other/sub/a", True),
        (["sub/"], "sub", None),
        (["sub"], "sub", True),
        (["sub"], "sub/a/b", True),
        (["**/sub/*"], "x/y/sub/a", True),
        (["a/**/b"], "a/b", True),
        (["a/**/b"], "a/x/y/b", True),
        (["a/**"], "a/x", True),
        (["a/**"], "a", None),
        (["*", "!*.json"], "config.json", False),
        (["*", "!*.json"], "sub/config.json", False),
        (["*", "!*.json"], "a.bin", True),
        (["!*.json", "*"], "config.json", True),
        (["model-0000[1-3].bin"], "model-00002.bin", True),
        (["model-0000[!1-3].bin"], "model-00002.bin", None),
        (["[]a]", "[[]"], "]", True),
        (["[[]"], "[", True),
        ([r"\!important"], "!important", True),
        ([r"\#a", "#b"], "#a", True),
        (["#b"], "#b", None),
        (["", "  "], "a", None),
        (["a "], "a", True),
        ([r"a\ "], "a ", True),
        (["?"], "é", True),
        (["**"], "a/b", True),
        (["A"], "a", None),
        (["b[!a]a"], "b/a", None),
        (["model*of*.safetensors"], "model-1-of-2.safetensors", True),
    ],
)
def test_patterns_decide_as_in_a_gitignore_file(
    lines: list[str], path: str, excluded: bool | None
) -> None:
    assert Patterns(lines).excludes(path) is excluded


@pytest.mark.parametrize("line", ["a[", "[", "a\\", "[z-a]", "!", "/", "a//b", "x" * 1025, "[!]"])
def test_what_is_no_pattern_is_named(line: str) -> None:
    with pytest.raises(InvalidRequest, match="is not a file pattern") as caught:
        Patterns(["ok", line])
    assert line[:100].replace("\\", "\\\\") in caught.value.message


def test_the_number_of_patterns_is_bounded() -> None:
    with pytest.raises(InvalidRequest, match="at most"):
        Patterns(["a"] * (MAX_PATTERNS + 1))


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("*a" * 100 + "*b", "a" * 255),
        ("**/a/" * 60 + "b", "a/" * 127 + "c"),
        ("*" * 1000 + "b", "a" * 255),
    ],
)
def test_hostile_names_take_no_time(line: str, path: str) -> None:
    patterns = Patterns([line])
    started = time.perf_counter()
    assert patterns.excludes(path) is None
    assert time.perf_counter() - started < 0.5


# without [!a]: pathspec lets it match a slash, git and this do not
pieces = st.sampled_from(["a", "b", "*", "**", "?", "[ab]", "/", "/", "/**/", "a*b", r"\*"])
lines = st.tuples(st.sampled_from(["", "!", "/"]), st.lists(pieces, min_size=1, max_size=6)).map(
    lambda parts: parts[0] + "".join(parts[1])
)
components = st.text("abx*", min_size=1, max_size=3)
file_paths = st.lists(components, min_size=1, max_size=5).map("/".join)


@settings(deadline=None)
@given(st.lists(lines, max_size=4), file_paths)
def test_pathspec_agrees(wanted: list[str], path: str) -> None:
    try:
        patterns = Patterns(wanted)
    except InvalidRequest:
        return
    assert (
        patterns.excludes(path)
        is pathspec.GitIgnoreSpec.from_lines(wanted).check_file(path).include
    )


@settings(deadline=None)
@given(st.lists(st.text(), max_size=3), st.text(min_size=1))
def test_any_text_is_a_pattern_or_a_clear_error(wanted: list[str], path: str) -> None:
    try:
        patterns = Patterns(wanted)
    except InvalidRequest:
        return
    assert patterns.excludes(path) in (True, False, None)
