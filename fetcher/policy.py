"""When a pull may be answered from the store, and when the registry has to be asked."""

from __future__ import annotations

import enum


class PullPolicy(enum.Enum):
    """The words of Kubernetes' ``imagePullPolicy``, for models.

    Whatever the policy, a cached model is never handed to somebody whom the registry did not let
    read it: ``IF_NOT_PRESENT`` without a registry, and ``NEVER``, believe only a digest for which
    these same credentials were accepted before.
    """

    IF_NOT_PRESENT = "IfNotPresent"
    """Ask the registry; without an answer use what the store has."""

    ALWAYS = "Always"
    """Ask the registry; without an answer fail."""

    NEVER = "Never"
    """Use what the store has, without a word to the registry."""
