"""Every error has a status, and somebody chose it."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

import grpc
import pytest

import csi
import fetcher
from csi.codes import CODES, code_of
from fetcher import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

# design, section 9
DESIGN = {
    errors.InvalidRequest: "INVALID_ARGUMENT",
    errors.InvalidArtifact: "INVALID_ARGUMENT",
    errors.NotFound: "NOT_FOUND",
    errors.Unauthenticated: "UNAUTHENTICATED",
    errors.AccessDenied: "PERMISSION_DENIED",
    errors.Unavailable: "UNAVAILABLE",
    errors.NoSpace: "RESOURCE_EXHAUSTED",
    errors.Conflict: "ALREADY_EXISTS",
    errors.InProgress: "ABORTED",
    errors.DigestMismatch: "DATA_LOSS",
    errors.Unsupported: "FAILED_PRECONDITION",
    errors.OutOfRange: "OUT_OF_RANGE",
    errors.ModelError: "INTERNAL",
}


def _subclasses(of: type[errors.ModelError]) -> Iterator[type[errors.ModelError]]:
    for subclass in of.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


@pytest.mark.parametrize("error", DESIGN, ids=lambda error: error.__name__)
def test_codes_are_those_of_the_design(error: type[errors.ModelError]) -> None:
    assert code_of(error("what went wrong")).name == DESIGN[error]


def _import_everything() -> None:
    """An error is walked only once its module is there."""
    for package in (csi, fetcher):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def test_every_error_has_a_decision() -> None:
    _import_everything()
    subclasses = list(_subclasses(errors.ModelError))

    assert len(subclasses) >= len(DESIGN) - 1
    for subclass in subclasses:
        decided = [ancestor for ancestor in subclass.__mro__ if ancestor in CODES]
        assert decided[0] is not errors.ModelError, f"{subclass.__name__} has no status of its own"


def test_a_subclass_has_the_code_of_its_nearest_ancestor() -> None:
    class Nearer(errors.NotFound):
        pass

    assert code_of(Nearer("here")) is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), RuntimeError("x")])
def test_what_is_no_error_of_ours_is_internal(error: Exception) -> None:
    assert code_of(error) is grpc.StatusCode.INTERNAL
