"""``mount``, ``unmount`` and ``status``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click
import msgspec

from csi.agent_calls import require_root
from csi.attributes import Mode
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
)
from fetcher import agent_protocol as protocol
from fetcher.errors import InvalidRequest
from fetcher.oci import Reference
from fetcher.schedule import Prefetch

if TYPE_CHECKING:
    from csi.config import Config
    from csi.progress import Show


@click.command(short_help="Show a model at a folder, read-only.")
@click.argument("reference", metavar="REF")
@click.argument("folder", metavar="DIR")
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in Mode]),
    default=Mode.EAGER.value,
    show_default=True,
    help="All of it before it is shown, or at once and fetched while it is read, or what is best.",
)
@click.option(
    "--prefetch",
    type=click.Choice([prefetch.value for prefetch in Prefetch]),
    help="What is fetched besides what is read; not with the mode eager.  [default: all]",
)
@selection_options
@registry_options
@global_options
@pass_invocation
def mount(
    invocation: Invocation,
    reference: str,
    folder: str,
    mode: str,
    prefetch: str | None,
    pull_policy: str,
    exclude: tuple[str, ...],
    exclude_weights: bool,
    username: str | None,
    password_stdin: bool,
) -> None:
    """Show the model REF at DIR, read-only. Downloads it first where that is needed.

    DIR is made if it is not there, and has to be empty. The mount outlives this command and any
    agent; it is gone after 'model-csi unmount DIR' or a restart of the machine. Needs root.

    With --mode lazy it is shown at once and fetched while it is read, by 'model-csi serve', which
    has to run.

    \b
    Examples:
      model-csi mount ghcr.io/acme/qwen3-8b:v1 /mnt/qwen3
      model-csi mount --mode lazy ghcr.io/acme/qwen3-8b:v1 /mnt/qwen3
    """
    require_root("mounting")
    password = read_password(username, password_stdin)

    async def task(config: Config, show: Show) -> protocol.MountResult:
        params = protocol.MountParams(
            reference=reference,
            target=target,
            mode=mode,
            prefetch=prefetch or "",
            pull_policy=pull_policy,
            exclude_weights=exclude_weights,
            exclude_patterns=exclude,
            login=await login_for(Reference.parse(reference), username, password),
        )
        return await client(invocation, config, show).call(protocol.MOUNT, params)

    target = _resolved(folder)
    result = work(invocation, f"pulling {reference}", task)
    if invocation.as_json:
        output.result(result)
    else:
        output.mounted(result)


@click.command(short_help="Take a model off a folder.")
@click.argument("folder", metavar="DIR")
@global_options
@pass_invocation
def unmount(invocation: Invocation, folder: str) -> None:
    """Take a model off DIR that 'model-csi mount' put there. The store keeps it. Needs root.

    Nothing but such a mount is touched. Where none is, there is nothing to do.

    \b
    Examples:
      model-csi unmount /mnt/qwen3
    """
    require_root("unmounting")
    target = _resolved(folder)

    async def task(config: Config, show: Show) -> protocol.UnmountResult:
        params = protocol.UnmountParams(target=target)
        return await client(invocation, config, show).call(protocol.UNMOUNT, params)

    result = work(invocation, f"unmounting {folder}", task)
    if invocation.as_json:
        output.result(result)
    else:
        word = "unmounted" if result.was_mounted else "not mounted"
        output.facts([(word, result.target)])


@click.command(short_help="Show agent, volumes, running pulls and disk.")
@global_options
@pass_invocation
def status(invocation: Invocation) -> None:
    """Show the agent, the volumes, the running pulls with their rates, and the disk.

    \b
    Examples:
      model-csi status
      model-csi status --json | jq '.pulls[] | [.reference, .done, .total]'
    """

    async def task(config: Config, show: Show) -> protocol.StatusResult:
        if not has_store(config):
            return protocol.StatusResult(
                root=str(config.root), agent=None, volumes=(), pulls=(), disk=None
            )
        found = await client(invocation, config, show).call(protocol.STATUS, protocol.NoParams())
        if found.agent is not None and found.agent.pid == os.getpid():
            # that this command was its own agent is nothing that anybody wants to know
            return msgspec.structs.replace(found, agent=None)
        return found

    result = work(invocation, "looking", task)
    output.result(result) if invocation.as_json else output.status(result)


def _resolved(folder: str) -> str:
    """The absolute path of ``folder`` without symlinks, as the agent wants it."""
    target = os.path.realpath(folder)
    try:
        target.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{folder!r} is not a path in UTF-8") from error
    return target
