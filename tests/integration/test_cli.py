"""The commands as real processes, with a real registry, a real store and real mounts."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from csi.__main__ import become
from csi.agent_client import AgentClient, Patience
from csi.config import Config
from csi.mount_table import mount_at
from fetcher.agent_protocol import LIST, ListResult, NoParams, socket_path
from fetcher.errors import InProgress
from fetcher.modelpack import Kind
from fetcher.oci import Digest
from tests.support.commands import ModelCsi, ended, wait_until
from tests.support.models import ModelBuilder, tiny_model
from tests.support.mounts import detach_below
from tests.support.proxy import serve_proxy
from tests.support.token_server import PASSWORD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.proxy import Proxy
    from tests.support.registry import RegistryServer

MIB = 1024 * 1024
NOBODY = 65534
ONE_LINE = re.compile(r"model-csi: [^\n]+\n")


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[ModelCsi]:
    home = tmp_path / "home"
    home.mkdir()
    cli = ModelCsi(tmp_path / "root", home)
    try:
        yield cli
    finally:
        cli.stop()
        detach_below(tmp_path)


def large_model(files: int = 3, size: int = 5 * MIB) -> ModelBuilder:
    """A model that takes its time through a slow proxy; no two chunks of it are alike."""
    builder = ModelBuilder()
    for number in range(files):
        builder.add_raw(f"part-{number}.safetensors", os.urandom(size), Kind.WEIGHT)
    return builder


def through(proxy: Proxy, repository: str, tag: str = "latest") -> str:
    return f"{proxy.address}/{repository}:{tag}"


def blob_bytes(builder: ModelBuilder) -> int:
    return sum(layer["size"] for layer in builder.layers)


def assert_shows(folder: Path, builder: ModelBuilder) -> None:
    """The raw layers of ``builder`` are the files of ``folder``."""
    for layer in builder.layers:
        path = folder / layer["annotations"]["org.cncf.model.filepath"]
        content = path.read_bytes()
        assert len(content) == layer["size"]
        assert content in builder.blobs.values()


# -- one command after the other -------------------------------------------------------------------


def test_from_a_folder_to_a_mount_and_back(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer
) -> None:
    folder, target = tmp_path / "model", tmp_path / "mnt"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(MIB))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer/vocab.txt").write_text("a\nb\n")
    reference = registry.reference("cli/whole", "v1")

    pushed = cli.run("push", str(folder), reference, "--json")
    assert pushed.status == 0, pushed.errors
    digest = pushed.json["digest"]

    pulled = cli.run("pull", reference, "--json")
    assert pulled.status == 0, pulled.errors
    assert pulled.json["digest"] == digest
    assert pulled.json["reference"] == f"{reference}@{digest}"
    assert pulled.json["files"] == 3
    assert pulled.json["fetched"] == pulled.json["size"] == MIB + 22 + 4
    assert (Path(pulled.json["path"]) / "tokenizer/vocab.txt").read_text() == "a\nb\n"

    [row] = cli.run("ls", "--json").json["models"]
    assert (row["digest"], row["references"], row["volumes"]) == (digest, [reference], [])

    mounted = cli.run("mount", reference, str(target), "--json")
    assert mounted.status == 0, mounted.errors
    assert (target / "config.json").read_text() == '{"model_type": "bert"}'
    with pytest.raises(OSError, match="Read-only"):
        (target / "new").touch()
    again = cli.run("mount", reference, str(target), "--json")
    assert again.json == mounted.json
    [row] = cli.run("ls", "--json").json["models"]
    assert row["volumes"] == [mounted.json["volume_id"]]

    status = cli.run("status", "--json").json
    [volume] = status["volumes"]
    assert volume["target"] == str(target)
    assert volume["state"] == "published"
    assert status["agent"] is None
    assert status["disk"]["used"] < 2 * MIB

    unmounted = cli.run("unmount", str(target), "--json")
    assert unmounted.json["was_mounted"] is True
    assert not target.exists()
    assert cli.run("unmount", str(target), "--json").json["was_mounted"] is False


def test_what_people_read(cli: ModelCsi, tmp_path: Path, registry: RegistryServer) -> None:
    builder = tiny_model()
    reference = builder.push(registry, "cli/words")
    pulled = cli.run("pull", reference)
    assert f"digest     {builder.digest}\n" in pulled.output
    assert re.search(r"^path +/.*/models/sha256/[0-9a-f]{64}$", pulled.output, re.MULTILINE)
    assert re.search(r"^size +16.0 KiB in 5 files$", pulled.output, re.MULTILINE)
    assert re.search(r"^fetched +\S+ KiB in \S+ s, .*/s$", pulled.output, re.MULTILINE)
    assert "nothing: it was in the store" in cli.run("pull", reference).output

    listed = cli.run("ls").output.splitlines()
    assert listed[0].split()[:3] == ["DIGEST", "SIZE", "FILES"]
    assert listed[1].startswith(builder.digest.short)
    assert listed[1].endswith(reference)

    target = tmp_path / "mnt"
    assert str(target) in cli.run("mount", reference, str(target)).output
    status = cli.run("status").output
    assert "agent  not running\n" in status
    assert re.search(rf"published +bind +{builder.digest.short} +{target}", status)
    assert cli.run("unmount", str(target)).output == f"unmounted  {target}\n"
    assert cli.run("unmount", str(target)).output == f"not mounted  {target}\n"


def test_inspect_downloads_no_layer(cli: ModelCsi, registry: RegistryServer, proxy: Proxy) -> None:
    builder = tiny_model()
    builder.push(registry, "cli/inspected")
    found = cli.run("inspect", through(proxy, "cli/inspected"), "--json")
    assert found.status == 0, found.errors
    assert found.json["digest"] == str(builder.digest)
    assert found.json["config"]["descriptor"] == {"name": "tiny"}
    assert [(row["kind"], row["packing"]) for row in found.json["layers"]] == [
        ("weight", "raw"),
        ("weight.config", "raw"),
        ("weight.config", "tar"),
        ("code", "tar+gzip"),
        ("doc", "tar+zstd"),
    ]
    assert proxy.counts.blob_requests() == 1
    assert not cli.root.exists()


def test_looking_makes_no_store(cli: ModelCsi) -> None:
    assert cli.run("ls", "--json").json == {"models": []}
    status = cli.run("status", "--json").json
    assert status["agent"] is None
    assert status["disk"] is None
    assert not cli.root.exists()


def test_parts_of_a_model(cli: ModelCsi, registry: RegistryServer) -> None:
    reference = tiny_model().push(registry, "cli/parts")
    light = cli.run("pull", reference, "--exclude-weights", "--exclude", "*.md", "--json")
    names = {path.name for path in Path(light.json["path"]).rglob("*") if path.is_file()}
    assert names == {"config.json", "vocab.txt", "run.sh"}
    assert cli.run("pull", reference, "--json").json["path"] != light.json["path"]
    refused = cli.run("pull", reference, "--exclude", "", "--json")
    assert (refused.status, refused.error["code"]) == (1, "InvalidRequest")


def test_a_store_is_verified_and_repaired_under_a_mount(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer
) -> None:
    assert cli.run("verify", "--json").json["damaged"] == []
    data = os.urandom(MIB)
    reference = ModelBuilder().add_raw("model.bin", data).push(registry, "cli/verified", "v1")
    mounted = cli.run("mount", reference, str(tmp_path / "mnt"), "--json")
    assert mounted.status == 0, mounted.errors
    assert cli.run("verify", reference).output.split() == [
        *("read", "again", "1.0", "MiB"),
        *("damaged", "0"),
    ]
    [tree] = (tmp_path / "root/models/sha256").iterdir()
    with (tmp_path / "mnt/model.bin").open("rb") as reader:
        with (tree / "model.bin").open("r+b") as file:
            file.write(b"rotten")
        told = cli.run("verify", "--dry-run", "--json")
        assert told.status == 1
        assert {row["kind"] for row in told.json["damaged"]} == {"content", "model"}
        assert cli.run("verify").status == 0
        assert reader.read() == data
    assert cli.run("verify", "--json").json["damaged"] == []
    assert cli.run("unmount", str(tmp_path / "mnt")).status == 0


# -- how commands fail -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["pull", "127.0.0.1:1/a/b:v1"], 1, "Unreachable"),
        (["pull", "REGISTRY/cli/nothing:v1"], 1, "NotFound"),
        (["pull", "--pull-policy", "Never", "REGISTRY/cli/nothing:v1"], 1, "NotFound"),
        (["pull", "https://example.org/a"], 1, "InvalidRequest"),
        (["inspect", ""], 1, "InvalidRequest"),
        (["push", "/nothing/here", "REGISTRY/cli/x:v1"], 1, "InvalidRequest"),
        (["mount", "REGISTRY/cli/nothing:v1", "/"], 1, "InvalidRequest"),
        (["unmount", "/"], 1, "InvalidRequest"),
        (["pull"], 2, "Usage"),
        (["pull", "a/b", "--no-such-flag"], 2, "Usage"),
        (["collect"], 2, "Usage"),
        (["verify", "REGISTRY/cli/nothing:v1"], 1, "NotFound"),
        (["pull", "a/b", "--username", "me"], 2, "Usage"),
        (["pull", "a/b", "--connections", "0"], 2, "Usage"),
        (["pull", "a/b", "--config", "/nothing/here.yaml"], 2, "Usage"),
        (["serve", "--mode", "everything"], 2, "Usage"),
    ],
)
def test_errors_are_one_line_or_one_object(
    cli: ModelCsi, registry: RegistryServer, arguments: list[str], status: int, code: str
) -> None:
    arguments = [one.replace("REGISTRY", registry.address) for one in arguments]
    plain = cli.run(*arguments)
    assert (plain.status, plain.output) == (status, "")
    assert ONE_LINE.fullmatch(_without_log(plain.errors)), plain.errors
    machine = cli.run(*arguments, "--json")
    assert (machine.status, machine.output) == (status, "")
    assert machine.error["code"] == code
    assert machine.error["message"]


def _without_log(errors: str) -> str:
    """Standard error without log lines, such as those of tries that are made again."""
    return re.sub(r"(?m)^\d{4}-\d\d-\d\dT\S+ [A-Z]+ \S+: .*\n", "", errors)


def test_a_hostile_artifact_cannot_steer_the_terminal(
    cli: ModelCsi, registry: RegistryServer
) -> None:
    builder = tiny_model()
    hostile = "\x1b]0;owned\x07\x1b[2J\r\n\u202egpj"
    builder.document["annotations"] = {hostile: hostile}
    reference = builder.push(registry, "cli/hostile")
    found = cli.run("inspect", reference)
    assert found.status == 0, found.errors
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", found.output)


def test_a_reader_that_leaves_is_no_drama(cli: ModelCsi, registry: RegistryServer) -> None:
    reference = tiny_model().push(registry, "cli/pipe")
    process = cli.start("inspect", reference)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process:
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_mounting_needs_root(registry: RegistryServer) -> None:
    reference = tiny_model().push(registry, "cli/nobody")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        cli = ModelCsi(folder / "root", folder)
        refused = cli.run("mount", reference, f"{folder}/mnt", "--json", user=NOBODY)
        assert (refused.status, refused.error["code"]) == (1, "AccessDenied")
        assert "root" in refused.error["message"]
        assert cli.run("pull", reference, user=NOBODY).status == 0


def test_the_roots_agent_is_not_everybodys(registry: RegistryServer) -> None:
    reference = tiny_model().push(registry, "cli/others")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        cli = ModelCsi(folder / "root", folder)
        with serving(cli, folder):
            refused = cli.run("pull", reference, "--json", user=NOBODY)
            assert (refused.status, refused.error["code"]) == (1, "AccessDenied")
            # this one needs nobody's store
            assert cli.run("inspect", reference, user=NOBODY).status == 0


def test_progress_is_a_bar_on_a_terminal(cli: ModelCsi, registry: RegistryServer) -> None:
    reference = large_model(2, 8 * MIB).push(registry, "cli/bar")
    ours, theirs = pty.openpty()
    environment = {**cli.variables(), "TERM": "xterm", "COLUMNS": "100"}
    with serve_proxy(registry.address) as proxy:
        proxy.faults.bytes_per_second = 16 * MIB
        process = subprocess.Popen(
            cli.command("pull", reference.replace(registry.address, proxy.address)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=environment,
        )
        os.close(theirs)
        shown = b""
        # the end of a terminal is an error on Linux
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                shown += data
        os.close(ours)
        with process:
            assert process.stdout is not None
            assert b"fetched" in process.stdout.read()
    assert process.returncode == 0
    assert "━" in shown.decode()
    assert "MiB/s" in shown.decode() or "MB/s" in shown.decode()


# -- credentials -----------------------------------------------------------------------------------


def docker_config(folder: Path, registry: str, username: str, password: str) -> Path:
    auth = base64.b64encode(f"{username}:{password}".encode()).decode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({"auths": {registry: {"auth": auth}}}))
    return path


def test_credentials_of_the_user(cli: ModelCsi, tmp_path: Path, guarded: RegistryServer) -> None:
    reference = tiny_model().push(guarded, "cli/private")
    assert cli.run("pull", reference, "--json").error["code"] == "Unauthenticated"

    by_option = ("--username", "robot", "--password-stdin")
    told = cli.run("pull", reference, *by_option, "--log-level", "debug", input=f"{PASSWORD}\n")
    assert told.status == 0, told.errors
    assert PASSWORD not in told.output + told.errors
    wrong = cli.run("pull", reference, *by_option, "--json", input="wrong-password\n")
    assert wrong.error["code"] in ("Unauthenticated", "AccessDenied")
    assert "wrong-password" not in wrong.errors

    # what one user may read is no other's: the store has it all, and it is refused
    assert cli.run("pull", reference, "--json").error["code"] == "Unauthenticated"
    docker_config(cli.home / ".docker", guarded.address, "robot", PASSWORD)
    assert cli.run("pull", reference).status == 0
    assert cli.run("inspect", reference).status == 0
    copied = guarded.reference("cli/copied", "v1")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert cli.run("push", str(folder), copied).status == 0


def test_credentials_go_to_the_agent_and_it_has_its_own(
    cli: ModelCsi, tmp_path: Path, guarded: RegistryServer
) -> None:
    reference = tiny_model().push(guarded, "cli/private-agent")
    with serving(cli, tmp_path, "--log-level", "debug") as log:
        assert cli.run("pull", reference, "--json").error["code"] == "Unauthenticated"
        told = cli.run("pull", reference, "--username", "robot", "--password-stdin", input=PASSWORD)
        assert told.status == 0, told.errors
        assert cli.run("pull", reference, "--json").error["code"] == "Unauthenticated"
    assert PASSWORD not in log.read_text()
    node = docker_config(tmp_path / "node", guarded.address, "robot", PASSWORD)
    with serving(cli, tmp_path, "--docker-config", str(node)) as log:
        assert cli.run("pull", reference).status == 0
        mounted = cli.run("mount", reference, str(tmp_path / "mnt"))
        assert mounted.status == 0, mounted.errors
    assert PASSWORD not in log.read_text()


# -- several processes -----------------------------------------------------------------------------


def test_pulls_at_once_fetch_each_blob_once(
    cli: ModelCsi, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = large_model()
    builder.push(registry, "cli/at-once")
    proxy.faults.bytes_per_second = 8 * MIB
    commands = [cli.start("pull", through(proxy, "cli/at-once"), "--json") for _ in range(4)]
    results = [ended(command) for command in commands]
    assert [done.status for done in results] == [0] * 4, results
    assert len({done.json["path"] for done in results}) == 1
    assert_shows(Path(results[0].json["path"]), builder)
    wanted = {layer["digest"]: layer["size"] for layer in builder.layers}
    assert proxy.counts.bytes == wanted
    assert not socket_path(cli.root).exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_another_takes_over_from_an_agent_that_ends(
    number: signal.Signals, cli: ModelCsi, registry: RegistryServer, proxy: Proxy
) -> None:
    """Twice: the first and the second process that is the agent end in the middle."""
    cli.environment.update(MODEL_CSI_CHUNK_SIZE="256KiB", MODEL_CSI_CONNECTIONS="2")
    builder = large_model(3, 8 * MIB)
    repository = f"cli/killed-{number.value}"
    builder.push(registry, repository)
    proxy.faults.bytes_per_second = 6 * MIB
    commands = [cli.start("pull", through(proxy, repository), "--json") for _ in range(4)]
    gone: list[subprocess.Popen[str]] = []
    for share in (0.25, 0.5):
        wanted = share * blob_bytes(builder)
        wait_until(partial(more_than, proxy, wanted), "bytes arrive")
        [agent] = [one for one in commands if one.pid == holder(cli.root)]
        agent.send_signal(number)
        expected = -number if number == signal.SIGKILL else 128 + number
        assert ended(agent).status == expected
        gone.append(agent)
    results = [ended(one) for one in commands if one not in gone]
    assert [done.status for done in results] == [0, 0], results
    assert_shows(Path(results[0].json["path"]), builder)
    # what was under way when a process ended is asked for again, and nothing else
    assert proxy.counts.total < 1.25 * blob_bytes(builder)
    assert cli.run("ls").status == 0


def more_than(proxy: Proxy, count: float) -> bool:
    return proxy.counts.total > count


def holder(root: Path) -> int:
    return int((root / "lock").read_text().strip())


def test_a_holder_that_hangs_is_named(cli: ModelCsi) -> None:
    cli.root.mkdir()
    program_text = (
        "import sys, pathlib; from fetcher.store import Store; "
        "store = Store.open(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program_text, str(cli.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    config = Config.load({"root": cli.root}, {}, None)
    client = AgentClient(cli.root, lambda: become(config), lambda *_: None, Patience(lock=0.3))

    async def ask() -> ListResult:
        return await client.call(LIST, NoParams())

    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InProgress, match=f"process {process.pid}.*--root"):
            trio.run(ask)
        process.stdin.close()
    assert trio.run(ask).models == ()


@pytest.mark.parametrize(
    "config",
    [b"", b"[" * 100_000 + b"]" * 100_000, b"[" * 400 + b"]" * 400, b"\xff", b"<html>", b"0"],
)
def test_a_config_that_is_none_hurts_nobody(
    config: bytes, cli: ModelCsi, registry: RegistryServer
) -> None:
    builder = tiny_model()
    builder.blobs[Digest.of(config)] = config
    builder.document["config"] |= {"digest": str(Digest.of(config)), "size": len(config)}
    reference = builder.push(registry, "cli/configs", Digest.of(config).short)
    found = cli.run("inspect", reference, "--json")
    assert found.status == 0, found.errors
    assert found.json["config"] in (None, 0)
    assert cli.run("inspect", reference).status == 0


# -- the driver ------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(cli: ModelCsi, folder: Path, *flags: str, mode: str = "node") -> Iterator[Path]:
    """A driver that is ready; it ends by SIGTERM, well. Gives its log."""
    log = folder / "serve.log"
    with start_driver(cli, folder, log, *flags, mode=mode) as driver:
        try:
            wait_until(lambda: "serving on unix://" in log.read_text(), "the driver is ready")
            yield log
        finally:
            driver.send_signal(signal.SIGTERM)
            status = driver.wait(20)
        assert status == 0, log.read_text()
    assert not (folder / "csi.sock").exists()


def start_driver(
    cli: ModelCsi, folder: Path, log: Path, *flags: str, mode: str = "node"
) -> subprocess.Popen[bytes]:
    (folder / "kubelet").mkdir(exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            cli.command(
                *("serve", "--mode", mode, "--endpoint", f"unix://{folder}/csi.sock"),
                *("--node-id", "node-1", "--kubelet-dir", f"{folder}/kubelet", *flags),
            ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=cli.variables(),
        )


def test_commands_talk_to_the_driver(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer
) -> None:
    builder = tiny_model()
    reference = builder.push(registry, "cli/served")
    target = tmp_path / "mnt"
    with serving(cli, tmp_path) as log:
        [ready] = [line for line in log.read_text().splitlines() if "mode node" in line]
        for word in (f"root {cli.root}", "driver model.csi.example.org", "mode node", "version"):
            assert word in ready
        agent = cli.run("status", "--json").json["agent"]
        assert (agent["role"], agent["mode"]) == ("serve", "node")
        assert agent["pid"] == holder(cli.root)
        assert cli.run("pull", reference).status == 0
        assert cli.run("mount", reference, str(target)).status == 0
        assert f"process {agent['pid']}, serving" in cli.run("status").output
    assert not socket_path(cli.root).exists()
    # it ends without taking anything from those who read
    assert mount_at(target) is not None
    assert (target / "config.json").read_bytes() == b'{"model_type": "bert"}'
    with serving(cli, tmp_path):
        assert [row["state"] for row in cli.run("status", "--json").json["volumes"]] == [
            "published"
        ]
        assert cli.run("unmount", str(target)).status == 0
    assert mount_at(target) is None


def test_the_drivers_end_loses_no_bytes(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    cli.environment.update(MODEL_CSI_CHUNK_SIZE="256KiB", MODEL_CSI_CONNECTIONS="2")
    builder = large_model(1, 32 * MIB)
    builder.push(registry, "cli/ended")
    proxy.faults.bytes_per_second = 12 * MIB
    with serving(cli, tmp_path):
        command = cli.start("pull", through(proxy, "cli/ended"), "--json")
        wait_until(lambda: proxy.counts.total > 12 * MIB, "bytes arrive")
        [pull] = cli.run("status", "--json").json["pulls"]
        assert 0 < pull["done"] < pull["total"] == 32 * MIB
        assert pull["rate"] > 0
        assert pull["waiters"] == 1
    # the command goes on by itself, from where the driver stopped
    done = ended(command)
    assert done.status == 0, done.errors
    assert_shows(Path(done.json["path"]), builder)
    assert proxy.counts.total < 1.2 * 32 * MIB


def test_the_driver_takes_the_store_from_a_command(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer, proxy: Proxy
) -> None:
    builder = large_model(1, 24 * MIB)
    builder.push(registry, "cli/handed-over")
    proxy.faults.bytes_per_second = 6 * MIB
    command = cli.start("pull", through(proxy, "cli/handed-over"), "--json")
    wait_until(lambda: proxy.counts.total > 2 * MIB, "bytes arrive")
    with serving(cli, tmp_path):
        assert command.poll() is None
        assert holder(cli.root) != command.pid
        done = ended(command)
        assert done.status == 0, done.errors
        assert_shows(Path(done.json["path"]), builder)


def test_a_second_driver_of_a_root_gives_up(cli: ModelCsi, tmp_path: Path) -> None:
    """Not at once: the one before may be about to end, as in an upgrade."""
    with serving(cli, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        with start_driver(cli, other, other / "serve.log") as second:
            try:
                with pytest.raises(subprocess.TimeoutExpired):
                    second.wait(1.5)
                assert not (other / "csi.sock").exists()
            finally:
                second.terminate()
        assert second.returncode == 0
        assert cli.run("status", "--json").json["agent"]["role"] == "serve"


def test_an_upgrade_follows_a_driver_that_ends(cli: ModelCsi, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    log = other / "serve.log"
    with serving(cli, tmp_path):
        second = start_driver(cli, other, log)
    with second:
        try:
            wait_until(lambda: "serving on" in log.read_text(), "the second one serves")
        finally:
            second.terminate()
    assert second.returncode == 0


def test_the_registry_may_be_away_when_the_driver_starts(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer
) -> None:
    target = tmp_path / "mnt"
    with serve_proxy(registry.address) as proxy:
        tiny_model().push(registry, "cli/away")
        assert cli.run("mount", through(proxy, "cli/away"), str(target)).status == 0
        reference = through(proxy, "cli/away")
    with serving(cli, tmp_path):
        assert (target / "config.json").exists()
        # the store has it, and these credentials were accepted for it before
        assert cli.run("pull", reference).status == 0


def test_a_controller_mounts_nothing(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer
) -> None:
    reference = tiny_model().push(registry, "cli/controller")
    with serving(cli, tmp_path, mode="controller"):
        refused = cli.run("mount", reference, str(tmp_path / "mnt"), "--json")
        assert (refused.status, refused.error["code"]) == (1, "Unsupported")
        assert cli.run("inspect", reference).status == 0


def test_log_lines_as_json(cli: ModelCsi, tmp_path: Path) -> None:
    with serving(cli, tmp_path, "--log-format", "json") as log:
        pass
    for line in log.read_text().splitlines():
        assert line.startswith("{")
        assert '"level": ' in line


def test_unmount_keeps_its_hands_off(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer
) -> None:
    """The user's own empty folder, and what somebody else mounted."""
    empty = tmp_path / "empty"
    empty.mkdir()
    assert cli.run("unmount", str(empty), "--json").json["was_mounted"] is False
    assert empty.is_dir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(empty)], check=True)
    refused = cli.run("unmount", str(empty), "--json")
    assert (refused.status, refused.error["code"]) == (1, "Conflict")
    assert mount_at(empty) is not None
    reference = tiny_model().push(registry, "cli/hands")
    assert cli.run("mount", reference, str(empty), "--json").error["code"] == "Conflict"


def test_a_mount_through_a_link_is_found_again(
    cli: ModelCsi, tmp_path: Path, registry: RegistryServer
) -> None:
    reference = tiny_model().push(registry, "cli/link")
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    assert cli.run("mount", reference, str(link)).status == 0
    assert (real / "config.json").exists()
    assert cli.run("unmount", str(real), "--json").json["was_mounted"] is True
    assert real.is_dir()
