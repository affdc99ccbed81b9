"""Binding and unmounting with the kernel: needs root, leaves nothing mounted."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import TYPE_CHECKING

import pytest
import trio

from csi import mounts
from csi.mounts import bind_read_only, mount_at, unmount
from fetcher.errors import Conflict, InvalidRequest
from tests.support.mounts import detach_below, mounts_below

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Bind = Callable[[Path, Path], None]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with a model's tree and an empty target."""
    folder = tmp_path.resolve()
    (folder / "tree").mkdir()
    (folder / "tree" / "config.json").write_text("{}")
    (folder / "target").mkdir(mode=0o750)
    try:
        yield folder
    finally:
        detach_below(folder)


def bind_with_the_api(source: Path, target: Path) -> None:
    trio.run(bind_read_only, source, target)


def bind_with_mount(source: Path, target: Path) -> None:
    tree, folder = os.open(source, os.O_RDONLY), os.open(target, os.O_RDONLY)
    try:
        mounts.bind_by_mount(tree, folder, target)
    finally:
        os.close(tree)
        os.close(folder)


both_ways = pytest.mark.parametrize("bind", [bind_with_the_api, bind_with_mount])


@both_ways
def test_a_bind_is_locked_down(bind: Bind, place: Path) -> None:
    target = place / "target"
    bind(place / "tree", target)
    mount = mount_at(target)
    assert mount is not None
    assert mount.locked
    assert "noexec" not in mount.options
    assert (target / "config.json").read_text() == "{}"
    with pytest.raises(OSError, match="Read-only") as caught:
        (target / "new").write_text("x")
    assert caught.value.errno == errno.EROFS
    # what is bound stays writable where it lies
    (place / "tree" / "new").write_text("x")


@both_ways
def test_every_copy_of_a_bind_is_locked_down(bind: Bind, place: Path) -> None:
    """What kubelet and the pods see is a copy that propagated out of the driver's namespace."""
    host, driver = place / "host", place / "driver"
    host.mkdir()
    driver.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", host], check=True)
    subprocess.run(["mount", "--make-shared", host], check=True)
    (host / "target").mkdir()
    subprocess.run(["mount", "--bind", host, driver], check=True)

    bind(place / "tree", driver / "target")

    for target in (driver / "target", host / "target"):
        mount = mount_at(target)
        assert mount is not None
        assert mount.locked
        assert (target / "config.json").exists()
    trio.run(unmount, driver / "target")
    assert mount_at(host / "target") is None


def test_a_bind_does_not_cover_anything(place: Path) -> None:
    (place / "target" / "somebody's").write_text("x")
    with pytest.raises(Conflict, match="not empty"):
        trio.run(bind_read_only, place / "tree", place / "target")
    assert mounts_below(place) == []


@pytest.mark.parametrize("kind", ["missing", "file", "symlink"])
@pytest.mark.parametrize("end", ["tree", "target"])
def test_both_ends_are_folders(kind: str, end: str, place: Path) -> None:
    odd = place / "odd"
    if kind == "file":
        odd.write_text("x")
    if kind == "symlink":
        odd.symlink_to(place / end)
    ends = {"tree": place / "tree", "target": place / "target"} | {end: odd}
    with pytest.raises(InvalidRequest, match="not a folder"):
        trio.run(bind_read_only, ends["tree"], ends["target"])
    assert mounts_below(place) == []


def test_names_that_are_hard_to_print(place: Path) -> None:
    target = place / "a b\tc\nd\\e\udcff"
    target.mkdir()
    trio.run(bind_read_only, place / "tree", target)
    assert mount_at(target) is not None
    assert trio.run(unmount, target) == 1
    assert mount_at(target) is None


def test_a_cancelled_bind_did_not_begin(place: Path) -> None:
    async def main() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await bind_read_only(place / "tree", place / "target")
        assert scope.cancelled_caught

    trio.run(main)
    assert mounts_below(place) == []


def test_a_bind_that_has_begun_is_finished(place: Path) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:

            async def bind() -> None:
                await bind_read_only(place / "tree", place / "target")

            nursery.start_soon(bind)
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert len(mounts_below(place)) in (0, 1)


def test_every_mount_of_a_stack_is_removed(place: Path) -> None:
    target = place / "target"
    for _ in range(3):
        bind_with_mount(place / "tree", target)
    assert trio.run(unmount, target) == 6
    assert mount_at(target) is None


def test_unmounting_what_is_no_mount(place: Path) -> None:
    assert trio.run(unmount, place / "target") == 0
    assert trio.run(unmount, place / "never") == 0


def test_a_busy_mount_is_detached(place: Path) -> None:
    target = place / "target"
    trio.run(bind_read_only, place / "tree", target)
    with (target / "config.json").open() as held:
        assert trio.run(unmount, target) == 1
        assert mount_at(target) is None
        assert held.read() == "{}"


def test_a_mount_of_others_stays(place: Path) -> None:
    target = place / "target"
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", target], check=True)
    with pytest.raises(Conflict, match="tmpfs"):
        trio.run(unmount, target, lambda mount: mount.type != "tmpfs")
    assert mount_at(target) is not None


def test_a_symlink_is_not_followed(place: Path) -> None:
    trio.run(bind_read_only, place / "tree", place / "target")
    (place / "link").symlink_to(place / "target")
    assert trio.run(unmount, place / "link") == 0
    assert mount_at(place / "target") is not None


def test_a_dead_file_system_does_not_hold_an_unmount_up(place: Path) -> None:
    """A FUSE mount whose server does not answer: stat on it would never return."""
    target = place / "target"
    server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        subprocess.run(
            ["mount", "-i", "-t", "fuse", "-o",
             f"fd={server},rootmode=40000,user_id=0,group_id=0", "dead", target],
            check=True, pass_fds=[server], timeout=30,
        )  # fmt: skip
        assert mount_at(target) is not None

        async def main() -> None:
            with trio.fail_after(15):
                assert await unmount(target) == 1

        trio.run(main)
        assert mount_at(target) is None
    finally:
        os.close(server)


def test_an_unmount_may_be_cancelled_anywhere(place: Path) -> None:
    target = place / "target"

    async def main() -> None:
        for delay in (0, 0.001, 0.005, 0.02, 0.05, 0.1):
            if mount_at(target) is None:
                await bind_read_only(place / "tree", target)
            with trio.move_on_after(delay):
                await unmount(target)
            await unmount(target)
            assert mount_at(target) is None

    trio.run(main)
