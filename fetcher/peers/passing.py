"""Passing a part of a blob on while it arrives: what is there is sent, then the next is waited for.

A thread sends it from begin to end (:mod:`fetcher.peers.following`). The task that started it looks
again at what there is when nothing comes any more, as a blob becomes complete, or is dropped, while
it is being sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from fetcher.errors import ModelError, Unavailable
from fetcher.peers.following import Following
from fetcher.peers.http import BytesMissing
from fetcher.ranges import Range

if TYPE_CHECKING:
    from collections.abc import Callable

    from fetcher.jobs import Job
    from fetcher.peers.bodies import Body
    from fetcher.peers.fills import Wanting
    from fetcher.peers.http import HttpConnection
    from fetcher.peers.served import Served
    from fetcher.peers.uploads import Uploads

_FIRST_BYTE_SECONDS: Final = 30.0
_NEXT_BYTE_SECONDS: Final = 10.0
"""How long what is on its way may stand still; who asked has left long before."""
_SLICE_BYTES: Final = 64 * 1024 * 1024
_MOST_MISSES: Final = 5
"""How often in a row what was there may have just moved, as when a blob became complete."""
_PAUSE: Final = 0.04
"""Seconds between two looks for the first byte."""
_SLICES_A_SECOND: Final = 20
_LEAST_SLICE: Final = 64 * 1024


class Passing:
    """One part on its way through this node."""

    def __init__(self, part: Range, find: Callable[[], Body | None], job: Job | None) -> None:
        """``find`` gives what is here of the blob at present, ``job`` is what fetches it."""
        self._part = part
        self._find = find
        self._job = job
        self._waiting = trio.CancelScope()
        self.wanting: Wanting | None = None
        """What has the part fetched, if that is done for this asker."""

    def look(self) -> None:
        """Look again whether there is something to wait for."""
        self._waiting.cancel()

    async def begun(self) -> Body:
        """The blob, once the first byte of the part is there.

        Raises what the fetching of it failed with, and :class:`Unavailable` where it ends or does
        not come.
        """
        with trio.move_on_after(_FIRST_BYTE_SECONDS):
            return await self._next(self._part)
        raise Unavailable("it does not arrive: ask again", retry_after=1.0)

    async def send(
        self, connection: HttpConnection, uploads: Uploads, served: Served, left: list[int]
    ) -> None:
        """Send the part as it arrives; ``left`` is told what is not sent yet.

        Raises :class:`BytesMissing` where it does not arrive, and what ends a connection.
        """
        part, rate, misses = self._part, uploads.rate, 0
        most = max(rate // _SLICES_A_SECOND, _LEAST_SLICE) if rate else _SLICE_BYTES
        while part:
            body = await self._next_or_end(part)
            following = Following(body, Range(part.start, min(part.stop, part.start + most)))
            pause = uploads.pause(len(following.left), trio.current_time())
            if pause:
                await trio.sleep(pause)
            try:
                await connection.send_part(following)
            finally:
                sent = following.sent
                left[0] -= sent
                uploads.sent(sent, left[0])
                served.bytes += sent
            misses = 0 if sent else misses + 1
            if misses == _MOST_MISSES:
                raise BytesMissing("what is said to be there is not")
            part = Range(part.start + sent, part.stop)

    async def _next_or_end(self, part: Range) -> Body:
        body = self._here(part)
        if body is not None:
            return body
        try:
            with trio.fail_after(_NEXT_BYTE_SECONDS):
                return await self._next(part)
        except (ModelError, trio.TooSlowError) as error:
            # the head has been sent: all that is left is to end before the end
            raise BytesMissing(str(error) or "nothing arrives any more") from error

    async def _next(self, part: Range) -> Body:
        while True:
            body = self._here(part)
            if body is not None:
                return body
            with trio.CancelScope() as self._waiting:
                await self._news()
            # what comes of the other chunks is news, too
            await trio.sleep(_PAUSE)

    def _here(self, part: Range) -> Body | None:
        """The blob, if the first byte of the part is there."""
        body = self._find()
        return body if body is not None and body.there(part) > part.start else None

    async def _news(self) -> None:
        """Wait until there may be more; raises why nothing more will arrive, if that is so."""
        job, wanting = self._job, self.wanting
        if wanting is not None and wanting.failure is not None:
            raise wanting.failure
        if job is not None and not job.finished.is_set():
            await job.change()
        elif wanting is not None and not wanting.ended:
            # it is about to say why
            await trio.sleep_forever()
        else:
            raise Unavailable("it stopped arriving: ask again", retry_after=1.0)
