"""Pods that read a volume all the time, by calls and through mappings; any error counts."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.support.commands import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_READER = """
import hashlib, mmap, os, random, sys
folder, digest = sys.argv[1:]
names = sorted(os.listdir(folder))
path = os.path.join(folder, names[0])
with open(path, "rb") as kept, mmap.mmap(kept.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    while True:
        # everything that a pod may do to a file that it has, or finds again
        assert sorted(os.listdir(folder)) == names
        assert os.stat(path).st_size == len(mapped)
        with open(path, "rb") as again:
            assert hashlib.sha256(again.read()).hexdigest() == digest
        assert hashlib.sha256(mapped).hexdigest() == digest
        kept.seek(random.randrange(len(mapped)))
        assert kept.read(1) != b""
        print(flush=True)
"""


class Reader:
    """One process that reads a volume of one file, over and over."""

    def __init__(self, folder: Path, digest: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _READER, str(folder), digest],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.rounds = 0
        self._thread = threading.Thread(target=self._count)
        self._thread.start()

    def _count(self) -> None:
        assert self._process.stdout is not None
        for _ in self._process.stdout:
            self.rounds += 1

    def goes_on(self, rounds: int = 2) -> None:
        """Wait until it has read everything so many times more. Raises with what it failed with."""
        goal = self.rounds + rounds
        wait_until(lambda: self.rounds >= goal or self._process.poll() is not None, "reads")
        assert self._process.poll() is None, self._process.communicate()[1]

    def end(self) -> None:
        """End the process; whether it read without an error is for :meth:`goes_on` to say."""
        self._process.kill()
        self._thread.join()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        self._process.wait()


@contextmanager
def reading(*volumes: Path, digest: str) -> Iterator[list[Reader]]:
    """Readers of these volumes, all of which have begun to read."""
    readers: list[Reader] = []
    try:
        # one by one: those that have begun are ended, though the next one cannot
        readers.extend(Reader(volume, digest) for volume in volumes)
        for reader in readers:
            reader.goes_on(1)
        yield readers
        for reader in readers:
            reader.goes_on()
    finally:
        for reader in readers:
            reader.end()
