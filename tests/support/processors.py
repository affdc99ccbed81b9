"""How busy the processors of the whole machine were."""

from __future__ import annotations

from pathlib import Path


class Busy:
    """The part of the processors that anything has used since it was made, from 0 to 1."""

    def __init__(self) -> None:
        self._used, self._all = _ticks()

    def part(self) -> float:
        used, everything = _ticks()
        return (used - self._used) / max(1, everything - self._all)


def _ticks() -> tuple[int, int]:
    """Used ones and all, as the kernel counts them since its start."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, idle, waiting, *interrupts = map(int, fields)
    used = user + nice + system + sum(interrupts)
    return used, used + idle + waiting
