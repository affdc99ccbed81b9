"""Who may be given what: the registry decides, in the name of whoever asks.

A peer has no rights of its own here: it passes on what it would show to the registry, and the
registry is asked with that and nothing else. What it says is remembered for a short time, and for a
longer one where the registry cannot be reached meanwhile.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from fetcher.credentials import Anonymous, PassedOn
from fetcher.errors import AccessDenied, NotFound, Unauthenticated, Unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fetcher.credentials import Keychain
    from fetcher.oci import Reference
    from fetcher.registry import Registry

_FRESH_SECONDS: Final = 60.0
_STALE_SECONDS: Final = 600.0
_MAX_KNOWN: Final = 65_536

_Key = tuple[str, str, bytes]


@dataclass(frozen=True, slots=True)
class Asker:
    """Somebody who asks for something of a repository, by what he shows to its registry."""

    reference: Reference
    authorization: str | None = field(repr=False)
    hops: int = 0
    """How many members it came through."""

    @property
    def keychain(self) -> Keychain:
        """What is shown to the registry: this, or nothing."""
        if self.authorization is None:
            return Anonymous()
        return PassedOn(self.reference, self.authorization)


@dataclass(frozen=True, slots=True)
class _Known:
    """The registry's word, and when it was given."""

    size: int | None
    told: float


class Rights:
    """What registries have let askers read lately. Belongs to the trio thread."""

    def __init__(
        self, registry: Registry, fresh: float = _FRESH_SECONDS, stale: float = _STALE_SECONDS
    ) -> None:
        """What a registry said is believed for ``fresh`` seconds, and for ``stale`` while it cannot
        be asked.
        """
        self._registry = registry
        self._fresh = fresh
        self._stale = stale
        self._known: OrderedDict[_Key, _Known] = OrderedDict()
        self._asking: weakref.WeakValueDictionary[_Key, trio.Lock] = weakref.WeakValueDictionary()

    async def blob(self, asker: Asker) -> int | None:
        """Return once the registry lets the asker read the blob of its reference: the blob's size,
        where it says so.

        Raises what the registry answers: ``NotFound``, ``Unauthenticated``, ``AccessDenied``,
        ``Unavailable``.
        """
        reference = asker.reference
        if reference.digest is None:
            raise ValueError(f"a blob without a digest: {reference}")
        digest = reference.digest

        async def ask() -> int | None:
            return await self._registry.head_blob(reference, digest, asker.keychain)

        return await self._told(asker, f"blob {digest}", ask)

    async def manifest(self, asker: Asker) -> None:
        """Return once the registry lets the asker read the manifest that its reference pins."""

        async def ask() -> int | None:
            await self._registry.head_manifest(asker.reference, asker.keychain)
            return None

        await self._told(asker, f"manifest {asker.reference.digest}", ask)

    async def _told(
        self, asker: Asker, what: str, ask: Callable[[], Awaitable[int | None]]
    ) -> int | None:
        """The registry's word, asked for once however many wait for it."""
        key = asker.reference.name, what, _fingerprint(asker.authorization)
        async with self._asking.setdefault(key, trio.Lock()):
            known = self._recall(key, self._fresh)
            if known is None:
                known = await self._ask(key, ask)
            return known.size

    async def _ask(self, key: _Key, ask: Callable[[], Awaitable[int | None]]) -> _Known:
        try:
            size = await ask()
        except (Unauthenticated, AccessDenied, NotFound):
            self._known.pop(key, None)
            raise
        except Unavailable:
            known = self._recall(key, self._stale)
            if known is None:
                raise
            return known
        known = _Known(size, trio.current_time())
        self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return known

    def _recall(self, key: _Key, seconds: float) -> _Known | None:
        known = self._known.get(key)
        return known if known and trio.current_time() < known.told + seconds else None


def _fingerprint(authorization: str | None) -> bytes:
    """What stands for a secret in memory; a token has too many bits to be guessed from it."""
    return hashlib.sha256((authorization or "").encode()).digest() if authorization else b""
