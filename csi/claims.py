"""Volumes that were created by name, and the digest that each was given.

A claim pins its model: the tag is resolved once, when the volume is created, so that every pod of
the claim gets the same bytes though the tag moves. The answer is kept under the name and given
again, through restarts. Nothing secret is kept.

Specification: CSI 1.12, CreateVolume, DeleteVolume, ListVolumes.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

from csi.attributes import VolumeAttributes, differences
from fetcher.errors import Conflict, InProgress, NotFound, OutOfRange
from fetcher.policy import PullPolicy

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from fetcher.credentials import Keychain
    from fetcher.modelpack import Model, Selection
    from fetcher.oci import Reference
    from fetcher.pull import Resolved

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS claims (
    number INTEGER PRIMARY KEY AUTOINCREMENT, volume_id TEXT NOT NULL UNIQUE, name TEXT NOT NULL,
    fingerprint TEXT NOT NULL, modes TEXT NOT NULL, capacity INTEGER NOT NULL,
    context TEXT NOT NULL, created REAL NOT NULL) STRICT
"""
_COLUMNS: Final = "number, volume_id, name, fingerprint, modes, capacity, context"


class Database(Protocol):
    """What is needed of :class:`fetcher.store.Database`."""

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """All of the block or nothing; durable when it returns."""


class Resolver(Protocol):
    """What is needed of :class:`fetcher.pull.Pulls`."""

    async def resolve(
        self, reference: Reference, keychain: Keychain, policy: PullPolicy
    ) -> Resolved:
        """The model, proven to be readable with ``keychain``."""


@dataclass(frozen=True)
class Capacity:
    """What a volume's size has to be, in bytes; zero says nothing."""

    required: int = 0
    limit: int = 0

    def holds(self, size: int) -> bool:
        """Whether a volume of ``size`` is what was asked for."""
        return self.required <= size and (not self.limit or size <= self.limit)


@dataclass(frozen=True)
class ClaimRequest:
    """A volume to be created."""

    name: str
    attributes: VolumeAttributes
    modes: frozenset[str]
    """The names of the access modes that it has to have."""
    capacity: Capacity
    keychain: Keychain = field(repr=False)


@dataclass(frozen=True)
class Claim:
    """A volume that was created."""

    number: int
    """Grows with each claim, and is never used again."""
    volume_id: str
    name: str
    fingerprint: str
    """Of the attributes as they were asked for, before the reference was pinned."""
    modes: frozenset[str]
    capacity: int
    context: Mapping[str, str]
    """The attributes with the pinned reference, as the node gets them."""


class Claims:
    """Creates, keeps and forgets claims. Belongs to the trio thread."""

    def __init__(self, database: Database, resolver: Resolver, driver_name: str) -> None:
        self._database = database
        self._resolver = resolver
        self._driver_name = driver_name
        self._busy: set[str] = set()
        with database.transaction() as connection:
            connection.execute(_TABLE)

    async def create(self, request: ClaimRequest) -> Claim:
        """The claim of this name, made if it is new; asked again, the same answer.

        Raises :class:`Conflict` when the name is taken by a claim that is not what is asked for,
        :class:`OutOfRange` when no volume of this model can have the capacity, :class:`InProgress`
        while another call works on it, and what resolving raises. Cancelled, it leaves nothing.
        """
        volume_id = volume_id_of(request.name)
        with self._turn(volume_id):
            existing = self._find(volume_id)
            if existing is not None:
                _check_same(existing, request)
                return existing
            _check_range(request.capacity)
            # by the registry's word, whatever the policy: that one is about the nodes' stores
            resolved = await self._resolver.resolve(
                request.attributes.reference, request.keychain, PullPolicy.ALWAYS
            )
            return self._add(volume_id, request, resolved)

    def delete(self, volume_id: str) -> None:
        """Forget a claim; one that is not there is a success."""
        with self._turn(volume_id), self._database.transaction() as connection:
            connection.execute("DELETE FROM claims WHERE volume_id = ?", (volume_id,))

    def get(self, volume_id: str) -> Claim:
        """Raises :class:`NotFound`."""
        claim = self._find(volume_id)
        if claim is None:
            raise NotFound(f"there is no volume {volume_id}", volume=volume_id)
        return claim

    def after(self, number: int, count: int) -> list[Claim]:
        """Up to ``count`` claims in the order of their numbers, all greater than ``number``."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                f"SELECT {_COLUMNS} FROM claims WHERE number > ? ORDER BY number LIMIT ?",  # noqa: S608 (constant)
                (number, count),
            ).fetchall()
        return [_claim(row) for row in rows]

    @contextmanager
    def _turn(self, volume_id: str) -> Iterator[None]:
        """One call for a volume at a time: the others are told to come again."""
        if volume_id in self._busy:
            raise InProgress(f"another call works on volume {volume_id}: ask again")
        self._busy.add(volume_id)
        try:
            yield
        finally:
            self._busy.discard(volume_id)

    def _find(self, volume_id: str) -> Claim | None:
        with self._database.transaction() as connection:
            row = connection.execute(
                f"SELECT {_COLUMNS} FROM claims WHERE volume_id = ?",  # noqa: S608 (constant)
                (volume_id,),
            ).fetchone()
        return None if row is None else _claim(row)

    def _add(self, volume_id: str, request: ClaimRequest, resolved: Resolved) -> Claim:
        size = _size(resolved.model, request.attributes.selection)
        # a claim gets what it asked for, though the model be smaller: a provisioner refuses less
        capacity = max(size, request.capacity.required)
        if not request.capacity.holds(capacity):
            raise OutOfRange(
                f"{resolved.reference} has {size} bytes, more than the limit of "
                f"{request.capacity.limit} bytes that the volume has"
            )
        pinned = replace(request.attributes, reference=resolved.reference)
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO claims (volume_id, name, fingerprint, modes, capacity, context, "
                "created) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    volume_id,
                    request.name,
                    request.attributes.fingerprint(),
                    json.dumps(sorted(request.modes)),
                    capacity,
                    json.dumps(pinned.to_context(self._driver_name)),
                    time.time(),
                ),
            )
        return self.get(volume_id)


def volume_id_of(name: str) -> str:
    """The id of the volume that has this name: the same one, always and everywhere."""
    return f"model-{hashlib.sha256(name.encode()).hexdigest()[:40]}"


def _claim(row: tuple[int, str, str, str, str, int, str]) -> Claim:
    number, volume_id, name, fingerprint, modes, capacity, context = row
    return Claim(
        number,
        volume_id,
        name,
        fingerprint,
        frozenset(json.loads(modes)),
        capacity,
        json.loads(context),
    )


def _check_same(existing: Claim, request: ClaimRequest) -> None:
    """Raise :class:`Conflict` that says in what ``existing`` is not what is asked for."""
    fingerprint = request.attributes.fingerprint()
    differing = list(differences(existing.fingerprint, fingerprint))
    if existing.modes != request.modes:
        differing.append("access modes")
    if not request.capacity.holds(existing.capacity):
        differing.append("capacity")
    if differing:
        raise Conflict(
            f"volume {request.name} is there already with another {', '.join(differing)}",
            volume=existing.volume_id,
        )


def _check_range(capacity: Capacity) -> None:
    if capacity.limit and capacity.limit < capacity.required:
        raise OutOfRange(
            f"the capacity's limit ({capacity.limit} bytes) is below what is required "
            f"({capacity.required} bytes)"
        )


def _size(model: Model, selection: Selection) -> int:
    """Bytes of the blobs that a volume of ``model`` needs."""
    return sum(layer.descriptor.size for layer in selection.layers(model).values())
