"""One request for bytes of a blob, and its answer: what is right, what will do, what is nonsense.

What is accepted follows the distribution specification ("Pulling blobs") and RFC 9110 section 14.
Nothing here opens a connection: libcurl's callbacks in :mod:`fetcher.transport` end here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import pycurl

from fetcher.addresses import refused
from fetcher.errors import AccessDenied, ModelError, NotFound, Unauthenticated, Unavailable
from fetcher.network_errors import retry_after
from fetcher.ranges import Range, parse_content_range
from fetcher.routes import REDIRECTS
from fetcher.threads import Stopped

if TYPE_CHECKING:
    import threading

    from fetcher.oci import Digest
    from fetcher.registry import BlobAccess
    from fetcher.routes import Hop

_GATHER_BYTES: Final = 256 * 1024
_GATHER_SECONDS: Final = 0.005
"""What is gathered is lost to a kill: on a slow line it is not gathered for long."""
_MAX_HEADER_BYTES: Final = 64 * 1024
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

    def __call__(self, data: bytes, /) -> bool:
        """Take the next bytes; false if they go beyond what is wanted."""

    def whole(self) -> bool:
        """The server sends the whole blob instead: whether that will do."""


class BlobExchange:
    """One request, its answer, and what was wrong with it. Lives in the worker thread."""

    def __init__(
        self, access: BlobAccess, hop: Hop, piece: Piece, sink: Sink, stop: threading.Event
    ) -> None:
        self._who = access.route.who
        self._host = hop.host
        self._redirected = hop is not access.hop
        self._steered = access.route.steered(hop)
        self._authorized = any(name.lower() == "authorization" for name, _ in hop.headers)
        self._piece = piece
        self._sink = sink
        self._stop = stop
        self._status = 0
        self._headers: dict[str, str] = {}
        self._header_bytes = 0
        self._left = len(piece.wanted)
        self._checked = False
        self._ignored = 0
        self._problem: BaseException | None = None
        self._pieces: list[bytes] = []
        self._gathered = 0
        self._handed_over = time.monotonic()
        self.is_enough = False
        """The rest of the answer is of no use: it was we who ended it."""

    @property
    def location(self) -> str | None:
        """Where the answer redirects to, if it does."""
        return self._headers.get("location") if self._status in REDIRECTS else None

    # Exceptions do not cross libcurl: callbacks note the problem and end the transfer.

    def check_peer(self, peer: str, local: str, peer_port: int, local_port: int) -> int:
        """Refuse what a registry must not steer a privileged process to, before it is asked."""
        why = refused(peer, steered=self._steered)
        if why is None:
            return int(pycurl.PREREQFUNC_OK)
        self._problem = AccessDenied(
            f"{self._host} is at {peer}, which {why}: it is never asked", registry=self._host
        )
        return int(pycurl.PREREQFUNC_ABORT)

    def take_header(self, line: bytes) -> int | None:
        self._header_bytes += len(line)
        if self._header_bytes > _MAX_HEADER_BYTES:
            self._problem = Unavailable(
                f"{self._host} sent more than {_MAX_HEADER_BYTES} bytes of headers"
            )
            return 0
        text = line.decode("iso-8859-1").strip()
        if text.startswith("HTTP/"):
            # an interim answer's headers are followed by those of the final one
            self._status = _status_of(text)
            self._headers.clear()
        elif ":" in text:
            name, _, value = text.partition(":")
            self._headers[name.strip().lower()] = value.strip()
        return None

    def take_body(self, data: bytes) -> int | None:
        try:
            if not 200 <= self._status < 300:
                return self._ignore(data)
            if not self._checked:
                self._check_answer()
            self._pieces.append(data)
            self._gathered += len(data)
            if self._gathered >= min(_GATHER_BYTES, self._left) or self._is_slow():
                self._hand_over()
        except BaseException as error:
            self._problem = error
            return 0
        return 0 if self.is_enough else None

    def _ignore(self, data: bytes) -> int | None:
        """Pass over the body of an error or a redirect: its status says enough."""
        self._ignored += len(data)
        self.is_enough = self._ignored > _MAX_ERROR_BYTES
        return 0 if self.is_enough else None

    def _is_slow(self) -> bool:
        return time.monotonic() - self._handed_over >= _GATHER_SECONDS

    def _hand_over(self) -> None:
        """Give the sink what was gathered: libcurl's 16 KiB at a time would keep Python busy."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._gathered = 0
        self._handed_over = time.monotonic()
        if len(data) > self._left:
            # a body longer than was said: what was asked for is there, and its digest will tell
            data = data[: self._left]
            self.is_enough = True
        if not self._sink(data):
            raise self._wrong("sent more bytes than it was asked for")
        self._left -= len(data)

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

    def keep_gathered(self) -> None:
        """After an answer that ended early: what came is good, and is not fetched again."""
        if self._pieces and self._problem is None:
            self._hand_over()

    def failure(self, code: int, text: str) -> BaseException:
        """What ended the transfer early, by libcurl's number and words for it or by our own."""
        if self._problem is not None:
            return self._problem
        if self._stop.is_set():
            return Stopped()
        if code in (pycurl.E_SSL_CACERT, pycurl.E_PEER_FAILED_VERIFICATION):
            text += "; if its certificate is of a private authority, configure that as ca-file"
        return self._unavailable(f"failed: {text}")

    def finish(self) -> None:
        """Judge an answer that came to its end."""
        status = self._status
        if 200 <= status < 300:
            if self._left:
                raise self._unavailable(f"ended {self._left} bytes early")
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
        raise self._unavailable(f"answered with the status {status}")

    def _text(self, what: str) -> str:
        led = f", to which {self._who} redirects," if self._redirected else ""
        return f"fetching blob {self._piece.digest}: {self._host}{led} {what}"

    def _wrong(self, what: str) -> ModelError:
        return WrongAnswer(self._text(what), registry=self._host, digest=self._piece.digest)

    def _unavailable(self, what: str) -> ModelError:
        return Unavailable(
            self._text(what),
            retry_after=retry_after(self._headers.get("retry-after", "")),
            registry=self._host,
            digest=self._piece.digest,
        )


def _status_of(line: str) -> int:
    parts = line.split(None, 2)
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0
