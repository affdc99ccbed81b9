"""Models and layers made for tests: good ones of every kind and packing, and hostile ones."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import zstandard

from fetcher.modelpack import Kind, Packing, layer_type
from fetcher.oci import Digest, Manifest, parse_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.support.registry import RegistryServer

IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MTIME = 1_700_000_000


@dataclass(frozen=True)
class Member:
    """One entry of a tar layer, written as it is said, sensible or not."""

    name: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    target: str = ""
    mode: int = 0o644
    mtime: float = MTIME
    pax: Mapping[str, str] = field(default_factory=dict)

    def header(self) -> tarfile.TarInfo:
        info = tarfile.TarInfo(self.name)
        info.size = len(self.data)
        info.type = self.type
        info.linkname = self.target
        info.mode = self.mode
        info.mtime = self.mtime
        info.pax_headers = dict(self.pax)
        return info


def folder(name: str) -> Member:
    return Member(name, type=tarfile.DIRTYPE, mode=0o755)


def symlink(name: str, target: str) -> Member:
    return Member(name, type=tarfile.SYMTYPE, target=target)


def hard_link(name: str, target: str) -> Member:
    return Member(name, type=tarfile.LNKTYPE, target=target)


def make_tar(
    members: Iterable[Member], format: int = tarfile.PAX_FORMAT, headers: Mapping[str, str] = {}
) -> bytes:
    """A tar archive; ``headers`` go into a global pax header."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=format, pax_headers=headers) as archive:
        for member in members:
            info = member.header()
            archive.addfile(info, io.BytesIO(member.data) if member.data else None)
    return output.getvalue()


def tar_files(files: Mapping[str, bytes]) -> bytes:
    """A tar archive of plain files."""
    return make_tar(Member(name, data) for name, data in files.items())


def pack(archive: bytes, packing: Packing) -> bytes:
    """Compress a tar archive as ``packing`` says."""
    match packing:
        case Packing.TAR_GZIP:
            return gzip.compress(archive, compresslevel=1, mtime=0)
        case Packing.TAR_ZSTD:
            return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(archive)
        case _:
            return archive


def header_block(
    name: bytes,
    size: int | bytes = 0,
    type: bytes = b"0",
    *,
    target: bytes = b"",
    mode: bytes = b"0000644\0",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
) -> bytes:
    """One raw header block with a right checksum, for what no tar writer would write."""
    number = b"%011o\0" % size if isinstance(size, int) else size
    block = bytearray(512)
    block[0:100] = name[:100].ljust(100, b"\0")
    block[100:108] = mode
    block[108:124] = b"0000000\0" * 2
    block[124:136] = number
    block[136:148] = b"%011o\0" % MTIME
    block[148:156] = b" " * 8
    block[156:157] = type
    block[157:257] = target[:100].ljust(100, b"\0")
    block[257:265] = magic
    block[345:500] = prefix[:155].ljust(155, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax_record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    total = length + len(str(length))
    total = length + len(str(total))
    return b"%d %s=%s\n" % (total, key, value)


END = bytes(1024)
"""The end of an archive."""


def gzip_bomb(zeros: int) -> bytes:
    """A tar+gzip layer of a few KiB whose one file is ``zeros`` bytes long."""
    output = io.BytesIO()
    with gzip.GzipFile(fileobj=output, mode="wb", mtime=0) as stream:
        stream.write(header_block(b"bomb", zeros))
        for _ in range(zeros // (1 << 20)):
            stream.write(bytes(1 << 20))
        stream.write(bytes(zeros % (1 << 20)) + END)
    return output.getvalue()


class ModelBuilder:
    """Puts a model together: layers, a config, a manifest, all as bytes.

    ``vendor`` is the spelling of media types and annotations, ``cncf`` or ``cnai``.
    """

    def __init__(self, vendor: str = "cncf") -> None:
        self.vendor = vendor
        self.blobs: dict[Digest, bytes] = {}
        self.document: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": IMAGE_MANIFEST,
            "artifactType": f"application/vnd.{vendor}.model.manifest.v1+json",
            "config": self._descriptor(
                f"application/vnd.{vendor}.model.config.v1+json",
                json.dumps({"descriptor": {"name": "tiny"}, "config": {}}).encode(),
            ),
            "layers": [],
        }
        """The manifest as it will be written: a test may change it to whatever it likes."""

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The layers' descriptors, to be changed in place."""
        layers: list[dict[str, Any]] = self.document["layers"]
        return layers

    def add_raw(
        self,
        path: str,
        data: bytes,
        kind: Kind = Kind.WEIGHT,
        *,
        metadata: Mapping[str, object] | None = None,
    ) -> ModelBuilder:
        """One file as it is; ``metadata`` goes into its annotation."""
        annotations = {self._key("filepath"): path}
        if metadata is not None:
            annotations[self._key("file.metadata+json")] = json.dumps(metadata)
        return self.add_layer(layer_type(kind, Packing.RAW, self.vendor), data, annotations)

    def add_tar(
        self,
        members: Mapping[str, bytes] | Iterable[Member],
        packing: Packing = Packing.TAR,
        kind: Kind = Kind.WEIGHT,
        path: str | None = None,
    ) -> ModelBuilder:
        """An archive of plain files, or of whatever ``members`` says."""
        archive = tar_files(members) if isinstance(members, Mapping) else make_tar(members)
        annotations = {} if path is None else {self._key("filepath"): path}
        media_type = layer_type(kind, packing, self.vendor)
        return self.add_layer(media_type, pack(archive, packing), annotations)

    def add_layer(
        self, media_type: str, data: bytes, annotations: Mapping[str, str] | None = None
    ) -> ModelBuilder:
        """A blob of any media type."""
        descriptor = self._descriptor(media_type, data)
        if annotations:
            descriptor["annotations"] = dict(annotations)
        self.layers.append(descriptor)
        return self

    @property
    def body(self) -> bytes:
        """The manifest's bytes."""
        return json.dumps(self.document).encode()

    @property
    def digest(self) -> Digest:
        return Digest.of(self.body)

    def manifest(self) -> Manifest:
        parsed = parse_manifest(self.body, None)
        assert isinstance(parsed, Manifest)
        return parsed

    def push(self, registry: RegistryServer, repository: str, tag: str = "latest") -> str:
        """Push blobs and manifest to a real registry; returns the reference."""
        for data in self.blobs.values():
            registry.push_blob(repository, data)
        registry.push_manifest(repository, tag, self.body, self.document["mediaType"])
        return registry.reference(repository, tag)

    def _key(self, name: str) -> str:
        return f"org.{self.vendor}.model.{name}"

    def _descriptor(self, media_type: str, data: bytes) -> dict[str, Any]:
        digest = Digest.of(data)
        self.blobs[digest] = data
        return {"mediaType": media_type, "digest": str(digest), "size": len(data)}


def tiny_model(vendor: str = "cncf") -> ModelBuilder:
    """A model with a layer of every packing: weights, config, code and a read-me."""
    return (
        ModelBuilder(vendor)
        .add_raw("model.safetensors", bytes(range(256)) * 64, Kind.WEIGHT)
        .add_raw("config.json", b'{"model_type": "bert"}', Kind.WEIGHT_CONFIG)
        .add_tar({"tokenizer/vocab.txt": b"a\nb\n"}, Packing.TAR, Kind.WEIGHT_CONFIG)
        .add_tar([Member("run.sh", b"#!/bin/sh\n", mode=0o755)], Packing.TAR_GZIP, Kind.CODE)
        .add_tar({"README.md": b"# Tiny\n"}, Packing.TAR_ZSTD, Kind.DOC)
    )
