"""``make bench-memory``: the memory of ``model-csi serve`` while it pulls, over time.

Models of growing size one at a time, then many models at once, each in a ``serve`` of its own;
commands ask for them. The data is zeros from a small server: what is in them costs no memory.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.bench.graph import Axis, Line, draw
from tests.bench.measure import MIB
from tests.bench.zeros import ZeroModel, serve_zeros
from tests.support.driver import serve_driver

if TYPE_CHECKING:
    from collections.abc import Sequence

_LIMIT_MIB: Final = 200
_SAMPLE_SECONDS: Final = 0.1
_POINTS: Final = 300
"""At most so many points of a line are drawn."""
_LAYERS: Final = 16


@dataclass(frozen=True)
class Load:
    """Models that are pulled at one time."""

    name: str
    models: tuple[ZeroModel, ...]


@dataclass(frozen=True)
class Course:
    """What the memory was: MiB over seconds."""

    load: Load
    samples: tuple[tuple[float, float], ...]
    peak_mib: float
    """As the kernel recorded it: between two samples it may have been more."""

    @property
    def seconds(self) -> float:
        return self.samples[-1][0]


def _model(name: str, mib: int) -> ZeroModel:
    # no two layers of a size: they would be one blob
    layer = mib * MIB // _LAYERS
    return ZeroModel(name, tuple(layer + number for number in range(_LAYERS)))


def _loads(sizes: Sequence[int], at_once: int, each: int) -> list[Load]:
    loads = [
        Load(f"one model of {_text(mib)}", (_model(f"bench/one-{mib}", mib),)) for mib in sizes
    ]
    # models differ by some KiB, and so do their layers
    many = tuple(
        ZeroModel(
            f"bench/many-{number}",
            tuple(each * MIB // _LAYERS + number * 1024 + layer + 8 for layer in range(_LAYERS)),
        )
        for number in range(at_once)
    )
    return [*loads, Load(f"{at_once} models of {_text(each)} at once", many)]


def _text(mib: int) -> str:
    return f"{mib // 1024} GiB" if mib % 1024 == 0 else f"{mib} MiB"


def measure(load: Load, address: str, folder: Path) -> Course:
    """Pull all models of ``load`` at one time into a new store, and watch."""
    with serve_driver(folder) as driver, contextlib.ExitStack() as stack:
        started = time.monotonic()
        root = ["--root", str(driver.root)]
        pulls = []
        for model in load.models:
            reference = f"{address}/{model.name}:v1"
            command = [sys.executable, "-m", "csi", "--json", *root, "pull", reference]
            pull = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            stack.callback(pull.kill)
            pulls.append(pull)
        samples = []
        while any(pull.poll() is None for pull in pulls):
            samples.append((time.monotonic() - started, _status_mib(driver.pid, "VmRSS")))
            time.sleep(_SAMPLE_SECONDS)
        if any(pull.returncode for pull in pulls):
            raise SystemExit(f"a pull failed; the log is\n{driver.log.read_text()[-4000:]}")
        return Course(load, tuple(samples), _status_mib(driver.pid, "VmHWM"))


def _status_mib(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(name)


def table(courses: Sequence[Course]) -> str:
    """Rows in Markdown."""
    rows = [
        "| pulled | bytes | seconds | memory at half | peak |",
        "| --- | --- | --- | --- | --- |",
    ]
    for course in courses:
        size = sum(model.size for model in course.load.models) // MIB
        half = course.samples[len(course.samples) // 2][1]
        rows.append(
            f"| {course.load.name} | {size} MiB | {course.seconds:.0f} | {half:.0f} MiB | "
            f"{course.peak_mib:.0f} MiB |"
        )
    return "\n".join(rows)


def graph(courses: Sequence[Course]) -> str:
    """The courses, each stretched to the width of the graph."""
    lines = []
    for course in courses:
        every = -(-len(course.samples) // _POINTS)
        points = [(at / course.seconds, mib) for at, mib in course.samples[::every]]
        lines.append(Line(f"{course.load.name} ({course.seconds:.0f} s)", points))
    axis = Axis("MiB of memory", top=_LIMIT_MIB + 20, step=50, limit=_LIMIT_MIB)
    return draw(lines, axis, "time of the pull")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1024,8192,32768", help="MiB, one model each")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--each", type=int, default=1024, help="MiB of each of those")
    parser.add_argument("--graph", type=Path, help="where to write the SVG")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    loads = _loads(sizes, arguments.at_once, arguments.each)
    courses = []
    with serve_zeros([model for load in loads for model in load.models]) as address:
        for load in loads:
            with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
                courses.append(measure(load, address, Path(folder)))
            print(table(courses[-1:]).splitlines()[-1], flush=True)
    print(f"\n{table(courses)}")
    if arguments.graph:
        arguments.graph.write_text(graph(courses))
    if any(course.peak_mib >= _LIMIT_MIB for course in courses):
        raise SystemExit(f"more than {_LIMIT_MIB} MiB")


if __name__ == "__main__":
    main()
