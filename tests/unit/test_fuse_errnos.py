"""Every error has an errno, and somebody chose it."""

from __future__ import annotations

import errno
import importlib
import pkgutil
from typing import TYPE_CHECKING

import pytest

import fetcher
import fuse
from fetcher import errors
from fuse.errnos import ERRNOS, errno_of

if TYPE_CHECKING:
    from collections.abc import Iterator


def _subclasses(of: type[errors.ModelError]) -> Iterator[type[errors.ModelError]]:
    for subclass in of.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def test_every_error_has_a_decision() -> None:
    for package in (fetcher, fuse):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for subclass in _subclasses(errors.ModelError):
        decided = [ancestor for ancestor in subclass.__mro__ if ancestor in ERRNOS]
        assert decided[0] is not errors.ModelError, f"{subclass.__name__} has no errno of its own"


def test_what_cannot_be_had_is_an_error_of_reading() -> None:
    assert errno_of(errors.Unreachable("gone")) == errno.EIO
    assert errno_of(errors.DigestMismatch("wrong")) == errno.EIO


def test_what_a_program_did_wrong_keeps_its_errno() -> None:
    assert errno_of(OSError(errno.EROFS, "read-only")) == errno.EROFS


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), OSError("no number")])
def test_what_is_no_error_of_ours_is_one_of_reading(error: Exception) -> None:
    assert errno_of(error) == errno.EIO
