"""Which gRPC status an error is: the one table, design section 9."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Final

import grpc

from fetcher import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

CODES: Final[Mapping[type[errors.ModelError], grpc.StatusCode]] = types.MappingProxyType(
    {
        errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
        errors.InvalidArtifact: grpc.StatusCode.INVALID_ARGUMENT,
        errors.NotFound: grpc.StatusCode.NOT_FOUND,
        errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
        errors.AccessDenied: grpc.StatusCode.PERMISSION_DENIED,
        errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
        errors.NoSpace: grpc.StatusCode.RESOURCE_EXHAUSTED,
        errors.Conflict: grpc.StatusCode.ALREADY_EXISTS,
        errors.OutOfRange: grpc.StatusCode.OUT_OF_RANGE,
        errors.InProgress: grpc.StatusCode.ABORTED,
        errors.DigestMismatch: grpc.StatusCode.DATA_LOSS,
        errors.Unsupported: grpc.StatusCode.FAILED_PRECONDITION,
        # the root alone says only that something of this node cannot be used
        errors.ModelError: grpc.StatusCode.INTERNAL,
    }
)


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status of ``error``: that of its nearest ancestor in the table, else ``INTERNAL``."""
    for ancestor in type(error).__mro__:
        if ancestor in CODES:
            return CODES[ancestor]
    return grpc.StatusCode.INTERNAL
