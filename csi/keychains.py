"""Whose credentials a volume is pulled with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fetcher.credentials import Chain, VolumeSecrets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fetcher.credentials import Keychain
    from fetcher.oci import Reference


def volume_keychain(
    secrets: Mapping[str, str], reference: Reference, node_keychain: Keychain
) -> Keychain:
    """The volume's own secrets, then the node's docker config; the node's alone without secrets.

    Raises :class:`fetcher.errors.InvalidRequest`, which quotes nothing of the secrets.
    """
    if not secrets:
        return node_keychain
    return Chain(VolumeSecrets.parse(dict(secrets), reference.registry), node_keychain)
