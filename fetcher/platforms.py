"""Which manifest of an index is the model, image specification "Image Index"."""

from __future__ import annotations

import platform as machine
from typing import Final

from fetcher.errors import InvalidArtifact
from fetcher.oci import MANIFEST_TYPES, Descriptor, Index, Platform

MODEL_ARTIFACT_TYPES: Final = frozenset(
    {
        "application/vnd.cncf.model.manifest.v1+json",
        "application/vnd.cnai.model.manifest.v1+json",
    }
)
_ARCHITECTURES: Final = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "i686": "386",
}
_MAX_LISTED: Final = 12


def this_platform() -> Platform:
    """The platform of this machine, in Go's words, which OCI uses."""
    name = machine.machine().lower()
    return Platform("linux", _ARCHITECTURES.get(name, name))


def pick(index: Index, wanted: Platform) -> Descriptor:
    """The descriptor of the manifest for ``wanted``, else of the only one, else of the only model.

    Where several fit the platform the first does, as the specification has it, but models come
    first. Raises :class:`InvalidArtifact` that lists what there is.
    """
    offered = [one for one in index.manifests if one.media_type in MANIFEST_TYPES and _is_real(one)]
    fitting = [one for one in offered if _fits(one, wanted)]
    models = [one for one in offered if one.artifact_type in MODEL_ARTIFACT_TYPES]
    fitting_models = [one for one in fitting if one in models]
    for candidates in (fitting_models, fitting):
        if candidates:
            return candidates[0]
    for candidates in (offered, models):
        if len(candidates) == 1:
            return candidates[0]
    raise InvalidArtifact(
        f"the index {index.digest} has no manifest for {wanted} and does not leave one to pick: "
        f"it has {_listed(index)}"
    )


def _is_real(descriptor: Descriptor) -> bool:
    """Whether it is something to run: build tools put attestations into an index as manifests."""
    found = descriptor.platform
    return found is None or (found.os, found.architecture) != ("unknown", "unknown")


def _fits(descriptor: Descriptor, wanted: Platform) -> bool:
    found = descriptor.platform
    return found is not None and (found.os, found.architecture) == (wanted.os, wanted.architecture)


def _listed(index: Index) -> str:
    if not index.manifests:
        return "nothing"
    listed = [_line(one) for one in index.manifests[:_MAX_LISTED]]
    more = len(index.manifests) - len(listed)
    return "; ".join(listed) + (f"; and {more} more" if more else "")


def _line(descriptor: Descriptor) -> str:
    what = descriptor.artifact_type or descriptor.media_type
    where = str(descriptor.platform) if descriptor.platform else "no platform"
    return f"{what[:80]!r} for {where[:60]!r}"
