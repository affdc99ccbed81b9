"""What the store knows, in ``state.db``: blobs, models, manifests, tags, and who may read what."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fetcher.errors import InvalidArtifact
from fetcher.oci import Digest, Manifest, parse_manifest
from fetcher.store.lists import ListRecords

if TYPE_CHECKING:
    import sqlite3

    from fetcher.oci import Reference
    from fetcher.store.database import Database

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS blobs (
    digest TEXT PRIMARY KEY, size INTEGER NOT NULL, completed REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS models (
    digest TEXT NOT NULL, selection TEXT NOT NULL, size INTEGER NOT NULL, files INTEGER NOT NULL,
    completed REAL NOT NULL, used REAL NOT NULL, PRIMARY KEY (digest, selection)) STRICT;
CREATE TABLE IF NOT EXISTS manifests (
    top TEXT PRIMARY KEY, digest TEXT NOT NULL, media_type TEXT NOT NULL, body BLOB NOT NULL)
    STRICT;
CREATE TABLE IF NOT EXISTS tags (
    reference TEXT PRIMARY KEY, digest TEXT NOT NULL, resolved REAL NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS accesses (
    name TEXT NOT NULL, digest TEXT NOT NULL, fingerprint TEXT NOT NULL, accepted REAL NOT NULL,
    PRIMARY KEY (name, digest, fingerprint)) STRICT;
CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT;
"""
_PROOFS: Final = """
CREATE TABLE proofs (
    name TEXT NOT NULL, digest TEXT NOT NULL, proven REAL NOT NULL, PRIMARY KEY (name, digest))
    STRICT, WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One tree in the store, as ``model-csi ls`` shows it."""

    digest: Digest
    selection: str
    references: tuple[str, ...]
    size: int
    files: int
    last_used: float
    """Seconds since the epoch."""


class Catalog:
    """The store's own tables. Used from the trio thread only, like the database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        database.connection.executescript(_TABLES)
        found = database.connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'proofs'")
        if found.fetchone() is None:
            self._begin_proofs()

    def _begin_proofs(self) -> None:
        """A store of an earlier version: what was readable below a name was fetched through it."""
        with self._database.transaction() as connection:
            connection.execute(_PROOFS)
            names = connection.execute("SELECT DISTINCT name FROM accesses").fetchall()
            for (name,) in names:
                for digest in _layers_below(connection, name):
                    connection.execute(
                        "INSERT OR IGNORE INTO proofs VALUES (?, ?, ?)", (name, digest, time.time())
                    )

    def salt(self) -> bytes:
        """The random bytes that fingerprints of credentials are made with here; made once."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO settings VALUES ('salt', ?)", (os.urandom(16),)
            )
            (salt,) = connection.execute("SELECT value FROM settings WHERE key = 'salt'").fetchone()
        return bytes(salt)

    def add_blob(self, digest: Digest, size: int, name: str | None = None) -> None:
        """Record that a blob was verified and synchronised, and that it was seen to be had below
        ``name``, if that is given.
        """
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO blobs VALUES (?, ?, ?)", (str(digest), size, time.time())
            )
            if name is not None:
                _add_proof(connection, name, digest)

    def has_blob(self, digest: Digest, size: int) -> bool:
        """Whether a blob is complete, by the records."""
        row = self._database.connection.execute(
            "SELECT 1 FROM blobs WHERE digest = ? AND size = ?", (str(digest), size)
        ).fetchone()
        return row is not None

    def blob_size(self, digest: Digest) -> int | None:
        """Bytes of a complete blob."""
        row = self._database.connection.execute(
            "SELECT size FROM blobs WHERE digest = ?", (str(digest),)
        ).fetchone()
        return None if row is None else int(row[0])

    def blobs(self) -> list[Digest]:
        """All blobs that are complete, by the records."""
        rows = self._database.connection.execute("SELECT digest FROM blobs")
        return [Digest.parse(digest) for (digest,) in rows]

    def remove_blob(self, digest: Digest) -> None:
        """Forget a blob."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM blobs WHERE digest = ?", (str(digest),))

    def add_model(self, digest: Digest, selection: str, size: int, files: int) -> None:
        """Record a tree that was built."""
        now = time.time()
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?, ?, ?)",
                (str(digest), selection, size, files, now, now),
            )

    def model(self, digest: Digest, selection: str) -> tuple[int, int] | None:
        """Bytes and files of a recorded tree."""
        row = self._database.connection.execute(
            "SELECT size, files FROM models WHERE digest = ? AND selection = ?",
            (str(digest), selection),
        ).fetchone()
        return None if row is None else (int(row[0]), int(row[1]))

    def remove_model(self, digest: Digest, selection: str) -> None:
        """Forget a tree."""
        with self._database.transaction() as connection:
            connection.execute(
                "DELETE FROM models WHERE digest = ? AND selection = ?", (str(digest), selection)
            )

    def touch_model(self, digest: Digest, selection: str) -> None:
        """Note that a tree is being used now."""
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE models SET used = ? WHERE digest = ? AND selection = ?",
                (time.time(), str(digest), selection),
            )

    def trees(self) -> list[tuple[Digest, str, float]]:
        """Model, selection and time of the last use of all recorded trees."""
        rows = self._database.connection.execute("SELECT digest, selection, used FROM models")
        return [(Digest.parse(digest), selection, used) for digest, selection, used in rows]

    def manifest_of(self, digest: Digest) -> Manifest | None:
        """The manifest of a model that was resolved before; its bytes are checked again."""
        row = self._database.connection.execute(
            "SELECT media_type, body FROM manifests WHERE digest = ? LIMIT 1", (str(digest),)
        ).fetchone()
        if row is None or not digest.matches(row[1]):
            return None
        manifest = parse_manifest(row[1], row[0])
        return manifest if isinstance(manifest, Manifest) else None

    def layers(self, digest: Digest) -> list[Digest]:
        """The blobs of all layers of a model; nothing where its manifest is not here."""
        manifest = self.manifest_of(digest)
        return [] if manifest is None else [layer.digest for layer in manifest.layers]

    def named(self, reference: Reference) -> Digest | None:
        """The model that a tag last led to here, or that a digest names, its own or an index's."""
        top = reference.digest or self.resolved(reference)
        if top is None:
            return None
        row = self._database.connection.execute(
            "SELECT digest FROM manifests WHERE top = ?", (str(top),)
        ).fetchone()
        return top if row is None else Digest.parse(row[0])

    def strays(self, before: float) -> list[Digest]:
        """Models without a tree that nothing was resolved to since ``before``, in seconds since
        the epoch.
        """
        rows = self._database.connection.execute(
            "SELECT DISTINCT digest FROM manifests WHERE digest NOT IN "
            "(SELECT digest FROM models UNION SELECT manifests.digest FROM manifests "
            "JOIN tags ON tags.digest = top WHERE resolved >= ?1 UNION "
            "SELECT manifests.digest FROM manifests JOIN accesses ON accesses.digest = top "
            "WHERE accepted >= ?1)",
            (before,),
        )
        return [Digest.parse(digest) for (digest,) in rows]

    @staticmethod
    def forget_blob(connection: sqlite3.Connection, digest: Digest) -> None:
        """Within a transaction: a blob is not complete any more."""
        connection.execute("DELETE FROM blobs WHERE digest = ?", (str(digest),))

    @staticmethod
    def forget_tree(
        connection: sqlite3.Connection, digest: Digest, selection: str, *, keep: bool
    ) -> None:
        """Within a transaction: a tree is gone.

        With a model's last tree go its manifest, its tags and who may read it; not with ``keep``,
        as where it is being pulled again.
        """
        connection.execute(
            "DELETE FROM models WHERE digest = ? AND selection = ?", (str(digest), selection)
        )
        if not keep:
            forget_model(connection, digest)

    def models(self) -> list[StoredModel]:
        """All recorded trees, last used first."""
        rows = self._database.connection.execute(
            "SELECT digest, selection, size, files, used FROM models ORDER BY used DESC, digest"
        ).fetchall()
        return [
            StoredModel(
                Digest.parse(digest), selection, self._references(digest), size, files, used
            )
            for digest, selection, size, files, used in rows
        ]

    def _references(self, digest: str) -> tuple[str, ...]:
        rows = self._database.connection.execute(
            "SELECT reference FROM tags JOIN manifests ON tags.digest = manifests.top "
            "WHERE manifests.digest = ? ORDER BY reference",
            (digest,),
        )
        return tuple(reference for (reference,) in rows)

    def add_resolution(
        self, reference: Reference, top: Digest, manifest: Manifest, fingerprint: str | None
    ) -> None:
        """Record that ``reference`` names ``top``, by the registry's word to these credentials.

        ``manifest`` is what ``top`` names, or what an index with that digest led to on this node.
        Without a ``fingerprint`` it was not the registry that said so: nobody is the wiser for it.
        """
        now = time.time()
        with self._database.transaction() as connection:
            connection.execute(
                # what is here is not written again: for that nobody asked whether there is room
                "INSERT INTO manifests VALUES (?, ?, ?, ?) ON CONFLICT (top) DO UPDATE "
                "SET digest = excluded.digest, media_type = excluded.media_type, "
                "body = excluded.body WHERE digest != excluded.digest OR body != excluded.body",
                (str(top), str(manifest.digest), manifest.media_type, manifest.body),
            )
            connection.execute(
                "INSERT OR REPLACE INTO tags VALUES (?, ?, ?)", (str(reference), str(top), now)
            )
            if fingerprint is not None:
                connection.execute(
                    "INSERT OR REPLACE INTO accesses VALUES (?, ?, ?, ?)",
                    (reference.name, str(top), fingerprint, now),
                )

    def remove_accesses(self, name: str, fingerprint: str) -> None:
        """Forget that these credentials were ever accepted below a name: they are refused now."""
        with self._database.transaction() as connection:
            connection.execute(
                "DELETE FROM accesses WHERE name = ? AND fingerprint = ?", (name, fingerprint)
            )

    def accepted(self, reference: Reference, digest: Digest, fingerprint: str) -> bool:
        """Whether the registry ever let these credentials read ``digest`` below this name."""
        row = self._database.connection.execute(
            "SELECT 1 FROM accesses WHERE name = ? AND digest = ? AND fingerprint = ?",
            (reference.name, str(digest), fingerprint),
        ).fetchone()
        return row is not None

    def is_below(self, name: str, top: Digest) -> bool:
        """Whether the registry ever let anybody read ``top`` below this name."""
        row = self._database.connection.execute(
            "SELECT 1 FROM accesses WHERE name = ? AND digest = ?", (name, str(top))
        ).fetchone()
        return row is not None

    def add_proof(self, name: str, blob: Digest) -> None:
        """Record that a blob was seen to be had below a name."""
        with self._database.transaction() as connection:
            _add_proof(connection, name, blob)

    def is_proven(self, name: str, blob: Digest) -> bool:
        """Whether a blob was ever seen to be had below a name."""
        row = self._database.connection.execute(
            "SELECT 1 FROM proofs WHERE name = ? AND digest = ?", (name, str(blob))
        ).fetchone()
        return row is not None

    def resolved(self, reference: Reference) -> Digest | None:
        """What ``reference`` last resolved to: the digest of a manifest or an index."""
        row = self._database.connection.execute(
            "SELECT digest FROM tags WHERE reference = ?", (str(reference),)
        ).fetchone()
        return None if row is None else Digest.parse(row[0])

    def manifest(self, top: Digest) -> Manifest | None:
        """The model's manifest that ``top`` led to before; its bytes are checked again."""
        row = self._database.connection.execute(
            "SELECT digest, media_type, body FROM manifests WHERE top = ?", (str(top),)
        ).fetchone()
        if row is None or not Digest.parse(row[0]).matches(row[2]):
            return None
        manifest = parse_manifest(row[2], row[1])
        return manifest if isinstance(manifest, Manifest) else None


def _add_proof(connection: sqlite3.Connection, name: str, blob: Digest) -> None:
    connection.execute(
        "INSERT OR IGNORE INTO proofs VALUES (?, ?, ?)", (name, str(blob), time.time())
    )


def forget_model(connection: sqlite3.Connection, digest: Digest) -> None:
    """Within a transaction: forget what led to a model, if it has no tree any more."""
    row = connection.execute("SELECT 1 FROM models WHERE digest = ?", (str(digest),)).fetchone()
    if row is not None:
        return
    tops = "(SELECT top FROM manifests WHERE digest = ?)"
    names = connection.execute(
        f"SELECT DISTINCT name FROM accesses WHERE digest IN {tops}",  # noqa: S608 (a constant)
        (str(digest),),
    ).fetchall()
    for table in ("tags", "accesses"):
        connection.execute(
            f"DELETE FROM {table} WHERE digest IN {tops}",  # noqa: S608 (constants)
            (str(digest),),
        )
    connection.execute("DELETE FROM manifests WHERE digest = ?", (str(digest),))
    ListRecords.forget(connection, str(digest))
    for (name,) in names:
        _forget_proofs(connection, name)


def _forget_proofs(connection: sqlite3.Connection, name: str) -> None:
    """Forget blobs below a name that no model of that name has any more."""
    kept = _layers_below(connection, name)
    proven = connection.execute("SELECT digest FROM proofs WHERE name = ?", (name,)).fetchall()
    gone = [(name, blob) for (blob,) in proven if blob not in kept]
    connection.executemany("DELETE FROM proofs WHERE name = ? AND digest = ?", gone)


def _layers_below(connection: sqlite3.Connection, name: str) -> set[str]:
    """The blobs of all models that somebody could read below a name."""
    rows = connection.execute(
        "SELECT DISTINCT media_type, body FROM manifests "
        "JOIN accesses ON accesses.digest = manifests.top WHERE accesses.name = ?",
        (name,),
    )
    found: set[str] = set()
    for media_type, body in rows:
        with contextlib.suppress(InvalidArtifact):
            manifest = parse_manifest(body, media_type)
            if isinstance(manifest, Manifest):
                found.update(str(layer.digest) for layer in manifest.layers)
    return found
