"""Names and inodes of a model: the same in every worker, in whatever order layers come."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import trio

from fetcher.artifacts import FileEntry, FolderEntry, HardLinkEntry, LinkEntry
from fetcher.errors import InvalidArtifact
from fetcher.modelpack import Kind, Packing, Selection, read_model
from fuse.tree import ROOT, File, Folder, Inodes, Link
from tests.support.models import ModelBuilder

if TYPE_CHECKING:
    from fetcher.artifacts import Entry
    from fetcher.modelpack import Model
    from fuse.tree import Index

EVERYTHING = Selection()


def _content(*entries: Entry) -> Index:
    return [(entry, 512 * number) for number, entry in enumerate(entries, 1)]


def _model(*archives: str) -> Model:
    builder = ModelBuilder().add_raw("config.json", b"{}", Kind.WEIGHT_CONFIG)
    builder.add_raw(
        "bin/run.sh", b"#!", Kind.CODE, metadata={"mode": 0o755, "mtime": "2024-01-01T00:00:00Z"}
    )
    for name in archives:
        builder.add_tar({name: name.encode()}, Packing.TAR)
    return read_model(builder.manifest())


def _names(inodes: Inodes) -> dict[str, int]:
    found: dict[str, int] = {}
    waiting: list[tuple[str, Folder]] = [("", inodes.root)]
    while waiting:
        path, folder = waiting.pop()
        for name, node in folder.children.items():
            found[f"{path}{name}"] = node.inode
            if isinstance(node, Folder):
                waiting.append((f"{path}{name}/", node))
    return found


def test_raw_layers_are_known_from_the_manifest() -> None:
    inodes = Inodes(_model(), EVERYTHING)
    assert inodes.complete
    assert inodes.root.inode == ROOT
    names = _names(inodes)
    assert sorted(names) == ["bin", "bin/run.sh", "config.json"]
    script = inodes.get(names["bin/run.sh"])
    assert isinstance(script, File)
    assert (script.executable, script.mtime_ns) == (True, 1704067200 * 10**9)
    assert inodes.size == 4


def test_what_a_selection_leaves_out_is_not_there() -> None:
    inodes = Inodes(_model("w.bin"), Selection(exclude_weights=True, exclude_patterns=("bin/",)))
    assert sorted(_names(inodes)) == ["config.json"]
    assert inodes.complete


def test_inodes_do_not_depend_on_the_order_in_which_layers_come() -> None:
    model = _model("a", "b", "c")
    archives = model.layers[2:]
    contents = [
        _content(
            FolderEntry("shared"),
            FileEntry(f"shared/{number}", 7),
            HardLinkEntry(f"again{number}", f"shared/{number}"),
            LinkEntry(f"link{number}", f"shared/{number}"),
        )
        for number in range(3)
    ]

    async def names(order: tuple[int, ...]) -> dict[str, int]:
        inodes = Inodes(model, EVERYTHING)
        for number in order:
            assert not inodes.complete
            await inodes.add(archives[number], list(contents[number]))
            # again changes nothing
            await inodes.add(archives[number], list(contents[number]))
        assert inodes.complete
        return _names(inodes)

    found = [trio.run(names, order) for order in itertools.permutations(range(3))]
    assert all(one == found[0] for one in found)
    assert len(set(found[0].values())) == len(found[0]) - 3
    assert found[0]["again1"] == found[0]["shared/1"]


def test_a_hard_link_is_the_same_file_though_its_first_name_is_left_out() -> None:
    inodes = Inodes(_model("a"), Selection(exclude_patterns=("first",)))
    content = _content(
        FileEntry("first", 7), HardLinkEntry("x", "first"), HardLinkEntry("y", "first")
    )
    trio.run(inodes.add, inodes.open[next(iter(inodes.open))], content)
    names = _names(inodes)
    assert "first" not in names
    file = inodes.get(names["x"])
    assert isinstance(file, File)
    assert (file.links, file.size, names["y"]) == (2, 7, names["x"])


def test_links_keep_their_target() -> None:
    inodes = Inodes(_model("a"), EVERYTHING)
    content = _content(LinkEntry("d/link", "../config.json"))
    trio.run(inodes.add, inodes.open[next(iter(inodes.open))], content)
    link = inodes.get(_names(inodes)["d/link"])
    assert isinstance(link, Link)
    assert link.target == "../config.json"


@pytest.mark.parametrize(
    "entry",
    [
        FileEntry("config.json", 5),
        FileEntry("bin", 5),
        FileEntry("config.json/below", 5),
        LinkEntry("out", "../../etc/passwd"),
        FileEntry("../out", 5),
    ],
)
def test_a_layer_that_contradicts_another_one_is_refused(entry: Entry) -> None:
    inodes = Inodes(_model("a", "b"), EVERYTHING)
    one, two = inodes.open.values()

    async def main() -> None:
        with pytest.raises(InvalidArtifact):
            await inodes.add(one, _content(FileEntry("good", 1), entry))
        # what other layers have may not be told apart any more
        with pytest.raises(InvalidArtifact):
            await inodes.add(two, _content(FileEntry("other", 1)))

    trio.run(main)
    assert not inodes.complete
    assert sorted(_names(inodes)) == ["bin", "bin/run.sh", "config.json"]
