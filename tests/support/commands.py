"""The command line as real processes, as people and scripts run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SECONDS = 60.0


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    output: str
    errors: str

    @property
    def json(self) -> Any:
        return json.loads(self.output)

    @property
    def error(self) -> dict[str, str]:
        """What a command with ``--json`` says of its failure."""
        found: dict[str, str] = json.loads(self.errors)["error"]
        return found


@dataclass(frozen=True)
class ModelCsi:
    """``model-csi`` for one root, with a home folder of its own."""

    root: Path
    home: Path
    environment: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, *arguments: str, input: str | None = None, user: int | None = None) -> Done:
        """Run a command to its end."""
        done = subprocess.run(
            self.command(*arguments) if user is None else self.command_as(user, *arguments),
            input=input,
            stdin=None if input is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
            env=self.variables(),
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command; :func:`ended` waits for it, and :meth:`stop` for what is left."""
        process = subprocess.Popen(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.variables(),
        )
        self.started.append(process)
        return process

    def stop(self) -> None:
        """End whatever a test that failed has left."""
        for process in self.started:
            with process:
                process.kill()

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "csi", "--root", str(self.root), *arguments]

    def command_as(self, user: int, *arguments: str) -> list[str]:
        """As another user, who may not be able to read the interpreter's own files."""
        program = (
            # the codec of host names is loaded at its first use, when it could not be read any more
            "import encodings.idna, os, sys; from csi.__main__ import main; "
            f"os.setgroups([]); os.setgid({user}); os.setuid({user}); main()"
        )
        return [sys.executable, "-c", program, *self.command(*arguments)[3:]]

    def variables(self) -> dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.home),
            **self.environment,
        }


def ended(process: subprocess.Popen[str]) -> Done:
    """Wait for a process that was started."""
    output, errors = process.communicate(timeout=SECONDS)
    return Done(process.returncode, output, errors)


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    """Wait for something that other processes bring about."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds} s still not: {what}")
        time.sleep(0.02)
