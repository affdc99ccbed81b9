"""A model folder as a ModelPack artifact: which files, of which kind, described how. No network.

Media types, annotations and the config document are those of the ModelPack specification 1.0. Kinds
go by file name, as ModelPack's ``modctl`` has it, except that tokenizers named ``*.model``,
vocabularies in ``*.txt`` and chat templates are configuration (an engine does not start without
them), and that tables of data are datasets.
"""

from __future__ import annotations

import datetime
import fnmatch
import json
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from fetcher.artifacts import safe_path
from fetcher.errors import InvalidArtifact, InvalidRequest
from fetcher.modelpack import ARTIFACT_TYPE, CONFIG_TYPE, FILE_METADATA, FILEPATH, Kind
from fetcher.oci import IMAGE_MANIFEST

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fetcher.model_facts import Facts
    from fetcher.oci import Digest

_LARGE: Final = 128 * 1024 * 1024
"""What modctl takes for weights when the name tells nothing."""

_SKIPPED: Final = (".*", "__pycache__", "*.pyc", "*.pyo", "*.pyd", "modelfile")

_PATTERNS: Final[tuple[tuple[Kind, str], ...]] = (
    (Kind.CODE, "requirements*.txt cmakelists.txt package.json pyproject.toml setup.cfg"),
    (
        Kind.WEIGHT_CONFIG,
        "*tokenizer.model* spiece.model *.bpe.model vocab*.txt merges*.txt *.tiktoken *.jinja "
        "*.vocab config.json.* *.safetensors.index.json",
    ),
    (Kind.DATASET, "*.parquet *.arrow *.csv *.tsv *.jsonl"),
    (
        Kind.WEIGHT_CONFIG,
        "*.json *.json5 *.jsonc *.yaml *.yml *.toml *.ini *.config *.cfg *.conf *.properties "
        "*.xml *.modelcard *.hparams *.params",
    ),
    (
        Kind.WEIGHT,
        "*.safetensors *.bin *.pt *.pth *.mar *.pte *.pt2 *.ptl *.tflite *.h5 *.hdf *.hdf5 *.pb "
        "*.data-* *.index *.gguf *.ggml *.ggmf *.ggjt *.f16 *.f32 *.ckpt *.checkpoint *.dist_ckpt "
        "*.tensor *.weights *.state *.embedding *.ot *.engine *.trt *.onnx *.onnx_data *.msgpack "
        "*.pkl *.pickle *.keras *.joblib *.npy *.npz *.nc *.mlmodel *.llamafile *.caffemodel "
        "*.dlc *.nemo",
    ),
    (Kind.WEIGHT_CONFIG, "*.model"),
    (
        Kind.CODE,
        "*.py *.ipynb *.sh *.bash *.patch *.c *.h *.cc *.cpp *.cxx *.hpp *.cu *.cuh *.java *.js "
        "*.ts *.go *.rs *.rb *.lua *.pl *.r *.jl *.sql *.so *.dll *.dylib *.a makefile* "
        "dockerfile* *.dockerfile *.cmake *.mk *.bat *.ps1",
    ),
    (
        Kind.DOC,
        "*.md *.txt *.rst *.pdf *.html *.htm *.tex *.log license* notice* readme* copying* "
        "changelog* setup* *.jpg *.jpeg *.png *.gif *.bmp *.tiff *.ico *.webp *.svg *.mp4 *.mov "
        "*.webm *.doc *.docx *.xls *.xlsx *.ppt *.pptx",
    ),
)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model folder, which becomes one raw layer."""

    path: str
    """Relative to the folder, with slashes."""
    source: Path
    kind: Kind
    size: int
    mode: int
    """Unix permission bits."""
    mtime_ns: int

    @property
    def media_type(self) -> str:
        """The layer's media type."""
        return f"application/vnd.cncf.model.{self.kind.value}.v1.raw"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What of a folder goes into the artifact, in the order of the layers."""

    files: tuple[ModelFile, ...]
    skipped: tuple[str, ...]
    """Hidden files and byproducts that stay behind."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def kind_of(name: str, size: int) -> Kind:
    """The kind of a file by its name, upper and lower case alike; by its size at last."""
    lower = name.lower()
    for kind, patterns in _PATTERNS:
        if any(fnmatch.fnmatchcase(lower, pattern) for pattern in patterns.split()):
            return kind
    return Kind.WEIGHT if size > _LARGE else Kind.CODE


def scan(folder: Path) -> ModelFolder:
    """The files of a model folder, in the order of their paths. Blocking.

    Raises :class:`InvalidRequest` for a folder that is not there or empty, for links that leave it,
    and for names that no volume could show.
    """
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is not a folder")
    root = folder.resolve()
    skipped: list[str] = []
    files = [_file(root, path) for path in _walk(root, root, skipped)]
    if not files:
        raise InvalidRequest(f"{folder} has no files to push; hidden ones do not count")
    files.sort(key=lambda file: file.path)
    return ModelFolder(tuple(files), tuple(sorted(skipped)))


def _walk(root: Path, folder: Path, skipped: list[str]) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise InvalidRequest(f"cannot read the folder {folder}: {error.strerror}") from error
    for entry in entries:
        path = Path(entry.path)
        name = entry.name.lower()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _SKIPPED):
            skipped.append(str(path.relative_to(root)))
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(root, path, skipped)
        else:
            yield path


def _file(root: Path, path: Path) -> ModelFile:
    relative = PurePosixPath(path.relative_to(root))
    target = _resolved(root, path, relative)
    try:
        name = safe_path(str(relative))
        name.encode()
    except (InvalidArtifact, UnicodeEncodeError) as error:
        raise InvalidRequest(
            f"{str(relative)!r} has a name that no volume can show: rename it"
        ) from error
    status = target.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InvalidRequest(f"{relative} is neither a file nor a folder")
    return ModelFile(
        path=name,
        source=target,
        kind=kind_of(path.name, status.st_size),
        size=status.st_size,
        mode=stat.S_IMODE(status.st_mode) & 0o777,
        mtime_ns=status.st_mtime_ns,
    )


def _resolved(root: Path, path: Path, relative: PurePosixPath) -> Path:
    """Where a link inside the folder leads; an artifact of raw layers has no links itself."""
    if not path.is_symlink():
        return path
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InvalidRequest(f"{relative} is a link to something that is not there") from error
    if not target.is_relative_to(root):
        raise InvalidRequest(
            f"{relative} is a link that leaves the folder; push a copy without links (cp -rL), or, "
            "for a Hugging Face cache, download with --local-dir"
        )
    if target.is_dir():
        raise InvalidRequest(
            f"{relative} is a link to a folder; push a copy without links (cp -rL)"
        )
    return target


def layer(file: ModelFile, digest: Digest) -> dict[str, object]:
    """The descriptor of a file's layer."""
    metadata = {
        "name": PurePosixPath(file.path).name,
        "mode": file.mode,
        # whoever packed the model is nobody on the nodes that mount it
        "uid": 0,
        "gid": 0,
        "size": file.size,
        "mtime": _rfc3339(file.mtime_ns),
        # as modctl writes it for a regular file
        "typeflag": 0,
    }
    return {
        "mediaType": file.media_type,
        "digest": str(digest),
        "size": file.size,
        "annotations": {
            FILEPATH: file.path,
            FILE_METADATA: json.dumps(metadata, separators=(",", ":")),
        },
    }


def config(name: str, folder: ModelFolder, digests: Sequence[Digest], facts: Facts) -> bytes:
    """The config document. ``createdAt`` is the newest file's time, so that the same folder pushed
    twice is the same artifact.
    """
    descriptor: dict[str, str] = {
        "createdAt": _rfc3339(max(file.mtime_ns for file in folder.files)),
        "name": name,
    }
    if facts.family:
        descriptor["family"] = facts.family
    told = {
        "architecture": facts.architecture,
        "format": facts.format or _format_by_names(folder),
        "paramSize": facts.param_size,
        "precision": facts.precision,
        "quantization": facts.quantization,
    }
    document = {
        "descriptor": descriptor,
        "config": {key: value for key, value in told.items() if value},
        "modelfs": {"type": "layers", "diffIds": [str(digest) for digest in digests]},
    }
    return json.dumps(document, separators=(",", ":")).encode()


def manifest(
    layers: Sequence[Mapping[str, object]], config_digest: Digest, config_size: int
) -> dict[str, object]:
    """The manifest document."""
    return {
        "schemaVersion": 2,
        "mediaType": IMAGE_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": str(config_digest), "size": config_size},
        "layers": list(layers),
    }


_FORMATS: Final = {
    ".safetensors": "safetensors",
    ".gguf": "gguf",
    ".ggml": "ggml",
    ".onnx": "onnx",
    ".bin": "pytorch",
    ".pt": "pytorch",
    ".pth": "pytorch",
    ".ckpt": "pytorch",
    ".h5": "keras",
    ".keras": "keras",
    ".pb": "tensorflow",
    ".tflite": "tflite",
    ".msgpack": "flax",
    ".engine": "tensorrt",
}


def _format_by_names(folder: ModelFolder) -> str:
    """The format that most bytes of weights have."""
    sizes: Counter[str] = Counter()
    for file in folder.files:
        if file.kind is Kind.WEIGHT:
            sizes[_FORMATS.get(PurePosixPath(file.path).suffix.lower(), "")] += file.size
    return sizes.most_common(1)[0][0] if sizes else ""


def _rfc3339(time_ns: int) -> str:
    seconds, fraction = divmod(time_ns, 1_000_000_000)
    text = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{fraction:09d}".rstrip("0").rstrip(".") + "Z"
