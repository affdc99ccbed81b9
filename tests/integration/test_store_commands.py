"""``gc``, ``rm`` and what ``status`` tells of the store, as real processes. Needs root."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from csi.mount_table import mount_at
from tests.support.commands import ModelCsi, wait_until
from tests.support.driver import serve_driver
from tests.support.models import ModelBuilder
from tests.support.mounts import detach_below
from tests.support.stores import MIB, disk_bytes, fill, small_disk, weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.registry import RegistryServer


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[ModelCsi]:
    home = tmp_path / "home"
    home.mkdir()
    cli = ModelCsi(tmp_path / "root", home, {"MODEL_CSI_MIN_FREE": "0"})
    try:
        yield cli
    finally:
        cli.stop()
        detach_below(tmp_path)


def pulled(cli: ModelCsi, registry: RegistryServer, name: str, builder: ModelBuilder) -> str:
    reference = builder.push(registry, f"commands/{name}", "v1")
    done = cli.run("pull", reference, "--json")
    assert done.status == 0, done.errors
    return reference


def listed(cli: ModelCsi) -> set[str]:
    return {
        reference
        for model in cli.run("ls", "--json").json["models"]
        for reference in model["references"]
    }


def test_gc_evicts_what_is_not_mounted(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer
) -> None:
    mounted, other = weights(2 * MIB), weights(3 * MIB)
    kept = pulled(cli, registry, "kept", mounted)
    gone = pulled(cli, registry, "gone", other)
    target = tmp_path / "mnt"
    assert cli.run("mount", kept, str(target)).status == 0

    shown = cli.run("gc", "--all", "--dry-run", "--json").json
    assert shown["dry_run"]
    [model, content] = shown["evicted"]
    assert (model["kind"], model["references"]) == ("model", [gone])
    assert (content["kind"], content["bytes"]) == ("content", 3 * MIB)
    assert shown["freed"] == model["bytes"] + content["bytes"]
    assert listed(cli) == {kept, gone}

    # far below the watermarks there is nothing to do
    assert cli.run("gc", "--max-size", "1GiB", "--json").json["evicted"] == []
    done = cli.run("gc", "--all", "--json").json
    assert done["evicted"] == shown["evicted"]
    assert done["used_before"] - done["used"] == pytest.approx(done["freed"], abs=MIB)
    assert listed(cli) == {kept}
    assert disk_bytes(cli.root) < 4 * MIB
    assert (target / "model-0.safetensors").stat().st_size == 2 * MIB

    assert cli.run("unmount", str(target)).status == 0
    text = cli.run("gc", "--all")
    assert text.status == 0
    assert kept in text.output
    assert "freed" in text.output
    assert listed(cli) == set()
    # and what was evicted is fetched again
    assert cli.run("pull", kept, "--json").json["fetched"] == 2 * MIB


def test_gc_goes_from_the_high_watermark_to_the_low_one(
    cli: ModelCsi, registry: RegistryServer
) -> None:
    references = [pulled(cli, registry, f"mark-{n}", weights(4 * MIB)) for n in range(4)]
    # used again: the second one is the oldest now
    assert cli.run("pull", references[0]).status == 0
    marks = ("--gc-high-watermark", "80", "--gc-low-watermark", "70")
    done = cli.run("gc", "--max-size", "20MiB", *marks, "--json")
    assert done.status == 0, done.errors
    assert listed(cli) == {references[0], references[2], references[3]}
    assert done.json["used"] <= 14 * MIB
    assert done.json["limit"] == 20 * MIB


def test_rm_removes_a_model_and_what_only_it_needs(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer
) -> None:
    data = os.urandom(MIB)
    one = pulled(cli, registry, "one", ModelBuilder().add_raw("a", data).add_raw("b", b"own"))
    two_builder = ModelBuilder().add_raw("c", data)
    two = pulled(cli, registry, "two", two_builder)

    removed = cli.run("rm", one, "--json")
    assert removed.status == 0, removed.errors
    assert [row["kind"] for row in removed.json["removed"]] == ["model", "content"]
    assert listed(cli) == {two}
    again = cli.run("rm", one, "--json")
    assert (again.status, again.error["code"]) == (1, "NotFound")
    assert one in again.error["message"]

    target = tmp_path / "mnt"
    assert cli.run("mount", two, str(target)).status == 0
    [volume] = cli.run("status", "--json").json["volumes"]
    refused = cli.run("rm", two, "--json")
    assert (refused.status, refused.error["code"]) == (1, "Conflict")
    assert volume["id"] in refused.error["message"]
    assert (target / "c").read_bytes() == data
    assert cli.run("unmount", str(target)).status == 0
    # by the digest alone
    assert cli.run("rm", str(two_builder.digest)).status == 0
    assert listed(cli) == set()
    never = cli.run("pull", two, "--pull-policy", "Never", "--json")
    assert never.error["code"] == "NotFound"


def test_rm_removes_all_or_nothing(cli: ModelCsi, registry: RegistryServer) -> None:
    one = pulled(cli, registry, "all-one", weights(MIB))
    two = pulled(cli, registry, "all-two", weights(MIB))
    refused = cli.run("rm", one, registry.reference("commands/none", "v1"), two, "--json")
    assert refused.error["code"] == "NotFound"
    assert listed(cli) == {one, two}
    assert cli.run("rm", one, two).status == 0
    assert listed(cli) == set()


def test_rm_takes_a_model_whose_contents_all_went_with_another(
    cli: ModelCsi, registry: RegistryServer
) -> None:
    data = os.urandom(MIB)
    one = pulled(cli, registry, "with-one", ModelBuilder().add_raw("a", data))
    begun = ModelBuilder().add_raw("a", data).add_raw("b", os.urandom(16 * MIB))
    two = begun.push(registry, "commands/with-two", "v1")
    assert cli.run("pull", two, "--max-size", "16MiB", "--json").error["code"] == "NoSpace"
    done = cli.run("rm", one, two, "--json")
    assert done.status == 0, done.errors
    assert done.json["freed"] >= MIB
    assert listed(cli) == set()
    assert disk_bytes(cli.root / "blobs") + disk_bytes(cli.root / "trash") < MIB


def test_commands_make_no_store(cli: ModelCsi) -> None:
    assert cli.run("gc", "--json").json["freed"] == 0
    assert cli.run("rm", "r.example.org/acme/m:v1", "--json").error["code"] == "NotFound"
    assert not cli.root.exists()


def test_status_tells_what_the_store_takes(cli: ModelCsi, registry: RegistryServer) -> None:
    pulled(cli, registry, "status", weights(2 * MIB, MIB))
    disk = cli.run("status", "--json").json["disk"]
    assert disk["used"] == pytest.approx(disk_bytes(cli.root), abs=MIB // 2)
    assert (disk["reserved"], disk["trash"], disk["orphan_bytes"]) == (0, 0, 0)
    assert (disk["models"], disk["contents"], disk["limit"]) == (1, 2, None)
    assert 0 < disk["free"] <= disk["total"]
    orphan = cli.root / "blobs/sha256" / ("0" * 64)
    orphan.write_bytes(os.urandom(MIB))
    assert cli.run("status", "--json").json["disk"]["orphan_bytes"] == MIB
    assert "1.0 MiB without a record" in cli.run("status").output
    assert cli.run("gc", "--json").json["orphan_bytes"] == MIB
    assert not orphan.exists()


def test_serve_finds_orphans_and_keeps_what_is_mounted(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer
) -> None:
    """The records are lost while a model is mounted: the model stays, as a pod may read it."""
    folder = tmp_path / "driver"
    folder.mkdir()
    cli = ModelCsi(folder / "root", cli.home, cli.environment)
    mounted, other = weights(2 * MIB), weights(3 * MIB)
    kept = pulled(cli, registry, "lost-kept", mounted)
    pulled(cli, registry, "lost-other", other)
    target = tmp_path / "mnt"
    assert cli.run("mount", kept, str(target)).status == 0
    for file in cli.root.glob("state.db*"):
        file.unlink()
    with serve_driver(folder, "--min-free", "0") as driver:
        tree = cli.root / "models/sha256" / mounted.digest.hex
        wait_until(
            lambda: cli.run("status", "--json").json["disk"]["orphan_bytes"] == 0, "no orphans"
        )
        assert (target / "model-0.safetensors").stat().st_size == 2 * MIB
        assert tree.is_dir()
        assert not (cli.root / "models/sha256" / other.digest.hex).exists()
        assert "released blobs/sha256/" in driver.log.read_text()
        assert f"adopted models/sha256/{mounted.digest.hex}" in driver.log.read_text()
        refused = cli.run("rm", str(mounted.digest), "--json")
        assert refused.error["code"] == "Conflict"
        assert cli.run("gc", "--all", "--json").json["evicted"] == []
        assert mount_at(target) is not None
        # the registry's word for it again: nothing has to be fetched
        assert cli.run("pull", kept, "--json").json["fetched"] == 0
    shutil.rmtree(folder / "kubelet")


def test_serve_collects_when_a_pull_or_a_volume_has_ended(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer
) -> None:
    folder = tmp_path / "driver"
    folder.mkdir()
    cli = ModelCsi(folder / "root", cli.home, cli.environment)
    target = tmp_path / "mnt"
    limits = ("--max-size", "20MiB", "--gc-high-watermark", "60", "--gc-low-watermark", "45")
    with serve_driver(folder, "--min-free", "0", *limits):
        mounted = pulled(cli, registry, "serve-mounted", weights(5 * MIB))
        assert cli.run("mount", mounted, str(target)).status == 0
        for number in range(2):
            pulled(cli, registry, f"serve-{number}", weights(4 * MIB))
        # what is mounted stays, though it is the oldest
        wait_until(lambda: listed(cli) == {mounted}, "all that is not mounted went")
        big = weights(7 * MIB).push(registry, "commands/serve-big", "v1")
        other = tmp_path / "other"
        assert cli.run("mount", big, str(other)).status == 0
        wait_until(lambda: listed(cli) == {mounted, big}, "what is mounted is all there is")
        assert cli.run("unmount", str(target)).status == 0
        wait_until(lambda: listed(cli) == {big}, "what was unmounted went")
        assert cli.run("unmount", str(other)).status == 0


def test_serve_starts_and_takes_volumes_down_on_a_full_disk(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer
) -> None:
    with small_disk(tmp_path / "driver", 64 * MIB) as folder:
        cli = ModelCsi(folder / "root", cli.home, cli.environment)
        kept = pulled(cli, registry, "full-disk", weights(8 * MIB))
        target = tmp_path / "mnt"
        assert cli.run("mount", kept, str(target)).status == 0
        for name in ("somebody-elses", "the-last-blocks"):
            fill(folder / name)
        config = tmp_path / "config"
        config.mkdir()
        with serve_driver(config, "--min-free", "0", "--root", str(cli.root)):
            assert (target / "model-0.safetensors").stat().st_size == 8 * MIB
            refused = cli.run(
                "pull", weights(4 * MIB).push(registry, "commands/full-no", "v1"), "--json"
            )
            assert refused.error["code"] == "NoSpace"
            assert cli.run("unmount", str(target)).status == 0
            assert mount_at(target) is None
            # and what is not used any more gives the room
            wait_until(lambda: listed(cli) == set(), "the model went")
            assert cli.run("pull", registry.reference("commands/full-no", "v1")).status == 0
