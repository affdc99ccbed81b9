"""What a pod brings stays with the registry that it is for, and is found nowhere else. Needs root.

The driver as it is shipped, registries that want a name and a password, and others that listen.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from csi.mount_table import mount_at
from tests.support.at_once import at_once
from tests.support.commands import ModelCsi
from tests.support.csi_client import CsiClient
from tests.support.driver import Driver, serve_driver
from tests.support.faulty_registry import FaultyRegistry, Reply, serve_faulty
from tests.support.models import ModelBuilder
from tests.support.registry import serve_registry

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.support.driver import DriverProcess
    from tests.support.registry import RegistryServer
    from tests.support.token_server import TokenServer

REFERENCE = "model.csi.example.org/reference"
MIB = 1024 * 1024

Secret = dict[str, str]


def attributes(reference: str) -> dict[str, str]:
    return {REFERENCE: reference}


def login(username: str, password: str) -> Secret:
    return {"username": username, "password": password}


def docker_config(auths: Mapping[str, tuple[str, str]]) -> Secret:
    """A secret of type ``kubernetes.io/dockerconfigjson``."""
    entries = {
        registry: {"auth": base64.b64encode(f"{name}:{password}".encode()).decode()}
        for registry, (name, password) in auths.items()
    }
    return {".dockerconfigjson": json.dumps({"auths": entries})}


def push(registry: RegistryServer, repository: str, size: int = MIB) -> tuple[str, bytes]:
    data = os.urandom(size)
    return ModelBuilder().add_raw("model.safetensors", data).push(registry, repository, "v1"), data


def failure(
    kubelet: CsiClient,
    target: Path,
    reference: str,
    secret: Secret,
    volume_id: str = "csi-one",
) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        kubelet.publish_inline(volume_id, target, attributes(reference), secrets=secret)
    assert mount_at(target) is None
    return caught.value


@contextmanager
def private_registry(folder: Path, **users: str) -> Iterator[RegistryServer]:
    with serve_registry(folder, users=users) as registry:
        yield registry


# -- nowhere else ----------------------------------------------------------------------------------


def traces(text: bytes, *words: str) -> list[str]:
    """Which of ``words`` are in ``text``: as they are, or within what was put into base64."""
    found = []
    for word in words:
        raw = word.encode()
        # at each of the three offsets that base64 may have it
        forms = [raw] + [
            base64.b64encode(b"x" * skip + raw)[4 if skip else 0 : -4] for skip in (0, 1, 2)
        ]
        if any(form in text for form in forms):
            found.append(word)
    return found


def leaks(running: DriverProcess, *words: str) -> list[str]:
    """Where below the node's folders, or in what ``/proc`` shows of processes, a word is found."""
    found = [
        str(path)
        for path in running.root.parent.rglob("*")
        if path.is_file() and not path.is_symlink() and traces(path.read_bytes(), *words)
    ]
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        for name in ("cmdline", "environ"):
            try:
                content = (process / name).read_bytes()
            except OSError:  # it has ended meanwhile
                continue
            if traces(content, *words):
                found.append(f"{process}/{name}")
    return found


def test_a_trace_is_found_in_every_form() -> None:
    word = secrets.token_hex(16)
    for prefix in ("", "a:", "ab:", "abc:"):
        encoded = base64.b64encode(f"{prefix}{word}".encode())
        assert traces(b"..." + encoded + b"...", word) == [word]
    assert traces(b"x" + word.encode(), word, "other-word-that-is-long") == [word]


def test_a_password_is_found_nowhere(
    tmp_path: Path, token_registry: RegistryServer, tokens: TokenServer
) -> None:
    right, wrong, identity = (f"{name}-{secrets.token_hex(16)}" for name in ("rw", "wr", "id"))
    told: list[str] = []
    with (
        private_registry(tmp_path / "private", robot=right) as registry,
        serve_driver(tmp_path / "node", "--log-level", "debug") as running,
        CsiClient(running.socket) as kubelet,
    ):
        tokens.users["robot"] = right
        for server in (registry, token_registry):
            target = running.target("one")
            reference, _ = push(server, "acme/secret")
            good: tuple[Secret, ...] = (
                login("robot", right),
                docker_config({server.address: ("robot", right)}),
            )
            for secret in good:
                kubelet.publish_inline("csi-one", target, attributes(reference), secrets=secret)
                assert leaks(running, right) == []
                told.append(kubelet.stats("csi-one", target).message)
                kubelet.unpublish("csi-one", target)
            bad: tuple[Secret, ...] = (
                login("robot", wrong),
                docker_config({server.address: ("robot", wrong)}),
                {".dockerconfigjson": json.dumps({"auths": {"a": {"auth": wrong}}})},
                {".dockerconfigjson": f"{{{wrong}"},
                {
                    ".dockerconfigjson": json.dumps(
                        {"auths": {server.address: {"identitytoken": identity}}}
                    )
                },
                {"password": wrong},
                {"username": f"{wrong}:", "password": wrong},
            )
            for secret in bad:
                error = failure(kubelet, target, reference, secret)
                told.append(f"{error!r} {error.details()}")
            # with the claim's secrets, too
            kubelet.create(f"claim-{server.address}", attributes(reference), secrets=good[0])
            with pytest.raises(grpc.RpcError) as caught:
                kubelet.create("other", attributes(reference), secrets=bad[0])
            told.append(str(caught.value))
        status = ModelCsi(running.root, tmp_path).run("--json", "status")
        told.append(status.output + status.errors)
        words = (right, wrong, identity, *(token.rpartition(".")[2] for token in tokens.issued))
        assert tokens.issued
        assert leaks(running, *words) == []
        assert traces(" ".join(told).encode(), *words) == []
        # and what may be seen is found by the same search
        assert {Path(path).name for path in leaks(running, "acme/secret")} >= {"driver.log"}


# -- for the registry that it names, and for no other ----------------------------------------------


@pytest.fixture
def password() -> str:
    return secrets.token_hex(16)


@pytest.fixture
def home(tmp_path: Path, password: str) -> Iterator[RegistryServer]:
    with private_registry(tmp_path / "home", robot=password) as registry:
        yield registry


@pytest.fixture
def running(tmp_path: Path) -> Iterator[DriverProcess]:
    with serve_driver(tmp_path / "node") as process:
        yield process


@pytest.fixture
def kubelet(running: DriverProcess) -> Iterator[CsiClient]:
    with CsiClient(running.socket) as client:
        yield client


def nothing_was_shown(listener: FaultyRegistry) -> bool:
    """Whether somebody listened, and heard no credentials of any kind."""
    assert listener.requests
    return all(
        noted.authorization is None and "refresh_token" not in noted.path
        for noted in listener.requests
    )


def test_a_secret_for_one_registry_is_not_for_another(
    home: RegistryServer,
    registry: RegistryServer,
    password: str,
    running: DriverProcess,
    kubelet: CsiClient,
) -> None:
    push(registry, "secrets/other")
    with serve_faulty(registry) as other:
        # it asks for a password as registries do, and would take anything
        other.add("/v2/", Reply(401, {"WWW-Authenticate": 'Basic realm="give it to me"'}))
        secret = docker_config({home.address: ("robot", password)})
        error = failure(
            kubelet, running.target("one"), other.reference("secrets/other", "v1"), secret
        )
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert nothing_was_shown(other)


def test_a_token_server_gets_what_is_for_the_registry_that_names_it(
    home: RegistryServer, password: str, running: DriverProcess, kubelet: CsiClient
) -> None:
    with serve_faulty() as evil, serve_faulty(home) as realm:
        challenge = f'Bearer realm="http://{realm.address}/v2/",service="any"'
        evil.add("/v2/", Reply(401, {"WWW-Authenticate": challenge}))
        secret = docker_config(
            {home.address: ("robot", password), realm.address: ("robot", password)}
        )
        failure(kubelet, running.target("one"), evil.reference("secrets/evil", "v1"), secret)
        # the realm is a registry that the secret has an entry for, and still it was not asked as
        # that: a registry would have its own password fetched from another one's pod
        assert nothing_was_shown(realm)
        assert nothing_was_shown(evil)


@pytest.mark.parametrize("where", ["/manifests/", "/blobs/"])
def test_a_redirect_takes_no_password_along(
    where: str,
    home: RegistryServer,
    registry: RegistryServer,
    password: str,
    running: DriverProcess,
    kubelet: CsiClient,
) -> None:
    reference, data = push(home, "secrets/redirect")
    ModelBuilder().add_raw("model.safetensors", data).push(registry, "secrets/redirect", "v1")
    with serve_faulty(home) as near, serve_faulty(registry) as far:
        near.add(
            where,
            change=lambda reply: (
                reply if reply.status == 401 else Reply(307, {"Location": _elsewhere(near, far)})
            ),
        )
        target = running.target("one")
        kubelet.publish_inline(
            "csi-one",
            target,
            attributes(reference.replace(home.address, near.address)),
            secrets=login("robot", password),
        )
        assert (target / "model.safetensors").read_bytes() == data
        assert nothing_was_shown(far)
        assert any(noted.authorization for noted in near.requests)
        kubelet.unpublish("csi-one", target)


def _elsewhere(near: FaultyRegistry, far: FaultyRegistry) -> str:
    return f"http://{far.address}{near.requests[-1].path}"


def test_a_mirror_gets_nothing_of_a_pods_secret(
    tmp_path: Path, home: RegistryServer, registry: RegistryServer, password: str
) -> None:
    reference, data = push(home, "secrets/mirror")
    ModelBuilder().add_raw("model.safetensors", data).push(registry, "secrets/mirror", "v1")
    with serve_faulty(registry) as mirror:
        hosts = tmp_path / "certs.d" / home.address
        hosts.mkdir(parents=True)
        (hosts / "hosts.toml").write_text(
            f'server = "http://{home.address}"\n[host."http://{mirror.address}"]\n'
            'capabilities = ["pull", "resolve"]\n'
        )
        flags = ("--hosts-dir", str(tmp_path / "certs.d"))
        with (
            serve_driver(tmp_path / "node", *flags) as running,
            CsiClient(running.socket) as kubelet,
        ):
            for number, secret in enumerate(
                (login("robot", password), docker_config({home.address: ("robot", password)}))
            ):
                target = running.target(f"pod-{number}")
                kubelet.publish_inline(
                    f"csi-{number}", target, attributes(reference), secrets=secret
                )
                assert (target / "model.safetensors").read_bytes() == data
                kubelet.unpublish(f"csi-{number}", target)
            assert mirror.asked("/blobs/")
            # nor when it asks for a password itself
            mirror.add("/v2/", Reply(401, {"WWW-Authenticate": 'Basic realm="mirror"'}))
            other, _ = push(home, "secrets/mirror-2")
            kubelet.publish_inline(
                "csi-2",
                running.target("pod-2"),
                attributes(other),
                secrets=login("robot", password),
            )
            assert nothing_was_shown(mirror)
            kubelet.unpublish("csi-2", running.target("pod-2"))


# -- what is cached is not public ------------------------------------------------------------------


def test_a_cached_model_is_for_the_team_that_the_registry_lets_read_it(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "node")
    red, blue = login("red", "of-the-red-team"), login("blue", "of-the-blue-team")
    try:
        running = driver.start()
        with private_registry(tmp_path / "registry", red=red["password"]) as registry:
            reference, data = push(registry, "teams/model")
            with CsiClient(running.socket) as kubelet:
                target = running.target("red")
                kubelet.publish_inline("csi-red", target, attributes(reference), secrets=red)
                for secret in (blue, {}):
                    error = failure(kubelet, running.target("blue"), reference, secret)
                    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                    assert not running.target("blue").exists()
        # without the registry those are believed whom it believed, also after a restart
        driver.end(signal.SIGKILL)
        running = driver.start()
        with CsiClient(running.socket) as kubelet:
            kubelet.publish_inline(
                "csi-red-2", running.target("red-2"), attributes(reference), secrets=red
            )
            assert (running.target("red-2") / "model.safetensors").read_bytes() == data

            def refused(pod: str, secret: Secret) -> None:
                target = running.target(pod)
                error = failure(kubelet, target, reference, secret, f"csi-{pod}")
                assert error.code() is grpc.StatusCode.UNAVAILABLE

            at_once(
                lambda: refused("blue", blue),
                lambda: refused("nobody", {}),
                lambda: refused("guess", login("red", "guessed")),
            )
            kubelet.unpublish("csi-red", target)
            kubelet.unpublish("csi-red-2", running.target("red-2"))
    finally:
        driver.clear()
