"""Artifacts that lie in the repository as they were made by tools that are not ours."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.registry import RegistryServer

MODCTL = Path(__file__).parent / "modctl"
"""See its README: one small model, built by ModelPack's modctl, tagged ``raw`` and ``tar``."""


def push_modctl_layout(registry: RegistryServer, repository: str, tag: str) -> str:
    """Copy one of the two, bit for bit, with skopeo; returns its reference."""
    reference = registry.reference(repository, tag)
    subprocess.run(
        [
            *("skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"),
            *(f"oci:{MODCTL / 'layout'}:{tag}", f"docker://{reference}"),
        ],
        check=True,
    )
    return reference
