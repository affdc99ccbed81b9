"""The command line without a store: options, help, logs, progress, signals."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
import trio.lowlevel
from hypothesis import given
from hypothesis import strategies as st

from csi.__main__ import program
from csi.agent_calls import keychain_for, volume_id_of
from csi.cli import output
from csi.cli.app import main, model_csi
from csi.cli.running import Interrupted, run
from csi.config import settings
from csi.progress import PlainLines, shown
from fetcher import errors, logs
from fetcher.agent_protocol import CALLS, Login
from fetcher.credentials import Anonymous
from fetcher.errors import NotFound
from fetcher.oci import Reference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from csi.cli.program import Program

SECRET = "s3cr3t-and-l0ng-enough"
COMMANDS = (
    *("serve", "pull", "mount", "unmount", "push", "index", "ls", "inspect", "status"),
    *("gc", "rm", "verify"),
)


@pytest.fixture
def whole() -> Program:
    return program()


# -- options and help ------------------------------------------------------------------------------


def test_the_commands_are_these() -> None:
    assert sorted(model_csi.commands) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(
    command: str, whole: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"], whole) == 0
    text = capsys.readouterr().out
    assert f"Usage: model-csi {command}" in text
    assert "Examples:" in text
    for option in ("--root", "--config", "--json", "--log-level"):
        assert option in text


def test_serve_takes_every_setting(whole: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"], whole) == 0
    text = capsys.readouterr().out
    for setting in settings():
        assert f"--{setting.name} " in text


def test_no_command_is_wrong_usage(whole: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], whole) == 2
    assert "Commands:" in capsys.readouterr().out


def test_the_version(whole: Program, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"], whole) == 0
    assert capsys.readouterr().out == f"model-csi {whole.version}\n"


@pytest.mark.parametrize(
    "arguments",
    [["--root", "ROOT", "--json", "ls"], ["ls", "--root", "ROOT", "--json"]],
)
def test_global_options_go_anywhere(
    arguments: list[str], tmp_path: Path, whole: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    placed = [str(tmp_path / "none") if one == "ROOT" else one for one in arguments]
    assert main(placed, whole) == 0
    assert json.loads(capsys.readouterr().out) == {"models": []}


def test_a_root_may_be_relative(
    tmp_path: Path,
    whole: Program,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status", "--root", "below/../here", "--json"], whole) == 0
    assert json.loads(capsys.readouterr().out)["root"] == str(tmp_path / "here")


def test_flags_win_over_the_environment_and_it_over_the_file(
    tmp_path: Path,
    whole: Program,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"root: {tmp_path}/file\n")

    def root_of(*arguments: str) -> str:
        assert main(["status", "--json", *arguments], whole) == 0
        found: str = json.loads(capsys.readouterr().out)["root"]
        return found.removeprefix(f"{tmp_path}/")

    assert root_of("--config", str(file)) == "file"
    monkeypatch.setenv("MODEL_CSI_ROOT", f"{tmp_path}/environment")
    assert root_of("--config", str(file)) == "environment"
    assert root_of("--config", str(file), "--root", f"{tmp_path}/flag") == "flag"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["pull", "--json"], 2),
        (["--json", "nothing"], 2),
        (["pull", "--nothing", "--json"], 2),
        (["pull", "Upper/Case", "--json"], 1),
    ],
)
def test_failures_as_json(
    arguments: list[str],
    status: int,
    whole: Program,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments, whole) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert set(json.loads(captured.err)["error"]) == {"code", "message"}


def test_a_password_comes_with_a_name_and_is_no_option(
    whole: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", "a/b", "--password", SECRET], whole) == 2
    assert main(["pull", "a/b", "--username", "me"], whole) == 2
    assert main(["pull", "a/b", "--password-stdin"], whole) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["pull", "a/b", "--username", "me", "--password-stdin"], whole) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO(SECRET * 5000))
    assert main(["pull", "a/b", "--username", "me", "--password-stdin"], whole) == 2
    assert SECRET not in capsys.readouterr().err


def test_a_fault_is_one_line_and_a_log_line(
    whole: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: str) -> str:
        raise RuntimeError("an inner matter")

    monkeypatch.setattr("os.path.exists", fail)
    assert main(["ls"], whole) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    log, line = captured.err.splitlines()
    assert "Traceback" in log
    assert line == "model-csi: fault of this program: RuntimeError: an inner matter"


# -- running ---------------------------------------------------------------------------------------


def test_running_returns_and_raises_as_it_is() -> None:
    async def fine() -> int:
        await trio.lowlevel.checkpoint()
        return 5

    async def bad() -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise NotFound("no such model")

    async def worse() -> int:
        raise ValueError("a bug")

    assert run(fine) == 5
    with pytest.raises(NotFound):
        run(bad)
    with pytest.raises(ExceptionGroup):
        run(worse)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_and_is_told(number: signal.Signals) -> None:
    undone = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), number)
            await trio.sleep(10)
        finally:
            undone.append(number)

    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    try:
        with pytest.raises(Interrupted) as caught:
            run(work)
    finally:
        for one, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(one, handler)
    assert caught.value.number == number
    assert undone == [number]


# -- credentials and ids ---------------------------------------------------------------------------


def test_a_login_is_for_the_calls_registry_alone() -> None:
    reference = Reference.parse("registry.example.org/acme/model:v1")
    login = Login(username="me", password=SECRET)
    keychain = keychain_for(reference, login, Anonymous())
    assert SECRET not in repr(keychain)

    async def main() -> None:
        found = await keychain.lookup("registry.example.org", "acme/model")
        assert found is not None
        assert found.password == SECRET
        assert await keychain.lookup("other.example.org", "acme/model") is None

    trio.run(main)


def test_a_volumes_id_is_that_of_its_folder(tmp_path: Path) -> None:
    assert volume_id_of(tmp_path / "a") == volume_id_of(tmp_path / "a")
    assert volume_id_of(tmp_path / "a") != volume_id_of(tmp_path / "b")
    assert volume_id_of(tmp_path / "a").startswith("cli-")


# -- logs ------------------------------------------------------------------------------------------


@pytest.fixture
def log() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream = io.StringIO()
    with logs.configured("info", "text", stream):
        yield logging.getLogger("test.logs"), stream


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {SECRET}",
        f"{{'authorization': 'Basic {SECRET}'}}",
        f"sent header Bearer {SECRET}",
        f"https://me:{SECRET}@registry.example.org/v2/",
        f"GET https://bucket.example.org/blob?X-Amz-Signature={SECRET}&x=1 HTTP/1.1",
        f'{{"username": "me", "password": "{SECRET}"}}',
        f"password={SECRET}",
        f"Credentials(identity_token='{SECRET}')",
        f'"access_token":"{SECRET}"',
        f"client_secret: {SECRET}",
        f"token=eyJhbGciOiJIUzI1NiJ9.{SECRET}.{SECRET}",
        f"saw eyJhbGciOiJIUzI1NiJ9.{SECRET.replace('-', '_')}.sig",
    ],
)
def test_what_looks_like_a_secret_is_cut(
    text: str, log: tuple[logging.Logger, io.StringIO]
) -> None:
    logger, stream = log
    logger.warning("it said %s", text)
    try:
        raise ValueError(text)
    except ValueError:
        logger.exception("it failed")
    written = stream.getvalue()
    assert SECRET not in written
    assert SECRET.replace("-", "_") not in written
    assert "***" in written


def test_what_does_not_look_like_one_is_not() -> None:
    for text in (
        "pulling ghcr.io/acme/token-model:v1@sha256:0123",
        "https://registry.example.org/v2/acme/model/manifests/v1 answered 503",
        "the password is wrong",
        "basic checks passed",
    ):
        assert logs.without_secrets(text) == text


@pytest.mark.parametrize("form", ["text", "json"])
@given(message=st.text(max_size=300))
def test_a_record_is_one_line_whatever_is_in_it(form: str, message: str) -> None:
    stream = io.StringIO()
    with logs.configured("info", form, stream):
        logging.getLogger("test.logs").info("%s", message)
    written = stream.getvalue()
    assert written.endswith("\n")
    assert len(written.splitlines()) == 1
    assert written[:-1].isprintable()


@pytest.mark.parametrize("form", ["text", "json"])
def test_records_are_bounded(form: str) -> None:
    stream = io.StringIO()

    def deep(level: int) -> None:
        if level:
            deep(level - 1)
        raise ValueError("x" * 100_000)

    with logs.configured("info", form, stream):
        logger = logging.getLogger("test.logs")
        logger.info("m" * 10_000_000, extra={"field": "f" * 10_000_000})
        with contextlib.suppress(ValueError):
            try:
                deep(50)
            except ValueError:
                logger.exception("failed")
                raise
    for line in stream.getvalue().splitlines():
        assert len(line) < 2 * (logs.MAX_MESSAGE + logs.MAX_STACK + logs.MAX_FIELD)


def test_json_lines_have_fields() -> None:
    stream = io.StringIO()
    with logs.configured("info", "json", stream):
        logging.getLogger("a.b").info(
            "done", extra={"seconds": 1.5, "volume": "v\n1", "level": "x"}
        )
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("a.b").exception("failed")
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert first["time"].endswith("Z")
    assert (first["level"], first["logger"], first["message"]) == ("info", "a.b", "done")
    assert (first["seconds"], first["volume"]) == (1.5, "v\\n1")
    assert "ValueError: why" in second["stack"]


def test_levels_and_talkative_libraries() -> None:
    stream = io.StringIO()
    with logs.configured("debug", "text", stream):
        logging.getLogger("csi").debug("ours")
        logging.getLogger("httpx").info("GET https://…")
        logging.getLogger("urllib3.connectionpool").debug("GET https://…")
    assert "ours" in stream.getvalue()
    assert "GET" not in stream.getvalue()


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1) as stream:
        with logs.configured("info", "text", stream):
            logging.getLogger("test.logs").info("nobody reads this")
        with contextlib.suppress(BrokenPipeError):
            stream.close()


# -- output and progress ---------------------------------------------------------------------------


def test_tables_line_up_and_cannot_steer(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("A", "LONG"), [("one\x1b[2J", ""), ("2", "x\ny")])
    assert capsys.readouterr().out == "A           LONG\none\\x1b[2J  -\n2           x\\ny\n"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_is_a_line_now_and_then() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = PlainLines("pulling a/b", stream, clock)
    for done in range(0, 101, 10):
        lines(done * 1024, 100 * 1024)
        clock.now += 1
    lines(100 * 1024, 100 * 1024)
    assert stream.getvalue().splitlines() == [
        "pulling a/b: 0 % (0 B of 100.0 KiB)",
        "pulling a/b: 50 % (50.0 KiB of 100.0 KiB, 10.0 KiB/s)",
        "pulling a/b: 100 % (100.0 KiB of 100.0 KiB, 10.0 KiB/s)",
    ]


def test_progress_of_nothing_is_complete() -> None:
    stream = io.StringIO()
    PlainLines("x", stream)(0, 0)
    assert stream.getvalue() == "x: 100 % (0 B of 0 B)\n"


def test_quiet_progress_says_nothing() -> None:
    stream = io.StringIO()
    with shown("x", stream, quiet=True) as show:
        show(1, 2)
    assert stream.getvalue() == ""


def test_a_title_is_no_markup() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with shown("[red]x[/red]", stream, quiet=False) as show:
        show(1, 2)
    assert "[red]x[/red]" in stream.getvalue()


# -- documentation ---------------------------------------------------------------------------------


def test_the_documentation_names_what_there_is() -> None:
    text = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    for command in COMMANDS:
        assert re.search(rf"^\| `{command}[` ]", text, re.MULTILINE), command
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.ModelError):
            assert f"`{kind.__name__}`" in text
    for call in CALLS:
        assert f"`{call.name}`" in text
