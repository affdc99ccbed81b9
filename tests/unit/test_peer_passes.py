"""What peers are shown is found out once for all blobs of a repository."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from fetcher.credentials import Anonymous
from fetcher.errors import Unauthenticated
from fetcher.oci import Reference
from fetcher.peers.passes import Passes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ONE, OTHER = (Reference.parse(f"registry.example/models/{name}:v1") for name in ("one", "other"))


def in_trio(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Run it where time is only waited for."""

    @functools.wraps(test)
    def run() -> None:
        trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))

    return run


@dataclass
class Looks:
    """Finds something else out each time."""

    found: list[str] = field(default_factory=list)

    async def __call__(self) -> str:
        await trio.sleep(0.1)
        self.found.append(f"Bearer {len(self.found)}")
        return self.found[-1]


@in_trio
async def test_it_is_looked_for_once_and_again_after_a_while() -> None:
    passes, look, keychain = Passes(), Looks(), Anonymous()
    first = await passes.get(ONE, keychain, look, renew=False)
    assert await passes.get(ONE, keychain, look, renew=False) == first
    await trio.sleep(6)
    assert await passes.get(ONE, keychain, look, renew=False) != first
    assert len(look.found) == 2


@in_trio
async def test_who_come_together_have_what_one_of_them_finds() -> None:
    passes, look, keychain = Passes(), Looks(), Anonymous()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(partial(passes.get, ONE, keychain, look, renew=False))
    assert len(look.found) == 1


@in_trio
async def test_each_repository_and_each_keychain_has_its_own() -> None:
    passes, look, keychain = Passes(), Looks(), Anonymous()
    shown = [
        await passes.get(ONE, keychain, look, renew=False),
        await passes.get(OTHER, keychain, look, renew=False),
        await passes.get(ONE, Anonymous(), look, renew=False),
    ]
    assert len(set(shown)) == 3


@in_trio
async def test_what_was_refused_is_not_shown_again() -> None:
    passes, look, keychain = Passes(), Looks(), Anonymous()
    refused = await passes.get(ONE, keychain, look, renew=False)
    fresh = await passes.get(ONE, keychain, look, renew=True)
    assert fresh != refused
    assert await passes.get(ONE, keychain, look, renew=False) == fresh


@in_trio
async def test_what_is_not_found_out_is_not_kept() -> None:
    passes, look, keychain = Passes(), Looks(), Anonymous()

    async def refuse() -> str:
        raise Unauthenticated("the registry wants credentials")

    with pytest.raises(Unauthenticated):
        await passes.get(ONE, keychain, refuse, renew=False)
    assert await passes.get(ONE, keychain, look, renew=False) == look.found[0]


@in_trio
async def test_few_are_kept() -> None:
    passes, look = Passes(), Looks()
    first = Anonymous()
    await passes.get(ONE, first, look, renew=False)
    keychains = [Anonymous() for _ in range(100)]
    for one in keychains:
        await passes.get(ONE, one, look, renew=False)
    before = len(look.found)
    await passes.get(ONE, first, look, renew=False)
    assert len(look.found) == before + 1
