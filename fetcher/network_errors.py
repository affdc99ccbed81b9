"""What went wrong on the network, in words: the reason lies some causes below httpx's exception."""

from __future__ import annotations

import email.utils
import socket
import ssl
import time
from typing import TYPE_CHECKING, Final, TypeVar

import httpx

from fetcher.addresses import RefusedAddress
from fetcher.errors import AccessDenied, ModelError, Unavailable, Unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator

_E = TypeVar("_E", bound=BaseException)
_MAX_CAUSES: Final = 32
_NOT_TLS: Final = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"})


def explain_failure(error: Exception, host: str) -> tuple[ModelError, bool]:
    """The error for people, and whether another attempt may cure it.

    An exception that is not about the network comes back raised: it is a fault of this program.
    """
    refused = _cause(error, RefusedAddress)
    if refused is not None:
        return AccessDenied(f"{refused}: refused", registry=host), False
    if not isinstance(error, httpx.HTTPError):
        raise error
    in_time = f"no connection to {host} came about in time"
    if isinstance(error, httpx.ConnectTimeout):
        return Unreachable(in_time, registry=host), True
    if isinstance(error, httpx.PoolTimeout):
        # by our own limits
        return Unavailable(in_time, registry=host), True
    if isinstance(error, httpx.ProxyError):
        text = f"the proxy does not let requests through to {host}"
        return Unreachable(text, registry=host), True
    found, passes = explain_causes(error, host, silent=isinstance(error, httpx.TimeoutException))
    if isinstance(error, httpx.ConnectError):
        return Unreachable(found.message, registry=host), passes
    return found, passes


def explain_causes(error: Exception, host: str, *, silent: bool) -> tuple[Unavailable, bool]:
    """As :func:`explain_failure`, for the exceptions of any library, by what lies below them.

    ``silent`` says that the library waited in vain.
    """
    text, passes = _words(error, host)
    if silent and text == _broken(host):
        text = f"{host} fell silent in the middle of an exchange"
    return Unavailable(text, registry=host), passes


def _words(error: Exception, host: str) -> tuple[str, bool]:
    untrusted = _cause(error, ssl.SSLCertVerificationError)
    if untrusted is not None:
        return (
            f"the TLS certificate of {host} is not trusted ({untrusted.verify_message}); if it "
            "was issued by an authority of your own, name that with the CA file setting"
        ), False
    tls = _cause(error, ssl.SSLError)
    if tls is not None:
        if tls.reason in _NOT_TLS:
            return f"{host} does not speak TLS; is it a plain HTTP registry?", False
        return f"TLS with {host} failed ({tls.reason or 'broken off'})", True
    unknown = _cause(error, socket.gaierror)
    if unknown is not None:
        if unknown.errno == socket.EAI_AGAIN:
            return f"the name of {host} cannot be looked up at the moment (DNS)", True
        return f"there is no host {host} (DNS: {unknown.strerror})", False
    if _cause(error, ConnectionRefusedError) is not None:
        return f"{host} refuses connections: nothing listens there", True
    broken = _cause(error, OSError)
    if broken is not None and broken.strerror:
        return f"the connection to {host} failed: {broken.strerror}", True
    return _broken(host), True


def _broken(host: str) -> str:
    return f"the connection to {host} broke, or what listens there does not speak HTTP"


def _cause(error: BaseException, kind: type[_E]) -> _E | None:
    return next((one for one in _causes(error) if isinstance(one, kind)), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and what lies below it. trio groups the failures of several addresses."""
    waiting, seen = [error], set[int]()
    while waiting and len(seen) < _MAX_CAUSES:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, BaseExceptionGroup):
            waiting.extend(current.exceptions)
        waiting.extend(one for one in (current.__cause__, current.__context__) if one is not None)


def retry_after(text: str) -> float | None:
    """Seconds from now that a ``Retry-After`` says, in either form (RFC 9110, section 10.2.3).

    Never negative; None for what is no such header.
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return max(seconds, 0.0)
