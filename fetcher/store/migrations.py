"""From the schema of an earlier version to today's, within the transaction that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fetcher.store.holdings import TABLES

if TYPE_CHECKING:
    import sqlite3

_TREE: Final = (
    "'models/' || replace(models.digest, ':', '/') "
    "|| CASE selection WHEN '' THEN '' ELSE '.' || selection END"
)

_FROM_1: Final = (
    *TABLES,
    # which files a selection leaves is not recorded: a tree may use all layers of its model
    f"INSERT OR IGNORE INTO uses SELECT {_TREE}, "  # noqa: S608 (a constant)
    "'blobs/' || replace(json_extract(layer.value, '$.digest'), ':', '/') FROM models "
    "JOIN manifests ON manifests.digest = models.digest, "
    "json_each(CAST(manifests.body AS TEXT), '$.layers') AS layer",
    # nothing is measured here: all of this is a promise until it is settled
    "INSERT OR IGNORE INTO holdings "
    "SELECT 'blobs/' || replace(digest, ':', '/'), size, 0, completed FROM blobs",
    "INSERT OR IGNORE INTO holdings "
    "SELECT 'blobs/' || replace(json_extract(layer.value, '$.digest'), ':', '/'), "
    "json_extract(layer.value, '$.size'), 0, models.used FROM models "
    "JOIN manifests ON manifests.digest = models.digest, "
    "json_each(CAST(manifests.body AS TEXT), '$.layers') AS layer",
    f"INSERT OR IGNORE INTO holdings SELECT {_TREE}, 4096, 0, used FROM models",  # noqa: S608
)


def upgrade_from_1(connection: sqlite3.Connection) -> None:
    """Record what the store of version 1 holds; contents without a tree are found as orphans."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if {"models", "manifests", "blobs"} <= tables:
        for statement in _FROM_1:
            connection.execute(statement)
