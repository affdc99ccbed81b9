"""Log lines: one line per record, bounded, as text or JSON, on standard error.

Nothing here is why secrets stay out of the log: what handles them never passes them on. This is the
last line of defence behind that, for what a library may say: it cuts what looks like a secret.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_MESSAGE: Final = 4096
MAX_STACK: Final = 8 * 1024
MAX_FIELD: Final = 1024
_HIDDEN: Final = "***"

_OWN_ATTRIBUTES: Final = frozenset(
    {*vars(logging.makeLogRecord({})), "message", "asctime", "time", "level", "logger", "stack"}
)
"""Of a record that nobody added anything to, and the fields of a line."""

_TALKATIVE: Final = ("httpx", "httpcore", "urllib3", "oras", "requests")

_SECRETS: Final = (
    # header values: RFC 9110 "Authorization" and what people send instead
    re.compile(
        r"(?P<keep>\b(?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?)(?:[A-Za-z]+\s+)?[^\s'\",;]+",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<keep>\b(?i:bearer|basic)\s+)(?=\S*[0-9A-Z=])[A-Za-z0-9+/=._~-]{6,}"),
    # JSON members, settings and query parameters by their names
    re.compile(
        r"(?P<keep>['\"]?\b(?:[a-z0-9_-]{0,40}password|passwd|[a-z0-9_-]{0,40}secret|identity_?token"
        r"|access_?token|refresh_?token|id_?token|token|api_?key|auth)['\"]?\s*[:=]\s*)"
        r"(?:b?'[^']*'|b?\"[^\"]*\"|[^\s,;&'\"})\]]+)",
        re.IGNORECASE,
    ),
    # user information of an address
    re.compile(r"(?P<keep>\b[a-z][a-z0-9+.-]{0,20}://)[^\s/@'\"]+@", re.IGNORECASE),
    # the query of an address: redirects of object stores are signed there
    re.compile(r"(?P<keep>\bhttps?://[^\s?'\"<>]+\?)[^\s'\"<>]+", re.IGNORECASE),
    # a JSON web token, wherever it is
    re.compile(r"(?P<keep>)\beyJ[A-Za-z0-9_-]{8,500}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"),
)


def without_secrets(text: str) -> str:
    """``text`` with everything cut that looks like a secret."""
    for pattern in _SECRETS:
        text = pattern.sub(rf"\g<keep>{_HIDDEN}", text)
    return text


def printable(text: str) -> str:
    """``text`` on one line: no control character of it reaches a terminal or a log collector."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def _bounded(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


class _Lines(logging.Formatter):
    """What both formats share: message and stack, cut, redacted, bounded."""

    def message_of(self, record: logging.LogRecord) -> str:
        # before it is cut, a long message is worth no more work than a little over its bound
        message = record.getMessage()[: 4 * MAX_MESSAGE]
        return printable(_bounded(without_secrets(message), MAX_MESSAGE))

    def stack_of(self, record: logging.LogRecord) -> str:
        if not record.exc_info or record.exc_info[1] is None:
            return ""
        stack = "".join(traceback.format_exception(record.exc_info[1]))
        # the end tells what was raised
        return without_secrets(stack[-MAX_STACK:].strip())

    def time_of(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextLines(_Lines):
    """``2026-01-31T12:00:00.000Z INFO fetcher.pull: message``, for people."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.time_of(record)} {record.levelname} {record.name}: "
        stack = self.stack_of(record)
        return head + self.message_of(record) + (f" | {printable(stack)}" if stack else "")


class JsonLines(_Lines):
    """One JSON object a line, for collectors."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": self.time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self.message_of(record),
        }
        fields.update(_extras(record))
        stack = self.stack_of(record)
        if stack:
            fields["stack"] = stack
        return json.dumps(fields, ensure_ascii=False)


def _extras(record: logging.LogRecord) -> dict[str, object]:
    """What the caller passed as ``extra``: numbers as they are, all else as bounded text."""
    found: dict[str, object] = {}
    for key, value in record.__dict__.items():
        if key in _OWN_ATTRIBUTES or key.startswith("_"):
            continue
        if isinstance(value, bool | int | float) or value is None:
            found[key] = value
        else:
            found[key] = printable(
                _bounded(without_secrets(str(value)[: 2 * MAX_FIELD]), MAX_FIELD)
            )
    return found


class _Stream(logging.StreamHandler[TextIO]):
    """Standard error; a reader that went away is no reason to stop."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)


@contextlib.contextmanager
def configured(level: str, form: str, stream: TextIO) -> Iterator[None]:
    """Send every logger of the process to ``stream`` for the time of the block.

    ``level`` and ``form`` are the words of :class:`csi.config.Config`.
    """
    handler = _Stream(stream)
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    before = list(root.handlers), root.level
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    # these tell every address they ask, with its query
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    try:
        yield
    finally:
        root.handlers[:] = before[0]
        root.setLevel(before[1])
        logging.captureWarnings(False)
