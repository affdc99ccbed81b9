"""A process that loads a model as an engine does: every tensor of every shard, by several threads.

``python -m tests.support.tensor_reader FOLDER THREADS`` prints one digest for each tensor's name.
"""

from __future__ import annotations

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import safe_open

MIB = 1024 * 1024
INDEX = "model.safetensors.index.json"


def digests(folder: Path, threads: int) -> dict[str, str]:
    """What is in each tensor, read through mappings of the shards."""
    index = folder / INDEX
    weight_map: dict[str, str] | None = None
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(weight_map.values()) if weight_map else {"model.safetensors"})

    def load(shard: str) -> dict[str, str]:
        with safe_open(folder / shard, framework="np") as tensors:
            return {
                name: hashlib.sha256(tensors.get_tensor(name).tobytes()).hexdigest()
                for name in tensors.keys()  # noqa: SIM118 (it is no mapping)
            }

    found: dict[str, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        for part in pool.map(load, shards):
            found.update(part)
    assert weight_map is None or set(found) == set(weight_map)
    return found


def main() -> None:
    """Print them."""
    print(json.dumps(digests(Path(sys.argv[1]), int(sys.argv[2]))))


if __name__ == "__main__":
    main()
