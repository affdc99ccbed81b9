"""The processes that serve lazily shown models: started, found again, watched, ended.

One for each model and selection of the node, shared by all of its volumes. A worker outlives the
driver: it is started in a session of its own, writes to a file and not to the driver's pipe, and
says in a lock file who it is (:mod:`csi.worker_locks`), so that the next driver finds it. All that
it needs is on the disk: it is started again without a word to any network.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from csi import fuse_connections
from csi.mount_table import mount_at
from csi.mounts import unmount
from csi.served import FUSE_TYPE
from csi.spare_worker import SpareWorker
from csi.worker_locks import LiveWorker, holder, is_held
from csi.worker_logs import WorkerLogs
from csi.worker_processes import (
    Launched,
    WorkerProcess,
    WorkerSettings,
    has_ended,
    kill,
    launch,
    problem_of,
    reaped,
)
from fetcher.errors import ModelError, Unavailable
from fetcher.lazy_plan import lock_path
from fetcher.worker_protocol import Order

if TYPE_CHECKING:
    from pathlib import Path

    from csi.served import Folders, TreeKey

__all__ = ["WorkerSettings", "Workers"]

logger = logging.getLogger(__name__)

START_TIMEOUT: Final = 20.0
"""Seconds for a worker to be ready, or for one that somebody else started."""
END_TIMEOUT: Final = 5.0
"""Seconds for a worker to end by itself once its mount is gone, and again once it was killed."""
LOOK_SECONDS: Final = 0.05
"""How often a lock that another driver's worker is about to take or leave is looked at."""

FOLDER_MODE: Final = 0o755


@dataclass(eq=False)
class _Start:
    """A worker that is being started, for everybody who waits for it."""

    finished: trio.Event = field(default_factory=trio.Event)
    failure: Exception | None = field(
        default_factory=lambda: Unavailable("the driver is ending: ask again")
    )


@dataclass(eq=False)
class _Question:
    """How a worker's file system is, asked by one thread for everybody."""

    answered: trio.Event = field(default_factory=trio.Event)
    answer: os.statvfs_result | None = None


class Workers:
    """The workers of a node. Belongs to the trio thread."""

    def __init__(
        self,
        folders: Folders,
        settings: WorkerSettings,
        nursery: trio.Nursery,
        logs: WorkerLogs | None = None,
    ) -> None:
        """They are watched in ``nursery``; when it is cancelled they live on."""
        self._folders = folders
        self._settings = settings
        self._nursery = nursery
        self._logs = logs or WorkerLogs()
        self.spare = SpareWorker(settings, folders.root)
        self._workers: dict[TreeKey, WorkerProcess] = {}
        self._starts: dict[TreeKey, _Start] = {}
        self._questions: dict[TreeKey, _Question] = {}
        self._send: trio.MemorySendChannel[TreeKey]
        self._deaths: trio.MemoryReceiveChannel[TreeKey]
        # of each model there is at most one death that nobody has heard of
        self._send, self._deaths = trio.open_memory_channel(math.inf)

    # -- there, or not -----------------------------------------------------------------------------

    def is_serving(self, key: TreeKey) -> bool:
        """Whether the worker lives, as far as is known, and has its mount."""
        return key in self._workers and self._is_mounted(key)

    def find(self, key: TreeKey) -> bool:
        """Whether a worker that an earlier driver started serves ``key``: then it is watched."""
        if not self.is_serving(key):
            found = holder(self._lock(key))
            if found is None:
                return False
            if key in self._workers or key in self._starts or not self._is_mounted(key):
                os.close(found.descriptor)
                return False
            self._register(key, self._adopted(key, found))
        return True

    def lost(self, key: TreeKey) -> None:
        """Treat the worker of ``key`` as one that died: it is not there, and should be."""
        self._send.send_nowait(key)

    def keys(self) -> set[TreeKey]:
        """Those that a worker is known to live for."""
        return set(self._workers)

    async def ask(self, key: TreeKey, seconds: float) -> os.statvfs_result | None:
        """What the worker's file system says of itself; None if it does not answer in time.

        A worker that hangs holds one thread, however often it is asked.
        """
        question = self._questions.get(key)
        if question is None:
            question = self._questions[key] = _Question()
            self._nursery.start_soon(self._ask, key, question, name="question to a worker")
        with trio.move_on_after(seconds):
            await question.answered.wait()
        return question.answer

    async def _ask(self, key: TreeKey, question: _Question) -> None:
        try:
            question.answer = await trio.to_thread.run_sync(
                os.statvfs,
                self._folders.mountpoint(key),
                abandon_on_cancel=True,
                limiter=trio.CapacityLimiter(1),
            )
        except OSError as error:
            logger.debug("the worker of model %s: %s", key.model.short, error)
        finally:
            del self._questions[key]
            question.answered.set()

    async def death(self) -> TreeKey:
        """The next worker that ends, or ended, though nobody wanted it."""
        return await self._deaths.receive()

    async def ensure(self, key: TreeKey) -> None:
        """Have the worker of ``key`` serve: found where it lives, else started; its plan is there.

        On return its mount is there. The start goes on when the caller is cancelled: :meth:`stop`
        ends it. Raises :class:`Unavailable` with what the worker says.
        """
        start = self._starts.get(key)
        if start is None:
            if self.is_serving(key):
                return
            start = self._starts[key] = _Start()
            self._nursery.start_soon(self._start, key, start, name=f"start of worker {key}")
        await start.finished.wait()
        if start.failure is not None:
            # every waiter gets an exception of its own: a traceback belongs to one task
            raise copy.copy(start.failure) from start.failure

    async def _start(self, key: TreeKey, start: _Start) -> None:
        try:
            self._register(key, await self._found_or_started(key))
            start.failure = None
        except Exception as error:
            if not isinstance(error, ModelError):
                logger.exception("fault of this program while starting a worker")
            start.failure = error
        finally:
            del self._starts[key]
            start.finished.set()

    def _register(self, key: TreeKey, worker: WorkerProcess) -> WorkerProcess:
        self._workers[key] = worker
        self._nursery.start_soon(self._watch, key, worker, name=f"worker {worker.pid}")
        return worker

    def _adopted(self, key: TreeKey, found: LiveWorker) -> WorkerProcess:
        logger.info("process %d serves model %s already", found.pid, key.model.short)
        self._logs.follow(key, self._folders.mountpoint(key))
        return WorkerProcess(found.pid, found.descriptor)

    async def _found_or_started(self, key: TreeKey) -> WorkerProcess:
        """The worker of ``key``: one that an earlier driver may be starting is waited for."""
        deadline = trio.current_time() + START_TIMEOUT
        if (old := self._workers.get(key)) is not None:
            # it lost its mount, so it ends: before that no other one can begin
            with trio.move_on_at(deadline):
                await old.ended.wait()
        while True:
            held = await self._await_lock(key, deadline)
            if held is not None:
                return self._adopted(key, held)
            try:
                return await self._spawn(key)
            except Unavailable:
                # one that was being started by a driver that was killed may have been faster
                if not is_held(self._lock(key)) or trio.current_time() > deadline:
                    raise

    async def _await_lock(self, key: TreeKey, deadline: float) -> LiveWorker | None:
        """Who holds the lock and has mounted; None as soon as nobody holds it."""
        while is_held(self._lock(key)):
            found = holder(self._lock(key))
            if found is not None and self._is_mounted(key):
                return found
            if found is not None:
                os.close(found.descriptor)
            if trio.current_time() > deadline:
                raise Unavailable(
                    f"another process holds {self._lock(key)} and mounts nothing: end it, and the "
                    "volume is published"
                )
            await trio.sleep(LOOK_SECONDS)
        return None

    def _lock(self, key: TreeKey) -> Path:
        return lock_path(self._folders.root, key.model, key.selection)

    def _is_mounted(self, key: TreeKey) -> bool:
        mount = mount_at(self._folders.mountpoint(key))
        return mount is not None and mount.type == FUSE_TYPE

    # -- one process -------------------------------------------------------------------------------

    async def _spawn(self, key: TreeKey) -> WorkerProcess:
        """Start a process and wait until it serves. What cannot is ended again."""
        mountpoint = self._folders.mountpoint(key)
        # what a worker that died left; nobody lives there now
        await unmount(mountpoint)
        try:
            mountpoint.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
            launched = self._launched(key, mountpoint)
        except OSError as error:
            raise Unavailable(
                f"the worker of model {key.model.short} cannot be started: {error.strerror}"
            ) from error
        worker = launched.process
        try:
            with trio.move_on_after(START_TIMEOUT):
                problem = await problem_of(launched.line)
                if problem is None:
                    logger.info("process %d serves model %s", worker.pid, key.model.short)
                    return worker
                raise _cannot_start(key, problem)
            raise _cannot_start(key, f"it is not ready after {START_TIMEOUT:g} s")
        except BaseException:
            # its mount stays, if there is one: it may be that of another one, which was faster
            with trio.CancelScope(shield=True):
                await kill(worker, END_TIMEOUT)
            os.close(worker.descriptor)
            self._logs.drain(key)
            raise
        finally:
            launched.line.close()

    def _launched(self, key: TreeKey, mountpoint: Path) -> Launched:
        """A process that was told to serve ``key``: the one that waits for that, or a new one.

        Raises OSError.
        """
        order = Order(str(key.model), key.selection)
        log = self._logs.open(key, mountpoint)
        try:
            spare = self.spare.take()
            if spare is not None:
                if spare.order(order, log):
                    return spare
                spare.drop()
            launched = launch(self._settings, self._folders.root)
            # one that has ended already will not answer
            launched.order(order, log)
            return launched
        finally:
            os.close(log)

    async def _watch(self, key: TreeKey, worker: WorkerProcess) -> None:
        """Notice the worker's end."""
        try:
            await trio.lowlevel.wait_readable(worker.descriptor)
        finally:
            trio.lowlevel.notify_closing(worker.descriptor)
            os.close(worker.descriptor)
        status = reaped(worker.pid)
        if self._workers.get(key) is worker:
            del self._workers[key]
        worker.ended.set()
        self._logs.drain(key)
        if not worker.stopping:
            logger.warning(
                "the worker of model %s, process %d, ended: %s", key.model.short, worker.pid, status
            )
            self._send.send_nowait(key)

    # -- the end -----------------------------------------------------------------------------------

    async def stop(self, key: TreeKey) -> None:
        """End the worker of ``key``, whoever started it, and remove its mount and its files.

        Bounded in time, whatever state the worker is in. Nobody may start one meanwhile. Raises
        :class:`ModelError` where the mount cannot be taken away.
        """
        start = self._starts.get(key)
        if start is not None:
            await start.finished.wait()
        worker = self._workers.get(key)
        if worker is None and (found := holder(self._lock(key))) is not None:
            worker = self._register(key, self._adopted(key, found))
        mountpoint = self._folders.mountpoint(key)
        if worker is not None:
            worker.stopping = True
            await self._end(worker, mountpoint)
        else:
            await unmount(mountpoint)
        await self._remove_files(key)

    async def _end(self, worker: WorkerProcess, mountpoint: Path) -> None:
        """Unmount, so that the worker ends by itself; if it does not in time, kill it."""
        mount = mount_at(mountpoint)
        await unmount(mountpoint)
        if await has_ended(worker, END_TIMEOUT):
            return
        logger.info("process %d does not end by itself: killing it", worker.pid)
        if await kill(worker, END_TIMEOUT):
            return
        # one that sleeps in the kernel cannot die; who waits for it can be let go
        if mount is not None:
            fuse_connections.abort(mount)
        if not await has_ended(worker, END_TIMEOUT):
            logger.error("process %d cannot be ended: its model is served no more", worker.pid)

    async def _remove_files(self, key: TreeKey) -> None:
        mountpoint = self._folders.mountpoint(key)
        self._logs.drain(key)
        self._logs.forget(key, mountpoint)
        try:
            if mount_at(mountpoint) is None and mountpoint.is_dir():
                mountpoint.rmdir()
            if not is_held(self._lock(key)):
                self._lock(key).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s is left where it is: %s", mountpoint, error.strerror)

    async def forward_logs(self) -> None:
        """Bring what workers write into this process's log, until cancelled."""
        await self._logs.forward()


def _cannot_start(key: TreeKey, reason: str) -> Unavailable:
    return Unavailable(
        f"the worker that serves model {key.model.short} could not be started: {reason}",
        model=key.model,
    )
