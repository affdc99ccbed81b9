"""What a node has sent to others, counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Served:
    """Since it started."""

    bytes: int = 0
    from_store: int = 0
    """Parts of blobs that were complete."""
    passed_on: int = 0
    """Parts that were there, or arrived, of a blob on its way."""
    filled: int = 0
    """Parts that were fetched for the asker."""
    lacking: int = 0
    """Requests for what is not here."""
    busy: int = 0
    """Requests that were sent elsewhere."""
    refused: int = 0
    """Requests that the registry, or the policy, does not allow."""
    strangers: int = 0
    """Connections of nobody that is known."""
    connections: int = 0
    """That are open now."""
    uploads: int = 0
    """That are under way now."""
