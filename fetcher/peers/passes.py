"""What peers are shown by this node's downloads, kept for a moment: it is one for a whole model."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fetcher.credentials import Keychain
    from fetcher.oci import Reference

    _Key = tuple[str, int]

_KEPT_SECONDS: Final = 5.0
_MOST_KEPT: Final = 64


class Passes:
    """Authorizations by repository and by whose they are. Belongs to the trio thread.

    Rights are by repository (distribution specification, "Token Scope"): what one blob's registry
    is shown is what it would be shown for another one of the same repository. To find that out
    takes some threads that look at files, which many small blobs would each need.
    """

    def __init__(self) -> None:
        self._kept: dict[_Key, tuple[float, Keychain, str | None]] = {}
        """With a keychain, which is held: its identity is not given to another one meanwhile."""
        self._looking: weakref.WeakValueDictionary[_Key, trio.Lock] = weakref.WeakValueDictionary()
        """Held while one is looked for: many requests go out together, and one look will do."""

    async def get(
        self,
        reference: Reference,
        keychain: Keychain,
        look: Callable[[], Awaitable[str | None]],
        *,
        renew: bool,
    ) -> str | None:
        """What is shown in the name of ``keychain``; ``look`` finds it out.

        With ``renew`` what is kept has been refused. Raises what ``look`` does.
        """
        key = reference.name, id(keychain)
        kept = self._kept.get(key)
        if kept is not None and not renew and key not in self._looking:
            until, _, shown = kept
            if trio.current_time() < until:
                return shown
        async with self._looking.setdefault(key, trio.Lock()):
            until, _, shown = self._kept.get(key, (float("-inf"), keychain, None))
            if renew or trio.current_time() >= until:
                shown = await look()
                self._keep(key, keychain, shown)
            return shown

    def _keep(self, key: _Key, keychain: Keychain, shown: str | None) -> None:
        self._kept.pop(key, None)
        self._kept[key] = trio.current_time() + _KEPT_SECONDS, keychain, shown
        while len(self._kept) > _MOST_KEPT:
            del self._kept[next(iter(self._kept))]
