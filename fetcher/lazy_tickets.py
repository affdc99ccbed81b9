"""What lets the next agent go on for a lazy model: its reference, and the credentials of its pods.

They are nowhere on the disk. Whoever serves the model keeps them in its memory as a *ticket*, which
it cannot read, and shows it to the next agent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from fetcher.credentials import Credentials
from fetcher.download import Source
from fetcher.errors import InvalidRequest
from fetcher.lazy_protocol import MAX_LINE_BYTES
from fetcher.oci import Reference

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fetcher.credentials import Keychain
    from fetcher.registry import Registry

_MAX_BYTES: Final = MAX_LINE_BYTES // 2


class _Entry(msgspec.Struct, frozen=True):
    registry: str
    username: str = ""
    password: str = ""
    identity_token: str = ""


class _Document(msgspec.Struct, frozen=True):
    reference: str
    entries: tuple[_Entry, ...] = ()


@dataclass(frozen=True)
class _Remembered:
    """The credentials of a ticket, then the node's own."""

    repository: str
    known: Mapping[str, Credentials] = field(repr=False)
    node: Keychain

    async def lookup(self, registry: str, repository: str) -> Credentials | None:
        """What was shown to this registry for the model's repository, else what the node has."""
        if repository == self.repository and registry in self.known:
            return self.known[registry]
        return await self.node.lookup(registry, repository)


async def write_ticket(source: Source, registry: Registry, node: Keychain) -> str:
    """The ticket of a source. Empty where it would be too large to be kept.

    What the node's own keychain gives is not in it: that one may have newer credentials later.
    Raises :class:`fetcher.errors.ModelError`. Asks no network.
    """
    reference = source.reference
    hosts = await registry.hosts(reference)
    entries = []
    for host in (hosts.server, *hosts.able("pull")):
        found = await source.keychain.lookup(host.name, reference.repository)
        if found is None or found == await node.lookup(host.name, reference.repository):
            continue
        entries.append(_Entry(host.name, found.username, found.password, found.identity_token))
    text = msgspec.json.encode(_Document(str(reference), tuple(dict.fromkeys(entries)))).decode()
    return text if len(text) <= _MAX_BYTES else ""


def read_ticket(ticket: str, node: Keychain) -> Source:
    """The source that a ticket stands for.

    Raises :class:`InvalidRequest`, which quotes nothing of it.
    """
    try:
        document = msgspec.json.decode(ticket, type=_Document)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise InvalidRequest("the ticket of a lazy model cannot be read") from None
    reference = Reference.parse(document.reference)
    known = {
        one.registry: Credentials(one.username, one.password, one.identity_token)
        for one in document.entries
    }
    return Source(reference, _Remembered(reference.repository, known, node))
