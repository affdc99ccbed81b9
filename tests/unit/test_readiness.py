"""What Probe answers, from a real store."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import trio

from csi.readiness import StoreReadiness
from fetcher.errors import ModelError
from fetcher.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "root")
    try:
        yield store
    finally:
        store.close()


def test_an_open_store_is_ready(store: Store) -> None:
    trio.run(StoreReadiness(store).check)


@pytest.mark.parametrize("again", [False, True])
def test_a_store_whose_folder_is_gone_or_another_is_not(store: Store, again: bool) -> None:
    readiness = StoreReadiness(store)
    shutil.move(store.root, store.root.with_name("away"))
    if again:
        Store.open(store.root).close()
    with pytest.raises(ModelError, match="not the folder"):
        trio.run(readiness.check)


def test_records_that_fail_are_told(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "root")
    readiness = StoreReadiness(store)
    store.close()
    with pytest.raises(ModelError, match="records"):
        trio.run(readiness.check)
