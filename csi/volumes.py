"""The way of a volume: check, resolve, decide, record, pull, mount, record; and back.

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
from typing import TYPE_CHECKING, Final

import trio

from csi import targets
from csi.attributes import Mode, differences
from csi.conditions import is_shown, unknown_mounts
from csi.lazy_volumes import Showing
from csi.mount_table import mount_at
from csi.names import Names
from csi.placement import Placement
from csi.reconcile import reconcile
from csi.served import Folders, TreeKey
from csi.state import Shown, VolumeRecord, VolumeState
from csi.stats import STATS_TIMEOUT, VolumeStats, known_problem, stats_of
from csi.turns import Turns
from csi.waiting import wait_for_tree
from fetcher.errors import (
    Conflict,
    InProgress,
    InvalidRequest,
    ModelError,
    NotFound,
    Unavailable,
    Unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from csi.attributes import VolumeAttributes
    from csi.lazy_volumes import LazyVolumes
    from csi.mount_table import Mount
    from csi.served import MountedTree
    from csi.state import VolumeRecords
    from csi.waiting import PullService
    from fetcher.credentials import Keychain
    from fetcher.pull import Progress, Resolved
    from fetcher.store import ModelTree

logger = logging.getLogger(__name__)

UNDO_TIMEOUT: Final = 15.0


@dataclass(frozen=True)
class PublishRequest:
    """One volume to be shown at one target."""

    volume_id: str
    target: Path
    attributes: VolumeAttributes
    keychain: Keychain = field(repr=False)
    pod: str | None = None
    """``namespace/name``, for log lines."""


class Volumes:
    """Publishes and unpublishes volumes. Belongs to the trio thread."""

    def __init__(
        self,
        records: VolumeRecords,
        pulls: PullService,
        root: Path,
        kubelet_dir: Path,
        lazy: LazyVolumes | None = None,
    ) -> None:
        """``root`` holds everything that is bound, and exists.

        ``kubelet_dir`` is where mounts are looked for that nobody knows. Without ``lazy`` no volume
        is shown while its model is still fetched.
        """
        self._records = records
        self._pulls = pulls
        self._lazy = lazy
        self._placement = Placement(records, Folders.of(root))
        self._names = Names(pulls, self._placement)
        self._kubelet_dir = kubelet_dir
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
        request = replace(request, target=await targets.locate(request.target))
        with self._turns.take(request.volume_id, request.target) as turn, turn.interruptibly():
            known = bool(self._records.of_target(request.target))
            previous = self._agreeing_record(request)
            if previous is not None and is_shown(previous):
                await self._renew(request, previous)
                return
            found = await self._check_target(request.target, previous)
            try:
                if found is not None and not known:
                    resolved = await self._names.of_shown(request, found)
                else:
                    resolved = await self._names.of(request, previous)
            except ModelError as error:
                if not error.transient:
                    # refused now: what an earlier call began must not go on in its name
                    self._pulls.release(_holder(request.volume_id, request.target))
                raise
            showing = self._decide(request, resolved, found)
            record = self._begin(request, resolved, previous, showing)
            try:
                source, record = await self._source(record, resolved, request, deadline)
                await self._placement.show(source, record)
            except InProgress:
                # the download goes on; the record keeps its digest for the next call
                raise
            except Exception:
                await self._undo(record, previous, found)
                raise
            if previous is not None:
                await self._left(previous)
        logger.info(
            "published volume %s (pod %s): %s, %s%s",
            record.volume_id,
            record.pod,
            resolved.reference,
            "lazy" if record.shown is Shown.LAZY else "complete",
            f" ({record.reason})" if record.reason else "",
        )

    async def _renew(self, request: PublishRequest, record: VolumeRecord) -> None:
        """The volume is published: what it brings now may be newer than what it brought before."""
        if record.shown is Shown.LAZY and self._lazy is not None:
            holder = _holder(record.volume_id, record.target)
            await self._lazy.renew(record, request.attributes, request.keychain, holder)

    def _decide(self, request: PublishRequest, resolved: Resolved, found: Mount | None) -> Showing:
        """How to show the volume. Raises :class:`Unsupported` for a mode that cannot be."""
        mode = request.attributes.mode
        if self._lazy is not None:
            tree = None if found is None else self._placement.tree_of(found)
            return self._lazy.decide(request.attributes, resolved, tree)
        if mode is Mode.LAZY:
            raise Unsupported("the volume's mode is lazy, and this process shows none that way")
        return Showing(Shown.BIND)

    def _agreeing_record(self, request: PublishRequest) -> VolumeRecord | None:
        """The volume's record at this target. Raises :class:`Conflict` for other parameters."""
        fingerprint = request.attributes.fingerprint()
        for record in self._records.of_volume(request.volume_id):
            here = record.target == request.target
            if record.fingerprint != fingerprint and (here or is_shown(record)):
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
            if is_shown(record):
                raise Conflict(
                    f"{target} belongs to volume {record.volume_id}: it stays as it is",
                    volume=record.volume_id,
                )
            # we have the target's turn and nothing is shown: its unpublish never came
            logger.info("forgetting volume %s: nothing of it is left", record.volume_id)
            self._records.remove(record.volume_id, target)

    async def _check_target(self, target: Path, record: VolumeRecord | None) -> Mount | None:
        """The mount of ours that is at ``target`` already. Raises :class:`Conflict` for another."""
        mount = mount_at(target)
        if mount is None:
            await targets.inspect(target)
        elif not self._placement.is_ours(mount, record):
            raise Conflict(f"{target} is a mount of something else ({mount.type}): it stays")
        return mount

    def _begin(
        self,
        request: PublishRequest,
        resolved: Resolved,
        previous: VolumeRecord | None,
        showing: Showing,
    ) -> VolumeRecord:
        """The record that pins the model, written before anything of it is there."""
        model, selection = str(resolved.model.digest), request.attributes.selection.key
        same = previous is not None and (previous.model, previous.selection) == (model, selection)
        record = VolumeRecord(
            volume_id=request.volume_id,
            target=request.target,
            state=VolumeState.PUBLISHING,
            fingerprint=request.attributes.fingerprint(),
            reference=str(request.attributes.reference),
            digest=str(resolved.reference.digest or resolved.model.digest),
            model=model,
            selection=selection,
            # a mount of ours without a record: the state was lost, and with it who made the folder
            made_target=previous.made_target if previous else mount_at(request.target) is not None,
            origin=previous.origin if previous is not None else None,
            size=previous.size if previous is not None and same else 0,
            files=previous.files if previous is not None and same else 0,
            pod=request.pod,
            created=previous.created if previous is not None else time.time(),
            shown=showing.shown,
            prefetch=request.attributes.prefetch.value,
            reason=showing.reason,
        )
        self._records.save(record)
        return record

    async def _source(
        self, record: VolumeRecord, resolved: Resolved, request: PublishRequest, deadline: float
    ) -> tuple[Path, VolumeRecord]:
        """What is to be bound, which is there, and the record with what it holds."""
        if record.shown is Shown.LAZY and self._lazy is not None:
            holder = _holder(record.volume_id, record.target)
            try:
                record = await self._lazy.open(record, resolved, request.attributes, holder)
                return await self._lazy.start(record), record
            except (Unavailable, InProgress) as error:
                # what is shown by another name, and not verified yet, is only to be had eagerly
                is_passing = isinstance(error, InProgress)
                if request.attributes.mode is not Mode.AUTO and not is_passing:
                    raise
                logger.warning("%s; volume %s becomes eager", error.message, record.volume_id)
                given_up = record
                record = replace(record, shown=Shown.BIND, reason=error.message)
                self._records.save(record)
                await self._left(given_up)
        tree = await self._pull(resolved, request, deadline)
        return tree.path, replace(record, size=tree.size, files=tree.files)

    async def _pull(
        self, resolved: Resolved, request: PublishRequest, deadline: float
    ) -> ModelTree:
        reference = str(request.attributes.reference)
        holder = _holder(request.volume_id, request.target)
        with self._pulls.join(resolved, request.attributes.selection, holder) as pull:
            return await wait_for_tree(pull, reference, deadline)

    async def _undo(
        self, record: VolumeRecord, previous: VolumeRecord | None, found: Mount | None
    ) -> None:
        """Take back what a failed publish did. What cannot be taken back stays recorded.

        A mount that was ``found``, published by an earlier call or by one whose record was lost,
        stays as it was: a pod may read it.
        """
        was_published = previous is None or previous.state is VolumeState.PUBLISHED
        if found is not None and was_published and mount_at(record.target) == found:
            self._pulls.release(_holder(record.volume_id, record.target))
            if previous is None:
                self._records.remove(record.volume_id, record.target)
            else:
                self._records.save(previous)
            await self._left(record)
            return
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
        record = self._records.get(volume_id, target)
        mount = mount_at(target)
        shown = None if mount is None else self._placement.tree_of(mount)
        self._pulls.release(_holder(volume_id, target))
        await self._placement.clear(volume_id, target)
        if record is not None:
            await self._left(record)
            self._pulls.left(record.model, record.selection)
        elif shown is not None and shown.lazy and self._lazy is not None:
            # its record was lost
            await self._lazy.left(shown.key)

    async def _left(self, record: VolumeRecord) -> None:
        """What a record named is not shown by it any more: the last one ends the model's worker."""
        key = TreeKey.of(record.model, record.selection)
        if record.shown is Shown.LAZY and self._lazy is not None and key is not None:
            await self._lazy.left(key)

    # -- what is there -----------------------------------------------------------------------------

    async def stats(self, volume_id: str, path: Path) -> VolumeStats:
        """Bytes, files and condition of a published volume, within five seconds.

        Raises :class:`NotFound` when the volume is not published at ``path``.
        """
        target = await targets.locate(path, STATS_TIMEOUT)
        record = self._records.get(volume_id, target)
        if record is None or record.state is not VolumeState.PUBLISHED:
            raise NotFound(f"volume {volume_id[:200]} is not published at {target}")
        return await stats_of(record, self._pulls, self._lazy)

    def problem(self, record: VolumeRecord) -> str | None:
        """What is wrong with a published volume, as far as is known without asking anybody."""
        if record.state is not VolumeState.PUBLISHED:
            return None
        return known_problem(record, self._lazy)

    def progress(self, record: VolumeRecord) -> Progress | None:
        """How much of what a lazily shown volume shows is here; None for any other one."""
        if record.shown is Shown.BIND or self._lazy is None:
            return None
        return self._lazy.progress(record)

    def list(self) -> list[VolumeRecord]:
        """Every volume that is recorded, published or not."""
        return self._records.all()

    # -- after a start -----------------------------------------------------------------------------

    async def reconcile(self) -> None:
        """Bring records and mounts together after a start; see :func:`csi.reconcile.reconcile`."""
        await reconcile(self._records, self._placement, self._turns)
        if self._lazy is not None:
            await self._lazy.restore()
        for tree in self.unknown_mounts():
            logger.warning(
                "no volume is known for the mount of model %s at %s: it stays, and so does the "
                "model; unpublishing or unmounting it ends that",
                tree.model.short,
                tree.target,
            )

    def unknown_mounts(self) -> Sequence[MountedTree]:
        """Mounts of models below kubelet's folder that no record knows."""
        folder = self._kubelet_dir.resolve()
        return unknown_mounts(self._records.all(), self._placement.folders, folder)

    async def tend(self) -> None:
        """Keep lazily shown volumes going, until cancelled; after :meth:`reconcile`."""
        if self._lazy is not None:
            await self._lazy.tend(self._placement, self._turns)


def _holder(volume_id: str, target: Path) -> str:
    """Who holds the pull of a volume between two tries: the volume, at that target."""
    return f"{volume_id} at {target}"


def _check_volume_id(volume_id: str) -> None:
    """Raise :class:`InvalidRequest` for an id that cannot be recorded or shown."""
    if not volume_id or len(volume_id) > 1024 or not volume_id.isprintable():
        raise InvalidRequest("the volume id is empty, too long, or has control characters")
