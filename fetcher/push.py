"""Pushing a model folder as a ModelPack artifact: scan, hash, upload, check.

What an artifact consists of is :mod:`fetcher.packaging`'s; how bytes get into the registry is
:mod:`fetcher.upload`'s; whether they arrived is asked of the registry as by any reader.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from fetcher.errors import DigestMismatch, InvalidRequest
from fetcher.model_facts import Facts, read_facts
from fetcher.modelpack import Kind, read_model
from fetcher.oci import Digest, Manifest, parse_manifest
from fetcher.packaging import ModelFile, ModelFolder, config, layer, manifest, scan
from fetcher.registry import Registry, RegistrySettings
from fetcher.tasks import for_each
from fetcher.upload import Upload, upload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fetcher.credentials import Keychain
    from fetcher.oci import Reference

log: Final = logging.getLogger(__name__)

_HASH_BLOCK: Final = 1024 * 1024


async def push(
    folder: Path,
    reference: Reference,
    keychain: Keychain,
    settings: RegistrySettings,
    progress: Callable[[int, int], None] | None = None,
) -> Digest:
    """Make the model in ``folder`` a ModelPack artifact at ``reference``; returns its digest.

    One raw layer per file, so that a pulled layer is its file. The same folder gives the same
    digest each time, and what the registry already has is not sent again. ``progress`` is told
    bytes done and bytes in all, on the trio thread. Raises ``InvalidRequest`` for a folder that
    cannot be pushed and what :class:`~fetcher.registry.Registry` raises.
    """
    if reference.digest is not None or reference.tag is None:
        raise InvalidRequest(f"{reference} has a digest: a model is pushed to a tag")
    found = await trio.to_thread.run_sync(scan, folder)
    for path in found.skipped:
        log.info("%s is not pushed: it is hidden, or a byproduct", path)
    digests = await _hash_all(found.files)
    facts = await trio.to_thread.run_sync(_facts, found)
    name = reference.repository.rpartition("/")[2]
    config_body = config(name, found, digests, facts)
    layers = [layer(*pair) for pair in zip(found.files, digests, strict=True)]
    document = manifest(layers, Digest.of(config_body), len(config_body))
    _check_readable(document)
    credentials = await keychain.lookup(reference.registry, reference.repository)
    # what is pushed goes to the registry itself, so that is who is asked for it afterwards
    registry = Registry(replace(settings, hosts_dir=None))
    try:
        sent = await upload(
            Upload(reference, credentials, found.files, tuple(digests), config_body, document),
            partial(registry.authorization, reference, keychain, "pull,push"),
            settings,
            progress or _silently,
        )
        arrived = await registry.head_manifest(reference, keychain)
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(5):
            await registry.aclose()
    if arrived != sent:
        raise DigestMismatch(
            f"{reference} was pushed as {sent}, and the registry has {arrived} there: somebody "
            "else pushed to the same tag, or the registry changed the manifest",
            reference=reference,
        )
    return arrived


def _check_readable(document: dict[str, object]) -> None:
    """Never push what this program itself would not mount."""
    parsed = parse_manifest(json.dumps(document).encode(), None)
    if not isinstance(parsed, Manifest):
        raise AssertionError("a manifest was made")
    read_model(parsed)


async def _hash_all(files: Sequence[ModelFile]) -> list[Digest]:
    """Digests in the order of ``files``, hashed in as many threads as there are processors."""
    digests: dict[ModelFile, Digest] = {}
    processors = len(os.sched_getaffinity(0))
    limiter = trio.CapacityLimiter(processors)

    async def hash_one(file: ModelFile) -> None:
        digests[file] = await trio.to_thread.run_sync(_hash, file, limiter=limiter)

    await for_each(files, hash_one, processors)
    return [digests[file] for file in files]


def _hash(file: ModelFile) -> Digest:
    """The SHA-256 of a file as it was scanned."""
    hasher, size = hashlib.sha256(), 0
    try:
        with file.source.open("rb") as stream:
            while block := stream.read(_HASH_BLOCK):
                trio.from_thread.check_cancelled()
                hasher.update(block)
                size += len(block)
    except OSError as error:
        raise InvalidRequest(f"cannot read {file.path}: {error.strerror}") from error
    if size != file.size:
        raise InvalidRequest(f"{file.path} changed while it was read: push it when it is complete")
    return Digest("sha256", hasher.hexdigest())


def _facts(folder: ModelFolder) -> Facts:
    configs = [file.source for file in folder.files if file.path == "config.json"]
    weights = [file.source for file in folder.files if file.kind is Kind.WEIGHT]
    return read_facts(configs[0] if configs else None, weights)


def _silently(done: int, total: int) -> None:
    """Tell nobody."""
