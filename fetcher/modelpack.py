"""ModelPack: what an OCI manifest says about a model. No I/O.

Sections are those of the model format specification (``docs/spec.md``, ``docs/annotations.md``).
Its older ``cnai`` spelling is read as well, also mixed with the new one. The files that a model
consists of are hostile until checked, by :mod:`fetcher.artifacts`.
"""

from __future__ import annotations

import enum
import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from fetcher.artifacts import FileEntry, Tree, quoted, safe_path
from fetcher.errors import InvalidArtifact
from fetcher.file_metadata import FileMetadata
from fetcher.oci import Descriptor
from fetcher.patterns import Patterns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fetcher.oci import Digest, Manifest

ARTIFACT_TYPE: Final = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE: Final = "application/vnd.cncf.model.config.v1+json"
FILEPATH: Final = "org.cncf.model.filepath"
FILE_METADATA: Final = "org.cncf.model.file.metadata+json"

MAX_MODEL_BYTES: Final = 1 << 50
"""Of all layers together, so that every sum of sizes fits wherever it is kept."""

_ARTIFACT_TYPES: Final = (ARTIFACT_TYPE, "application/vnd.cnai.model.manifest.v1+json")
_CONFIG_TYPES: Final = (CONFIG_TYPE, "application/vnd.cnai.model.config.v1+json")
_FILEPATHS: Final = (FILEPATH, "org.cnai.model.filepath")
_FILE_METADATAS: Final = (FILE_METADATA, "org.cnai.model.file.metadata+json")
_TITLE: Final = "org.opencontainers.image.title"
_IMAGE_CONFIGS: Final = (
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
)


class Kind(enum.Enum):
    """What a layer is for; the value is the media type's word."""

    WEIGHT = "weight"
    WEIGHT_CONFIG = "weight.config"
    DOC = "doc"
    CODE = "code"
    DATASET = "dataset"


class Packing(enum.Enum):
    """How a layer holds its files; the value is the media type's word."""

    RAW = "raw"
    TAR = "tar"
    TAR_GZIP = "tar+gzip"
    TAR_ZSTD = "tar+zstd"


def layer_type(kind: Kind, packing: Packing, vendor: str = "cncf") -> str:
    """The media type of a layer, ``docs/spec.md``, "layers"."""
    return f"application/vnd.{vendor}.model.{kind.value}.v1.{packing.value}"


_LAYER_TYPES: Final = {
    layer_type(kind, packing, vendor): (kind, packing)
    for kind in Kind
    for packing in Packing
    for vendor in ("cncf", "cnai")
}


@dataclass(frozen=True, slots=True)
class Position:
    """Which layer of which model it is."""

    model: Digest
    """The manifest's digest."""
    index: int
    """Among the manifest's layers."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: a file as it is, or an archive of files."""

    descriptor: Descriptor
    kind: Kind
    packing: Packing
    path: str | None
    """A safe path. A raw layer always has one and it is its file's; an archive's own headers name
    its files, and this is only what the packager noted."""
    executable: bool = False
    mtime_ns: int | None = None
    """Both only of a raw layer, as an archive has them per file."""
    position: Position | None = field(default=None, compare=False)
    """Where it was found; None for a blob that is fetched by itself."""


def blob_layer(
    digest: Digest, size: int, media_type: str, position: Position | None = None
) -> Layer:
    """A blob that is fetched by itself, to be laid out as a layer of that media type would be.

    One of any other type is a file, and has no path in a tree.
    """
    kind, packing = _LAYER_TYPES.get(media_type, (Kind.DOC, Packing.RAW))
    return Layer(Descriptor(media_type, digest, size), kind, packing, None, position=position)


@dataclass(frozen=True, slots=True)
class Model:
    """A model: its manifest's digest, its config and its layers, checked against each other."""

    digest: Digest
    artifact_type: str
    config: Descriptor
    layers: tuple[Layer, ...]
    annotations: Mapping[str, str] = field(hash=False)

    @property
    def size(self) -> int:
        """Bytes of all layers, a blob that several of them share counted once."""
        return sum({one.descriptor.digest: one.descriptor.size for one in self.layers}.values())


def read_model(manifest: Manifest) -> Model:
    """Read a manifest as a model.

    Raises :class:`InvalidArtifact` saying what it is instead, which layer is of an unknown media
    type, has no usable path or contradicts its metadata, and which layers contradict each other.
    What is inside archives can only be checked when they are unpacked.
    """
    artifact_type = _artifact_type(manifest)
    if not manifest.layers:
        raise InvalidArtifact("the model has no layers: there is nothing to mount")
    layers = tuple(
        replace(_read_layer(descriptor), position=Position(manifest.digest, index))
        for index, descriptor in enumerate(manifest.layers)
    )
    _check_files(layers)
    _check_blobs(layers)
    return Model(manifest.digest, artifact_type, manifest.config, layers, manifest.annotations)


def _artifact_type(manifest: Manifest) -> str:
    """The artifact type; by the config's where old tools wrote none."""
    found, config = manifest.artifact_type, manifest.config.media_type
    if found in _ARTIFACT_TYPES:
        return found
    if found is None and config in _CONFIG_TYPES:
        return _ARTIFACT_TYPES[_CONFIG_TYPES.index(config)]
    what = f"its artifactType is {quoted(found)}" if found else "it has no artifactType"
    is_image = (
        "; it looks like a container image, which a container runtime mounts and not this driver"
        if config in _IMAGE_CONFIGS
        else ""
    )
    raise InvalidArtifact(
        f"not a ModelPack model: {what} and its config is {quoted(config)}{is_image}; expected "
        f"artifactType {ARTIFACT_TYPE}",
        artifact_type=found,
        config_type=config[:200],
    )


def _read_layer(descriptor: Descriptor) -> Layer:
    known = _LAYER_TYPES.get(descriptor.media_type)
    if known is None:
        raise InvalidArtifact(
            f"the layer {descriptor.digest} has the media type {quoted(descriptor.media_type)}, "
            "which is none of ModelPack's",
            media_type=descriptor.media_type[:200],
        )
    kind, packing = known
    try:
        if packing is Packing.RAW:
            return _read_raw(descriptor, kind)
        return _read_archive(descriptor, kind, packing)
    except InvalidArtifact as error:
        raise InvalidArtifact(
            f"the layer {descriptor.digest}: {error.message}", digest=descriptor.digest
        ) from error


def _read_raw(descriptor: Descriptor, kind: Kind) -> Layer:
    noted = _annotation(descriptor, (*_FILEPATHS, _TITLE))
    if noted is None:
        raise InvalidArtifact(f"a raw layer needs a path, and its {FILEPATH} annotation is missing")
    path = safe_path(noted)
    if noted.endswith("/"):
        raise InvalidArtifact(f"the path {quoted(noted)} is that of a folder")
    metadata = _metadata(descriptor)
    metadata.check_regular()
    if metadata.size not in (None, descriptor.size):
        raise InvalidArtifact(
            f"{quoted(path)} has {metadata.size} bytes by its metadata, but the blob has "
            f"{descriptor.size}"
        )
    return Layer(descriptor, kind, Packing.RAW, path, metadata.is_executable, metadata.modified_ns)


def _read_archive(descriptor: Descriptor, kind: Kind, packing: Packing) -> Layer:
    _metadata(descriptor)  # has to be readable, though the archive's headers say it better
    noted = _annotation(descriptor, _FILEPATHS)
    whole_model = noted in (None, ".", "./")
    return Layer(descriptor, kind, packing, None if whole_model else safe_path(noted or ""))


def _metadata(descriptor: Descriptor) -> FileMetadata:
    text = _annotation(descriptor, _FILE_METADATAS)
    return FileMetadata() if text is None else FileMetadata.parse(text)


def _annotation(descriptor: Descriptor, keys: tuple[str, ...]) -> str | None:
    return next(
        (descriptor.annotations[key] for key in keys if key in descriptor.annotations), None
    )


def _check_files(layers: tuple[Layer, ...]) -> None:
    tree = Tree()
    for layer in layers:
        if layer.packing is Packing.RAW and layer.path is not None:
            tree.add(FileEntry(layer.path, layer.descriptor.size))


def _check_blobs(layers: tuple[Layer, ...]) -> None:
    blobs: dict[Digest, tuple[int, Packing]] = {}
    for layer in layers:
        digest, found = layer.descriptor.digest, (layer.descriptor.size, layer.packing)
        first = blobs.setdefault(digest, found)
        if found != first:
            raise InvalidArtifact(
                f"two layers contradict each other about the blob {digest}: {first[0]} bytes, "
                f"{first[1].value}, and {found[0]} bytes, {found[1].value}"
            )
    total = sum(layer.descriptor.size for layer in layers)
    if total > MAX_MODEL_BYTES:
        raise InvalidArtifact(
            f"the model's layers have {total} bytes together; at most {MAX_MODEL_BYTES} are mounted"
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """Which files of a model a volume shows.

    Raises :class:`fetcher.errors.InvalidRequest` when it is made with something that is no pattern.
    """

    exclude_weights: bool = False
    """Leave out all that is of kind ``weight``, unless a negated pattern keeps it."""
    exclude_patterns: tuple[str, ...] = ()
    """As in a ``.gitignore`` file at the model's root; see :class:`fetcher.patterns.Patterns`."""
    _patterns: Patterns = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_patterns", Patterns(self.exclude_patterns))

    @property
    def key(self) -> str:
        """Short, stable and safe as a file name; empty when nothing is excluded."""
        if not self.exclude_weights and not self.exclude_patterns:
            return ""
        canonical = json.dumps([self.exclude_weights, self.exclude_patterns], separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def wants_layer(self, layer: Layer) -> bool:
        """Whether any file of ``layer`` may be wanted: whether it has to be fetched."""
        if layer.packing is Packing.RAW and layer.path is not None:
            return self.wants_path(layer.kind, layer.path)
        excluded = self.exclude_weights and layer.kind is Kind.WEIGHT
        return not excluded or self._patterns.keeps_any

    def layers(self, model: Model) -> dict[Digest, Layer]:
        """The layers of ``model`` that :meth:`wants_layer` wants, by blob: each blob once."""
        return {layer.descriptor.digest: layer for layer in model.layers if self.wants_layer(layer)}

    def wants_path(self, kind: Kind, path: str) -> bool:
        """Whether the file at ``path``, of a layer of ``kind``, is shown."""
        verdict = self._patterns.excludes(path)
        if verdict is None:
            verdict = self.exclude_weights and kind is Kind.WEIGHT
        return not verdict
