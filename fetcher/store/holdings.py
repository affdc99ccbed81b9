"""What the store holds, in ``state.db``: bytes of every content and tree, and which tree uses what.

A holding stands in the records before the first byte of it is written, with all the bytes that it
may come to take, so that the sum is never too small, whenever a process is killed. While it is not
*settled* the figure is such a promise; a settled one was measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from fetcher.store.footprint import TRASH

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Mapping

    from fetcher.store.database import Database

TABLES: Final = (
    "CREATE TABLE IF NOT EXISTS holdings (name TEXT PRIMARY KEY, bytes INTEGER NOT NULL, "
    "settled INTEGER NOT NULL, worked REAL NOT NULL) STRICT",
    "CREATE INDEX IF NOT EXISTS unsettled_holdings ON holdings (name) WHERE settled = 0",
    "CREATE TABLE IF NOT EXISTS uses (tree TEXT NOT NULL, content TEXT NOT NULL, "
    "PRIMARY KEY (tree, content)) STRICT, WITHOUT ROWID",
)


@dataclass(frozen=True, slots=True)
class Holding:
    """One content or tree, or what is left of one in the trash."""

    name: str
    bytes: int
    settled: bool
    worked: float
    """When it was last worked on; seconds since the epoch."""


class Holdings:
    """The tables of holdings and uses. Used from the trio thread only; every call is short."""

    def __init__(self, database: Database) -> None:
        self._database = database
        for table in TABLES:
            database.connection.execute(table)

    def total(self) -> tuple[int, int]:
        """Bytes of all holdings: of those that stay, and of those in the trash."""
        row = self._database.connection.execute(
            "SELECT coalesce(sum(bytes) FILTER (WHERE name NOT GLOB ?1), 0), "
            "coalesce(sum(bytes) FILTER (WHERE name GLOB ?1), 0) FROM holdings",
            (f"{TRASH}/*",),
        ).fetchone()
        return int(row[0]), int(row[1])

    def count(self, kind: str) -> int:
        """How many there are below ``blobs``, ``models`` or ``trash``."""
        row = self._database.connection.execute(
            "SELECT count(*) FROM holdings WHERE name GLOB ?", (f"{kind}/*",)
        ).fetchone()
        return int(row[0])

    def get(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of those of ``names`` that are recorded."""
        # in one step, and with one row: at each of them other threads may take their turn, and this
        # is asked of all that is worked on, for each part that is fetched for others
        found = self._of(names, "json_group_object(name, bytes)", "TRUE")
        return msgspec.json.decode(found, type=dict[str, int])

    def promised(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` whose bytes are a promise."""
        found = self._of(names, "json_group_array(name)", "settled = 0")
        return msgspec.json.decode(found, type=list[str])

    def _of(self, names: Iterable[str], wanted: str, which: str) -> str:
        (found,) = self._database.connection.execute(
            f"SELECT {wanted} FROM json_each(?) CROSS JOIN holdings ON name = value "  # noqa: S608
            f"WHERE {which}",
            (msgspec.json.encode(list(names)).decode(),),
        ).fetchone()
        return str(found)

    def below(self, kind: str) -> list[Holding]:
        """All below ``blobs``, ``models`` or ``trash``."""
        rows = self._database.connection.execute(
            "SELECT name, bytes, settled, worked FROM holdings WHERE name GLOB ? ORDER BY name",
            (f"{kind}/*",),
        )
        return [Holding(name, size, bool(settled), worked) for name, size, settled, worked in rows]

    def unsettled(self) -> list[str]:
        """Names whose bytes are a promise: what is worked on, and what a kill left behind."""
        rows = self._database.connection.execute(
            "SELECT name FROM holdings WHERE settled = 0 AND name NOT GLOB ? ORDER BY name",
            (f"{TRASH}/*",),
        )
        return [name for (name,) in rows]

    def promise(self, claims: Mapping[str, int]) -> None:
        """Let each name take so many bytes, durably; one that has more keeps them."""
        now = time.time()
        with self._database.transaction() as connection:
            connection.executemany(
                "INSERT INTO holdings VALUES (?1, ?2, 0, ?3) ON CONFLICT (name) DO UPDATE "
                "SET bytes = max(bytes, excluded.bytes), settled = 0, worked = excluded.worked",
                [(name, size, now) for name, size in claims.items()],
            )

    def settle(self, measured: Mapping[str, int]) -> None:
        """Put what was measured in the place of promises; what takes nothing is forgotten."""
        gone = [(name,) for name, size in measured.items() if not size]
        there = [(name, size, time.time()) for name, size in measured.items() if size]
        with self._database.transaction() as connection:
            connection.executemany("DELETE FROM holdings WHERE name = ?", gone)
            connection.executemany(
                "INSERT INTO holdings VALUES (?1, ?2, 1, ?3) ON CONFLICT (name) DO UPDATE "
                "SET bytes = excluded.bytes, settled = 1",
                there,
            )

    def touch(self, names: Iterable[str]) -> None:
        """Note that unsettled contents were worked on until now."""
        now = time.time()
        with self._database.transaction() as connection:
            connection.executemany(
                "UPDATE holdings SET worked = ? WHERE name = ? AND settled = 0",
                [(now, name) for name in names],
            )

    def forget(self, names: Iterable[str]) -> None:
        """Forget what is not there any more."""
        with self._database.transaction() as connection:
            connection.executemany(
                "DELETE FROM holdings WHERE name = ?", [(name,) for name in names]
            )

    def uses(self) -> dict[str, set[str]]:
        """The contents that each tree is made of, or may be."""
        found: dict[str, set[str]] = {}
        for tree, content in self._database.connection.execute("SELECT tree, content FROM uses"):
            found.setdefault(tree, set()).add(content)
        return found

    def use(self, tree: str, contents: Iterable[str]) -> None:
        """Record what a tree is made of, before it is there."""
        with self._database.transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO uses VALUES (?, ?)", [(tree, name) for name in contents]
            )


def discard(connection: sqlite3.Connection, name: str, to: str) -> None:
    """Within a transaction: what has this name is going to be in the trash."""
    connection.execute("UPDATE holdings SET name = ? WHERE name = ?", (to, name))
    connection.execute("DELETE FROM uses WHERE tree = ?", (name,))
