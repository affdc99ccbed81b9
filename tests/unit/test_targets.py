"""Targets: hostile paths, what may be mounted on, and that nothing is deleted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from csi import targets
from csi.targets import Found
from fetcher.errors import Conflict, InvalidRequest, Unavailable


@pytest.mark.parametrize(
    "path",
    ["relative", "", "/", "..", "/a/../b", "/a/..", "/a\0b", "/" + "a" * 256, "/a" * 2048,
     "/\udcff"],
)  # fmt: skip
def test_paths_that_cannot_be_targets(path: str) -> None:
    with pytest.raises(InvalidRequest):
        trio.run(targets.locate, Path(path))


def test_a_target_is_known_by_one_name(tmp_path: Path) -> None:
    real = tmp_path.resolve()
    (real / "pods").mkdir()
    (real / "link").symlink_to(real / "pods")
    (real / "pods" / "target").symlink_to("/etc")
    for spelling in ("pods/target", "link/target", "./pods//target/", "link/./target"):
        # the last part is not followed: what it is, is asked later
        assert trio.run(targets.locate, Path(f"{real}/{spelling}")) == real / "pods" / "target"
    assert trio.run(targets.locate, real / "no" / "such") == real / "no" / "such"


def test_what_may_be_mounted_on(tmp_path: Path) -> None:
    assert trio.run(targets.inspect, tmp_path / "new") is Found.MISSING
    (tmp_path / "new").mkdir()
    assert trio.run(targets.inspect, tmp_path / "new") is Found.EMPTY


@pytest.mark.parametrize("kind", ["file", "symlink", "dangling", "fifo", "no parent", "file above"])
def test_what_may_not_be_mounted_on(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("kept")
    elif kind == "symlink":
        target.symlink_to(tmp_path)
    elif kind == "dangling":
        target.symlink_to(tmp_path / "nowhere")
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        target = target / "below"
    if kind == "file above":
        target.parent.write_text("kept")
    with pytest.raises(InvalidRequest):
        trio.run(targets.inspect, target)


def test_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    with pytest.raises(Conflict, match="not empty"):
        trio.run(targets.inspect, tmp_path)


def test_making_and_removing(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for _ in range(2):
        trio.run(targets.make, target)
        assert target.stat().st_mode & 0o777 == 0o750
    for _ in range(2):
        assert trio.run(targets.remove, target)
        assert not target.exists()
    with pytest.raises(Unavailable):
        trio.run(targets.make, tmp_path / "no" / "such")


@pytest.mark.parametrize("kind", ["file", "symlink", "full"])
def test_only_an_empty_folder_is_removed(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    kept = tmp_path / "kept"
    kept.mkdir()
    if kind == "file":
        target.write_text("x")
    elif kind == "symlink":
        target.symlink_to(kept)
    else:
        target.mkdir()
        (target / "x").write_text("x")
    assert not trio.run(targets.remove, target)
    assert target.exists()
    assert kept.is_dir()


def test_parents(tmp_path: Path) -> None:
    assert trio.run(targets.parent_exists, tmp_path / "target")
    assert not trio.run(targets.parent_exists, tmp_path / "no" / "target")


def test_a_file_system_that_answers(tmp_path: Path) -> None:
    assert trio.run(targets.answers, tmp_path, 5.0)
    assert not trio.run(targets.answers, tmp_path / "no", 5.0)
