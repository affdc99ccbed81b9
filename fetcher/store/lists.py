"""The lists of chunk digests that were found for models, and when none was, in ``state.db``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import sqlite3

    from fetcher.oci import Digest
    from fetcher.store.database import Database

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS chunk_lists (
    name TEXT NOT NULL, digest TEXT NOT NULL, body BLOB, until REAL NOT NULL,
    PRIMARY KEY (name, digest)) STRICT
"""


@dataclass(frozen=True, slots=True)
class ListRecord:
    """What was found for a model below one name."""

    body: bytes | None = field(repr=False)
    """The list; None where there was none."""
    until: float
    """When to ask again where there was none, in seconds since the epoch."""


class ListRecords:
    """The table of lists. Used from the trio thread only.

    A list belongs to the name, a registry and a repository, under which it was found: others have
    not said that they believe who may push there.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        database.connection.execute(_TABLE)

    def get(self, name: str, model: Digest) -> ListRecord | None:
        """What is known; None where nobody has asked."""
        row = self._database.connection.execute(
            "SELECT body, until FROM chunk_lists WHERE name = ? AND digest = ?", (name, str(model))
        ).fetchone()
        return None if row is None else ListRecord(row[0], row[1])

    def put(self, name: str, model: Digest, record: ListRecord) -> None:
        """Record what was found. Raises :class:`fetcher.errors.NoSpace`."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO chunk_lists VALUES (?, ?, ?, ?)",
                (name, str(model), record.body, record.until),
            )

    @staticmethod
    def forget(connection: sqlite3.Connection, model: str) -> None:
        """Within a transaction: nothing is known of a model any more."""
        connection.execute("DELETE FROM chunk_lists WHERE digest = ?", (model,))
