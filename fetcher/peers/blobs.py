"""The way of one blob to a peer: may it be read, is it here, is it on its way, is it ours to fetch.

Members of the cluster get what is here and what this node owns, and a quick no otherwise: they know
whom to ask next. Foreign clients know nobody else: for them everything is fetched.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from fetcher.errors import NotFound, OutOfRange
from fetcher.modelpack import Packing, blob_layer
from fetcher.peers import protocol
from fetcher.peers.access import Asker
from fetcher.peers.bodies import ArrivingBody, StoredBodies, StoredBody
from fetcher.peers.passing import Passing
from fetcher.peers.requests import Refusal, refusal
from fetcher.peers.uploads import Handed
from fetcher.ranges import Range, content_range, requested_range

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fetcher.jobs import Job, Jobs
    from fetcher.oci import Digest
    from fetcher.peers.bodies import Body
    from fetcher.peers.fills import Fills
    from fetcher.peers.http import Headers, HttpConnection
    from fetcher.peers.owners import Deal
    from fetcher.peers.requests import Asked
    from fetcher.peers.served import Served
    from fetcher.peers.uploads import Uploads
    from fetcher.policy import ReferencePolicy
    from fetcher.store.store import Store


_ANY_SIZE: Final = 10**19
"""More than any blob has."""


class Ownership(Protocol):
    """Whose turn it is to fetch what."""

    def owns(self, deal: Deal, wanted: Range, chunk_size: int) -> bool:
        """Whether this node is to fetch, for others that ask it, the chunk of that size that
        ``wanted`` begins in.
        """

    def asked(self, blob: Digest) -> None:
        """A member wants some of a blob that this node is to fetch for all."""


class OwnsNothing:
    """The ownership of a node without members."""

    def owns(self, deal: Deal, wanted: Range, chunk_size: int) -> bool:
        return False

    def asked(self, blob: Digest) -> None:
        """Nothing follows from it."""


class Allowing(Protocol):
    """Who may be given which blob; see :class:`fetcher.peers.access.Rights`."""

    async def blob(self, asker: Asker) -> int | None: ...


@dataclass(frozen=True, slots=True)
class _Wish:
    """A part of a blob that somebody may have."""

    asked: Asked
    asker: Asker
    part: Range
    size: int
    """Of the blob."""

    @property
    def is_whole(self) -> bool:
        """Whether it is answered as the whole blob, and not as a part."""
        return len(self.part) == self.size and not self.asked.range


class Blobs:
    """The blobs of a node, for others. Belongs to the trio thread."""

    def __init__(
        self,
        store: Store,
        jobs: Jobs,
        fills: Fills,
        rights: Allowing,
        policy: ReferencePolicy,
        ownership: Ownership,
        uploads: Uploads,
        served: Served,
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._fills = fills
        self._rights = rights
        self._policy = policy
        self._ownership = ownership
        self._uploads = uploads
        self._served = served
        self._stored = StoredBodies(store)
        self._handed = Handed()

    async def answer(self, connection: HttpConnection, asked: Asked, *, is_head: bool) -> None:
        """Answer one request. Raises :class:`Refusal`, ``ModelError`` and what ends a connection,
        :class:`fetcher.peers.http.BytesMissing` among that.
        """
        self._policy.check(asked.reference)
        if not is_head and self._is_nowhere(asked):
            # at once: the registry would be asked for nothing, while somebody waits
            self._served.lacking += 1
            raise _lacking(asked, self._have(asked, None))
        if asked.member and not asked.ready and self._is_owned(asked):
            self._ownership.asked(asked.digest)
        asker = Asker(asked.reference, asked.authorization, asked.hops)
        told = await self._rights.blob(asker)
        # nothing is held for others: what is evicted meanwhile, they get elsewhere
        found = self._find(asked.digest)
        size = told if found is None else found.size
        if size is None:
            raise NotFound(f"the registry does not say how large blob {asked.digest} is")
        if is_head or not size:
            whole = _Wish(asked, asker, Range(0, size), size)
            await connection.begin(200, self._headers(whole, found, as_whole=True))
            await connection.end()
            return
        await self._send(connection, _Wish(asked, asker, _part(asked, size), size), found)

    def _is_nowhere(self, asked: Asked) -> bool:
        """Whether nothing of the blob is here or will be, for all that this node does for a member.

        Which is no more than a peer may know (docs/security.md).
        """
        if not asked.member or self._find(asked.digest) is not None:
            return False
        return asked.ready or self._is_owned(asked) is False

    def _is_owned(self, asked: Asked) -> bool | None:
        """Whether this node is to fetch the part that is asked for; None where it is the whole."""
        # the size is the registry's to say: it is not looked at here whether there are such bytes
        part = requested_range(asked.range, _ANY_SIZE)
        return None if part is None else self._owns(asked, part)

    def _find(self, digest: Digest) -> Body | None:
        """What is here of a blob."""
        job = self._jobs.running(digest)
        if job is None or job.partial is None or job.complete or job.partial.is_closed:
            # the records are asked only where nothing is on its way: this is looked at all the time
            return self._stored.find(digest)
        # an archive lies in the files that it holds; everything else in one file, as it is
        whole = job.layer.packing is not Packing.TAR
        return ArrivingBody(job.partial, self._store.blob_path(digest) if whole else None)

    async def _send(self, connection: HttpConnection, wish: _Wish, found: Body | None) -> None:
        part, served = wish.part, self._served
        is_here = found is not None and found.there(part) == part.stop
        is_ours = not wish.asked.ready and self._is_ours(wish)
        is_coming = not wish.asked.ready and found is not None and found.is_begun(part)
        if not (is_here or is_ours or is_coming):
            served.lacking += 1
            raise _lacking(wish.asked, self._have(wish.asked, found))
        with self._admitted(wish, found) as left:
            job = self._jobs.running(wish.asked.digest)
            if is_here or not is_ours:
                if isinstance(found, StoredBody):
                    served.from_store += 1
                else:
                    served.passed_on += 1
                await self._pass_on(connection, wish, self._passing(wish, job), left)
            else:
                served.filled += 1
                await self._fill(connection, wish, left)

    def _is_ours(self, wish: _Wish) -> bool:
        """Whether to fetch it for who asks."""
        return not wish.asked.member or self._owns(wish.asked, wish.part)

    def _owns(self, asked: Asked, part: Range) -> bool:
        size = asked.chunk_size if asked.hops < protocol.MOST_HOPS else 0
        return size > 0 and self._ownership.owns(asked.deal, part, size)

    @contextlib.contextmanager
    def _admitted(self, wish: _Wish, found: Body | None) -> Iterator[list[int]]:
        """Room for an upload, and how much of it is not sent; raises :class:`Refusal` if there is
        none.
        """
        asked, part = wish.asked, wish.part
        other = self._handed.member(asked.digest, part, asked.member) if asked.member else None
        if other and asked.spare is not None and self._uploads.running > asked.spare:
            self._served.busy += 1
            headers = ((protocol.TRY, other), *self._have(asked, found))
            raise Refusal(429, "TOOMANYREQUESTS", "another member has less to do", headers)
        wait = self._uploads.admit(len(part))
        if wait is not None:
            self._served.busy += 1
            elsewhere = ((protocol.TRY, other),) if other else ()
            headers = (
                ("Retry-After", str(max(1, round(wait)))),
                *elsewhere,
                *self._have(asked, found),
            )
            raise Refusal(429, "TOOMANYREQUESTS", "this node is busy", headers)
        left = [len(part)]
        self._served.uploads += 1
        try:
            yield left
        finally:
            self._served.uploads -= 1
            self._uploads.leave(left[0])
            if asked.member and not left[0]:
                # not before: whoever is sent there wants it whole
                self._handed.note(asked.digest, part, asked.member)

    async def _fill(self, connection: HttpConnection, wish: _Wish, left: list[int]) -> None:
        """Send what is fetched from the registry in the asker's name."""
        asked = wish.asked
        layer = blob_layer(asked.digest, wish.size, asked.layer, asked.position)
        async with self._fills.filling(wish.asker, layer) as job:
            passing = self._passing(wish, job)
            wanting = self._fills.wanting(
                job,
                wish.part,
                passing.look,
                urgent=asked.urgent,
                # by this node's own count it may be somebody else's, who asks this one in turn
                adopts=bool(asked.member) and job.deal != asked.deal,
            )
            with wanting as passing.wanting:
                await self._pass_on(connection, wish, passing, left)

    def _passing(self, wish: _Wish, job: Job | None) -> Passing:
        return Passing(wish.part, lambda: self._find(wish.asked.digest), job)

    async def _pass_on(
        self, connection: HttpConnection, wish: _Wish, passing: Passing, left: list[int]
    ) -> None:
        """Answer with a part, as soon as its first byte is there, and as it arrives."""
        found = await passing.begun()
        headers = self._headers(wish, found, as_whole=wish.is_whole)
        await connection.begin(200 if wish.is_whole else 206, headers)
        await passing.send(connection, self._uploads, self._served, left)
        await connection.end()

    def _headers(self, wish: _Wish, found: Body | None, *, as_whole: bool) -> Headers:
        digest, part = wish.asked.digest, wish.part
        of_part = () if as_whole else (("Content-Range", content_range(part, wish.size)),)
        return (
            ("Content-Type", "application/octet-stream"),
            ("Content-Length", str(wish.size if as_whole else len(part))),
            ("Accept-Ranges", "bytes"),
            ("Docker-Content-Digest", str(digest)),
            ("ETag", f'"{digest}"'),
            *of_part,
            *self._have(wish.asked, found),
        )

    def _have(self, asked: Asked, found: Body | None) -> Headers:
        """What a member of the cluster is told of this node, and of the other chunks."""
        if not asked.member:
            return ()
        text = None if found is None else found.have().text
        have = () if text is None else ((protocol.HAVE, text),)
        return ((protocol.LOAD, str(self._uploads.running)), *have)


def _lacking(asked: Asked, headers: Headers) -> Refusal:
    return Refusal(404, "BLOB_UNKNOWN", f"blob {asked.digest} is not here", headers)


def _part(asked: Asked, size: int) -> Range:
    """Which bytes are asked for. Raises :class:`Refusal` where there are none of them."""
    try:
        return requested_range(asked.range, size) or Range(0, size)
    except OutOfRange as error:
        raise refusal(error, asked.kind, size) from error
