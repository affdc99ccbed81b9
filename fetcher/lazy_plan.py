"""The plan of a lazily mounted model, on the disk: all that its worker needs to begin.

It lies beside the mount, ``<root>/lazy/<algorithm>/<hex>[.<selection>].json``, as long as some
volume shows it, so that a worker or an agent that comes back needs nobody's network. There is no
secret in it.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from fetcher.errors import InvalidArtifact, InvalidRequest, ModelError
from fetcher.modelpack import Selection, read_model
from fetcher.oci import Digest, Manifest, parse_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fetcher.modelpack import Model

LAZY: Final = "lazy"
"""The folder of the mounts, below the root."""

_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class LazyPlan:
    """Which model is shown, what of it, and how much of it is fetched unasked."""

    model: Digest
    manifest: bytes = field(repr=False)
    """The manifest's body, whose digest is ``model``."""
    media_type: str
    """The manifest's."""
    exclude_weights: bool
    exclude_patterns: tuple[str, ...]
    prefetch: str
    """The word of the volume attribute."""
    reference: str = ""
    """By which it is fetched, with the digest: what its volumes name it."""
    spoiled: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Why blobs are not shown any more, whose bytes proved wrong after they had been."""

    @property
    def selection(self) -> Selection:
        """What of the model is shown."""
        return Selection(self.exclude_weights, self.exclude_patterns)

    def read_model(self) -> Model:
        """The model of the plan. Raises :class:`InvalidArtifact` when there is none in it."""
        manifest = parse_manifest(self.manifest, self.media_type)
        if not isinstance(manifest, Manifest):
            raise InvalidArtifact(f"the plan of {self.model} holds an index, not a manifest")
        return read_model(manifest)


class _Document(msgspec.Struct):
    version: int
    model: str = ""
    manifest: str = ""
    media_type: str = ""
    exclude_weights: bool = False
    exclude_patterns: tuple[str, ...] = ()
    prefetch: str = ""
    reference: str = ""
    spoiled: dict[str, str] = {}


def mountpoint(root: Path, model: Digest, selection: str) -> Path:
    """Where the worker of a model mounts it; ``selection`` is a :attr:`Selection.key`."""
    name = f"{model.hex}.{selection}" if selection else model.hex
    return root / LAZY / model.algorithm / name


def plan_path(root: Path, model: Digest, selection: str) -> Path:
    """Where its plan lies."""
    place = mountpoint(root, model, selection)
    return place.with_name(place.name + ".json")


def lock_path(root: Path, model: Digest, selection: str) -> Path:
    """The file whose lock its worker holds, with who that is."""
    place = mountpoint(root, model, selection)
    return place.with_name(place.name + ".lock")


def encode_plan(plan: LazyPlan) -> bytes:
    """The plan as it lies on the disk."""
    return msgspec.json.encode(
        _Document(
            _VERSION,
            str(plan.model),
            base64.b64encode(plan.manifest).decode(),
            plan.media_type,
            plan.exclude_weights,
            plan.exclude_patterns,
            plan.prefetch,
            plan.reference,
            dict(plan.spoiled),
        )
    )


def decode_plan(content: bytes) -> LazyPlan:
    """Read a plan back. Raises :class:`ModelError` when it is none, or its manifest another one."""
    try:
        document = msgspec.json.decode(content, type=_Document)
        if document.version != _VERSION:
            raise ModelError(
                f"the plan of a lazy model has version {document.version}, and this program reads "
                f"version {_VERSION}"
            )
        manifest = base64.b64decode(document.manifest, validate=True)
        model = Digest.parse(document.model)
        plan = LazyPlan(
            model,
            manifest,
            document.media_type,
            document.exclude_weights,
            document.exclude_patterns,
            document.prefetch,
            document.reference,
            document.spoiled,
        )
        for digest in plan.spoiled:
            Digest.parse(digest)
        # patterns that are none are found here, not where the tree is made
        Selection(plan.exclude_weights, plan.exclude_patterns)
    except (msgspec.DecodeError, UnicodeDecodeError, binascii.Error, ValueError) as error:
        raise ModelError(
            f"the plan of a lazy model cannot be read: {str(error)[:200]}; it is written anew when "
            "a volume of the model is published"
        ) from error
    except (InvalidArtifact, InvalidRequest) as error:
        raise ModelError(f"the plan of a lazy model cannot be used: {error.message}") from error
    if not model.matches(manifest):
        raise ModelError(f"the plan of the lazy model {model} holds another manifest")
    return plan
