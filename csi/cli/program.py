"""What commands need of the rest of the program; put together in :mod:`csi.__main__`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from csi.agent import Calls
    from csi.config import Config
    from fetcher.credentials import Keychain
    from fetcher.registry import Registry, RegistrySettings


@dataclass(frozen=True)
class Program:
    """The ways in."""

    version: str
    become: Callable[[Config], AbstractAsyncContextManager[Calls]]
    """Opens the store, and what answers a command's calls with it."""
    serve: Callable[[Config], Awaitable[None]]
    """Serves until cancelled."""
    registry: Callable[[Config], AbstractAsyncContextManager[Registry]]
    registry_settings: Callable[[Config], RegistrySettings]
    keychain: Callable[[Config], Keychain]
    """The node's own credentials."""
