"""What an agent does with its store for commands: collect, remove, verify, tell the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fetcher import agent_protocol as protocol
from fetcher.errors import Conflict, InvalidArtifact, NotFound
from fetcher.oci import Digest, Reference
from fetcher.store.collection import EVERYTHING, HeldTree
from fetcher.store.footprint import content_of, tree_of
from fetcher.verification import Verifier

if TYPE_CHECKING:
    from csi.agent import Watch
    from csi.volumes import Volumes
    from fetcher.credentials import Keychain
    from fetcher.pull import Pulls
    from fetcher.store import Store
    from fetcher.store.collection import HeldContent, Plan
    from fetcher.verification import Finding

    References = dict[tuple[Digest, str], tuple[str, ...]]
    """Of every tree, by model and selection."""


class StoreCalls:
    """Runs ``gc``, ``rm`` and ``verify``. Belongs to the trio thread."""

    def __init__(self, store: Store, volumes: Volumes, pulls: Pulls, keychain: Keychain) -> None:
        """``keychain`` is the node's own."""
        self._store = store
        self._volumes = volumes
        self._pulls = pulls
        self._keychain = keychain

    async def collect(self, params: protocol.GcParams, _: Watch) -> protocol.GcResult:
        """Evict by the watermarks, or all that is not in use; release orphans."""
        store = self._store
        await store.rooms.settle()
        orphan_bytes = await store.orphans.bytes()
        # no checkpoint from here to the eviction: what is shown is what goes
        before = store.space.usage()
        planned = store.garbage.plan(EVERYTHING) if params.all else store.garbage.by_watermarks()
        rows = self._rows(planned)
        if not params.dry_run:
            store.garbage.evict(planned)
            await store.orphans.reconcile()
        return protocol.GcResult(
            dry_run=params.dry_run,
            evicted=rows,
            freed=planned.bytes,
            orphan_bytes=orphan_bytes,
            used_before=before.used,
            used=store.space.usage().used,
            limit=before.limit,
        )

    async def remove(self, params: protocol.RemoveParams, _: Watch) -> protocol.RemoveResult:
        """Remove models with all that only they need; none of them unless all can be removed."""
        digests = dict.fromkeys(self._named(reference) for reference in params.references)
        for digest in digests:
            self._check_unused(digest)
            self._store.garbage.plan_removal(digest)
        removed: list[protocol.EvictedRow] = []
        for digest in digests:
            try:
                # planned again: what two of them share goes with the last one
                planned = self._store.garbage.plan_removal(digest)
            except NotFound:
                # all that there was of it belonged to one of the others as well
                continue
            removed.extend(self._rows(planned))
            self._store.garbage.evict(planned)
        await self._store.garbage.empty_trash()
        return protocol.RemoveResult(
            removed=tuple(removed), freed=sum(row.bytes for row in removed)
        )

    def _named(self, text: str) -> Digest:
        """The model that a reference or a bare digest names. Raises :class:`NotFound`."""
        try:
            return Digest.parse(text)
        except InvalidArtifact:
            reference = Reference.parse(text)
        found = self._store.catalog.named(reference)
        if found is None:
            raise NotFound(f"{reference} is not in the store", reference=reference)
        return found

    def _check_unused(self, digest: Digest) -> None:
        volumes = [
            record.volume_id for record in self._volumes.list() if record.model == str(digest)
        ]
        if volumes:
            shown = ", ".join(volumes[:10]) + (", …" if len(volumes) > 10 else "")
            raise Conflict(
                f"model {digest} is in use, by these volumes: {shown}; unpublish them first",
                digest=digest,
                volumes=shown,
            )

    def _rows(self, planned: Plan) -> tuple[protocol.EvictedRow, ...]:
        known = self._references()
        return tuple(_row(victim, known) for victim in planned.victims)

    def _references(self) -> References:
        return {
            (model.digest, model.selection): model.references
            for model in self._store.catalog.models()
        }

    async def verify(self, params: protocol.VerifyParams, watch: Watch) -> protocol.VerifyResult:
        """Read the store again, or some models in it; drop and repair what is damaged."""
        await self._store.rooms.settle()
        models = {self._named(reference) for reference in params.references} or None
        known = self._references()
        verifier = Verifier(self._store, self._pulls, self._keychain)
        watch.follow(verifier.progress)
        findings = await verifier.verify(models, repair=not params.dry_run)
        return protocol.VerifyResult(
            dry_run=params.dry_run,
            bytes=verifier.progress().done,
            damaged=tuple(_damage(finding, known) for finding in findings),
        )

    async def disk(self) -> protocol.DiskRow:
        """What the store takes and may take."""
        await self._store.rooms.settle()
        orphan_bytes = await self._store.orphans.bytes()
        usage = self._store.space.usage()
        return protocol.DiskRow(
            used=usage.used,
            reserved=usage.reserved,
            trash=usage.trash,
            orphan_bytes=orphan_bytes,
            limit=usage.limit,
            free=usage.free,
            total=usage.capacity,
            models=usage.trees,
            contents=usage.contents,
        )


def _damage(finding: Finding, known: References) -> protocol.DamageRow:
    tree = tree_of(finding.name)
    return protocol.DamageRow(
        kind="content" if tree is None else "model",
        digest=str((tree[0] if tree else content_of(finding.name)) or finding.name),
        selection=tree[1] if tree else "",
        references=known.get(tree, ()) if tree else (),
        problem=finding.problem,
        outcome=finding.outcome,
        repaired=finding.repaired,
    )


def _row(victim: HeldTree | HeldContent, known: References) -> protocol.EvictedRow:
    if isinstance(victim, HeldTree):
        tree = tree_of(victim.name)
        return protocol.EvictedRow(
            kind="model",
            digest=str(tree[0]) if tree else victim.name,
            selection=tree[1] if tree else "",
            references=known.get(tree, ()) if tree else (),
            bytes=victim.bytes,
            last_used=victim.used,
        )
    return protocol.EvictedRow(
        kind="content",
        digest=str(content_of(victim.name) or victim.name),
        bytes=victim.bytes,
        last_used=victim.worked,
    )
