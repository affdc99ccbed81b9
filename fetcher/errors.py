"""Everything that can go wrong on behalf of a user, in the user's words.

One tree with one root. A class exists where somebody acts on the difference: the gRPC edge picks a
status code by it, a download decides by ``transient`` whether to try again. Programming mistakes
are not in the tree: they stay ordinary exceptions and end as ``INTERNAL``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fetcher.chunk_digests import BlobChunks


class ModelError(Exception):
    """Root of all errors that are meant for a user.

    ``message`` must be safe to show: what failed, on what, why, what to do, and never a secret or
    the query of a signed address. ``context`` carries the same facts for machines (log fields), as
    strings.
    """

    transient = False
    """Whether the same request may succeed later without anybody changing anything."""

    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message)
        self.message = message
        self.context = {key: str(value) for key, value in context.items()}


class InvalidRequest(ModelError):
    """A bad reference, attribute, capability, path or setting: the caller has to change the
    request.
    """


class InvalidArtifact(ModelError):
    """The artifact breaks its specification, is hostile, or is not a model."""


class NotFound(ModelError):
    """No such model, tag, blob or volume."""


class Unauthenticated(ModelError):
    """The registry wants credentials, or does not know the ones it got."""


class AccessDenied(ModelError):
    """The registry knows these credentials and refuses them, or a policy here does."""


class Unavailable(ModelError):
    """Registry or network down, or answering nonsense, after all retries."""

    transient = True

    def __init__(
        self, message: str, *, retry_after: float | None = None, **context: object
    ) -> None:
        super().__init__(message, **context)
        self.retry_after = retry_after
        """Seconds after which the other side wants to be asked again, if it said so."""


class Unreachable(Unavailable):
    """No connection came about: whoever is there was not even asked."""


class NoSpace(ModelError):
    """Not enough room on the disk or below the limit, for what was asked."""


class Conflict(ModelError):
    """The same volume exists with other parameters, or something foreign is in the way."""


class OutOfRange(ModelError):
    """A size or count that was asked for cannot be had."""


class InProgress(ModelError):
    """Work on the same thing goes on: ask again later."""

    transient = True


class DigestMismatch(ModelError):
    """Bytes are not what their digest says, whoever sent them."""


class ChunkMismatch(DigestMismatch):
    """The bytes of one chunk are not what its own digest says; they were dropped."""

    def __init__(self, message: str, **context: object) -> None:
        super().__init__(message, **context)
        self.senders: frozenset[str] = frozenset()
        """Who sent them, as the sink was told; an empty name is somebody who is not known."""
        self.hearsay: BlobChunks | None = None
        """What says so, where that is nobody's word who is believed."""

    @property
    def sole(self) -> bool:
        """Whether all of them came from one."""
        return len(self.senders) == 1


class Unsupported(ModelError):
    """Asked for by name and not there on this node (as FUSE), or not built in."""
