"""Which trees were found to be damaged, in ``state.db``: no volume gets one of them any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fetcher.store.database import Database


class Damages:
    """The table of damaged trees, by name. Used from the trio thread only."""

    def __init__(self, database: Database) -> None:
        self._database = database
        database.connection.execute(
            "CREATE TABLE IF NOT EXISTS damages (tree TEXT PRIMARY KEY) STRICT, WITHOUT ROWID"
        )

    def add(self, trees: Iterable[str]) -> None:
        """These are damaged."""
        with self._database.transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO damages VALUES (?)", [(tree,) for tree in trees]
            )

    def has(self, tree: str) -> bool:
        """Whether this one is."""
        row = self._database.connection.execute(
            "SELECT 1 FROM damages WHERE tree = ?", (tree,)
        ).fetchone()
        return row is not None

    def remove(self, trees: Iterable[str]) -> None:
        """These are right again, or gone."""
        with self._database.transaction() as connection:
            connection.executemany(
                "DELETE FROM damages WHERE tree = ?", [(tree,) for tree in trees]
            )
