"""Which model a volume shows: what its reference names, or what it named when it began.

A tag may move while a volume waits for its download, or after the record of one was lost.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fetcher.errors import Conflict, InvalidArtifact, NotFound
from fetcher.oci import Digest

if TYPE_CHECKING:
    from csi.mount_table import Mount
    from csi.placement import Placement
    from csi.state import VolumeRecord
    from csi.volumes import PublishRequest
    from csi.waiting import PullService
    from fetcher.oci import Reference
    from fetcher.pull import Resolved

logger = logging.getLogger(__name__)


class Names:
    """Resolves the references of volumes."""

    def __init__(self, pulls: PullService, placement: Placement) -> None:
        self._pulls = pulls
        self._placement = placement

    async def of(self, request: PublishRequest, previous: VolumeRecord | None) -> Resolved:
        """What the volume shows: what an earlier call resolved, though the tag moved since."""
        attributes = request.attributes
        # as the volume names it: what an earlier call made of it has a digest whatever the policy
        self._pulls.check(attributes.reference)
        pinned = _pinned(attributes.reference, previous)
        if pinned is not None:
            try:
                return await self._pulls.resolve(pinned, request.keychain, attributes.pull_policy)
            except NotFound as error:
                # nothing of it was shown yet, so the volume may take what the tag names now
                logger.info("%s; asking for %s again", error.message, attributes.reference)
        return await self._pulls.resolve(
            attributes.reference, request.keychain, attributes.pull_policy
        )

    async def of_shown(self, request: PublishRequest, found: Mount) -> Resolved:
        """What the volume shows already, by a call whose record was lost.

        A pod may read it, so it stays whatever the tag names now, and though the registry does not
        have it any more (:class:`NotFound`). Raises :class:`Conflict` where it cannot be what the
        volume's attributes ask for.
        """
        attributes, tree = request.attributes, self._placement.tree_of(found)
        if tree is None:
            return await self.of(request, None)
        self._pulls.check(attributes.reference)
        reference = attributes.reference
        if reference.digest is None:
            reference = reference.with_digest(tree.model)
        resolved = await self._pulls.resolve(reference, request.keychain, attributes.pull_policy)
        wanted = resolved.model.digest, attributes.selection.key
        if wanted != (tree.model, tree.selection):
            raise Conflict(
                f"{request.target} shows files of model {tree.model.short} that volume "
                f"{request.volume_id} does not ask for, and its record was lost: it stays as it is",
                volume=request.volume_id,
            )
        return resolved


def _pinned(reference: Reference, previous: VolumeRecord | None) -> Reference | None:
    """``reference`` at the digest that the record kept; None where there is nothing to keep."""
    if previous is None or reference.digest is not None:
        return None
    try:
        return reference.with_digest(Digest.parse(previous.digest))
    except InvalidArtifact:
        return None
