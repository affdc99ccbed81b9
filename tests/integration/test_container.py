"""The driver as its manifests run it: in a mount namespace of its own, or without any privilege."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.commands import wait_until
from tests.support.csi_client import CsiClient
from tests.support.layouts import push_modctl_layout
from tests.support.mounts import detach_below, mounts_below

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.registry import RegistryServer

READY_SECONDS = 30.0
NOBODY = 65532

# What deploy/node.yaml makes of a container: nothing that is mounted inside is seen outside, but
# for the pods' folder; what is not a volume cannot be written.
NODE_CONTAINER = """
set -e
mount --make-private /
for volume in "$1/root" "$1/csi"; do
    mount --bind "$volume" "$volume"
    mount --make-private "$volume"
done
mount -o remount,ro,bind /
shift
exec "$@"
"""

# A process that has root's interpreter and modules, and then no rights of root's any more.
# What is loaded at its first use could not be read any more by then: the codec of host names, gRPC.
CONTROLLER_CONTAINER = f"""
import encodings.idna
import os
import csi.controller.service, csi.identity.service, csi.node.service, csi.server
from csi.__main__ import main
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
main()
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    """A node's folders; the pods' one is shared between mount namespaces, as kubelet's is."""
    for name in ("kubelet/pods", "csi", "root"):
        (tmp_path / name).mkdir(parents=True)
    pods = tmp_path / "kubelet/pods"
    subprocess.run(["mount", "--bind", pods, pods], check=True)
    subprocess.run(["mount", "--make-shared", pods], check=True)
    yield tmp_path
    detach_below(tmp_path)


def serve(folder: Path, mode: str) -> tuple[str, ...]:
    return (
        *("serve", "--mode", mode, "--node-id", "node-1"),
        *("--endpoint", f"unix://{folder}/csi/csi.sock", "--root", f"{folder}/root"),
        *("--kubelet-dir", f"{folder}/kubelet"),
    )


@contextlib.contextmanager
def running(folder: Path, *command: str) -> Iterator[CsiClient]:
    socket = folder / "csi/csi.sock"
    with (folder / "driver.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=log, env={"PATH": os.environ["PATH"]}
        )
    try:
        wait_until(socket.exists, "the driver listens", READY_SECONDS)
        with CsiClient(socket) as client:
            client.wait_until_ready(READY_SECONDS)
            yield client
    finally:
        process.terminate()
        process.wait(READY_SECONDS)


def node_container(folder: Path) -> contextlib.AbstractContextManager[CsiClient]:
    return running(
        folder,
        *("unshare", "--mount", "--propagation", "unchanged"),
        *("bash", "-c", NODE_CONTAINER, "bash", str(folder)),
        *(sys.executable, "-m", "csi", *serve(folder, "node")),
    )


def test_a_containers_mounts_are_the_nodes(node: Path, registry: RegistryServer) -> None:
    attributes = {
        "model.csi.example.org/reference": push_modctl_layout(registry, "container/tiny", "tar")
    }
    pods = node / "kubelet/pods"
    target = pods / "uid/volumes/kubernetes.io~csi/model/mount"
    with node_container(node) as client:
        client.publish_inline("csi-1", target, attributes)
        assert str(target) in mounts_below(pods)
        assert (target / "LICENSE").read_text() == "Apache-2.0\n"
        assert mounts_below(node / "root") == []
    # an upgrade: the pod goes on reading, and the next container knows the volume
    assert (target / "LICENSE").read_text() == "Apache-2.0\n"
    with node_container(node) as client:
        client.publish_inline("csi-1", target, attributes)
        assert not client.stats("csi-1", target).abnormal
        client.unpublish("csi-1", target)
    assert not target.exists()
    assert mounts_below(pods) == [str(pods)]


@pytest.fixture
def anyones() -> Iterator[Path]:
    """A folder that another user can reach, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        folder.chmod(0o755)
        for path in (folder / "csi", folder / "root"):
            path.mkdir()
            os.chown(path, NOBODY, NOBODY)
        yield folder


def test_the_controller_needs_no_privilege(anyones: Path, registry: RegistryServer) -> None:
    parameters = {
        "model.csi.example.org/reference": push_modctl_layout(registry, "container/claim", "raw")
    }
    command = (sys.executable, "-c", CONTROLLER_CONTAINER, *serve(anyones, "controller"))
    with running(anyones, *command) as client:
        volume = client.create("pvc-1", parameters)
    # its records outlive it
    with running(anyones, *command) as client:
        assert client.create("pvc-1", parameters) == volume
        client.delete(volume.volume_id)
