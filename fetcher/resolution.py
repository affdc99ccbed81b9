"""From a reference to a model: what the registry says, and what the store may say without it.

The registry is asked in each caller's own name. What it let whom read is recorded, so that a node
without a network still knows its models, and shows them to nobody else.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from fetcher.credentials import fingerprint
from fetcher.errors import AccessDenied, NotFound, Unauthenticated, Unavailable
from fetcher.modelpack import read_model
from fetcher.policy import PullPolicy, ReferencePolicy

if TYPE_CHECKING:
    from fetcher.credentials import Keychain
    from fetcher.modelpack import Model
    from fetcher.oci import Digest, Manifest, Reference
    from fetcher.registry import Named, Registry
    from fetcher.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Resolved:
    """A model that the registry let these credentials read."""

    reference: Reference
    """With the digest of the manifest."""
    model: Model
    keychain: Keychain = field(repr=False)


class Resolver:
    """Resolves references for one node. Belongs to the trio thread."""

    def __init__(
        self, store: Store, registry: Registry, references: ReferencePolicy, patience: float
    ) -> None:
        """``patience`` is for a registry that could be done without, in seconds."""
        self._store = store
        self._registry = registry
        self._references = references
        self._patience = patience
        self._salt = store.catalog.salt()

    def check(self, reference: Reference) -> None:
        """Raise :class:`AccessDenied` for a reference that the node's policy does not allow."""
        self._references.check(reference)

    async def resolve(
        self, reference: Reference, keychain: Keychain, policy: PullPolicy
    ) -> Resolved:
        """The model that ``reference`` names, proven to be readable with ``keychain``.

        Asks the registry as ``policy`` says. Without its word, a model is given only if the
        registry gave this very digest to these same credentials before. Where it could be given, a
        registry that does not answer costs a bounded time. Raises :class:`ModelError`, for a
        reference that :meth:`check` refuses before anybody is asked.
        """
        self.check(reference)
        credentials = await self._registry.credentials(reference, keychain)
        proof = await fingerprint(credentials, self._salt)
        if policy is PullPolicy.NEVER:
            return self._recall(reference, keychain, proof, None)
        patience = math.inf
        if policy is PullPolicy.IF_NOT_PRESENT and self._known(reference, proof) is not None:
            patience = self._patience
        try:
            manifest, named = await self._ask(reference, keychain, patience)
        except (Unauthenticated, AccessDenied):
            # by tag or by digest: what is refused is the repository
            self._store.catalog.remove_accesses(reference.name, proof)
            raise
        except Unavailable as error:
            if policy is PullPolicy.ALWAYS:
                raise
            logger.warning("%s; looking into the store", error.message)
            return self._recall(reference, keychain, proof, error)
        model = read_model(manifest)
        if self._store.catalog.manifest(named.digest) is None:
            await self._store.rooms.check_records(len(manifest.body))
        # what mirrors say of a registry that is away is for now
        accepted = proof if named.by_registry else None
        self._store.catalog.add_resolution(reference, named.digest, manifest, accepted)
        return Resolved(reference.with_digest(named.digest), model, keychain)

    async def _ask(
        self, reference: Reference, keychain: Keychain, patience: float
    ) -> tuple[Manifest, Named]:
        """The model's manifest, and what the registry names for the reference.

        A manifest that came from this name before is not sent again: that the registry names its
        digest to these credentials is the proof that is needed. One that came from another name is:
        whoever knows a digest can name it. Where nothing is known of the reference it is sent at
        once, which proves as much. Raises :class:`Unavailable` where it is not named within
        ``patience`` seconds.
        """
        if self._sent_before(reference) is None:
            return await self._registry.resolve_model(reference, keychain)
        with trio.move_on_after(patience) as waiting:
            named = await self._registry.named(reference, keychain)
        if waiting.cancelled_caught:
            raise Unavailable(
                f"{reference.registry} gave no answer about {reference} in {patience:g} s"
            )
        top = named.digest
        if reference.digest is not None and top != reference.digest:
            raise Unavailable(f"the registry answered for {reference} with another digest, {top}")
        known = self._sent_before(reference.with_digest(top))
        if known is None:
            known, _ = await self._registry.resolve_model(reference.with_digest(top), keychain)
        return known, named

    def _sent_before(self, reference: Reference) -> Manifest | None:
        """The manifest that came from this very name, as the reference named it last."""
        catalog = self._store.catalog
        top = reference.digest or catalog.resolved(reference)
        if top is None or not catalog.is_below(reference.name, top):
            return None
        return catalog.manifest(top)

    def _recall(
        self, reference: Reference, keychain: Keychain, proof: str, error: Unavailable | None
    ) -> Resolved:
        known = self._known(reference, proof)
        if known is not None:
            manifest, top = known
            return Resolved(reference.with_digest(top), read_model(manifest), keychain)
        if error is not None:
            raise error
        raise NotFound(
            f"{reference} is not in the store for these credentials, and its pull policy is Never: "
            "pull it first, or choose another policy",
            reference=reference,
        )

    def _known(self, reference: Reference, proof: str) -> tuple[Manifest, Digest] | None:
        """What the store can say of a reference to credentials that were accepted for it before."""
        catalog = self._store.catalog
        digest = reference.digest or catalog.resolved(reference)
        manifest = catalog.manifest(digest) if digest is not None else None
        if digest is None or manifest is None or not catalog.accepted(reference, digest, proof):
            return None
        return manifest, digest
