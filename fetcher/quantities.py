"""Quantities as people read them, in errors, progress and tables."""

from __future__ import annotations

import math

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def bytes_text(count: float) -> str:
    """A number of bytes: ``512 B``, ``1.5 GiB``."""
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log2(count)) // 10, len(_UNITS))
    return f"{count / 1024**power:.1f} {_UNITS[power - 1]}"
