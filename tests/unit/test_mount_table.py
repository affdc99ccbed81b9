"""The mount table: real lines, hostile names, stacks, and whose a mount is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.mount_table import Mount, mount_at, mount_table, parse_mount_table, shows_below, topmost
from csi.served import Folders, MountedTree, TreeKey, mounted_trees, served
from fetcher.errors import Unavailable
from fetcher.oci import Digest

NODE = rb"""27 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw,discard
40 27 0:21 / /proc rw,nosuid,nodev,noexec,relatime shared:12 - proc proc rw
90 27 8:16 /csi /var/lib/model-csi rw,relatime shared:40 master:3 - xfs /dev/sdb rw,attr2
91 27 8:16 /csi/models/sha256/aa /pods/one/mount ro,nosuid,nodev,relatime shared:41 - xfs sdb rw
92 27 8:16 /csi/models/sha256/bb//deleted /pods/two/mount ro,nosuid,nodev shared:42 - xfs sdb rw
93 27 8:16 /csi/blobs /pods/three/mount rw - xfs sdb rw
94 27 0:77 / /pods/four/mount rw - nfs4 server:/export rw
95 27 8:17 /csi/models/sha256/aa /pods/five/mount ro - xfs /dev/sdc rw
96 27 8:16 /csi/models /pods/six/mount ro - xfs sdb rw
97 27 8:16 /csi/models-of-others/aa /pods/seven/mount ro - xfs sdb rw
"""


def table() -> list[Mount]:
    return parse_mount_table(NODE)


def at(target: str) -> Mount:
    mount = topmost(table(), Path(target))
    assert mount is not None
    return mount


def test_a_line_is_read() -> None:
    mount = at("/pods/one/mount")
    assert mount == Mount(
        id=91,
        parent=27,
        device="8:16",
        root="/csi/models/sha256/aa",
        mountpoint="/pods/one/mount",
        options=frozenset({"ro", "nosuid", "nodev", "relatime"}),
        type="xfs",
        source="sdb",
    )
    assert mount.locked
    assert not mount.deleted
    assert mount.origin == "8:16 /csi/models/sha256/aa"


@pytest.mark.parametrize(
    ("target", "ours"),
    [("one", True), ("two", True), ("three", False), ("four", False), ("five", False),
     ("six", False), ("seven", False)],
)  # fmt: skip
def test_whose_a_mount_is(target: str, ours: bool) -> None:
    models = Path("/var/lib/model-csi/models")
    assert shows_below(table(), at(f"/pods/{target}/mount"), models) is ours


def test_a_deleted_source_is_told() -> None:
    assert at("/pods/two/mount").deleted


@pytest.mark.parametrize("target", ["/pods/none", "/pods/one", "/pods/one/mount/x", "relative"])
def test_what_is_no_mount(target: str) -> None:
    assert topmost(table(), Path(target)) is None


@pytest.mark.parametrize(
    ("options", "locked"),
    [(b"ro", False), (b"rw,nosuid,nodev", False), (b"ro,nosuid,nodev,noatime", True)],
)
def test_locked_means_all_three(options: bytes, locked: bool) -> None:
    (mount,) = parse_mount_table(b"9 1 0:5 / /t %b - tmpfs t ro,nosuid,nodev\n" % options)
    assert mount.locked is locked


def test_octal_escapes() -> None:
    line = rb"9 1 0:5 /a\040b /t\011\012\134040 rw - fuse.\040odd src rw"
    (mount,) = parse_mount_table(line)
    assert (mount.root, mount.mountpoint, mount.type) == ("/a b", "/t\t\n\\040", "fuse. odd")


def test_names_that_are_no_utf_8() -> None:
    (mount,) = parse_mount_table(b"9 1 0:5 / /\xff\xfe rw - tmpfs t rw\n")
    assert mount.mountpoint == "/\udcff\udcfe"


def test_a_name_that_looks_like_the_separator() -> None:
    (mount,) = parse_mount_table(b"9 1 0:5 - - rw shared:1 - tmpfs - rw\n")
    assert (mount.root, mount.mountpoint, mount.type) == ("-", "-", "tmpfs")


def test_the_top_of_a_stack_whatever_the_order() -> None:
    # newer kernels list by id, older ones by place in a list; one moved beneath is newer and below
    lines = [
        b"50 27 0:5 /first /t rw - tmpfs t rw",
        b"70 50 0:5 /second /t rw - tmpfs t rw",
        b"60 70 0:5 /third /t rw - tmpfs t rw",
    ]
    for order in (lines, lines[::-1], [lines[1], lines[2], lines[0]]):
        top = topmost(parse_mount_table(b"\n".join(order)), Path("/t"))
        assert top is not None
        assert top.root == "/third"


def test_a_root_that_is_its_own_parent() -> None:
    top = topmost(parse_mount_table(b"1 1 0:2 / / rw - rootfs rootfs rw"), Path("/"))
    assert top is not None


@pytest.mark.parametrize(
    "line",
    [b"x", b"1 2 3 4 5 6", b"a b 0:1 / / rw - t s o", b"1 2 0:1 / / rw shared:1 -", b"\x00"],
)
def test_a_line_that_is_none(line: bytes) -> None:
    with pytest.raises(Unavailable, match="cannot be read"):
        parse_mount_table(line)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        parse_mount_table(content)
    except Unavailable:
        return


@given(st.text(min_size=1, max_size=60).filter(lambda text: "\0" not in text))
def test_any_name_survives(name: str) -> None:
    raw = name.encode(errors="surrogatepass")
    escaped = b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in raw)
    (mount,) = parse_mount_table(b"9 1 0:5 / /%b rw - tmpfs t rw\n" % escaped)
    assert mount.mountpoint == "/" + raw.decode(errors="surrogateescape")


def test_this_machines_own() -> None:
    root = mount_at(Path("/"))
    assert root is not None
    assert root.mountpoint == "/"
    assert root in mount_table()
    assert mount_at(Path("/proc")) is not None
    assert mount_at(Path("/no/such/folder")) is None


DIGEST = "a" * 64
LAZY = f"""50 27 0:39 / /r/lazy/sha256/{DIGEST} ro - fuse.model-csi /r/lazy/sha256/{DIGEST} ro
58 27 0:39 / /host/r/lazy/sha256/{DIGEST} ro - fuse.model-csi /r/lazy/sha256/{DIGEST} ro
51 27 0:39 / /pods/one/mount ro,nosuid,nodev shared:8 - fuse.model-csi /r/lazy/sha256/{DIGEST} ro
52 27 0:39 /sub /pods/two/mount ro - fuse.model-csi /r/lazy/sha256/{DIGEST} ro
53 27 0:40 / /pods/key/mount ro - fuse.model-csi /r/lazy/sha256/{DIGEST}.0f12 ro
54 27 0:41 / /pods/far/mount ro - fuse.model-csi /other/lazy/sha256/{DIGEST} ro
55 27 0:42 / /pods/odd/mount ro - fuse.model-csi /r/lazy/sha256/odd ro
56 27 0:43 / /pods/low/mount ro - fuse.model-csi /r/lazy/sha256/{DIGEST}/x ro
57 27 0:44 / /pods/not/mount ro - fuse.sshfs /r/lazy/sha256/{DIGEST} ro
""".encode()


def test_what_workers_serve_is_told_by_the_name_of_their_mount() -> None:
    folders = Folders(Path("/r"), Path("/r/models"), Path("/r/lazy"))
    mounts = parse_mount_table(NODE + LAZY)
    model = Digest("sha256", DIGEST)
    assert mounted_trees(mounts, folders) == [
        MountedTree(model, "", Path("/pods/one/mount"), whole=True, lazy=True),
        MountedTree(model, "", Path("/pods/two/mount"), whole=False, lazy=True),
        MountedTree(model, "0f12", Path("/pods/key/mount"), whole=True, lazy=True),
    ]
    keys = [key for _, key in served(mounts, folders.lazy)]
    assert keys == [TreeKey(model, "")] * 4 + [TreeKey(model, "0f12")]
    assert folders.mountpoint(keys[-1]) == Path(f"/r/lazy/sha256/{DIGEST}.0f12")
