"""Work on many things side by side, whose first failure is the failure of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

from fetcher.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

T = TypeVar("T")


async def for_each(
    items: Iterable[T], work: Callable[[T], Awaitable[None]], at_one_time: int
) -> None:
    """Do ``work`` with every item, with so many of them at one time, in any order.

    The first :class:`ModelError` cancels the others and is raised, not a group with it inside.
    """
    failures: list[ModelError] = []
    places = trio.CapacityLimiter(at_one_time)

    async def one(item: T, scope: trio.CancelScope) -> None:
        try:
            async with places:
                await work(item)
        except ModelError as error:
            failures.append(error)
            scope.cancel()

    async with trio.open_nursery() as nursery:
        for item in items:
            nursery.start_soon(one, item, nursery.cancel_scope)
    if failures:
        raise failures[0]
