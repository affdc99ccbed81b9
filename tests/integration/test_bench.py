"""The benchmark programs run: at a size at which their figures mean nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def _run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"tests.bench.{program}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pulls_are_compared() -> None:
    # without oras, which is not built for the tests; a quiet machine is for real figures
    output = _run(
        "pull",
        *("--runs", "1", "--as-it-is", "--against", "skopeo,curl"),
        *("--case", "4x2", "--case", "4x1-tar-tls"),
    )
    tables = output.partition("alternating runs")[2]
    heads, *rows = [
        line.split(" | ") for line in tables.splitlines() if " / ours" in line or "MiB in" in line
    ]
    assert [row[0] for row in rows] == [
        *("| 4 MiB in 2 raw", "| 4 MiB in 1 tar TLS"),
        *("| 4 MiB in 2 raw", "| 4 MiB in 1 tar TLS"),
    ]
    assert all(float(cell) > 0 for row in rows[:2] for cell in row[1:4])
    assert heads[1:4] == ["model-csi", "skopeo", "curl"]


def test_nodes_race_and_are_drawn(tmp_path: Path) -> None:
    drawn = tmp_path / "peers.svg"
    output = _run(
        "peers", *("--case", "2x2", "--only", "one node alone", "--graph", str(drawn), "--once")
    )
    [line] = [line for line in output.splitlines() if "2 MiB in 2 raw" in line]
    assert line.split(" | ")[6] == "1.000"
    assert len(re.findall("<polyline", drawn.read_text())) == 1


def test_memory_is_watched_and_drawn(tmp_path: Path) -> None:
    drawn = tmp_path / "memory.svg"
    output = _run(
        "memory",
        *("--sizes", "4,8", "--at-once", "3", "--each", "4", "--graph", str(drawn)),
    )
    assert output.count("| one model of 8 MiB | 8 MiB |") == 2
    assert output.count("| 3 models of 4 MiB at once | 12 MiB |") == 2
    lines = re.findall(r'<polyline points="(.+?)"', drawn.read_text())
    assert len(lines) == 3
