"""Credentials that tests show, without a secret around them."""

from __future__ import annotations

from dataclasses import dataclass

from fetcher.credentials import Credentials


@dataclass(frozen=True)
class Everywhere:
    """The same name and password for every registry, which no pod's secret ever is."""

    username: str
    password: str

    async def lookup(self, registry: str, repository: str) -> Credentials | None:
        return Credentials(self.username, self.password)
