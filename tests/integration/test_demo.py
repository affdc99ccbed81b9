"""``make demo`` works, and whatever ends it, it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.mounts import mounts_below

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def folder() -> Iterator[Path]:
    """For sockets below it, whose paths may not be long: those of parallel tests are longer."""
    with tempfile.TemporaryDirectory(prefix="demo-") as made:
        yield Path(made)


def start_demo(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.demo"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
        # as a terminal does it: the demo and what it starts get the signal of the process group
        start_new_session=True,
    )


def processes_naming(folder: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has ended meanwhile
        if str(folder) in command:
            found.append(command)
    return found


def assert_nothing_is_left(folder: Path) -> None:
    assert not mounts_below(folder)
    assert not processes_naming(folder)
    assert not list(folder.iterdir())


def test_the_demo_shows_a_model_and_leaves_nothing(folder: Path) -> None:
    with start_demo(folder) as demo:
        output, _ = demo.communicate(timeout=100)
    assert demo.returncode == 0, output
    assert "equal to the original" in output
    assert "in both pods" in output
    assert_nothing_is_left(folder)


@pytest.mark.parametrize("seen", ["registry", "driver", "pod-1"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(
    number: signal.Signals, seen: str, folder: Path
) -> None:
    with start_demo(folder) as demo:
        assert demo.stdout is not None
        before = []
        for line in demo.stdout:
            before.append(line)
            if f" {seen} " in line:
                break
        os.killpg(demo.pid, number)
        rest, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, "".join(before) + rest
    assert_nothing_is_left(folder)
