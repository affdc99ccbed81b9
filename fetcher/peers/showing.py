"""What peers are shown of who asks: what the registry would be, and nothing of the node's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fetcher.credentials import Keychain
    from fetcher.oci import Digest, Reference
    from fetcher.registry import Registry


async def shown_for(
    registry: Registry,
    reference: Reference,
    digest: Digest,
    keychain: Keychain,
    *,
    renew: bool = False,
) -> str | None:
    """The authorization that the registry of ``reference`` would be shown for something of its
    repository, but for what the administrator gave this node for it. Raises ``ModelError``.
    """
    hosts = await registry.hosts(reference)
    access = await registry.blob_access(reference, digest, keychain, host=hosts.server, renew=renew)
    if not hosts.server.is_own:
        # what somebody else is shown is nothing for peers, which ask the registry by its name
        return None
    ours = set(access.hop.headers) - set(hosts.server.headers)
    shown = (text for name, text in ours if name.lower() == "authorization")
    return next(shown, None)
