"""A process that reads random ranges of a file over and over, and knows what is right.

What is right may be the beginning of the file: then no more of it is read.

``python -m tests.support.random_reader FILE RIGHT`` prints a line for each read: ``ok``, or the
name of the error that it ended with. Wrong bytes end it with status 1.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.commands import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

_REPOSITORY = Path(__file__).parents[2]
_MOST = 300_000


class RandomReader:
    """The process, and what became of its reads so far."""

    def __init__(self, file: Path, right: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.random_reader", file, right],
            stdout=subprocess.PIPE,
            text=True,
            cwd=_REPOSITORY,
        )
        self.outcomes: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._count)
        self._thread.start()

    def _count(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.outcomes[line.strip()] += 1

    def goes_on(self, reads: int = 5, seconds: float = 30) -> None:
        """Wait until so many more reads were right."""
        goal = self.outcomes["ok"] + reads
        wait_until(
            lambda: self.outcomes["ok"] >= goal or self._process.poll() is not None,
            "right bytes are read",
            seconds,
        )
        assert self._process.poll() is None, "wrong bytes were read"

    @property
    def errors(self) -> dict[str, int]:
        """How often a read ended with which error."""
        return {name: count for name, count in self.outcomes.items() if name != "ok"}

    def end(self) -> None:
        """End the process. Raises if it read wrong bytes."""
        ended = self._process.poll()
        self._process.kill()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()
        assert ended is None, "wrong bytes were read"


@contextmanager
def random_reader(file: Path, right: Path) -> Iterator[RandomReader]:
    """A reader that has begun; the block fails where it read wrong bytes."""
    reader = RandomReader(file, right)
    try:
        reader.goes_on(1)
        yield reader
    finally:
        reader.end()


def _read_once(file: str, right: bytes) -> str:
    offset = random.randrange(len(right))  # noqa: S311 (no secret)
    size = random.randint(1, min(_MOST, len(right) - offset))  # noqa: S311 (no secret)
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            found = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    if found != right[offset : offset + size]:
        print(f"wrong bytes at {offset}", file=sys.stderr)
        sys.exit(1)
    return "ok"


def main() -> None:
    """Read until killed."""
    file, right = sys.argv[1], Path(sys.argv[2]).read_bytes()
    while True:
        print(_read_once(file, right), flush=True)


if __name__ == "__main__":
    main()
