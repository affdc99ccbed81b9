"""What a user can type to have a model's files: our command and those it is measured against."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fetcher.modelpack import Packing

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bench.models import Blob, Pushed

ORAS: Final = Path(".tools/oras")
"""Built by the Makefile."""

MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"


@dataclass(frozen=True)
class Contender:
    """A way to pull: its command line for a model and an empty folder that is its own."""

    name: str
    command: Callable[[Pushed, Path], list[str]]


def _ours(model: Pushed, folder: Path) -> list[str]:
    tls = model.registry.tls
    trust = ["--ca-file", str(tls.ca), "--https", model.registry.address] if tls else []
    root = ["--root", str(folder)]
    return [sys.executable, "-m", "csi", "--json", *root, "pull", *trust, model.reference]


def _skopeo(model: Pushed, folder: Path) -> list[str]:
    tls = model.registry.tls
    trust = f"--src-cert-dir={_ca_folder(tls.ca)}" if tls else "--src-tls-verify=false"
    reference = f"docker://{model.reference}"
    return ["skopeo", "copy", "--quiet", trust, reference, f"dir:{folder / 'copy'}"]


def _oras(model: Pushed, folder: Path) -> list[str]:
    tls = model.registry.tls
    trust = ["--ca-file", str(tls.ca)] if tls else ["--plain-http"]
    return [str(ORAS), "pull", "--no-tty", *trust, "--output", str(folder), model.reference]


def _curl(model: Pushed, folder: Path) -> list[str]:
    """One curl for each layer, all at once; hashed, and archives unpacked, as they come."""
    curl = ["curl", "--fail", "--silent", "--show-error", "--location"]
    if model.registry.tls:
        curl += ["--cacert", str(model.registry.tls.ca)]
    accept = ["--header", f"Accept: {MANIFEST_TYPE}"]
    lines = [
        "set -euo pipefail",
        f"cd {shlex.quote(str(folder))}",
        shlex.join([*curl, *accept, "--output", "manifest", model.url("manifests/v1")]),
        "pids=()",
    ]
    for layer in model.layers:
        lines += [f"{_curl_layer(model, curl, layer)} &", "pids+=($!)"]
    lines.append('for pid in "${pids[@]}"; do wait "$pid"; done')
    return ["bash", "-c", "\n".join(lines)]


def _curl_layer(model: Pushed, curl: list[str], layer: Blob) -> str:
    name = shlex.quote(layer.name)
    fetch = shlex.join([*curl, model.url(f"blobs/{layer.digest}")])
    check = f"sha256sum | grep -qx '{layer.digest.removeprefix('sha256:')}  -'"
    if model.case.packing is Packing.TAR:
        # the pipe between tee and tar has a name, so that the shell waits for tar
        unpack = f"mkfifo {name}.pipe; tar -xf {name}.pipe & {fetch} | tee {name}.pipe"
        return f"( {unpack} | {check}; wait $! )"
    return f"( {fetch} | tee {name} | {check} )"


def _ca_folder(ca: Path) -> Path:
    """A folder in the form in which skopeo takes an authority."""
    folder = ca.parent / "skopeo"
    folder.mkdir(exist_ok=True)
    (folder / "ca.crt").write_bytes(ca.read_bytes())
    return folder


OURS: Final = Contender("model-csi", _ours)
THEIRS: Final = (
    Contender("skopeo", _skopeo),
    Contender("oras", _oras),
    Contender("curl", _curl),
)
