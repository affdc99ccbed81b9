"""Records of volumes: kept, replaced, forgotten, and read after a crash."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from csi.state import Shown, VolumeRecord, VolumeRecords, VolumeState
from fetcher.errors import ModelError
from fetcher.store.database import Database

if TYPE_CHECKING:
    from collections.abc import Iterator

ONE = VolumeRecord(
    volume_id="csi-1",
    target=Path("/pods/one/mount"),
    state=VolumeState.PUBLISHING,
    fingerprint='{"reference":"r.io/m:v1"}',
    reference="r.io/m:v1",
    digest="sha256:" + "a" * 64,
    model="sha256:" + "b" * 64,
    selection="",
    made_target=False,
    origin=None,
    size=0,
    files=0,
    pod=None,
    created=1.5,
)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "state.db")
    yield opened
    opened.close()


def test_records_come_back_as_they_went(database: Database) -> None:
    records = VolumeRecords(database)
    two = replace(
        ONE,
        target=Path("/pods/tw o\n/ü"),
        state=VolumeState.PUBLISHED,
        made_target=True,
        origin="8:1 /models/x",
        size=1 << 45,
        files=7,
        pod="ns/name",
        created=2.5,
        shown=Shown.LAZY,
        prefetch="opened",
        reason="not all of it is here",
    )
    other = replace(ONE, volume_id="csi-2", created=3.5)
    for record in (ONE, two, other):
        records.save(record)
    assert records.get("csi-1", ONE.target) == ONE
    assert records.get("csi-1", two.target) == two
    assert records.get("csi-3", ONE.target) is None
    assert records.of_volume("csi-1") == [ONE, two]
    assert records.of_target(ONE.target) == [ONE, other]
    assert records.all() == [ONE, two, other]


def test_a_record_is_replaced_and_forgotten(database: Database) -> None:
    records = VolumeRecords(database)
    records.save(ONE)
    records.save(replace(ONE, state=VolumeState.UNPUBLISHING))
    assert [record.state for record in records.all()] == [VolumeState.UNPUBLISHING]
    records.remove("csi-1", Path("/elsewhere"))
    assert len(records.all()) == 1
    for _ in range(2):
        records.remove("csi-1", ONE.target)
        assert records.all() == []


def test_records_outlive_the_process(tmp_path: Path) -> None:
    first = Database(tmp_path / "state.db")
    VolumeRecords(first).save(ONE)
    # not closed: a killed process closes nothing
    second = Database(tmp_path / "state.db")
    assert VolumeRecords(second).all() == [ONE]
    first.close()
    second.close()


def test_a_record_of_another_version_is_passed_over(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    records = VolumeRecords(database)
    records.save(ONE)
    records.save(replace(ONE, volume_id="csi-2"))
    with database.transaction() as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("UPDATE volumes SET state = 'asleep' WHERE volume_id = 'csi-1'")
    assert [record.volume_id for record in records.all()] == ["csi-2"]
    assert "csi-1" in caplog.text


def test_a_table_that_cannot_be_read(database: Database) -> None:
    records = VolumeRecords(database)
    with database.transaction() as connection:
        connection.execute("DROP TABLE volumes")
    with pytest.raises(ModelError, match="cannot be read"):
        records.all()
    with pytest.raises(ModelError):
        records.save(ONE)


OLD_TABLE = """
CREATE TABLE volumes (
    volume_id TEXT NOT NULL, target TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('publishing', 'published', 'unpublishing')),
    fingerprint TEXT NOT NULL, reference TEXT NOT NULL, digest TEXT NOT NULL, model TEXT NOT NULL,
    selection TEXT NOT NULL, made_target INTEGER NOT NULL, origin TEXT, size INTEGER NOT NULL,
    files INTEGER NOT NULL, pod TEXT, created REAL NOT NULL,
    PRIMARY KEY (volume_id, target)) STRICT
"""
OLD_ROW = (
    *("csi-1", "/pods/one/mount", "publishing", ONE.fingerprint, ONE.reference, ONE.digest),
    *(ONE.model, "", 0, None, 0, 0, None, 1.5),
)


def test_records_of_an_earlier_version_are_taken_over(database: Database) -> None:
    places = ", ".join("?" * len(OLD_ROW))
    insert = f"INSERT INTO volumes VALUES ({places})"  # noqa: S608 (a constant)
    with database.transaction() as connection:
        connection.execute(OLD_TABLE)
        connection.execute(insert, OLD_ROW)
    assert VolumeRecords(database).all() == [ONE]
    records = VolumeRecords(database)
    assert records.all() == [ONE]
    lazy = replace(ONE, shown=Shown.LAZY)
    records.save(lazy)
    assert records.all() == [lazy]
