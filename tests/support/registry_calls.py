"""Small models in a registry, and one call at a time to our own registry access."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import trio

from fetcher.credentials import Anonymous, Keychain
from fetcher.oci import Digest, Manifest, Reference
from fetcher.registry import Named, Registry, RegistrySettings
from tests.support.keychains import Everywhere
from tests.support.registry import OCI_MANIFEST, RegistryServer
from tests.support.token_server import PASSWORD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

MODEL_TYPE = "application/vnd.cncf.model.manifest.v1+json"
ROBOT = Everywhere("robot", PASSWORD)
WRONG = Everywhere("robot", "not-" + PASSWORD)
NOBODY = Anonymous()
QUICK = RegistrySettings(attempts=3, retry_seconds=20, connect_timeout=3, stall_timeout=5)


def manifest_of(*layers: tuple[Digest, int], note: str = "") -> bytes:
    config = Digest.of(b"{}")
    document: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": MODEL_TYPE,
        "config": {"mediaType": "application/x.config", "digest": str(config), "size": 2},
        "layers": [
            {"mediaType": "application/x.layer", "digest": str(digest), "size": size}
            for digest, size in layers
        ],
    }
    if note:
        document["annotations"] = {"note": note}
    return json.dumps(document).encode()


def push_model(server: RegistryServer, repository: str, tag: str = "v1", note: str = "") -> Digest:
    """A model of one small layer; returns its manifest's digest."""
    content = f"weights of {repository} {note}".encode()
    layer = server.push_blob(repository, content)
    server.push_blob(repository, b"{}")
    return server.push_manifest(
        repository, tag, manifest_of((layer, len(content)), note=note), OCI_MANIFEST
    )


@contextlib.asynccontextmanager
async def opened(settings: RegistrySettings = QUICK) -> AsyncIterator[Registry]:
    registry = Registry(settings)
    try:
        yield registry
    finally:
        await registry.aclose()


def ask(
    call: Callable[[Registry, Reference], Awaitable[Any]],
    reference: str,
    settings: RegistrySettings = QUICK,
) -> Any:
    """One call to a fresh :class:`Registry`, in a loop of its own."""

    async def main() -> Any:
        async with opened(settings) as registry:
            return await call(registry, Reference.parse(reference))

    return trio.run(main)


def manifest(reference: str, keychain: Keychain = NOBODY, **settings: Any) -> Any:
    return ask(
        lambda registry, parsed: registry.manifest(parsed, keychain),
        reference,
        replace(QUICK, **settings),
    )


def resolve(reference: str, keychain: Keychain = NOBODY) -> tuple[Manifest, Digest]:
    found: tuple[Manifest, Named] = ask(
        lambda registry, parsed: registry.resolve_model(parsed, keychain), reference
    )
    manifest, named = found
    return manifest, named.digest


async def call_by_name(
    name: str, keychain: Keychain, client: Registry, reference: Reference
) -> Any:
    """A method of :class:`Registry` that takes a reference and a keychain."""
    return await getattr(client, name)(reference, keychain)
