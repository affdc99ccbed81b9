"""The file metadata annotation, ModelPack ``docs/annotations.md``, "Layer Annotation Values". No
I/O.
"""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Final

import msgspec

from fetcher.artifacts import usable_time
from fetcher.errors import InvalidArtifact

MAX_CHARACTERS: Final = 64 * 1024

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_RFC3339: Final = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt]([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?"
    r"([Zz]|[+-][0-9]{2}:[0-9]{2})"
)

# tar's type flags for a regular file, and what Go writes who does not set it
_REGULAR_FLAGS: Final = frozenset({0, ord("0"), ord("7")})
# setuid and setgid, as Unix has them and as Go's os.FileMode
_SET_ID: Final = 0o6000 | 1 << 23 | 1 << 22
# os.FileMode's ModeType: folder, link, device, pipe, socket, character device, irregular
_GO_TYPES: Final = 1 << 31 | 1 << 27 | 1 << 26 | 1 << 25 | 1 << 24 | 1 << 21 | 1 << 19
_UNIX_TYPES: Final = 0o170000
_UNIX_REGULAR: Final = 0o100000

_Unsigned32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class FileMetadata(msgspec.Struct, frozen=True):
    """What a packager noted about a file. Owner and name are read and not used."""

    name: str | None = None
    mode: _Unsigned32 | None = None
    uid: _Unsigned32 | None = None
    gid: _Unsigned32 | None = None
    size: Annotated[int, msgspec.Meta(ge=0, le=1 << 50)] | None = None
    mtime: str | None = None
    typeflag: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None

    @classmethod
    def parse(cls, text: str) -> FileMetadata:
        """Read the annotation's value, unknown keys aside. Raises :class:`InvalidArtifact`."""
        if len(text) > MAX_CHARACTERS:
            raise InvalidArtifact(f"its file metadata has more than {MAX_CHARACTERS} characters")
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise InvalidArtifact(
                f"its file metadata cannot be read: {str(error)[:200]}"
            ) from error
        except RecursionError as error:
            raise InvalidArtifact("its file metadata is nested too deeply") from error

    def check_regular(self) -> None:
        """Raise :class:`InvalidArtifact` if this is no regular file, or one with privileges."""
        mode = self.mode or 0
        if (
            self.typeflag not in (None, *_REGULAR_FLAGS)
            or mode & _GO_TYPES
            or mode & _UNIX_TYPES not in (0, _UNIX_REGULAR)
        ):
            raise InvalidArtifact(
                f"its metadata (typeflag {self.typeflag}, mode {mode:#o}) is not a regular file's"
            )
        if mode & _SET_ID:
            raise InvalidArtifact(f"its file is setuid or setgid (mode {mode:#o})")

    @property
    def is_executable(self) -> bool:
        """Whether anybody may execute it; the permissions are the low bits in both spellings."""
        return bool((self.mode or 0) & 0o111)

    @property
    def modified_ns(self) -> int | None:
        """Nanoseconds since 1970; ``None`` for Go's zero time and whatever no file can have."""
        match = _RFC3339.fullmatch(self.mtime or "")
        if match is None:
            return None
        day, time, fraction, zone = match.groups()
        try:
            moment = datetime.datetime.fromisoformat(f"{day}T{time}{zone.upper()}")
            seconds = (moment - _EPOCH) // datetime.timedelta(seconds=1)
        except (ValueError, OverflowError):
            return None
        return usable_time(seconds * 10**9 + int((fraction or "").ljust(9, "0")))
