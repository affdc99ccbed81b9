"""Dragonfly and Spegel as mirrors, by the ``hosts.toml`` that their guides give for containerd."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from tests.support.engines import dragonfly, serve_engine, spegel
from tests.support.proxy import serve_proxy
from tests.support.sources import shown, weights, write_hosts
from tests.support.stores import CHUNK, NO_FLOOR, REGISTRIES, pull, pulling

if TYPE_CHECKING:
    from pathlib import Path

    from fetcher.registry import RegistrySettings
    from tests.support.proxy import Proxy
    from tests.support.registry import RegistryServer


def pulled(root: Path, reference: str, settings: RegistrySettings) -> dict[str, bytes]:
    async def main() -> dict[str, bytes]:
        with trio.fail_after(60):
            async with pulling(root, NO_FLOOR, registries=settings) as (pulls, _):
                return shown(await pull(pulls, reference))

    return trio.run(main)


def configured(tmp_path: Path, home: Proxy, text: str) -> RegistrySettings:
    write_hosts(tmp_path / "certs.d", home.address, text)
    return replace(REGISTRIES, hosts_dir=tmp_path / "certs.d")


def test_dragonfly_is_told_which_registry_to_go_to(
    tmp_path: Path, registry: RegistryServer
) -> None:
    builder, files = weights(30 * CHUNK + 7, 5)
    builder.push(registry, "engines/dragonfly", "v1")
    with (
        serve_proxy(registry.address) as home,
        serve_engine(registry.address, dragonfly(home.address)) as daemon,
    ):
        text = f"""
server = "http://{home.address}"

[host."http://{daemon.address}"]
capabilities = ["pull", "resolve"]

[host."http://{daemon.address}".header]
X-Dragonfly-Registry = "http://{home.address}"
"""
        reference = f"{home.address}/engines/dragonfly:v1"
        assert pulled(tmp_path / "root", reference, configured(tmp_path, home, text)) == files
        assert not daemon.refused
        assert [asked.path for asked in daemon.requests if "/blobs/" in asked.path]
        # every byte of the files came from there; who may read them was the registry's to say
        assert home.counts.total == 0
        assert all(asked.ns == home.address for asked in daemon.requests)


def test_spegel_gives_what_nodes_have_and_the_registry_the_rest(
    tmp_path: Path, registry: RegistryServer
) -> None:
    builder, files = weights(20 * CHUNK, 10 * CHUNK)
    builder.push(registry, "engines/spegel", "v1")
    blobs = {str(digest): data for digest, data in builder.blobs.items()}
    large = max(blobs, key=lambda digest: len(blobs[digest]))
    with serve_proxy(registry.address) as home:
        has = {large}
        with serve_engine(registry.address, spegel(home.address, has)) as daemon:
            text = f"""
[host]

[host.'http://{daemon.address}']
capabilities = ['pull', 'resolve']
dial_timeout = '200ms'

[host.'http://127.0.0.1:9']
capabilities = ['pull', 'resolve']
dial_timeout = '200ms'
"""
            reference = f"{home.address}/engines/spegel:v1"
            assert pulled(tmp_path / "root", reference, configured(tmp_path, home, text)) == files
            assert large not in home.counts.bytes
            assert home.counts.total == 10 * CHUNK
            missing = [one.path for one in daemon.refused if "/blobs/" in one.path]
            # what no node has costs one question each
            assert len(missing) == len(set(missing))


def test_spegel_names_a_model_while_the_registry_is_away(
    tmp_path: Path, registry: RegistryServer
) -> None:
    builder, files = weights(3 * CHUNK)
    builder.push(registry, "engines/away", "v1")
    has = {"v1", str(builder.digest), *map(str, builder.blobs)}
    # a port where nothing listens
    away = "127.0.0.1:9"
    with serve_engine(registry.address, spegel(away, has)) as daemon:
        write_hosts(
            tmp_path / "certs.d",
            away,
            f"[host.'http://{daemon.address}']\ncapabilities = ['pull', 'resolve']\n",
        )
        settings = replace(REGISTRIES, hosts_dir=tmp_path / "certs.d")
        assert pulled(tmp_path / "root", f"{away}/engines/away:v1", settings) == files
