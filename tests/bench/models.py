"""Models of a given size for benchmarks, pushed to a registry."""

from __future__ import annotations

import multiprocessing
import os
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

from fetcher.modelpack import Kind, Packing, layer_type
from tests.bench.measure import MIB
from tests.support.models import ModelBuilder

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.registry import RegistryServer

_BLOCK: Final = 4 * MIB
_RECORD: Final = 512
_TITLE: Final = "org.opencontainers.image.title"


@dataclass(frozen=True)
class Case:
    """A kind of model, and how the registry is reached."""

    mib: int
    """Bytes in all, in MiB; a multiple of the number of layers."""
    layers: int
    packing: Packing = Packing.RAW
    tls: bool = False

    @property
    def size(self) -> int:
        return self.mib * MIB

    @property
    def name(self) -> str:
        """As a row of a table is called."""
        size = f"{self.mib // 1024} GiB" if self.mib % 1024 == 0 else f"{self.mib} MiB"
        return f"{size} in {self.layers} {self.packing.value}{' TLS' if self.tls else ''}"


@dataclass(frozen=True)
class Blob:
    """A layer that was pushed."""

    name: str
    digest: str
    size: int


@dataclass(frozen=True)
class Pushed:
    """A model in a registry."""

    case: Case
    registry: RegistryServer
    repository: str
    layers: tuple[Blob, ...]

    @property
    def reference(self) -> str:
        return self.registry.reference(self.repository, "v1")

    def url(self, path: str) -> str:
        """The address of one of its manifests or blobs."""
        return f"{self.registry.url}/v2/{self.repository}/{path}"


def push(registry: RegistryServer, case: Case, folder: Path) -> Pushed:
    """Make a model and push it, in a process of its own: what this one has in memory counts for
    the commands that it starts. ``folder`` holds one layer at a time.
    """
    repository = f"bench/{case.packing.value}-{case.mib}-{case.layers}"
    context = multiprocessing.get_context("fork")
    results: multiprocessing.SimpleQueue[tuple[Blob, ...]] = context.SimpleQueue()

    def work() -> None:
        results.put(_push(registry, repository, case, folder / "layer"))

    process = context.Process(target=work)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the model could not be pushed")
    return Pushed(case, registry, repository, results.get())


def _push(registry: RegistryServer, repository: str, case: Case, scratch: Path) -> tuple[Blob, ...]:
    builder = ModelBuilder()
    layers = []
    for number in range(case.layers):
        name = f"model-{number + 1:05}-of-{case.layers:05}.safetensors"
        _write_layer(scratch, name, case.size // case.layers, case.packing)
        digest, size = registry.push_blob(repository, scratch), scratch.stat().st_size
        layers.append(Blob(name, str(digest), size))
        builder.layers.append(
            {
                "mediaType": layer_type(Kind.WEIGHT, case.packing, "cncf"),
                "digest": str(digest),
                "size": size,
                # oras pulls only what has a title
                "annotations": {"org.cncf.model.filepath": name, _TITLE: name},
            }
        )
    scratch.unlink()
    builder.push(registry, repository, "v1")
    return tuple(layers)


def _write_layer(path: Path, name: str, size: int, packing: Packing) -> None:
    """Write a layer of one file of ``size`` bytes that are not worth compressing."""
    with path.open("wb") as file:
        if packing is Packing.TAR:
            header = tarfile.TarInfo(name)
            header.size = size
            file.write(header.tobuf())
        _write_random(file, size)
        if packing is Packing.TAR:
            file.write(bytes(-size % _RECORD + 2 * _RECORD))


def _write_random(file: BinaryIO, size: int) -> None:
    block = os.urandom(_BLOCK)
    for offset in range(0, size, _BLOCK):
        # no two blocks are the same, and no two layers
        file.write((os.urandom(8) + block[8:])[: size - offset])
