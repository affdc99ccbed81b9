"""``make bench-pull`` and ``make bench-pull-all``: cold pulls against what else a user can type.

Every command is timed whole, its start included, in turn with the others; rows of a table in
Markdown are printed. Ours also synchronises the data to the disk and builds the tree that volumes
bind; ``skopeo`` and ``oras`` leave archives packed, ours and ``curl`` with ``tar`` do not.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import functools
import hashlib
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fetcher.modelpack import Packing
from tests.bench.contenders import ORAS, OURS, THEIRS
from tests.bench.measure import MIB, median, timed, undisturbed
from tests.bench.models import Case, push
from tests.support.registry import make_tls, serve_registry

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.bench.contenders import Contender
    from tests.bench.measure import Run
    from tests.bench.models import Pushed

_PACKAGES: Final = ("csi", "fetcher", "fuse", "proto")
_QUICK: Final = (Case(1024, 4),)
_ALL: Final = (
    Case(64, 1),
    Case(64, 4),
    Case(256, 1),
    Case(256, 4),
    Case(256, 16),
    Case(1024, 1),
    Case(1024, 4),
    Case(1024, 16),
    Case(8192, 4),
    Case(1024, 1, Packing.TAR),
    Case(1024, 4, Packing.TAR),
    Case(256, 4, tls=True),
    Case(1024, 1, tls=True),
    Case(1024, 4, tls=True),
    Case(1024, 4, Packing.TAR, tls=True),
)


@dataclass(frozen=True)
class Alone:
    """How long the parts of a pull take with nothing beside them: seconds."""

    hash: float
    """SHA-256 of the layers: each on one processor, on as many as there are."""
    copy: float
    """Writing as many bytes and synchronising them."""
    network: float
    """All layers from the registry to nowhere, by ``curl``."""

    @property
    def limit(self) -> str:
        """The part that takes longest, which no pull can be faster than."""
        parts = {"hash": self.hash, "copy": self.copy, "network": self.network}
        return max(parts, key=lambda part: parts[part])


@dataclass(frozen=True)
class Outcome:
    """All runs of one case, by contender, in the order in which they ran."""

    case: Case
    runs: dict[str, list[Run]]
    alone: Alone


class Bench:
    """Runs cases below one folder."""

    def __init__(
        self, folder: Path, theirs: Sequence[Contender], runs: int, *, quietly: bool
    ) -> None:
        """``quietly`` waits for the machine to be quiet before each run."""
        self._folder = folder
        self._contenders = (OURS, *theirs)
        self._runs = runs
        self._quietly = quietly

    def measure(self, case: Case) -> Outcome:
        """Run every contender several times, in turn."""
        tls = make_tls(self._folder / "tls") if case.tls else None
        with (
            _emptied(self._folder / "registry") as storage,
            serve_registry(storage, tls=tls) as registry,
        ):
            model = push(registry, case, self._folder)
            found: dict[str, list[Run]] = {one.name: [] for one in self._contenders}
            for _ in range(self._runs):
                for one in self._contenders:
                    attempt = functools.partial(self._run, one, model)
                    found[one.name].append(undisturbed(attempt) if self._quietly else attempt())
            alone = self._alone(model)
        return Outcome(case, found, alone)

    def _run(self, contender: Contender, model: Pushed) -> Run:
        with _emptied(self._folder / "pulled") as folder:
            return timed(contender.command(model, folder), model.registry.pid)

    def _alone(self, model: Pushed) -> Alone:
        return Alone(
            _hash_seconds(model),
            _copy_seconds(self._folder, model.case.size),
            _network_seconds(model),
        )


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """An empty folder that is gone from the disk after the block."""
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        # the disk would still be busy with the removal in the next run
        os.sync()


def _hash_seconds(model: Pushed) -> float:
    """The longer of: the largest layer on one processor, all layers on all processors."""
    data = os.urandom(64 * MIB)
    hashlib.sha256(data).digest()
    started = time.perf_counter()
    hashlib.sha256(data).digest()
    for_each = (time.perf_counter() - started) / len(data)
    largest = max(layer.size for layer in model.layers)
    return for_each * max(largest, model.case.size / (os.cpu_count() or 1))


def _copy_seconds(folder: Path, size: int) -> float:
    """Writing as many bytes, by 64 KiB as ours does, and synchronising them."""
    data = os.urandom(64 * 1024)
    path = folder / "written"
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(data)):
            file.write(data)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def _network_seconds(model: Pushed) -> float:
    """All layers at once, from the registry to nowhere."""
    command = ["curl", "--fail", "--silent", "--show-error", "--no-progress-meter", "--parallel"]
    if model.registry.tls:
        command += ["--cacert", str(model.registry.tls.ca)]
    for layer in model.layers:
        command += ["--output", "/dev/null", model.url(f"blobs/{layer.digest}")]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


# -- tables ----------------------------------------------------------------------------------------


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _ratios(ours: list[Run], theirs: list[Run]) -> list[float]:
    return [their.wall / our.wall for our, their in zip(ours, theirs, strict=True)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _heads(cells: Sequence[str]) -> str:
    return f"{_row(cells)}\n|{' --- |' * len(cells)}"


def comparison(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Seconds of every contender, and how many times as long the others take, run by run."""
    theirs = [name for name in outcomes[0].runs if name != OURS.name]
    yield _heads(["model", OURS.name, *theirs, *(f"{name} / ours" for name in theirs)])
    for outcome in outcomes:
        ours = outcome.runs[OURS.name]
        seconds = [f"{median(runs, lambda run: run.wall):.2f}" for runs in outcome.runs.values()]
        ratios = [_spread(_ratios(ours, outcome.runs[name])) for name in theirs]
        yield _row([outcome.case.name, *seconds, *ratios])


def costs(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Where the time of ours goes, and what limits it."""
    yield _heads(
        [
            *("model", "MiB/s", "user", "system", "registry", "processors busy", "peak memory"),
            *("hash alone", "copy alone", "network alone", "limit"),
        ]
    )
    for outcome in outcomes:
        ours, alone = outcome.runs[OURS.name], outcome.alone
        cells = [
            f"{outcome.case.mib / median(ours, lambda run: run.wall):.0f}",
            f"{median(ours, lambda run: run.user):.2f}",
            f"{median(ours, lambda run: run.system):.2f}",
            f"{median(ours, lambda run: run.server):.2f}",
            f"{median(ours, lambda run: run.busy):.0%}",
            f"{median(ours, lambda run: run.peak_mib):.0f} MiB",
        ]
        parts = [f"{part:.2f}" for part in (alone.hash, alone.copy, alone.network)]
        yield _row([outcome.case.name, *cells, *parts, alone.limit])


def _case(text: str) -> Case:
    """``1024x4``, ``1024x4-tar``, ``1024x4-tls``, ``1024x4-tar-tls``: MiB by layers."""
    size, *options = text.split("-")
    mib, layers = size.split("x")
    packing = Packing.TAR if "tar" in options else Packing.RAW
    return Case(int(mib), int(layers), packing, "tls" in options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="models of many kinds")
    parser.add_argument("--case", type=_case, action="append", help=_case.__doc__)
    parser.add_argument("--against", default=",".join(one.name for one in THEIRS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--as-it-is", action="store_true", help="do not wait for a quiet machine")
    arguments = parser.parse_args()
    cases = arguments.case or (_ALL if arguments.all else _QUICK)
    theirs = [one for one in THEIRS if one.name in arguments.against.split(",")]
    if any(one.name == "oras" for one in theirs) and not ORAS.exists():
        parser.error(f"{ORAS} is not built: run 'make {ORAS}', or leave oras out of --against")
    for package in _PACKAGES:
        # as it is where it was installed
        compileall.compile_dir(package, quiet=1)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="bench-pull-") as folder:
        bench = Bench(Path(folder), theirs, arguments.runs, quietly=not arguments.as_it_is)
        for case in cases:
            outcomes.append(bench.measure(case))
            print("\n".join([*comparison(outcomes[-1:]), *costs(outcomes[-1:])]), flush=True)
    print(
        f"\nSeconds, medians of {arguments.runs} alternating runs, {os.cpu_count()} processors:\n"
    )
    print("\n".join(comparison(outcomes)), end="\n\n")
    print("\n".join(costs(outcomes)))


if __name__ == "__main__":
    main()
