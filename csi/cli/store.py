"""``gc``, ``rm`` and ``verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from csi.cli import output
from csi.cli.calling import client, has_store, work
from csi.cli.options import (
    REGISTRIES,
    Invocation,
    global_options,
    pass_invocation,
    setting_options,
)
from fetcher import agent_protocol as protocol
from fetcher.errors import NotFound

if TYPE_CHECKING:
    from csi.config import Config
    from csi.progress import Show

_LIMITS = ("max_size", "min_free", "gc_high_watermark", "gc_low_watermark")


@click.command(short_help="Evict models that no volume uses.")
@click.option("--all", "everything", is_flag=True, help="Evict all that is not in use.")
@click.option("--dry-run", is_flag=True, help="Print what would go, and evict nothing.")
@setting_options(_LIMITS)
@global_options
@pass_invocation
def gc(invocation: Invocation, everything: bool, dry_run: bool) -> None:
    """Bring the store below its watermarks: models that no volume uses go, those first that were
    not used for the longest time. What was left behind by a killed process goes as well.

    Where an agent runs, its limits count.

    \b
    Examples:
      model-csi gc --dry-run
      model-csi gc --all
    """

    async def task(config: Config, show: Show) -> protocol.GcResult:
        if not has_store(config):
            return protocol.GcResult(dry_run=dry_run)
        params = protocol.GcParams(all=everything, dry_run=dry_run)
        return await client(invocation, config, show).call(protocol.GC, params)

    result = work(invocation, "collecting", task)
    output.result(result) if invocation.as_json else output.collected(result)


@click.command("rm", short_help="Remove models from the store.")
@click.argument("references", metavar="REF...", nargs=-1, required=True)
@global_options
@pass_invocation
def remove(invocation: Invocation, references: tuple[str, ...]) -> None:
    """Remove the models REF, by tag or by digest, and what no other model needs of them.

    A tag stands for the model that it last led to here. Models that a volume uses stay, and then
    none of the others is removed either.

    \b
    Examples:
      model-csi rm ghcr.io/acme/qwen3-8b:v1
      model-csi rm sha256:7d865e959b2466918c9863afca942d0fb89d7c9ac0c99bafc3749504ded97730
    """

    async def task(config: Config, show: Show) -> protocol.RemoveResult:
        if not has_store(config):
            raise NotFound(f"there is no store at {config.root}", root=config.root)
        params = protocol.RemoveParams(references=references)
        return await client(invocation, config, show).call(protocol.REMOVE, params)

    result = work(invocation, "removing", task)
    output.result(result) if invocation.as_json else output.removed(result)


@click.command(short_help="Read the store again and repair it.")
@click.argument("references", metavar="[REF]...", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Print what is damaged, and leave it as it is.")
@setting_options(REGISTRIES)
@global_options
@pass_invocation
def verify(invocation: Invocation, references: tuple[str, ...], dry_run: bool) -> int:
    """Hash all layers in the store again, or those of the models REF, by tag or by digest, and
    compare what volumes show with them.

    What is damaged is dropped and fetched again by the next pull. What a volume shows is fetched at
    once, with the node's own credentials, and put right under its readers. Exit status 1 says that
    something damaged is left.

    \b
    Examples:
      model-csi verify --dry-run
      model-csi verify ghcr.io/acme/qwen3-8b:v1
    """

    async def task(config: Config, show: Show) -> protocol.VerifyResult:
        if not has_store(config) and references:
            raise NotFound(f"there is no store at {config.root}", root=config.root)
        if not has_store(config):
            return protocol.VerifyResult(dry_run=dry_run)
        params = protocol.VerifyParams(references=references, dry_run=dry_run)
        return await client(invocation, config, show).call(protocol.VERIFY, params)

    result = work(invocation, "verifying", task)
    output.result(result) if invocation.as_json else output.verified(result)
    return int(not all(row.repaired for row in result.damaged))
