"""Paths, links and trees: what they refuse, and that what they let pass stays inside for real."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fetcher.artifacts import (
    MAX_DEPTH,
    MAX_PATH_BYTES,
    Entry,
    FileEntry,
    FolderEntry,
    HardLinkEntry,
    LinkEntry,
    Tree,
    quoted,
    safe_path,
    safe_target,
)
from fetcher.errors import InvalidArtifact


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("a", "a"),
        ("./a//b", "a/b"),
        ("a/b/", "a/b"),
        ("a/./b/.", "a/b"),
        ("...", "..."),
        ("a..b/..c", "a..b/..c"),
        ("weights/模型.safetensors", "weights/模型.safetensors"),
        ("a\\b", "a\\b"),
        (" a ", " a "),
        ("n" * 255, "n" * 255),
    ],
)
def test_safe_paths_have_a_normal_form(text: str, normal: str) -> None:
    assert safe_path(text) == normal


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("/etc/passwd", "absolute"),
        ("//a", "absolute"),
        ("..", r"'\.\.'"),
        ("../a", r"'\.\.'"),
        ("a/../b", r"'\.\.'"),
        ("a/..", r"'\.\.'"),
        ("", "empty"),
        (".", "empty"),
        ("././/", "empty"),
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("a\x7f", "control"),
        ("a\x85", "control"),
        ("n" * 256, "255 bytes"),
        ("ü" * 128, "255 bytes"),
        ("n/" * (MAX_PATH_BYTES // 2 + 1), "bytes"),
        ("a/" * (MAX_DEPTH + 1), "deep"),
        ("a\udcff", "UTF-8"),
    ],
)
def test_unsafe_paths_are_refused(text: str, why: str) -> None:
    with pytest.raises(InvalidArtifact, match=why) as caught:
        safe_path(text)
    assert len(caught.value.message) < 1000
    assert caught.value.message.isprintable()


def test_quotes_are_bounded_and_printable() -> None:
    assert len(quoted("x" * 10**6)) < 250
    assert quoted("a\n\udcff\u202e").isprintable()


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("l", "a"),
        ("l", "."),
        ("l", "a//./b/"),
        ("a/l", ".."),
        ("a/l", "../b"),
        ("a/b/l", "../../c"),
        ("snapshots/main/m", "../../blobs/abc"),
        ("l", "..."),
    ],
)
def test_targets_inside_are_kept_as_they_are(path: str, target: str) -> None:
    assert safe_target(path, target) == target


@pytest.mark.parametrize(
    ("path", "target", "why"),
    [
        ("l", "/etc/passwd", "absolute"),
        ("l", "..", "leaves"),
        ("l", "../a", "leaves"),
        ("a/l", "../../a", "leaves"),
        ("a/l", "./.././../a", "leaves"),
        ("l", "a/../b", "behind a name"),
        ("l", "a/..", "behind a name"),
        ("l", "", "no target"),
        ("l", "a\0b", "control"),
        ("l", "a\udcff", "UTF-8"),
        ("l", "n" * 256, "255"),
        ("l", "n/" * 2048, "4095"),
    ],
)
def test_targets_outside_are_refused(path: str, target: str, why: str) -> None:
    with pytest.raises(InvalidArtifact, match=why):
        safe_target(path, target)


def tree_of(*entries: Entry) -> list[Entry]:
    tree = Tree()
    for entry in entries:
        tree.add(entry)
    return list(tree.entries())


def test_entries_come_in_an_order_in_which_they_can_be_created() -> None:
    found = tree_of(
        LinkEntry("a-link", "z/deep/file"),
        FileEntry("z/deep/file", 1),
        HardLinkEntry("a-name", "z/deep/file"),
        FolderEntry("z"),
        FolderEntry("b/empty"),
        FileEntry("a", 2, executable=True, mtime_ns=5),
        FolderEntry("z"),
    )
    assert found == [
        FolderEntry("b"),
        FolderEntry("b/empty"),
        FolderEntry("z"),
        FolderEntry("z/deep"),
        FileEntry("a", 2, executable=True, mtime_ns=5),
        FileEntry("z/deep/file", 1),
        HardLinkEntry("a-name", "z/deep/file"),
        LinkEntry("a-link", "z/deep/file"),
    ]


def test_a_tree_can_be_iterated_again_and_is_sensitive_to_case() -> None:
    tree = Tree()
    tree.add(FileEntry("a", 1))
    tree.add(FileEntry("A", 1))
    assert [*tree] == [*tree.entries()] == [FileEntry("A", 1), FileEntry("a", 1)]


CONFLICTS: dict[str, list[Entry]] = {
    "a file twice": [FileEntry("a", 1), FileEntry("a", 1)],
    "a file and a folder": [FileEntry("a", 1), FolderEntry("a")],
    "a file and an implied folder": [FileEntry("a", 1), FileEntry("a/b", 1)],
    "a file in a file, deeper": [FileEntry("x/a", 1), FileEntry("x/a/b/c", 1)],
    "a link and a file": [LinkEntry("a", "b"), FileEntry("a", 1)],
    "a link and a folder": [LinkEntry("a", "b"), FolderEntry("a")],
    "a link twice": [LinkEntry("a", "b"), LinkEntry("a", "b")],
    "a file below a link": [LinkEntry("a", "b"), FileEntry("a/c", 1)],
    "a folder below a link": [LinkEntry("a", "b"), FolderEntry("a/c")],
    "a link below a link": [LinkEntry("a", "b"), LinkEntry("a/c", "d")],
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_conflicts_are_refused_in_either_order(name: str) -> None:
    for entries in itertools.permutations(CONFLICTS[name]):
        with pytest.raises(InvalidArtifact):
            tree_of(*entries)


@pytest.mark.parametrize(
    "entries",
    [
        [LinkEntry("a", "b"), LinkEntry("b", "a")],
        [LinkEntry("a", "a")],
        [LinkEntry("a", "a/b")],
        [FolderEntry("d"), LinkEntry("d/l", "../k"), LinkEntry("k", "d/l/x")],
        [LinkEntry(f"l{number}", f"l{number + 1}") for number in range(45)],
        # 2^40 steps for who follows links naively
        [LinkEntry(f"l{n}", f"l{n + 1}/l{n + 1}") for n in range(40)] + [LinkEntry("l40", ".")],
    ],
)
def test_loops_are_refused_in_any_order(entries: list[Entry]) -> None:
    for order in (entries, entries[::-1]):
        with pytest.raises(InvalidArtifact, match="loop"):
            tree_of(*order)


def test_chains_and_dangling_links_inside_are_fine() -> None:
    links = [LinkEntry(f"l{number}", f"l{number + 1}") for number in range(40)]
    assert len(tree_of(*links, FileEntry("l40", 1), LinkEntry("dangling", "no/such"))) == 42


@pytest.mark.parametrize(
    "entry",
    [
        FileEntry("../a", 1),
        FileEntry("a//b", 1),
        LinkEntry("a", "../b"),
        HardLinkEntry("a", "b"),
        HardLinkEntry("a", "../b"),
        HardLinkEntry("a", "a"),
        HardLinkEntry("a", "folder"),
        HardLinkEntry("a", "link"),
        HardLinkEntry("a", "link/file"),
    ],
)
def test_a_tree_trusts_no_entry(entry: Entry) -> None:
    tree = Tree()
    tree.add(FileEntry("folder/file", 1))
    tree.add(LinkEntry("link", "folder"))
    with pytest.raises(InvalidArtifact):
        tree.add(entry)


def test_implied_folders_count_against_the_limit() -> None:
    tree = Tree(max_entries=4)
    tree.add(FileEntry("a/b/c", 1))
    tree.add(FolderEntry("a/b"))
    tree.add(FileEntry("d", 1))
    with pytest.raises(InvalidArtifact, match="more than 4"):
        tree.add(FileEntry("e", 1))


def test_names_are_bounded_together() -> None:
    folders = "/".join(["n" * 250] * 11)
    files = (FileEntry(f"{folders}/{number:0200}", 1) for number in range(50_000))
    with pytest.raises(InvalidArtifact, match="characters together"):
        tree_of(*files)


names = st.sampled_from(["a", "b", "c", "..", ".", "", "l", "x" * 10])
paths = st.lists(names, min_size=1, max_size=5).map("/".join)
entries = st.one_of(
    paths.map(lambda path: FileEntry(path, 1)),
    paths.map(FolderEntry),
    st.builds(LinkEntry, paths, paths),
    st.builds(HardLinkEntry, paths, paths),
)


@settings(deadline=None)
@given(st.text())
def test_a_safe_path_is_inside_and_normal(text: str) -> None:
    try:
        path = safe_path(text)
    except InvalidArtifact:
        return
    assert os.path.normpath(path) == path
    assert not path.startswith(("/", "../"))
    assert path not in ("..", ".")
    assert safe_path(path) == path


def create(root: Path, entries: list[Entry]) -> None:
    """What an unpacker does, with no check of its own."""
    for entry in entries:
        place = root / entry.path
        match entry:
            case FolderEntry():
                place.mkdir()
            case FileEntry():
                with place.open("xb") as file:
                    file.write(b"x")
            case LinkEntry():
                place.symlink_to(entry.target)
            case HardLinkEntry():
                place.hardlink_to(root / entry.target)


@settings(deadline=None)
@given(st.lists(entries, max_size=12))
def test_whatever_a_tree_accepts_stays_inside_when_created(wanted: list[Entry]) -> None:
    tree = Tree()
    accepted = []
    for entry in wanted:
        try:
            tree.add(entry)
        except InvalidArtifact:
            # an entry that is refused leaves at most folders behind
            continue
        accepted.append(entry)
    try:
        found = list(tree.entries())
    except InvalidArtifact:
        return
    assert {entry for entry in accepted if not isinstance(entry, FolderEntry)} <= {*found}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "outer" / "root"
        root.mkdir(parents=True)
        create(root, found)
        assert [place.name for place in root.parent.iterdir()] == ["root"]
        for path, folders, files in os.walk(root):
            for name in (*folders, *files):
                place = (Path(path) / name).resolve()
                assert place == root or root in place.parents


@settings(deadline=None)
@given(
    st.lists(entries, max_size=6).flatmap(lambda one: st.tuples(st.just(one), st.permutations(one)))
)
def test_the_verdict_does_not_depend_on_the_order(both: tuple[list[Entry], list[Entry]]) -> None:
    verdicts = []
    for order in both:
        try:
            verdicts.append(
                tree_of(*[entry for entry in order if not isinstance(entry, HardLinkEntry)])
            )
        except InvalidArtifact:
            verdicts.append([])
    assert verdicts[0] == verdicts[1]
