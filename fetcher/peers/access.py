"""Who may be given what: the registry decides, in the name of whoever asks.

A peer has no rights of its own here: it passes on what it would show to the registry, and the
registry is asked with that and nothing else. What it says is remembered for a short time, and for a
longer one where the registry cannot be reached meanwhile.

Rights are by repository (distribution specification, "Token Scope": ``repository:name:pull``). So
each answer says two things: that this asker may read the repository, and that the repository has
this content. Whoever may read one that has what he asks for is not asked about again: many askers
of many layers cost a question for each asker and for each layer, and not for each pair.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

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

_T = TypeVar("_T")
_Reader = tuple[str, bytes]
"""A repository, by name, and what stands for what an asker shows."""
_Content = tuple[str, str]
"""A repository and a blob or a manifest."""


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
class _Word:
    """The registry's word, and when it was asked for."""

    asked: float
    size: int | None = None
    """Of a blob, where it says so."""


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
        self._readers: OrderedDict[_Reader, _Word] = OrderedDict()
        """Who was let read something of a repository."""
        self._contents: OrderedDict[_Content, _Word] = OrderedDict()
        """What repositories have, whoever was told."""
        self._asking: weakref.WeakValueDictionary[_Reader | _Content, trio.Lock] = (
            weakref.WeakValueDictionary()
        )
        """Held while something that is not known of one is asked for."""

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
        name = asker.reference.name
        reader, content = (name, _fingerprint(asker.authorization)), (name, what)
        while True:
            known = self._recall(reader, content, self._fresh)
            if known is not None:
                return known.size
            # what is asked about one content says about the others that this asker may read them
            may_read = self._may_read(reader)
            gap = content if may_read else reader
            async with self._asking.setdefault(gap, trio.Lock()):
                told = self._recall(reader, content, self._fresh)
                if told is None and self._may_read(reader) == may_read:
                    return (await self._ask(reader, content, ask)).size

    def _may_read(self, reader: _Reader) -> bool:
        return self._is_fresh(self._readers.get(reader), self._fresh)

    async def _ask(
        self, reader: _Reader, content: _Content, ask: Callable[[], Awaitable[int | None]]
    ) -> _Word:
        asked = trio.current_time()
        try:
            word = _Word(asked, await ask())
        except (Unauthenticated, AccessDenied):
            self._readers.pop(reader, None)
            raise
        except NotFound:
            # which may be how a registry refuses, too
            self._readers.pop(reader, None)
            self._contents.pop(content, None)
            raise
        except Unavailable:
            known = self._recall(reader, content, self._stale)
            if known is None:
                raise
            return known
        _keep(self._readers, reader, word)
        _keep(self._contents, content, word)
        return word

    def _recall(self, reader: _Reader, content: _Content, seconds: float) -> _Word | None:
        """What is known of a content, where both halves are not older than that."""
        found = self._contents.get(content)
        may_read = self._is_fresh(self._readers.get(reader), seconds)
        return found if may_read and self._is_fresh(found, seconds) else None

    def _is_fresh(self, word: _Word | None, seconds: float) -> bool:
        return word is not None and trio.current_time() < word.asked + seconds


def _keep(known: OrderedDict[_T, _Word], key: _T, word: _Word) -> None:
    known[key] = word
    known.move_to_end(key)
    while len(known) > _MAX_KNOWN:
        known.popitem(last=False)


def _fingerprint(authorization: str | None) -> bytes:
    """What stands for a secret in memory; a token has too many bits to be guessed from it."""
    return hashlib.sha256((authorization or "").encode()).digest() if authorization else b""
