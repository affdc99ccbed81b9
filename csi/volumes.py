"""The way of a volume, top to bottom: check, resolve, record, pull, mount, record; and back.

What a crash or a cancellation leaves is told by the record and the mount table together, and every
call starts by looking at both: a mount counts only if a record says *published*; anything else of
ours at a target is made again, or removed. Nothing here asks a file system that could be dead.

Specification: CSI 1.12, NodePublishVolume, NodeUnpublishVolume, NodeGetVolumeStats.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

import trio

from csi import targets
from csi.attributes import Mode, differences
from csi.mount_table import Mount, mount_at, mount_table, shows_below
from csi.mounts import bind_read_only, unmount
from csi.state import VolumeRecord, VolumeState
from csi.targets import Found
from csi.turns import Turns
from csi.waiting import wait_for_tree
from fetcher.errors import (
    Conflict,
    InProgress,
    InvalidArtifact,
    InvalidRequest,
    ModelError,
    NotFound,
    Unavailable,
    Unsupported,
)
from fetcher.oci import Digest

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from csi.attributes import VolumeAttributes
    from csi.state import VolumeRecords
    from csi.waiting import RunningPull
    from fetcher.credentials import Keychain
    from fetcher.modelpack import Selection
    from fetcher.oci import Reference
    from fetcher.policy import PullPolicy
    from fetcher.pull import Resolved
    from fetcher.store import ModelTree

logger = logging.getLogger(__name__)

STATS_TIMEOUT: Final = 2.0
"""Seconds for each of the two questions that stats ask: together below their five."""

UNDO_TIMEOUT: Final = 15.0


class PullService(Protocol):
    """What is needed of :class:`fetcher.pull.Pulls`."""

    def check(self, reference: Reference) -> None:
        """Raise :class:`AccessDenied` for a reference that the node's policy does not allow."""

    async def resolve(
        self, reference: Reference, keychain: Keychain, policy: PullPolicy
    ) -> Resolved:
        """The model, proven to be readable with ``keychain``."""

    def join(
        self, resolved: Resolved, selection: Selection, holder: str | None = None
    ) -> AbstractContextManager[RunningPull]:
        """The pull of the model, started or joined; leaving the block stops waiting for it.

        It goes on for a ``holder`` that leaves, until :meth:`release` or for some minutes.
        """

    def release(self, holder: str) -> None:
        """``holder`` does not come again."""


@dataclass(frozen=True)
class PublishRequest:
    """One volume to be shown at one target."""

    volume_id: str
    target: Path
    attributes: VolumeAttributes
    keychain: Keychain = field(repr=False)
    pod: str | None = None
    """``namespace/name``, for log lines."""


@dataclass(frozen=True)
class VolumeStats:
    """What NodeGetVolumeStats answers."""

    bytes_used: int
    files: int
    abnormal: bool
    message: str


class Volumes:
    """Publishes and unpublishes volumes. Belongs to the trio thread."""

    def __init__(self, records: VolumeRecords, pulls: PullService, models_folder: Path) -> None:
        """``models_folder`` holds every tree that is bound, and exists."""
        self._records = records
        self._pulls = pulls
        self._models_folder = models_folder.resolve()
        self._turns = Turns()

    # -- publish -----------------------------------------------------------------------------------

    async def publish(self, request: PublishRequest, wait: float | None) -> None:
        """Show the model at the target, read-only; on return it is there, verified and recorded.

        ``wait`` is how many seconds the download may take of this call; then :class:`InProgress`
        tells how far it is, it goes on, and the next call joins it. None waits for ever. A volume
        that is right already is a success, without a word to any network. Raises
        :class:`ModelError`: :class:`Conflict` for other parameters or something foreign at the
        target, which stays as it is. Cancelled, or killed, it can be called again, or unpublished.
        """
        deadline = math.inf if wait is None else trio.current_time() + wait
        _check_volume_id(request.volume_id)
        _check_mode(request.attributes.mode)
        request = replace(request, target=await targets.locate(request.target))
        with self._turns.take(request.volume_id, request.target) as turn, turn.interruptibly():
            previous = self._agreeing_record(request)
            if previous is not None and _is_shown(previous):
                return
            await self._check_target(request.target, previous)
            resolved = await self._resolve(request, previous)
            record = self._begin(request, resolved, previous)
            try:
                tree = await self._pull(resolved, request, deadline)
                await self._show(tree, record)
            except InProgress:
                # the download goes on; the record keeps its digest for the next call
                raise
            except Exception:
                await self._undo(record)
                raise
        logger.info(
            "published volume %s (pod %s): %s", record.volume_id, record.pod, resolved.reference
        )

    def _agreeing_record(self, request: PublishRequest) -> VolumeRecord | None:
        """The volume's record at this target. Raises :class:`Conflict` for other parameters."""
        fingerprint = request.attributes.fingerprint()
        for record in self._records.of_volume(request.volume_id):
            here = record.target == request.target
            if record.fingerprint != fingerprint and (here or _is_shown(record)):
                names = ", ".join(differences(record.fingerprint, fingerprint))
                raise Conflict(
                    f"volume {request.volume_id} is there already with other attributes: {names}",
                    volume=request.volume_id,
                )
        self._check_other_volumes(request.volume_id, request.target)
        return self._records.get(request.volume_id, request.target)

    def _check_other_volumes(self, volume_id: str, target: Path) -> None:
        """Raise :class:`Conflict` when another volume is shown at ``target``; forget stale ones."""
        for record in self._records.of_target(target):
            if record.volume_id == volume_id:
                continue
            if _is_shown(record):
                raise Conflict(
                    f"{target} belongs to volume {record.volume_id}: it stays as it is",
                    volume=record.volume_id,
                )
            # we have the target's turn and nothing is shown: its unpublish never came
            logger.info("forgetting volume %s: nothing of it is left", record.volume_id)
            self._records.remove(record.volume_id, target)

    async def _check_target(self, target: Path, record: VolumeRecord | None) -> None:
        mount = mount_at(target)
        if mount is None:
            await targets.inspect(target)
        elif not self._is_ours(mount, record):
            raise Conflict(f"{target} is a mount of something else ({mount.type}): it stays")

    async def _resolve(self, request: PublishRequest, previous: VolumeRecord | None) -> Resolved:
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

    def _begin(
        self, request: PublishRequest, resolved: Resolved, previous: VolumeRecord | None
    ) -> VolumeRecord:
        """The record that pins the model, written before anything of it is there."""
        record = VolumeRecord(
            volume_id=request.volume_id,
            target=request.target,
            state=VolumeState.PUBLISHING,
            fingerprint=request.attributes.fingerprint(),
            reference=str(request.attributes.reference),
            digest=str(resolved.reference.digest or resolved.model.digest),
            model=str(resolved.model.digest),
            selection=request.attributes.selection.key,
            # a mount of ours without a record: the state was lost, and with it who made the folder
            made_target=previous.made_target if previous else mount_at(request.target) is not None,
            origin=previous.origin if previous is not None else None,
            size=0,
            files=0,
            pod=request.pod,
            created=previous.created if previous is not None else time.time(),
        )
        self._records.save(record)
        return record

    async def _pull(
        self, resolved: Resolved, request: PublishRequest, deadline: float
    ) -> ModelTree:
        reference = str(request.attributes.reference)
        holder = _holder(request.volume_id, request.target)
        with self._pulls.join(resolved, request.attributes.selection, holder) as pull:
            return await wait_for_tree(pull, reference, deadline)

    async def _show(self, tree: ModelTree, record: VolumeRecord) -> None:
        """Bind the tree and record it as published; a half-made mount of ours makes way."""
        target = record.target
        await unmount(target, self._ours(record))
        if await targets.inspect(target) is Found.MISSING:
            record = replace(record, made_target=True)
            self._records.save(record)
            await targets.make(target)
        await bind_read_only(tree.path, target)
        # no checkpoint from the end of the bind to the record: a cancellation finds both or neither
        mount = mount_at(target)
        if mount is None or not mount.locked:
            raise Unavailable(f"{target} was mounted, and is not read-only or gone again")
        self._records.save(
            replace(
                record,
                state=VolumeState.PUBLISHED,
                origin=mount.origin,
                size=tree.size,
                files=tree.files,
            )
        )

    async def _undo(self, record: VolumeRecord) -> None:
        """Take back a publish that failed. What cannot be taken back stays recorded."""
        with trio.CancelScope(shield=True), trio.move_on_after(UNDO_TIMEOUT):
            try:
                await self._take_down(record.volume_id, record.target)
            except ModelError as error:
                logger.warning("undoing %s: %s", record.volume_id, error.message)

    # -- unpublish ---------------------------------------------------------------------------------

    async def unpublish(self, volume_id: str, target: Path) -> None:
        """Take the volume off the target; the store keeps the model.

        Idempotent: a target that is gone, half made, dead, never published, or not a mount is a
        success. A publish that waits there is interrupted. Deletes nothing but our mounts and an
        empty folder. Raises :class:`Conflict` for a mount that is not ours, :class:`InProgress`
        when another call has the target.
        """
        _check_volume_id(volume_id)
        target = await targets.locate(target)
        await self._turns.interrupt(volume_id, target)
        with self._turns.take(volume_id, target):
            self._check_other_volumes(volume_id, target)
            await self._take_down(volume_id, target)
        logger.info("unpublished volume %s", volume_id)

    async def _take_down(self, volume_id: str, target: Path) -> None:
        """Unmount what is ours, remove the folder that we made, then the record."""
        record = self._records.get(volume_id, target)
        mount = mount_at(target)
        if record is not None and (mount is None or self._is_ours(mount, record)):
            self._records.save(replace(record, state=VolumeState.UNPUBLISHING))
        self._pulls.release(_holder(volume_id, target))
        await unmount(target, self._ours(record))
        # without a record (a lost state, an unknown volume) an empty folder is taken for ours
        if record is None or record.made_target:
            await targets.remove(target)
        self._records.remove(volume_id, target)

    # -- whose a mount is --------------------------------------------------------------------------

    def _ours(self, record: VolumeRecord | None) -> Callable[[Mount], bool]:
        return lambda mount: self._is_ours(mount, record)

    def _is_ours(self, mount: Mount, record: VolumeRecord | None) -> bool:
        """Whether the record names the mount, or it shows a tree of the store."""
        if record is not None and record.origin == mount.origin:
            return True
        return shows_below(mount_table(), mount, self._models_folder)

    # -- what is there -----------------------------------------------------------------------------

    async def stats(self, volume_id: str, path: Path) -> VolumeStats:
        """Bytes, files and condition of a published volume, within five seconds.

        Raises :class:`NotFound` when the volume is not published at ``path``.
        """
        target = await targets.locate(path, STATS_TIMEOUT)
        record = self._records.get(volume_id, target)
        if record is None or record.state is not VolumeState.PUBLISHED:
            raise NotFound(f"volume {volume_id[:200]} is not published at {target}")
        problem = _problem(record)
        if problem is None and not await targets.answers(target, STATS_TIMEOUT):
            problem = "its file system does not answer"
        message = problem or "mounted read-only from the node's store"
        return VolumeStats(
            bytes_used=record.size,
            files=record.files,
            abnormal=problem is not None,
            message=f"model {record.reference} ({record.digest}): {message}",
        )

    def list(self) -> list[VolumeRecord]:
        """Every volume that is recorded, published or not."""
        return self._records.all()

    # -- after a start -----------------------------------------------------------------------------

    async def reconcile(self) -> None:
        """Bring records and mounts together after a start, from local state alone.

        What was being published is undone, and keeps its digest while its pod is there; what was
        being unpublished is finished; what is published and lost its mount (the node restarted) is
        forgotten. A record that resists is logged and passed over.
        """
        for record in self._records.all():
            try:
                with self._turns.take(record.volume_id, record.target):
                    await self._reconcile(record)
            except ModelError as error:
                logger.warning("volume %s is left as it is: %s", record.volume_id, error.message)
            except Exception:
                logger.exception("volume %s is left as it is", record.volume_id)

    async def _reconcile(self, record: VolumeRecord) -> None:
        if record.state is VolumeState.PUBLISHED and mount_at(record.target) is not None:
            return
        if record.state is VolumeState.PUBLISHING and await targets.parent_exists(record.target):
            await unmount(record.target, self._ours(record))
            return
        await self._take_down(record.volume_id, record.target)
        logger.info("forgot volume %s, which was %s", record.volume_id, record.state.value)


def _problem(record: VolumeRecord) -> str | None:
    """What is wrong with a published volume's mount, as the mount table tells it."""
    mount = mount_at(record.target)
    if mount is None:
        return "the mount is gone"
    if mount.deleted:
        return "the model's files were removed from the node"
    if mount.origin != record.origin:
        return "something else is mounted over it"
    if not mount.locked:
        return "the mount is not read-only, nosuid and nodev any more"
    return None


def _is_shown(record: VolumeRecord) -> bool:
    return record.state is VolumeState.PUBLISHED and _problem(record) is None


def _pinned(reference: Reference, previous: VolumeRecord | None) -> Reference | None:
    """``reference`` at the digest that the record kept; None where there is nothing to keep."""
    if previous is None or reference.digest is not None:
        return None
    try:
        return reference.with_digest(Digest.parse(previous.digest))
    except InvalidArtifact:
        return None


def _holder(volume_id: str, target: Path) -> str:
    """Who holds the pull of a volume between two tries: the volume, at that target."""
    return f"{volume_id} at {target}"


def _check_volume_id(volume_id: str) -> None:
    """Raise :class:`InvalidRequest` for an id that cannot be recorded or shown."""
    if not volume_id or len(volume_id) > 1024 or not volume_id.isprintable():
        raise InvalidRequest("the volume id is empty, too long, or has control characters")


def _check_mode(mode: Mode) -> None:
    if mode is Mode.LAZY:
        raise Unsupported(
            "the volume's mode is lazy: lazily mounted volumes are not in this version; use eager"
        )
