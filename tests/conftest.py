"""Fixtures for every test: a real registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.registry import RegistryServer, serve_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """One anonymous registry for the whole run: use a repository of your own in it."""
    with serve_registry(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture
def fresh_registry(tmp_path: Path) -> Iterator[RegistryServer]:
    """An empty anonymous registry for one test."""
    with serve_registry(tmp_path / "fresh-registry") as server:
        yield server
