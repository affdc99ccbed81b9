"""Records of volumes in the store's database: what was published where, through crashes too.

A record is written before anything is done and taken back after it was undone, so that at any
moment each mount of ours is either recorded or below the store's models. Nothing secret is in it.
"""

from __future__ import annotations

import enum
import logging
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from fetcher.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

logger = logging.getLogger(__name__)

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS volumes (
    volume_id TEXT NOT NULL, target TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('publishing', 'published', 'unpublishing')),
    fingerprint TEXT NOT NULL, reference TEXT NOT NULL, digest TEXT NOT NULL, model TEXT NOT NULL,
    selection TEXT NOT NULL, made_target INTEGER NOT NULL, origin TEXT, size INTEGER NOT NULL,
    files INTEGER NOT NULL, pod TEXT, created REAL NOT NULL,
    shown TEXT NOT NULL DEFAULT 'bind', prefetch TEXT NOT NULL DEFAULT 'all', reason TEXT,
    PRIMARY KEY (volume_id, target)) STRICT
"""
_ADDED: Final = {
    "shown": "TEXT NOT NULL DEFAULT 'bind'",
    "prefetch": "TEXT NOT NULL DEFAULT 'all'",
    "reason": "TEXT",
}
"""Columns that a table of an earlier version lacks; it had bound all of its volumes."""

_NAMES: Final = (
    *("volume_id", "target", "state", "fingerprint", "reference", "digest", "model", "selection"),
    *("made_target", "origin", "size", "files", "pod", "created", "shown", "prefetch", "reason"),
)
_COLUMNS: Final = ", ".join(_NAMES)
_PLACES: Final = ", ".join("?" * len(_NAMES))


class Database(Protocol):
    """What this module needs of the store's database."""

    connection: sqlite3.Connection

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """All of the block or nothing, durable when it returns."""


class VolumeState(enum.Enum):
    """How far a volume is at one target."""

    PUBLISHING = "publishing"
    """Resolved, perhaps downloading, perhaps mounted: no call has said so yet."""
    PUBLISHED = "published"
    UNPUBLISHING = "unpublishing"


class Shown(enum.Enum):
    """What is bound at a target."""

    BIND = "bind"
    """The tree of a complete model: no process stands between a pod and its files."""
    LAZY = "lazy"
    """The mount of the model's worker."""


@dataclass(frozen=True)
class VolumeRecord:
    """One volume at one target."""

    volume_id: str
    target: Path
    """Without symlinks."""
    state: VolumeState
    fingerprint: str
    """Of the attributes, as :meth:`VolumeAttributes.fingerprint` gives it."""
    reference: str
    """As the volume names it."""
    digest: str
    """What the reference was resolved to, kept while the download is waited for."""
    model: str
    """Digest of the model's manifest; with ``selection`` it names the tree, which this pins."""
    selection: str
    made_target: bool
    """Whether we make, and so have to remove, the folder at the target."""
    origin: str | None
    """:attr:`Mount.origin` of the mount; None before there is one."""
    size: int
    files: int
    pod: str | None
    created: float
    """Seconds since the epoch."""
    shown: Shown = Shown.BIND
    prefetch: str = "all"
    """What the worker's model is to fetch unasked, as the volume's attributes have it."""
    reason: str | None = None
    """Why it is shown as it is, where its mode left that open."""


class VolumeRecords:
    """The table of volumes. Used from the trio thread only; every call is short and durable."""

    def __init__(self, database: Database) -> None:
        self._database = database
        with database.transaction() as connection:
            connection.execute(_TABLE)
            there = {row[1] for row in connection.execute("PRAGMA table_info(volumes)")}
            for name, kind in _ADDED.items():
                if name not in there:
                    connection.execute(f"ALTER TABLE volumes ADD COLUMN {name} {kind}")

    def get(self, volume_id: str, target: Path) -> VolumeRecord | None:
        """The record of a volume at a target."""
        found = self._select("WHERE volume_id = ? AND target = ?", volume_id, str(target))
        return found[0] if found else None

    def of_volume(self, volume_id: str) -> list[VolumeRecord]:
        """A volume at all of its targets."""
        return self._select("WHERE volume_id = ? ORDER BY target", volume_id)

    def of_target(self, target: Path) -> list[VolumeRecord]:
        """All volumes that are recorded at a target; more than one only after a state was lost."""
        return self._select("WHERE target = ? ORDER BY volume_id", str(target))

    def all(self) -> list[VolumeRecord]:
        """Every record that can be read; one that cannot is logged and left out."""
        return self._select("ORDER BY created, volume_id, target")

    def pins(self) -> set[tuple[str, str]]:
        """Model and selection of every record, also of those that cannot be read otherwise."""
        try:
            rows = self._database.connection.execute(
                "SELECT DISTINCT model, selection FROM volumes"
            )
            return {(str(model), str(selection)) for model, selection in rows}
        except sqlite3.Error as error:
            raise _unreadable(error) from error

    def save(self, record: VolumeRecord) -> None:
        """Write a record, in place of the one of the same volume and target."""
        with self._database.transaction() as connection:
            connection.execute(
                f"INSERT OR REPLACE INTO volumes ({_COLUMNS}) "  # noqa: S608 (a constant)
                f"VALUES ({_PLACES})",
                (
                    record.volume_id,
                    str(record.target),
                    record.state.value,
                    record.fingerprint,
                    record.reference,
                    record.digest,
                    record.model,
                    record.selection,
                    int(record.made_target),
                    record.origin,
                    record.size,
                    record.files,
                    record.pod,
                    record.created,
                    record.shown.value,
                    record.prefetch,
                    record.reason,
                ),
            )

    def remove(self, volume_id: str, target: Path) -> None:
        """Forget a volume at a target; nothing happens if it is not known."""
        with self._database.transaction() as connection:
            connection.execute(
                "DELETE FROM volumes WHERE volume_id = ? AND target = ?", (volume_id, str(target))
            )

    def _select(self, clause: str, *values: str) -> list[VolumeRecord]:
        try:
            rows = self._database.connection.execute(
                f"SELECT {_COLUMNS} FROM volumes {clause}",  # noqa: S608 (clauses are constants)
                values,
            ).fetchall()
        except sqlite3.Error as error:
            raise _unreadable(error) from error
        return [record for row in rows if (record := _read(row)) is not None]


def _unreadable(error: sqlite3.Error) -> ModelError:
    return ModelError(f"the records of volumes cannot be read: {error}")


def _read(row: Sequence[object]) -> VolumeRecord | None:
    """A row as a record; None, and a line in the log, for one that another version wrote."""
    (volume_id, target, state, fingerprint, reference, digest, model, selection, made_target,
     origin, size, files, pod, created, shown, prefetch, reason) = row  # fmt: skip
    try:
        return VolumeRecord(
            volume_id=str(volume_id),
            target=Path(str(target)),
            state=VolumeState(state),
            fingerprint=str(fingerprint),
            reference=str(reference),
            digest=str(digest),
            model=str(model),
            selection=str(selection),
            made_target=bool(made_target),
            origin=None if origin is None else str(origin),
            size=int(str(size)),
            files=int(str(files)),
            pod=None if pod is None else str(pod),
            created=float(str(created)),
            shown=Shown(shown),
            prefetch=str(prefetch),
            reason=None if reason is None else str(reason),
        )
    except ValueError as error:
        logger.error("the record of volume %s at %s is passed over: %s", volume_id, target, error)
        return None
