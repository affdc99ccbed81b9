"""In which order the layers of a lazy model are fetched while nobody reads them. Pure policy.

First what every engine looks at before it loads anything: small files, and the begin of every shard
of weights, where its tensors are listed. Then the shards in the order in which engines read them,
and last what hardly anybody reads at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from fetcher.modelpack import Kind, Packing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fetcher.modelpack import Layer

_SMALL_BYTES: Final = 1024 * 1024
_INDEX_SUFFIX: Final = ".safetensors.index.json"
MAX_INDEX_BYTES: Final = 32 * 1024 * 1024
_LISTING_TENSORS: Final = (".safetensors", ".gguf")
_LATE: Final = {Kind.DOC: 1, Kind.DATASET: 2}
_DIGITS: Final = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class Step:
    """A layer to fetch, or only what stands at its begin."""

    layer: Layer
    head: bool = False


def fill_order(layers: Iterable[Layer], shards: Sequence[str] = ()) -> list[Step]:
    """The steps that fetch ``layers``; ``shards`` are the paths of weights in their order."""
    first: list[Step] = []
    heads: list[Step] = []
    rest: list[Layer] = []
    for layer in layers:
        if layer.descriptor.size <= _SMALL_BYTES or shard_index(layer):
            first.append(Step(layer))
            continue
        rest.append(layer)
        if layer.packing is Packing.RAW and (layer.path or "").endswith(_LISTING_TENSORS):
            heads.append(Step(layer, head=True))
    places = {path: number for number, path in reversed(list(enumerate(shards)))}

    def place(layer: Layer) -> tuple[int, int, list[tuple[int, int, str]]]:
        path = layer.path or ""
        late = _LATE.get(layer.kind, 0)
        return late, places.get(path, len(places)), _natural(path)

    return [*first, *heads, *map(Step, sorted(rest, key=place))]


def shard_index(layer: Layer) -> bool:
    """Whether a layer is the file that says which tensor is in which shard."""
    return (
        layer.packing is Packing.RAW
        and (layer.path or "").endswith(_INDEX_SUFFIX)
        and layer.descriptor.size <= MAX_INDEX_BYTES
    )


class _Index(msgspec.Struct):
    weight_map: dict[str, str] = {}


def read_shards(path: str, content: bytes) -> list[str]:
    """The shards that an index at ``path`` names, in the order of their tensors; none if it is not
    one: it only says what comes first.
    """
    try:
        index = msgspec.json.decode(content, type=_Index)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    folder = path.rpartition("/")[0]
    names = dict.fromkeys(index.weight_map.values())
    return [f"{folder}/{name}" if folder else name for name in names]


def _natural(path: str) -> list[tuple[int, int, str]]:
    """A key by which ``part-10`` comes behind ``part-9``."""
    parts = _DIGITS.split(path)
    return [(1, int(one), "") if one.isdecimal() else (0, 0, one) for one in parts]
