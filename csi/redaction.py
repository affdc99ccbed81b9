"""What of a request may be shown in a log line: everything but secrets, on one line, bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from google.protobuf.text_format import MessageToString

from proto import csi_pb2

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor
    from google.protobuf.message import Message

    _M = TypeVar("_M", bound=Message)

MAX_SHOWN: Final = 2000
"""Characters of a request in a log line."""

TOKEN_KEY: Final = "serviceaccount.tokens"  # noqa: S105 -- a key's name
"""Part of the keys under which kubelet hands over pods' tokens, CSIDriver ``tokenRequests``."""

_HIDDEN: Final = "***"


def shown(request: Message) -> str:
    """``request`` for a log line: one line, at most :data:`MAX_SHOWN` characters, no secrets.

    Fields that the running stubs do not know are left out: one of them may be a secret.
    """
    text = MessageToString(redacted(request), as_one_line=True, as_utf8=False).strip()
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text)} characters)"


def redacted(message: _M) -> _M:
    """A copy without the fields that the contract marks ``csi_secret``, and without tokens."""
    copy = type(message)()
    copy.CopyFrom(message)
    _strip(copy)
    return copy


def _strip(message: Message) -> None:
    for field, value in message.ListFields():
        if field.GetOptions().Extensions[csi_pb2.csi_secret]:
            message.ClearField(field.name)
        elif field.message_type is None:
            continue
        elif field.message_type.GetOptions().map_entry:
            _strip_map(field.message_type, value)
        else:
            for part in value if field.is_repeated else (value,):
                _strip(part)


def _strip_map(entry: Descriptor, values: Any) -> None:
    """Strip a map field: ``entry`` is its type, ``values`` behaves as a dict."""
    if entry.fields_by_name["value"].message_type is not None:
        for part in values.values():
            _strip(part)
        return
    for key in [key for key in values if TOKEN_KEY in str(key).lower()]:
        values[key] = _HIDDEN
