"""One request for bytes of a blob, and its answer: what is right, what will do, what is nonsense.

What is accepted follows the distribution specification ("Pulling blobs") and RFC 9110 section 14.
Nothing here opens a connection: :mod:`fetcher.transport` tells what came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from fetcher.addresses import refused
from fetcher.errors import AccessDenied, ModelError, NotFound, Unauthenticated, Unavailable
from fetcher.network_errors import explain_causes, retry_after
from fetcher.ranges import Range, parse_content_range
from fetcher.routes import REDIRECTS
from fetcher.wire import MAX_HEADER_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fetcher.oci import Digest
    from fetcher.registry import BlobAccess
    from fetcher.routes import Hop
    from fetcher.wire import Head

_MAX_ERROR_BYTES: Final = 64 * 1024
_ADDRESS_REFUSED: Final = frozenset({400, 401, 403, 410})
"""What stores answer to a signed address that has expired."""


class RangeIgnored(Unavailable):
    """The server answered a range with the whole blob, which the sink cannot use."""


class WrongAnswer(Unavailable):
    """The server answered with something that is not the blob, or not the range that was asked."""


class AddressRefused(Unavailable):
    """The address to which a registry redirected is refused there; a fresh one may not be."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What to fetch of which blob."""

    digest: Digest
    size: int
    """Of the blob."""
    wanted: Range


class Sink(Protocol):
    """Where the bytes of a range go, in order."""

    def __call__(self, data: memoryview, /) -> bool:
        """Take the next bytes; false if they go beyond what is wanted.

        They are good until it returns: the buffer is used again.
        """

    def whole(self) -> bool:
        """The server sends the whole blob instead: whether that will do."""


class BlobExchange:
    """One request, its answer, and what was wrong with it. Lives in the worker thread."""

    def __init__(self, access: BlobAccess, hop: Hop, piece: Piece, sink: Sink) -> None:
        self._access = access
        self._who = access.route.who
        self._host = hop.host
        self._redirected = hop is not access.hop
        self._steered = access.route.steered(hop)
        self._authorized = any(name.lower() == "authorization" for name, _ in hop.headers)
        self._piece = piece
        self._sink = sink
        self._status = 0
        self._headers: Mapping[str, str] = {}
        self._left = len(piece.wanted)
        self._checked = False
        self._ignored = 0

    @property
    def wanted(self) -> Range:
        """What is asked for."""
        return self._piece.wanted

    @property
    def location(self) -> str | None:
        """Where the answer redirects to, if it does."""
        return self._headers.get("location") if self._status in REDIRECTS else None

    def check_peer(self, peer: str) -> None:
        """Raise :class:`AccessDenied` for what a registry must not steer a privileged process to,
        before it is asked.
        """
        why = refused(peer, steered=self._steered)
        if why is not None:
            raise AccessDenied(
                f"{self._host} is at {peer}, which {why}: it is never asked", registry=self._host
            )

    def begin(self, head: Head) -> None:
        """An answer has begun; the one before, if any, was broken off."""
        self._status, self._headers = head.status, head.headers
        if self.location is None and self._access.on_answer is not None:
            self._access.on_answer(head)

    def take(self, data: memoryview) -> bool:
        """The next bytes of the answer; false if the rest of it is of no use.

        Raises what the sink does, :class:`RangeIgnored` and :class:`WrongAnswer`.
        """
        if not 200 <= self._status < 300:
            # the body of an error or a redirect: its status says enough
            self._ignored += len(data)
            return self._ignored <= _MAX_ERROR_BYTES
        if not self._checked:
            self._check_answer()
        # a body may be longer than was said: what was asked for is there, and its digest will tell
        wanted = data[: self._left]
        if not self._sink(wanted):
            raise self._wrong("sent more bytes than it was asked for")
        self._left -= len(wanted)
        return len(wanted) == len(data)

    def _check_answer(self) -> None:
        self._checked = True
        if self._status == 206:
            self._check_range()
        elif self._status == 200:
            self._check_whole()
        else:
            raise self._wrong(f"answered with the status {self._status}")

    def _check_whole(self) -> None:
        """Whether this is the whole blob, and of use."""
        piece, length = self._piece, self._length()
        kind = self._headers.get("content-type", "").partition(";")[0].strip().lower()
        if length is None and kind in ("text/html", "application/xhtml+xml"):
            raise self._wrong("answered with an HTML page; is there a captive portal in between?")
        if length is None and self._is_compressed():
            raise self._wrong("compressed its answer without having been asked to")
        if length not in (None, piece.size):
            raise self._wrong(f"announced {length} bytes for a blob of {piece.size}")
        if not self._sink.whole():
            raise RangeIgnored(f"{self._host} ignores ranges", registry=self._host)
        self._left = piece.size

    def _check_range(self) -> None:
        """Whether this is the range that was asked for, or its beginning."""
        wanted, size = self._piece.wanted, self._piece.size
        try:
            got, whole = parse_content_range(self._headers.get("content-range", ""))
        except Unavailable as error:
            raise self._wrong(f"sent a range that is none: {error.message}") from error
        right = got.start == wanted.start and got.stop <= wanted.stop and whole in (None, size)
        if not right:
            raise self._wrong(
                f"answered with bytes {got.start} to {got.stop} of {whole}, not with "
                f"{wanted.start} to {wanted.stop} of {size}"
            )
        if self._is_compressed() and self._length() != len(got):
            raise self._wrong("compressed its answer without having been asked to")
        self._left = len(got)

    def _is_compressed(self) -> bool:
        return self._headers.get("content-encoding", "identity").lower() not in ("", "identity")

    def _length(self) -> int | None:
        """What the answer says of its length, if anything."""
        text = self._headers.get("content-length", "")
        chunked = "transfer-encoding" in self._headers
        return int(text) if text.isascii() and text.isdigit() and not chunked else None

    def broken(self, error: Exception, *, silent: bool = False) -> Unavailable:
        """What to raise for an exchange that ``error`` ended early."""
        return self._unavailable(explain_causes(error, self._named, silent=silent)[0].message)

    def too_long(self) -> Unavailable:
        """What to raise for headers that have no end."""
        return self._unavailable(
            f"{self._named} sent more than {MAX_HEADER_BYTES} bytes of headers"
        )

    def not_in_time(self) -> Unavailable:
        """What to raise where no connection came about."""
        return self._unavailable(f"no connection to {self._named} came about in time")

    def not_let_through(self) -> Unavailable:
        """What to raise for a proxy that refuses."""
        return self._unavailable(f"the proxy does not let requests through to {self._named}")

    def finish(self) -> None:
        """Judge an answer that came to its end."""
        status = self._status
        if 200 <= status < 300:
            if self._left:
                raise self._unavailable(f"{self._named} ended {self._left} bytes early")
            return
        if self._redirected and status in _ADDRESS_REFUSED:
            raise AddressRefused(
                self._text(f"refuses the address with the status {status}"),
                registry=self._host,
            )
        if status == 401:
            hint = "refused these credentials" if self._authorized else "wants credentials"
            raise Unauthenticated(self._text(hint), registry=self._host)
        if status == 403:
            raise AccessDenied(self._text("refused access"), registry=self._host)
        if status == 404:
            raise NotFound(self._text("does not have it"), registry=self._host)
        if status == 416:
            raise self._wrong("says that the blob is not as long as its descriptor")
        raise self._unavailable(f"{self._named} answered with the status {status}")

    @property
    def _named(self) -> str:
        """The host, for a sentence."""
        return f"{self._host}, to which {self._who} redirects," if self._redirected else self._host

    def _text(self, what: str) -> str:
        return f"fetching blob {self._piece.digest}: {self._named} {what}"

    def _wrong(self, what: str) -> ModelError:
        return WrongAnswer(self._text(what), registry=self._host, digest=self._piece.digest)

    def _unavailable(self, sentence: str) -> Unavailable:
        return Unavailable(
            f"fetching blob {self._piece.digest}: {sentence}",
            retry_after=retry_after(self._headers.get("retry-after", "")),
            registry=self._host,
            digest=self._piece.digest,
        )
