"""Who may be shown which bytes: a name's own repository has to have every layer that it shows.

The store keeps each blob once, whoever brought it, and a manifest is easily written that lists
somebody else's blob. So a layer counts for a name only if it was fetched through that name, or if
the registry of that name said that it has the blob and that the asker may read it. Either is
recorded: nobody is asked twice. The first is recorded together with the blob, where a pull wants it
(:attr:`fetcher.job.Job.proven_name`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fetcher.tasks import for_each

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fetcher.credentials import Keychain
    from fetcher.oci import Digest, Reference
    from fetcher.registry import Registry
    from fetcher.store.catalog import Catalog

_AT_ONE_TIME: Final = 8


class Proofs:
    """What is known of the blobs below names. Belongs to the trio thread."""

    def __init__(self, catalog: Catalog, registry: Registry) -> None:
        self._catalog = catalog
        self._registry = registry

    async def prove(
        self, reference: Reference, blobs: Iterable[Digest], keychain: Keychain
    ) -> None:
        """Return once all ``blobs``, no two alike, are known to be below the name of ``reference``.

        Asks its registry for those of which that is not known yet, and raises what it answers:
        ``NotFound``, ``Unauthenticated``, ``AccessDenied``, ``Unavailable``.
        """
        name = reference.name
        wanted = [one for one in blobs if not self._catalog.is_proven(name, one)]

        async def ask(blob: Digest) -> None:
            await self._registry.head_blob(reference, blob, keychain)
            self._catalog.add_proof(name, blob)

        await for_each(wanted, ask, _AT_ONE_TIME)
