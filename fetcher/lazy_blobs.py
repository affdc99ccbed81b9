"""One layer of a lazily shown model: served to readers while it is fetched, tried again and again.

Readers wait for as long as they like: what fails for now is tried again, and only what somebody has
to change is told to them at once. The job that fetches the blob is joined while somebody needs it,
and a little longer.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from typing import TYPE_CHECKING, Final, Protocol

import trio

from fetcher.errors import (
    AccessDenied,
    DigestMismatch,
    InvalidArtifact,
    ModelError,
    NoSpace,
    Unauthenticated,
)
from fetcher.modelpack import Packing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fetcher.download import Source
    from fetcher.jobs import Job, Jobs
    from fetcher.layouts import Layouts
    from fetcher.modelpack import Layer
    from fetcher.ranges import Range
    from fetcher.store import Store

logger = logging.getLogger(__name__)

_LINGER_SECONDS: Final = 10.0
"""How long a blob stays open for the next reader."""
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 10.0
_REFUSED_SECONDS: Final = 60.0
"""After so long a registry that refuses is asked again; sooner with other credentials."""


class Owner(Protocol):
    """The model that a layer belongs to; :class:`fetcher.lazy.LazyModel` is one."""

    @property
    def source(self) -> Source | None:
        """Where it is fetched from, once that is known."""

    def give_up(self, source: Source) -> bool:
        """The registry does not take these credentials: whether there are others to ask with."""

    def changed(self) -> trio.Event:
        """Set once there are other credentials, or room."""

    def spoiled(self, layer: Layer, reason: str) -> None:
        """The bytes of a layer proved wrong, and may have been shown."""

    def reads(self) -> None:
        """A reader begins to wait for something."""

    def was_read(self) -> None:
        """A reader got what it waited for."""

    def progressed(self) -> None:
        """One more layer is complete."""


class LazyBlob:
    """A layer of a model that is shown while it is fetched. Belongs to the trio thread."""

    def __init__(
        self,
        layer: Layer,
        owner: Owner,
        store: Store,
        jobs: Jobs,
        layouts: Layouts,
        nursery: trio.Nursery,
    ) -> None:
        """What serves it runs in ``nursery``."""
        self.layer = layer
        self.complete = store.has_content(layer)
        self.failure: ModelError | None = None
        """Why the last try failed, while there was no other."""
        self.ruined: ModelError | None = None
        """Why it can never be shown."""
        self._waits: dict[object, float] = {}
        """Who waits for something of it, since when."""
        self._owner = owner
        self._store = store
        self._jobs = jobs
        self._layouts = layouts
        self._nursery = nursery
        self._job: Job | None = None
        self._left = 0
        """Bytes that were here when it was open last."""
        self._opened: list[Range] = []
        self._needs = 0
        self._serving = False
        self._change = trio.Event()
        self._pause = _FIRST_PAUSE
        self._again = 0.0
        """When a failure is forgotten."""
        self._stack = contextlib.ExitStack()
        """What opened files want of the job."""

    @property
    def done(self) -> int:
        """Bytes that are here, as far as anybody looked."""
        if self.complete:
            return self.layer.descriptor.size
        return self._job.done if self._job is not None else self._left

    @property
    def is_refused(self) -> bool:
        """Whether somebody has to change something before it can be had."""
        return self.failure is not None and not _is_passing(self.failure)

    @property
    def is_waited_for(self) -> bool:
        """Whether a reader waits for something of it."""
        return bool(self._waits)

    @property
    def silence(self) -> float:
        """Seconds for which a reader has waited and nothing of it has come."""
        if not self._waits:
            return 0.0
        since = min(self._waits.values())
        if self._job is not None:
            since = max(since, self._job.moved)
        return max(time.monotonic() - since, 0.0)

    # -- what is wanted ----------------------------------------------------------------------------

    async def want(self, wanted: Range, *, ahead: bool = False) -> bool:
        """Wait until these bytes may be shown. Whether the whole is here and verified.

        Raises the :class:`ModelError` that keeps them from coming until somebody changes something;
        what passes by itself is waited for.
        """
        if not ahead:
            self._owner.reads()
        if self._is_read_early:
            await self._until(lambda job: job.want(wanted, ahead=ahead, trusted=True))
        else:
            await self._until(_complete)
        if not ahead:
            self._owner.was_read()
        return self.complete

    async def index(self) -> bool:
        """Wait until it is known what is in an archive. As :meth:`want`."""
        if self.layer.packing is Packing.TAR:
            await self._until(_index)
        else:
            await self._until(_complete)
        return self.complete

    async def fill(self, order: int, wanted: Range | None = None) -> None:
        """Have all of it fetched, or a part of it, though nobody waits. As :meth:`want`, but
        raises what passes by itself as well.
        """

        async def fetch(job: Job) -> None:
            if wanted is not None:
                await job.fill(wanted, order)
                return
            # to the end: what was there may prove wrong when the whole is hashed, and comes again
            with job.filled(order):
                await job.wait()

        await self._until(fetch, patient=False)

    def open(self, wanted: Range) -> None:
        """A file was opened: it is fetched whole ahead of what nobody waits for."""
        if self.complete or self.ruined or wanted in self._opened:
            return
        self._opened.append(wanted)
        if self._job is not None:
            self._job_opened(self._job, wanted)
        self._serve()

    def spoil(self, error: DigestMismatch) -> None:
        """Its bytes proved wrong, whoever had them fetched, and may have been shown."""
        if self.ruined is None and not self.complete:
            self.ruined = error
            self._owner.spoiled(self.layer, error.message)
            self._changed()

    def tell(self) -> None:
        """Something changed that may let it be fetched: other credentials, or room."""
        self.failure = None
        self._changed()

    async def _until(self, work: Work, *, patient: bool = True) -> None:
        with self._needed(patient):
            while not self.complete:
                self._check(patient)
                job = self._job
                if job is None:
                    await self._changes()
                    continue
                used = job.trusted_source or job.source
                try:
                    await (work if self._is_alike(job) else _complete)(job)
                except ModelError as error:
                    if not await self._is_over(job, used, error):
                        raise
                else:
                    self._pause = _FIRST_PAUSE
                    if not job.complete:
                        return
                    await self._ends(job)

    def _is_alike(self, job: Job) -> bool:
        """Whether the blob is fetched into the form that readers of this layer know."""
        return job.layer.packing is self.layer.packing

    def _check(self, patient: bool) -> None:
        """Raise what keeps the blob from coming, if nobody should wait for it."""
        if self.ruined is not None:
            raise copy.copy(self.ruined) from self.ruined
        failure = self.failure
        if failure is not None and not _is_passing(failure) and trio.current_time() > self._again:
            self.failure = failure = None
        if failure is not None and not (patient and _is_passing(failure)):
            raise copy.copy(failure) from failure

    async def _is_over(self, job: Job, used: Source, error: ModelError) -> bool:
        """Whether to look again after a failure: the job has ended, or it passes by itself, or
        there are other credentials than those that were ``used``.
        """
        if job.finished.is_set():
            await self._ends(job)
            return True
        if self._is_asked_otherwise(used, error):
            return True
        self.failure = error
        pause = self._next_pause(error)
        if not _is_passing(error):
            return False
        with trio.move_on_after(pause):
            await self._owner.changed().wait()
        if self.failure is error:
            self.failure = None
        return True

    def _is_asked_otherwise(self, used: Source, error: ModelError) -> bool:
        refused = isinstance(error, Unauthenticated | AccessDenied)
        return refused and self._owner.give_up(used)

    async def _ends(self, job: Job) -> None:
        """Wait until the end of a job has been looked at."""
        while self._job is job:
            await self._changes()

    @contextlib.contextmanager
    def _needed(self, patient: bool) -> Iterator[None]:
        waiter = object()
        self._needs += 1
        if patient:
            self._waits[waiter] = time.monotonic()
        self._serve()
        self._changed()
        try:
            yield
        finally:
            self._needs -= 1
            self._waits.pop(waiter, None)
            self._changed()

    def _changed(self) -> None:
        self._change.set()
        self._change = trio.Event()

    async def _changes(self) -> None:
        await self._change.wait()

    # -- serving -----------------------------------------------------------------------------------

    def _serve(self) -> None:
        if not (self._serving or self.complete or self.ruined):
            self._serving = True
            name = f"layer {self.layer.descriptor.digest.short}"
            self._nursery.start_soon(self._run, name=name)

    async def _run(self) -> None:
        """Keep the blob open while somebody needs it, whatever goes wrong."""
        try:
            while not (self.complete or self.ruined) and await self._is_needed():
                source = self._owner.source
                if source is None:
                    await self._owner.changed().wait()
                    continue
                try:
                    await self._serve_once(source)
                except ModelError as error:
                    if not self._is_asked_otherwise(source, error):
                        await self._failed(error)
        finally:
            self._serving = False
            self._changed()

    async def _is_needed(self) -> bool:
        """Whether anybody needs it, or comes to need it in a moment."""
        with trio.move_on_after(_LINGER_SECONDS):
            while not (self._needs or self._opened):
                await self._changes()
        return bool(self._needs or self._opened)

    async def _serve_once(self, source: Source) -> None:
        name = source.reference.name
        with (
            self._jobs.join(self.layer, source, background=False) as job,
            contextlib.ExitStack() as self._stack,
        ):
            if self._is_read_early:
                job.check_name(name)
            self._job = job
            for wanted in self._opened:
                self._job_opened(job, wanted)
            self._changed()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._leave, nursery.cancel_scope)
                    await job.finished.wait()
                    nursery.cancel_scope.cancel()
                if job.finished.is_set():
                    await job.wait()
                    await self._layouts.lay_out(self.layer)
                    self._completed()
            finally:
                self._job, self._left = None, job.done
                self._changed()

    @property
    def _is_read_early(self) -> bool:
        """Whether bytes of it can be shown before all are there."""
        return self.layer.packing in (Packing.RAW, Packing.TAR)

    async def _leave(self, scope: trio.CancelScope) -> None:
        while await self._is_needed():
            while self._needs or self._opened:
                await self._changes()
        scope.cancel()

    def _job_opened(self, job: Job, wanted: Range) -> None:
        if self._is_read_early and self._is_alike(job):
            self._stack.enter_context(job.opened(wanted))

    def _completed(self) -> None:
        self.complete, self.failure = True, None
        self._opened.clear()
        self._owner.progressed()

    async def _failed(self, error: ModelError) -> None:
        """Note why a try failed, and wait for the next one."""
        digest = self.layer.descriptor.digest
        if isinstance(error, DigestMismatch):
            self.spoil(error)
            return
        if isinstance(error, InvalidArtifact):
            self.ruined = error
            logger.warning("the layer %s cannot be shown: %s", digest, error.message)
            return
        self.failure = error
        seconds = self._next_pause(error)
        logger.warning("%s; the layer is asked for again in %.1f s", error.message, seconds)
        self._changed()
        with trio.move_on_after(seconds):
            await self._owner.changed().wait()
            self._pause = _FIRST_PAUSE
        self.failure = None
        self._changed()

    def _next_pause(self, error: ModelError) -> float:
        """How long to wait after a failure, seconds."""
        if _is_passing(error):
            pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        else:
            pause = _LONGEST_PAUSE if isinstance(error, NoSpace) else _REFUSED_SECONDS
        self._again = trio.current_time() + pause
        return pause


class Work(Protocol):
    """What a caller wants of a job."""

    async def __call__(self, job: Job, /) -> None: ...


async def _complete(job: Job) -> None:
    with job.whole():
        await job.wait()


async def _index(job: Job) -> None:
    await job.index()


def _is_passing(error: ModelError) -> bool:
    """Whether it may pass without anybody changing anything."""
    return error.transient
