"""In which order a model is filled."""

from __future__ import annotations

import json

import pytest

from fetcher.lazy_order import fill_order, read_shards
from fetcher.modelpack import Kind, Packing, read_model
from tests.support.models import ModelBuilder

BIG = 1024 * 1024 + 1


def steps(builder: ModelBuilder, shards: list[str] | None = None) -> list[str]:
    """The paths of all steps, those that are for the begin alone with a colon."""
    layers = read_model(builder.manifest()).layers
    return [
        (step.layer.path or step.layer.packing.value) + (":" if step.head else "")
        for step in fill_order(layers, shards or [])
    ]


def content(mark: str) -> bytes:
    return mark.encode() * (BIG // len(mark.encode()) + 1)


def test_small_files_heads_shards_in_their_order_and_the_rest() -> None:
    builder = (
        ModelBuilder()
        .add_raw("README.md", content("r"), Kind.DOC)
        .add_raw("data.bin", content("d"), Kind.DATASET)
        .add_raw("model-10.safetensors", content("10"))
        .add_raw("model-9.safetensors", content("9"))
        .add_raw("model.gguf", content("g"))
        .add_tar({"a": content("t")}, Packing.TAR, Kind.CODE)
        .add_raw("config.json", b"{}", Kind.WEIGHT_CONFIG)
    )
    assert steps(builder) == [
        "config.json",
        "model-10.safetensors:",
        "model-9.safetensors:",
        "model.gguf:",
        "tar",
        "model-9.safetensors",
        "model-10.safetensors",
        "model.gguf",
        "README.md",
        "data.bin",
    ]
    ordered = steps(builder, ["model-10.safetensors", "model-9.safetensors"])
    assert ordered[4:6] == ["model-10.safetensors", "model-9.safetensors"]


def test_the_index_of_shards_comes_among_the_first_however_large() -> None:
    builder = (
        ModelBuilder()
        .add_raw("a.safetensors", content("a"))
        .add_raw("m/model.safetensors.index.json", content("{"))
    )
    assert steps(builder)[0] == "m/model.safetensors.index.json"


def test_shards_are_in_the_order_of_their_tensors() -> None:
    index = {"metadata": {}, "weight_map": {"x": "b", "y": "a", "z": "b"}}
    assert read_shards("m/model.safetensors.index.json", json.dumps(index).encode()) == [
        "m/b",
        "m/a",
    ]
    assert read_shards("i.json", json.dumps(index).encode()) == ["b", "a"]


@pytest.mark.parametrize("text", [b"", b"[]", b'{"weight_map": [1]}', b"\xff", b"[" * 100000])
def test_an_index_that_is_none_orders_nothing(text: bytes) -> None:
    assert read_shards("i.json", text) == []
