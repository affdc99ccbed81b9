"""Artifacts of ModelPack's own modctl, mounted through the driver and compared byte for byte."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.demo.kubelet import Kubelet, Pod
from tests.support.driver import serve_driver
from tests.support.layouts import MODCTL, push_modctl_layout
from tests.support.registry import OCI_MANIFEST

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.registry import RegistryServer

Tree = dict[str, tuple[bytes, bool]]


def tree_of(folder: Path) -> Tree:
    """Content and executable bit of every file."""
    return {
        path.relative_to(folder).as_posix(): (
            path.read_bytes(),
            bool(path.stat().st_mode & 0o111),
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("packing", ["raw", "tar"])
def test_a_model_of_modctl_is_mounted_as_it_was(
    packing: str, tmp_path: Path, registry: RegistryServer
) -> None:
    repository = "modctl/tiny"
    reference = push_modctl_layout(registry, repository, packing)
    status, _, body = registry.request(
        "GET",
        repository,
        f"/v2/{repository}/manifests/{packing}",
        headers={"Accept": OCI_MANIFEST},
    )
    media_types = {layer["mediaType"] for layer in json.loads(body)["layers"]}
    assert status == 200
    assert all(media_type.endswith(f".v1.{packing}") for media_type in media_types)

    pod = Pod("reader")
    with (
        serve_driver(tmp_path) as driver,
        Kubelet(driver) as kubelet,
    ):
        mount = kubelet.publish(pod, {"model.csi.example.org/reference": reference})
        assert tree_of(mount) == tree_of(MODCTL / "model")
        kubelet.unpublish(pod)


def test_the_drivers_name_is_the_attributes_prefix(
    tmp_path: Path, registry: RegistryServer
) -> None:
    """The CNCF driver's pod spec is taken unchanged where this driver goes by its name."""
    reference = push_modctl_layout(registry, "modctl/cncf", "raw")
    pod = Pod("cncf")
    with (
        serve_driver(tmp_path, "--driver-name", "model.csi.modelpack.org") as driver,
        Kubelet(driver) as kubelet,
    ):
        assert kubelet.register()[0] == "model.csi.modelpack.org"
        mount = kubelet.publish(pod, {"model.csi.modelpack.org/reference": reference})
        assert (mount / "config.json").read_bytes() == (MODCTL / "model/config.json").read_bytes()
        kubelet.unpublish(pod)
