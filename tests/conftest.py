"""Fixtures for every test: real registries, open, guarded and misbehaving."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.support.faulty_registry import FaultyRegistry, serve_faulty
from tests.support.proxy import Proxy, serve_proxy
from tests.support.registry import RegistryServer, serve_registry
from tests.support.token_server import PASSWORD, TokenServer, serve_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


# how long an example takes says nothing on a machine on which others run
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


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


@pytest.fixture
def faulty(registry: RegistryServer) -> Iterator[FaultyRegistry]:
    """A proxy before ``registry`` that misbehaves as it is told."""
    with serve_faulty(registry) as proxy:
        yield proxy


@pytest.fixture
def proxy(registry: RegistryServer) -> Iterator[Proxy]:
    """A proxy before ``registry`` that counts blob bytes, and changes them as it is told."""
    with serve_proxy(registry.address) as running:
        yield running


@pytest.fixture
def home(registry: RegistryServer) -> Iterator[Proxy]:
    """The registry itself, beside :func:`mirror`."""
    with serve_proxy(registry.address) as running:
        yield running


@pytest.fixture
def mirror(registry: RegistryServer) -> Iterator[Proxy]:
    """A mirror with all that the registry has."""
    with serve_proxy(registry.address) as running:
        yield running


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A registry that wants a name and a password."""
    folder = tmp_path_factory.mktemp("guarded")
    with serve_registry(folder, users={"robot": PASSWORD}) as server:
        yield server


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[TokenServer]:
    """A token server that knows ``robot``."""
    with serve_tokens(tmp_path / "tokens", {"robot": PASSWORD}) as server:
        yield server


@pytest.fixture
def token_registry(tmp_path: Path, tokens: TokenServer) -> Iterator[RegistryServer]:
    """A registry that wants tokens of ``tokens``."""
    with serve_registry(
        tmp_path / "registry", token=tokens.auth, authorization=tokens.authorization
    ) as server:
        yield server
