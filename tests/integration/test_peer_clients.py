"""Other people's clients pull an ordinary image through a node, as the driver serves its peers.

The conformance suite of the distribution specification is built by ``make conformance`` from
``tests/conformance``; skopeo and containerd are Debian's.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.commands import wait_until
from tests.support.driver import serve_driver
from tests.support.images import push_image
from tests.support.registry import make_tls

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.registry import RegistryServer

REPOSITORY = Path(__file__).parents[2]
CONFORMANCE = REPOSITORY / ".tools/conformance"
TOKEN = "a-shared-token-of-the-peers"

NEEDS_WRITING = {
    "Populate registry with test blob",
    "Populate registry with test layer",
    "Populate registry with test manifest",
}
"""What the suite leaves out of "pull", as the content is there already."""


@pytest.fixture
def address() -> str:
    """A free port of this machine, as ``host:port``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_conformance(registry: RegistryServer, address: str, tmp_path: Path) -> None:
    assert CONFORMANCE.exists(), "run 'make conformance', which builds it"
    image = push_image(registry, "clients/conformance")
    flags = ("--peer-listen", address, "--peer-namespace", registry.address)
    with serve_driver(tmp_path / "driver", *flags, "--peer-insecure", "true"):
        done = subprocess.run(
            [str(CONFORMANCE)],
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "OCI_ROOT_URL": f"http://{address}",
                "OCI_NAMESPACE": "clients/conformance",
                "OCI_TEST_PULL": "1",
                "OCI_BLOB_DIGEST": str(image.layer),
                "OCI_MANIFEST_DIGEST": str(image.manifest),
                "OCI_TAG_NAME": "v1",
                "OCI_HIDE_SKIPPED_WORKFLOWS": "1",
                "OCI_REPORT_DIR": str(tmp_path),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    # written by the program that was just run
    cases = ElementTree.parse(tmp_path / "junit.xml").iter("testcase")  # noqa: S314
    results = {"passed": list[str](), "failed": list[str](), "skipped": list[str]()}
    for case in cases:
        name = case.get("name", "")
        if "Pull" in name:
            results[case.get("status", "")].append(name)
    print(f"conformance: { ({status: len(names) for status, names in results.items()}) }")
    assert not results["failed"], done.stdout[-4000:]
    assert done.returncode == 0, done.stdout[-4000:]
    assert len(results["passed"]) >= 12
    for name in results["skipped"]:
        assert "teardown" in name.lower() or any(one in name for one in NEEDS_WRITING), name


def test_skopeo(registry: RegistryServer, address: str, tmp_path: Path) -> None:
    image = push_image(registry, "clients/skopeo")
    tls, shown = make_tls(tmp_path / "tls"), tmp_path / "shown"
    shown.mkdir()
    for file, name in ((tls.ca, "ca.crt"), (tls.certificate, "c.cert"), (tls.key, "c.key")):
        (shown / name).write_bytes(file.read_bytes())
    flags = (
        *("--peer-listen", address, "--peer-namespace", registry.address),
        *("--peer-cert", str(tls.certificate), "--peer-key", str(tls.key)),
        *("--peer-ca", str(tls.ca)),
    )
    copy = ("skopeo", "--insecure-policy", "copy", "--src-cert-dir", str(shown))
    with serve_driver(tmp_path / "driver", *flags):
        subprocess.run(
            [*copy, f"docker://{address}/clients/skopeo:v1", f"oci:{tmp_path / 'copied'}:v1"],
            check=True,
            capture_output=True,
            timeout=60,
        )
        (shown / "c.cert").unlink()
        (shown / "c.key").unlink()
        stranger = subprocess.run(
            [*copy, f"docker://{address}/clients/skopeo:v1", f"oci:{tmp_path / 'none'}:v1"],
            check=False,
            capture_output=True,
            timeout=60,
        )
    assert stranger.returncode != 0
    blobs = tmp_path / "copied/blobs/sha256"
    assert {one.name for one in blobs.iterdir()} == {
        image.manifest.hex,
        image.config.hex,
        image.layer.hex,
    }


@contextlib.contextmanager
def _containerd(folder: Path) -> Iterator[list[str]]:
    """A containerd of the test's own; gives how its client is called."""
    folder.mkdir()
    config = folder / "config.toml"
    config.write_text(
        f"version = 2\nroot = {json.dumps(str(folder / 'root'))}\n"
        f"state = {json.dumps(str(folder / 'state'))}\n"
        'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n'
        f"[grpc]\naddress = {json.dumps(str(folder / 'c.sock'))}\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["containerd", "--config", str(config)], stdout=log, stderr=log)
    client = ["ctr", "--address", str(folder / "c.sock")]
    try:
        wait_until(
            lambda: subprocess.run([*client, "version"], capture_output=True).returncode == 0,
            "containerd answers",
            30,
        )
        yield client
    finally:
        process.terminate()
        process.wait(20)


def test_containerd(registry: RegistryServer, address: str, tmp_path: Path) -> None:
    """By ``hosts.toml``, with the registry itself out of its reach."""
    image = push_image(registry, "clients/containerd")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    hosts = tmp_path / "hosts" / registry.address
    hosts.mkdir(parents=True)

    def write(token: str) -> None:
        (hosts / "hosts.toml").write_text(
            'server = "http://127.0.0.1:1"\n'
            f'[host."http://{address}"]\n'
            'capabilities = ["pull", "resolve"]\n'
            f'[host."http://{address}".header]\n'
            f'Model-CSI-Peer = "{token}"\n'
        )

    flags = ("--peer-listen", address, "--peer-token-file", str(tmp_path / "token"))
    with serve_driver(tmp_path / "driver", *flags), _containerd(tmp_path / "c") as client:
        pull = [
            *(*client, "images", "pull", "--hosts-dir", str(tmp_path / "hosts")),
            *("--snapshotter", "native", image.reference),
        ]
        write("a-token-of-somebody-else")
        stranger = subprocess.run(pull, capture_output=True, check=False, timeout=60)
        assert stranger.returncode != 0
        write(TOKEN)
        done = subprocess.run(pull, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        listed = subprocess.run(
            [*client, "images", "ls"], capture_output=True, text=True, check=True, timeout=60
        )
        assert str(image.manifest) in listed.stdout
