"""``<root>/state.db``: the one SQLite database of a node.

Write-ahead log with full synchronisation: what a transaction wrote is there after a power loss. It
is used from the trio thread only; every statement is short.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from typing import TYPE_CHECKING, Final

from fetcher.errors import ModelError, NoSpace, Unsupported
from fetcher.store.migrations import upgrade_from_1

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCHEMA_VERSION: Final = 2
_CHECKPOINT_PAGES: Final = 128
"""After which the log is written back and begun anew: it counts to what the store may take."""


BALLAST_BYTES: Final = _CHECKPOINT_PAGES * 4096
"""Enough for the log until it is begun anew, in the place that it has then."""
_INCREMENTAL: Final = 2
_LITTLE: Final = 2 * BALLAST_BYTES
_ENOUGH: Final = 32 * BALLAST_BYTES


class _Ballast:
    """Some bytes of the disk that are kept for the database.

    Others fill disks. A volume can be taken down and a model evicted only if that can be recorded:
    when there is next to nothing left, these bytes are given up, and taken again when there is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._there = path.exists()

    def trim(self) -> None:
        """Drop or take it, as the disk wants it. Never fails: it only helps."""
        with contextlib.suppress(OSError):
            state = os.statvfs(self._path.parent)
            free = state.f_bavail * state.f_frsize
            if self._there and free < _LITTLE:
                self._path.unlink(missing_ok=True)
                self._there = False
            elif not self._there and free > _ENOUGH:
                self._there = True
                with self._path.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, BALLAST_BYTES)


class Database:
    """An open database; every owner of tables creates its own with ``IF NOT EXISTS``."""

    def __init__(self, path: Path) -> None:
        """Open or create ``path``. Raises :class:`ModelError` when it cannot be used."""
        self._path = path
        self._ballast = _Ballast(path.with_name(f"{path.name}-ballast"))
        self._ballast.trim()
        try:
            self.connection = sqlite3.connect(path, isolation_level=None)
            self._prepare()
        except sqlite3.Error as error:
            raise _translated(error, path) from error

    def _prepare(self) -> None:
        execute = self.connection.execute
        # before anything else, for a file that is new
        execute("PRAGMA auto_vacuum = INCREMENTAL")
        execute("PRAGMA journal_mode = WAL")
        execute(f"PRAGMA journal_size_limit = {BALLAST_BYTES}")
        # for every one: where a commit was not put on the disk at once, an fsync that fails later
        # leaves a hole in the log, and what is behind the hole is not read again
        execute("PRAGMA synchronous = FULL")
        execute("PRAGMA foreign_keys = ON")
        execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        (version,) = execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            self.connection.close()
            raise Unsupported(
                f"{self._path} was written by a newer model-csi (its schema is {version}, this "
                f"program knows {SCHEMA_VERSION}): run the newer version, or use another root"
            )
        if version != SCHEMA_VERSION:
            with self.transaction() as connection:
                if version == 1:
                    upgrade_from_1(connection)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        (vacuum,) = execute("PRAGMA auto_vacuum").fetchone()
        if vacuum != _INCREMENTAL:
            self._rewrite()

    def _rewrite(self) -> None:
        """Let the file of an earlier version be one that can shrink; or try again next time."""
        with contextlib.suppress(sqlite3.OperationalError):
            self.connection.execute("PRAGMA temp_store = MEMORY")
            self.connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self.connection.execute("VACUUM")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing; durable when it returns. Not to be nested, no ``await``."""
        self._ballast.trim()
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
            except BaseException:
                self.connection.execute("ROLLBACK")
                raise
            self.connection.execute("COMMIT")
        except sqlite3.Error as error:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise _translated(error, self._path) from error

    def shrink(self) -> bool:
        """Give the disk some of what the file has and does not need; whether there was anything.

        A little is kept for what is written next. Never fails for a full disk.
        """
        (free,) = self.connection.execute("PRAGMA freelist_count").fetchone()
        if free < _CHECKPOINT_PAGES:
            return False
        self._ballast.trim()
        with contextlib.suppress(sqlite3.OperationalError):
            # not `execute`, which would take the first step only: one page
            self.connection.executescript(f"PRAGMA incremental_vacuum({_CHECKPOINT_PAGES})")
            # the file is cut when the log was written back
            self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        (left,) = self.connection.execute("PRAGMA freelist_count").fetchone()
        return bool(left < free)

    def close(self) -> None:
        """Close it; later use is a programming mistake."""
        self.connection.close()


def _translated(error: sqlite3.Error, path: Path) -> ModelError:
    if getattr(error, "sqlite_errorcode", None) in (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR_WRITE,
    ):
        return NoSpace(f"{path} cannot be written: the disk is full; free some space", path=path)
    return ModelError(f"{path} cannot be used: {error}", path=path)
