"""Making the list of a model's chunk digests, for a command or by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fetcher import agent_protocol as protocol
from fetcher.chunk_digests import is_chunk_size
from fetcher.errors import InvalidRequest
from fetcher.indexing import Indexing
from fetcher.modelpack import read_model
from fetcher.pull import Progress

if TYPE_CHECKING:
    from csi.agent import Watch
    from fetcher.credentials import Keychain
    from fetcher.indexing import Contents
    from fetcher.oci import Reference
    from fetcher.registry import Registry


async def make_list(
    registry: Registry,
    reference: Reference,
    keychain: Keychain,
    chunk_size: int,
    watch: Watch,
    contents: Contents | None = None,
) -> protocol.IndexResult:
    """The list for the model under ``reference``, not pushed anywhere.

    Blobs that ``contents`` has are read there, all others from the registry.
    """
    if not is_chunk_size(chunk_size):
        raise InvalidRequest(f"chunks of {chunk_size} bytes are too small or too large for a list")
    manifest, _ = await registry.resolve_model(reference, keychain)
    model = read_model(manifest)
    pinned = reference.with_digest(model.digest)
    indexing = Indexing(registry, pinned, keychain, contents)
    watch.follow(lambda: Progress(*indexing.progress()))
    made = await indexing.make(model, chunk_size)
    return protocol.IndexResult(
        reference=str(pinned),
        digest=str(model.digest),
        chunk_size=made.chunk_size,
        blobs=len(made.blobs),
        bytes=sum(blob.size for blob in made.blobs.values()),
        fetched=indexing.fetched,
        list=made.encode().decode(),
    )
