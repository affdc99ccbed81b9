"""``pull``, ``push``, ``ls`` and ``inspect``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from csi.agent_calls import inspect_model, keychain_for
from csi.agent_client import AgentLost
from csi.cli import output
from csi.cli.calling import client, has_store, work
from csi.cli.options import (
    Invocation,
    global_options,
    login_for,
    pass_invocation,
    read_password,
    registry_options,
    selection_options,
    setting_options,
)
from fetcher import agent_protocol as protocol
from fetcher.oci import Reference

if TYPE_CHECKING:
    from csi.config import Config
    from csi.progress import Show


@click.command(short_help="Download a model into the store.")
@click.argument("reference", metavar="REF")
@selection_options
@setting_options(("connections", "max_size", "min_free"))
@registry_options
@global_options
@pass_invocation
def pull(
    invocation: Invocation,
    reference: str,
    pull_policy: str,
    exclude: tuple[str, ...],
    exclude_weights: bool,
    username: str | None,
    password_stdin: bool,
) -> None:
    """Download the model REF into the store and print where its files are.

    What is there already is not downloaded again, and a pull that was interrupted goes on where it
    stopped. Pulls of the same model at the same time share one download.

    \b
    Examples:
      model-csi pull ghcr.io/acme/qwen3-8b:v1
      model-csi pull --root ~/models --exclude '*.bin' ghcr.io/acme/qwen3-8b:v1
      echo "$TOKEN" | model-csi pull --username acme --password-stdin ghcr.io/acme/private:v1
    """
    password = read_password(username, password_stdin)

    async def task(config: Config, show: Show) -> protocol.PullResult:
        params = protocol.PullParams(
            reference=reference,
            pull_policy=pull_policy,
            exclude_weights=exclude_weights,
            exclude_patterns=exclude,
            login=await login_for(Reference.parse(reference), username, password),
        )
        return await client(invocation, config, show).call(protocol.PULL, params)

    result = work(invocation, f"pulling {reference}", task)
    output.result(result) if invocation.as_json else output.pulled(result)


@click.command(short_help="Push a model folder to a registry.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("reference", metavar="REF")
@registry_options
@global_options
@pass_invocation
def push(
    invocation: Invocation,
    folder: Path,
    reference: str,
    username: str | None,
    password_stdin: bool,
) -> None:
    """Make the model folder DIR a ModelPack artifact and push it to REF.

    One raw layer for each file, so that a pulled layer is its file. What the registry has already
    is not sent again. Needs no store and no agent.

    \b
    Examples:
      model-csi push ./qwen3-8b ghcr.io/acme/qwen3-8b:v1
    """
    password = read_password(username, password_stdin)
    wanted = Reference.parse(reference)

    async def task(config: Config, show: Show) -> str:
        login = await login_for(wanted, username, password)
        keychain = keychain_for(wanted, login, invocation.program.keychain(config))
        settings = invocation.program.registry_settings(config)
        # here, as what it imports would double the time that other commands take to start
        from fetcher.push import push as push_folder

        return str(await push_folder(folder, wanted, keychain, settings, show))

    digest = work(invocation, f"pushing {reference}", task)
    if invocation.as_json:
        output.result({"reference": f"{wanted}@{digest}", "digest": digest})
    else:
        output.facts([("reference", f"{wanted}@{digest}"), ("digest", digest)])


@click.command("ls", short_help="List the models in the store.")
@global_options
@pass_invocation
def list_models(invocation: Invocation) -> None:
    """List the models in the store, last used first.

    \b
    Examples:
      model-csi ls
      model-csi ls --json | jq -r '.models[].digest'
    """

    async def task(config: Config, show: Show) -> protocol.ListResult:
        if not has_store(config):
            return protocol.ListResult(models=())
        return await client(invocation, config, show).call(protocol.LIST, protocol.NoParams())

    result = work(invocation, "looking", task)
    output.result(result) if invocation.as_json else output.models(result)


@click.command(short_help="Show what a registry has, without downloading it.")
@click.argument("reference", metavar="REF")
@registry_options
@global_options
@pass_invocation
def inspect(
    invocation: Invocation, reference: str, username: str | None, password_stdin: bool
) -> None:
    """Show what a registry has under REF: manifest, layers and config. Downloads no layer.

    Needs no store: without an agent, or with one that is not this user's to talk to, the command
    asks the registry itself.

    \b
    Examples:
      model-csi inspect ghcr.io/acme/qwen3-8b:v1
      model-csi inspect --json ghcr.io/acme/qwen3-8b:v1 | jq '.layers[].path'
    """
    password = read_password(username, password_stdin)
    wanted = Reference.parse(reference)

    async def task(config: Config, show: Show) -> protocol.InspectResult:
        params = protocol.InspectParams(
            reference=reference, login=await login_for(wanted, username, password)
        )
        agent = client(invocation, config, show)
        if await agent.reachable():
            with contextlib.suppress(AgentLost):
                found = await agent.ask_running(protocol.INSPECT, params)
                if found is not None:
                    return found
        keychain = keychain_for(wanted, params.login, invocation.program.keychain(config))
        async with invocation.program.registry(config) as registry:
            return await inspect_model(registry, wanted, keychain)

    result = work(invocation, f"inspecting {reference}", task)
    output.result(result) if invocation.as_json else output.model(result)
