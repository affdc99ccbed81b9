"""Manifests as models: both spellings, every layer type, and everything that makes them refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fetcher.errors import InvalidArtifact, InvalidRequest
from fetcher.file_metadata import FileMetadata
from fetcher.modelpack import Kind, Layer, Packing, Selection, layer_type, read_model
from fetcher.oci import Manifest, parse_manifest
from tests.support.layouts import MODCTL
from tests.support.models import Member, ModelBuilder, tiny_model

VENDORS = ["cncf", "cnai"]


def refuse(builder: ModelBuilder, why: str) -> InvalidArtifact:
    with pytest.raises(InvalidArtifact, match=why) as caught:
        read_model(builder.manifest())
    assert len(caught.value.message) < 1500
    assert caught.value.message.isprintable()
    return caught.value


@pytest.mark.parametrize("vendor", VENDORS)
def test_a_model_is_read_in_both_spellings(vendor: str) -> None:
    builder = tiny_model(vendor)
    model = read_model(builder.manifest())
    assert model.digest == builder.digest
    assert model.artifact_type == f"application/vnd.{vendor}.model.manifest.v1+json"
    assert [(layer.kind, layer.packing, layer.path) for layer in model.layers] == [
        (Kind.WEIGHT, Packing.RAW, "model.safetensors"),
        (Kind.WEIGHT_CONFIG, Packing.RAW, "config.json"),
        (Kind.WEIGHT_CONFIG, Packing.TAR, None),
        (Kind.CODE, Packing.TAR_GZIP, None),
        (Kind.DOC, Packing.TAR_ZSTD, None),
    ]
    assert model.size == sum(layer["size"] for layer in builder.layers)


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("kind", Kind)
def test_every_layer_type_is_known(vendor: str, kind: Kind, packing: Packing) -> None:
    builder = ModelBuilder()
    builder.add_layer(
        f"application/vnd.{vendor}.model.{kind.value}.v1.{packing.value}",
        b"x",
        {"org.cncf.model.filepath": "a/b"},
    )
    [layer] = read_model(builder.manifest()).layers
    assert (layer.kind, layer.packing, layer.path) == (kind, packing, "a/b")


@pytest.mark.parametrize("tag", ["raw", "tar"])
def test_what_modctl_builds_is_read(tag: str) -> None:
    index = json.loads((MODCTL / "layout" / "index.json").read_bytes())
    [digest] = [
        one["digest"]
        for one in index["manifests"]
        if one["annotations"]["org.opencontainers.image.ref.name"] == tag
    ]
    body = (MODCTL / "layout" / "blobs" / digest.replace(":", "/")).read_bytes()
    manifest = parse_manifest(body, None)
    assert isinstance(manifest, Manifest)
    model = read_model(manifest)
    assert sorted(layer.path or "" for layer in model.layers) == sorted(
        str(path.relative_to(MODCTL / "model"))
        for path in (MODCTL / "model").rglob("*")
        if path.is_file()
    )
    if tag == "raw":
        executables = {layer.path for layer in model.layers if layer.executable}
        assert executables == {"run.sh"}
        assert all(layer.mtime_ns for layer in model.layers)


def test_shared_blobs_count_once() -> None:
    builder = ModelBuilder().add_raw("a", b"same").add_raw("b", b"same").add_raw("c", b"other")
    assert read_model(builder.manifest()).size == 9


@pytest.mark.parametrize("vendor", VENDORS)
def test_old_tools_wrote_no_artifact_type(vendor: str) -> None:
    builder = ModelBuilder(vendor).add_raw("a", b"x")
    del builder.document["artifactType"]
    model = read_model(builder.manifest())
    assert model.artifact_type == f"application/vnd.{vendor}.model.manifest.v1+json"


def test_the_config_of_a_model_may_be_anything() -> None:
    builder = ModelBuilder().add_raw("a", b"x")
    builder.document["config"]["mediaType"] = "application/vnd.oci.empty.v1+json"
    assert len(read_model(builder.manifest()).layers) == 1


@pytest.mark.parametrize(
    ("artifact_type", "config", "why"),
    [
        (None, "application/vnd.oci.image.config.v1+json", "no artifactType.*container image"),
        (None, "application/vnd.docker.container.image.v1+json", "container image"),
        (None, "application/vnd.oci.empty.v1+json", "no artifactType.*oci.empty"),
        ("application/spdx+json", "application/vnd.oci.empty.v1+json", "spdx.*expected"),
        ("application/spdx+json", "application/vnd.cncf.model.config.v1+json", "spdx"),
        ("x" * 10**6, "y" * 10**6, "not a ModelPack model"),
        ("a\n\x1b[31m", "y", "not a ModelPack model"),
    ],
)
def test_what_is_no_model_is_named(artifact_type: str | None, config: str, why: str) -> None:
    builder = ModelBuilder().add_raw("a", b"x")
    builder.document["artifactType"] = artifact_type
    builder.document["config"]["mediaType"] = config
    refuse(builder, why)


def test_a_model_without_layers_is_refused() -> None:
    refuse(ModelBuilder(), "no layers")


@pytest.mark.parametrize(
    "media_type",
    [
        "",
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.cncf.model.weight.v2.raw",
        "application/vnd.cncf.model.weight.v1.tar+xz",
        "application/vnd.cncf.model.weight.v1.raw ",
        "x" * 10**6,
    ],
)
def test_an_unknown_layer_is_named(media_type: str) -> None:
    builder = ModelBuilder().add_raw("a", b"x").add_layer(media_type, b"y")
    error = refuse(builder, "none of ModelPack's")
    assert repr(media_type[:50])[:-1] in error.message
    assert builder.layers[1]["digest"] in error.message


@pytest.mark.parametrize(
    ("annotations", "path"),
    [
        ({"org.cncf.model.filepath": "a"}, "a"),
        ({"org.cnai.model.filepath": "./b//c"}, "b/c"),
        ({"org.opencontainers.image.title": "d"}, "d"),
        ({"org.opencontainers.image.title": "d", "org.cnai.model.filepath": "c"}, "c"),
        ({"org.cnai.model.filepath": "c", "org.cncf.model.filepath": "a"}, "a"),
    ],
)
def test_where_the_path_of_a_raw_layer_is(annotations: dict[str, str], path: str) -> None:
    media_type = layer_type(Kind.DOC, Packing.RAW)
    builder = ModelBuilder().add_layer(media_type, b"x", annotations)
    assert read_model(builder.manifest()).layers[0].path == path


def test_a_raw_layer_without_a_path_is_named() -> None:
    builder = ModelBuilder().add_layer(layer_type(Kind.DOC, Packing.RAW), b"x")
    assert builder.layers[0]["digest"] in refuse(builder, "needs a path").message


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("path", ["/etc/passwd", "../a", "a/../b", "", "a\0b", "n" * 256, "a\nb"])
def test_unsafe_paths_are_refused(packing: Packing, path: str) -> None:
    builder = ModelBuilder().add_layer(
        layer_type(Kind.DOC, packing), b"x", {"org.cncf.model.filepath": path}
    )
    refuse(builder, "path")


@pytest.mark.parametrize("path", [".", "a/", "./"])
def test_a_raw_layer_is_no_folder(path: str) -> None:
    refuse(ModelBuilder().add_raw(path, b"x"), "path")


def test_an_archive_may_be_the_whole_model() -> None:
    builder = ModelBuilder().add_tar({"a": b"x"}, path=".")
    assert read_model(builder.manifest()).layers[0].path is None


@pytest.mark.parametrize(
    ("paths", "why"),
    [
        (["a", "a"], "already"),
        (["a", "./a"], "already"),
        (["a", "a/b"], "not a folder"),
        (["a/b", "a"], "already"),
        (["a/b/c", "a/b"], "already"),
    ],
)
def test_files_that_contradict_each_other_are_refused(paths: list[str], why: str) -> None:
    builder = ModelBuilder()
    for number, path in enumerate(paths):
        builder.add_raw(path, bytes([number]))
    refuse(builder, why)
    # an identical blob is no excuse
    refuse(ModelBuilder().add_raw("a", b"x").add_raw("a", b"x"), "already")


def test_one_blob_is_one_thing() -> None:
    builder = ModelBuilder().add_raw("a", b"x").add_raw("b", b"x")
    builder.layers[1]["size"] = 2
    refuse(builder, "contradict each other")
    builder.layers[1]["size"] = 1
    builder.layers[1]["mediaType"] = layer_type(Kind.DOC, Packing.TAR)
    refuse(builder, "contradict each other")


def test_sizes_are_bounded_together() -> None:
    builder = ModelBuilder()
    for number in range(3):
        builder.add_raw(str(number), bytes([number]))
        builder.layers[number]["size"] = 1 << 49
    refuse(builder, "together")


def file_of(metadata: object, data: bytes = b"12345") -> ModelBuilder:
    builder = ModelBuilder().add_raw("a", data)
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    builder.layers[0]["annotations"]["org.cncf.model.file.metadata+json"] = text
    return builder


GOOD: dict[str, Any] = {
    "name": "a",
    "mode": 0o644,
    "uid": 1000,
    "gid": 1000,
    "size": 5,
    "mtime": "2025-01-02T03:04:05.123456789+02:00",
    "typeflag": 48,
}


@pytest.mark.parametrize(
    "key", ["org.cncf.model.file.metadata+json", "org.cnai.model.file.metadata+json"]
)
def test_metadata_gives_mode_and_time(key: str) -> None:
    builder = ModelBuilder().add_raw("a", b"12345")
    builder.layers[0]["annotations"][key] = json.dumps({**GOOD, "mode": 0o755, "more": [1]})
    [layer] = read_model(builder.manifest()).layers
    assert layer.executable
    assert layer.mtime_ns == 1735779845123456789


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"size": -1}, "size"),
        ({"size": 4}, "4 bytes by its metadata, but the blob has 5"),
        ({"size": 6}, "6 bytes"),
        ({"size": 1 << 63}, "size"),
        ({"size": 10**30}, "size"),
        ({"size": 5.5}, "size"),
        ({"size": "5"}, "size"),
        ({"mode": -1}, "mode"),
        ({"mode": 1 << 32}, "mode"),
        ({"mode": "0644"}, "mode"),
        ({"mode": True}, "mode"),
        ({"mode": 0o4755}, "setuid"),
        ({"mode": 0o2755}, "setgid"),
        ({"mode": 1 << 23 | 0o755}, "setuid"),
        ({"mode": 1 << 22 | 0o755}, "setuid"),
        ({"mode": 1 << 31 | 0o755}, "not a regular"),
        ({"mode": 1 << 27 | 0o755}, "not a regular"),
        ({"mode": 0o040755}, "not a regular"),
        ({"mode": 0o120777}, "not a regular"),
        ({"typeflag": 53}, "not a regular"),
        ({"typeflag": 50}, "not a regular"),
        ({"typeflag": 49}, "not a regular"),
        ({"typeflag": 256}, "typeflag"),
        ({"typeflag": "0"}, "typeflag"),
        ({"mtime": 5}, "mtime"),
        ({"mtime": ["2025"]}, "mtime"),
        ({"name": {}}, "name"),
        ({"uid": -1}, "uid"),
    ],
)
def test_bad_metadata_is_refused(change: dict[str, object], why: str) -> None:
    refuse(file_of({**GOOD, **change}), why)


@pytest.mark.parametrize(
    "text",
    ["", "x", "[]", "null", "5", "{", '{"size":1e999}', '{"a":' * 10**4, '{"a":' + "[" * 10**4],
)
def test_metadata_that_is_none_is_refused(text: str) -> None:
    refuse(file_of(text), "metadata")


def test_metadata_is_bounded() -> None:
    refuse(file_of({"name": "n" * 100_000}), "more than")


def test_metadata_of_an_archive_is_only_informative() -> None:
    builder = ModelBuilder().add_tar([Member("a", b"x")], path="a")
    annotations = builder.layers[0]["annotations"]
    annotations["org.cncf.model.file.metadata+json"] = json.dumps({**GOOD, "size": 99})
    [layer] = read_model(builder.manifest()).layers
    assert (layer.executable, layer.mtime_ns) == (False, None)
    annotations["org.cncf.model.file.metadata+json"] = "{"
    refuse(builder, "metadata")


@pytest.mark.parametrize(
    ("mode", "executable"),
    [(None, False), (0, False), (0o644, False), (0o100755, True), (0o001, True), (0o1755, True)],
)
def test_modes(mode: int | None, executable: bool) -> None:
    metadata = FileMetadata(mode=mode)
    metadata.check_regular()
    assert metadata.is_executable is executable


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:00.000000001Z", 1),
        ("1970-01-01T01:00:00.5+01:00", 500_000_000),
        ("1970-01-01t00:00:01z", 10**9),
        ("2262-01-01T00:00:00Z", 9214646400 * 10**9),
        ("0001-01-01T00:00:00Z", None),
        ("0001-01-01T00:00:00+23:59", None),
        ("9999-12-31T23:59:59-23:59", None),
        ("0000-01-01T00:00:00Z", None),
        ("1969-12-31T23:59:59Z", None),
        ("2025-02-30T00:00:00Z", None),
        ("2025-01-01T24:00:00Z", None),
        ("2025-01-01T00:00:60Z", None),
        ("2025-01-01T00:00:00", None),
        ("2025-01-01", None),
        ("2025-01-01T00:00:00+99:00", None),
        ("yesterday", None),
        ("", None),
        (None, None),
    ],
)
def test_times(text: str | None, nanoseconds: int | None) -> None:
    assert FileMetadata(mtime=text).modified_ns == nanoseconds


@settings(deadline=None)
@given(st.text())
def test_no_time_makes_it_crash(text: str) -> None:
    assert FileMetadata(mtime=text).modified_ns is None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3),
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD]), values, max_size=7))
def test_any_metadata_is_read_or_refused(metadata: dict[str, object]) -> None:
    try:
        FileMetadata.parse(json.dumps(metadata)).check_regular()
    except InvalidArtifact as error:
        assert len(error.message) < 1000  # noqa: PT017 -- any outcome is fine, but only these two


# -- selections ------------------------------------------------------------------------------------


def layer_of(kind: Kind, packing: Packing = Packing.RAW, path: str | None = "a") -> Layer:
    descriptor = ModelBuilder().add_raw("a", b"x").manifest().layers[0]
    return Layer(descriptor, kind, packing, path)


def test_everything_is_selected_unless_said_otherwise() -> None:
    selection = Selection()
    assert selection.key == ""
    assert all(
        selection.wants_layer(layer_of(kind, packing)) and selection.wants_path(kind, "a/b")
        for kind in Kind
        for packing in Packing
    )


@pytest.mark.parametrize("packing", Packing)
def test_weights_are_excluded_and_nothing_else(packing: Packing) -> None:
    selection = Selection(exclude_weights=True)
    wanted = {kind for kind in Kind if selection.wants_layer(layer_of(kind, packing))}
    assert wanted == {*Kind} - {Kind.WEIGHT}
    assert wanted == {kind for kind in Kind if selection.wants_path(kind, "a")}


def test_patterns_exclude_raw_layers_and_files_of_archives() -> None:
    selection = Selection(exclude_patterns=("*.bin", "!keep.bin"))
    assert not selection.wants_layer(layer_of(Kind.WEIGHT, path="sub/a.bin"))
    assert selection.wants_layer(layer_of(Kind.WEIGHT, path="keep.bin"))
    assert selection.wants_layer(layer_of(Kind.WEIGHT, Packing.TAR, path="a.bin"))
    assert not selection.wants_path(Kind.WEIGHT, "a.bin")
    assert selection.wants_path(Kind.WEIGHT, "sub/keep.bin")


def test_a_negated_pattern_keeps_a_weight() -> None:
    selection = Selection(exclude_weights=True, exclude_patterns=("!model-00001*",))
    assert selection.wants_path(Kind.WEIGHT, "model-00001-of-2.safetensors")
    assert not selection.wants_path(Kind.WEIGHT, "model-00002-of-2.safetensors")
    assert selection.wants_layer(layer_of(Kind.WEIGHT, Packing.TAR, None))


def test_keys_are_short_stable_and_different() -> None:
    selections = [
        Selection(exclude_weights=True),
        Selection(exclude_patterns=("a",)),
        Selection(exclude_patterns=("a", "b")),
        Selection(exclude_patterns=("b", "a")),
        Selection(exclude_patterns=('a","b',)),
        Selection(exclude_weights=True, exclude_patterns=("a",)),
        Selection(exclude_patterns=("ü",)),
    ]
    keys = [selection.key for selection in selections]
    assert len({*keys}) == len(keys)
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)
    assert Selection(exclude_weights=True).key == "1b711c794e696001"


@pytest.mark.parametrize("pattern", ["[", "a\\", "!"])
def test_a_bad_pattern_is_the_requests_fault(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match="not a file pattern"):
        Selection(exclude_patterns=("*.bin", pattern))


def test_selections_are_values() -> None:
    one, same = Selection(True, ("a",)), Selection(True, ("a",))
    assert one == same
    assert len({one, same}) == 1
    assert dataclasses.replace(one, exclude_weights=False) == Selection(False, ("a",))
    assert "Patterns" not in repr(one)


documents = st.fixed_dictionaries(
    {
        "schemaVersion": st.just(2),
        "artifactType": st.just("application/vnd.cncf.model.manifest.v1+json"),
        "config": st.just(ModelBuilder().document["config"]),
        "layers": st.lists(
            st.fixed_dictionaries(
                {
                    "mediaType": st.sampled_from(
                        [layer_type(Kind.DOC, Packing.RAW), layer_type(Kind.CODE, Packing.TAR)]
                    ),
                    "digest": st.sampled_from([f"sha256:{character * 64}" for character in "ab"]),
                    "size": st.integers(0, 3),
                    "annotations": st.dictionaries(
                        st.sampled_from(["org.cncf.model.filepath", "org.cnai.model.filepath"]),
                        st.text(max_size=5),
                    ),
                }
            ),
            max_size=3,
        ),
    }
)


@settings(deadline=None)
@given(documents)
def test_any_manifest_is_a_model_or_refused(document: dict[str, object]) -> None:
    manifest = parse_manifest(json.dumps(document).encode(), None)
    assert isinstance(manifest, Manifest)
    try:
        layers = read_model(manifest).layers
        assert all(layer.path for layer in layers if layer.packing is Packing.RAW)
    except InvalidArtifact as error:
        assert error.message.isprintable()  # noqa: PT017 -- any outcome is fine, but only these two
