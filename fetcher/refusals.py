"""What a registry's refusal means, in words: distribution specification "Error Codes".

Registries disagree on refusals. Many answer 401 or 403 for a repository that does not exist, so as
not to tell strangers what there is; the messages say so, since that is what a typing error in a
reference looks like.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from fetcher.auth import unauthenticated
from fetcher.errors import AccessDenied, ModelError, NotFound, Unavailable

if TYPE_CHECKING:
    from fetcher.auth import Asked
    from fetcher.credentials import Credentials
    from fetcher.exchange import Answer

_MAX_SHOWN: Final = 200
_MAX_ERRORS: Final = 2


@dataclass(frozen=True, slots=True)
class Refused:
    """An answer that is not what was asked for, and who was asked for what in whose name."""

    asked: Asked
    what: str
    """As in "the manifest v1 of acme/qwen3"."""
    answer: Answer
    credentials: Credentials | None
    authorization: str | None = field(repr=False)


def refusal(refused: Refused) -> ModelError:
    """The error for an answer whose status is not a success."""
    status, asked = refused.answer.status, refused.asked
    said = _said(refused)
    if status == 401:
        error: ModelError = unauthenticated(asked, refused.credentials)
        return type(error)(error.message + said, **error.context)
    if status == 403:
        who = "the credentials that were found" if refused.credentials else "requests without any"
        return AccessDenied(
            f"{asked.registry} refuses {who} access to {asked.repository}; some registries answer "
            f"the same when the repository does not exist{said}",
            registry=asked.registry,
            repository=asked.repository,
        )
    if status == 404:
        return NotFound(
            f"{asked.registry} does not have {refused.what}: check the spelling of the repository "
            f"and of the tag{said}",
            registry=asked.registry,
            repository=asked.repository,
        )
    return Unavailable(
        f"{asked.registry} answered HTTP status {status} when asked for {refused.what}{said}",
        registry=asked.registry,
    )


def page(asked: Asked, what: str) -> Unavailable:
    """The error for a page where data should be."""
    return Unavailable(
        f"{asked.registry} answered with an HTML page when asked for {what}; is there a proxy or a "
        "captive portal between this node and the registry, or is it no registry at all?",
        registry=asked.registry,
    )


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct):
    errors: list[_Error] = []


def _said(refused: Refused) -> str:
    """The registry's own words: bounded, printable, and without our secrets if it echoes them."""
    if refused.answer.is_page:
        return "; it answered with an HTML page: is there a proxy or a captive portal in between?"
    try:
        errors = msgspec.json.decode(refused.answer.body, type=_Errors).errors
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        # no words of its own, or not in the form that the specification has
        return ""
    shown = [
        clean(": ".join(part for part in (one.code, one.message) if part), _secrets(refused))
        for one in errors[:_MAX_ERRORS]
    ]
    words = "; ".join(one for one in shown if one)
    return f" (the registry says: {words})" if words else ""


def _secrets(refused: Refused) -> tuple[str, ...]:
    found = [(refused.authorization or "").partition(" ")[2]]
    if refused.credentials:
        basic = refused.credentials.basic.partition(" ")[2]
        found += [basic, refused.credentials.password, refused.credentials.identity_token]
        found.append(refused.credentials.passed.partition(" ")[2])
    return tuple(found)


def clean(text: str, secrets: tuple[str, ...] = ()) -> str:
    """``text`` on one line, without ``secrets``, and short enough for an event."""
    for secret in secrets:
        if secret:
            text = text.replace(secret, "[secret]")
    printable = "".join(one if one.isprintable() else " " for one in text[: 4 * _MAX_SHOWN])
    line = " ".join(printable.split())
    return line if len(line) <= _MAX_SHOWN else line[: _MAX_SHOWN - 1] + "…"
