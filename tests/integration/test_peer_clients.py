"""Other people's clients pull an ordinary image through a node, as the driver serves its peers.

skopeo and containerd are Debian's; the rest is asked word by word, as the distribution
specification puts it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import subprocess
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.support.commands import wait_until
from tests.support.driver import serve_driver
from tests.support.images import push_image
from tests.support.registry import make_tls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.registry import RegistryServer

TOKEN = "a-shared-token-of-the-peers"


@pytest.fixture
def address() -> str:
    """A free port of this machine, as ``host:port``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_what_the_specification_asks_of_pull(
    registry: RegistryServer, address: str, tmp_path: Path
) -> None:
    """Distribution specification 1.1, "Pull" and "Error Codes", for content that is there."""
    image = push_image(registry, "clients/pull")
    absent = "sha256:" + "0" * 64
    flags = ("--peer-listen", address, "--peer-namespace", registry.address)
    with (
        serve_driver(tmp_path / "driver", *flags, "--peer-insecure", "true"),
        httpx.Client(base_url=f"http://{address}/v2", timeout=30) as client,
    ):
        assert client.get("/").status_code == 200
        for kind, names in (
            ("blobs", (image.layer, image.config)),
            ("manifests", (image.manifest, "v1")),
        ):
            for name in names:
                sent = client.get(f"/clients/pull/{kind}/{name}")
                head = client.head(f"/clients/pull/{kind}/{name}")
                assert sent.status_code == head.status_code == 200
                expected = str(image.manifest if name == "v1" else name)
                assert "sha256:" + hashlib.sha256(sent.content).hexdigest() == expected
                assert head.content == b""
                for answer in (sent, head):
                    assert answer.headers["docker-content-digest"] == expected
                    assert answer.headers["content-length"] == str(len(sent.content))
                if kind == "manifests":
                    assert sent.headers["content-type"] == sent.json()["mediaType"]
            for name in (absent, *(("v2",) if kind == "manifests" else ())):
                missing = client.get(f"/clients/pull/{kind}/{name}")
                assert missing.status_code == 404
                [error] = missing.json()["errors"]
                assert error["code"] in ("BLOB_UNKNOWN", "MANIFEST_UNKNOWN", "NAME_UNKNOWN")
                assert client.head(f"/clients/pull/{kind}/{name}").status_code == 404


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
