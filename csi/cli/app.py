"""``model-csi``: its commands, and how any of them ends."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

import click

from csi.cli import output
from csi.cli.index import index
from csi.cli.models import inspect, list_models, pull, push
from csi.cli.options import Invocation, global_options
from csi.cli.running import Interrupted, innermost
from csi.cli.serve import serve
from csi.cli.store import gc, remove, verify
from csi.cli.volumes import mount, status, unmount
from fetcher import logs
from fetcher.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from csi.cli.program import Program

logger = logging.getLogger(__name__)

OK, FAILED, USAGE = 0, 1, 2


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@global_options
@click.version_option(package_name="model-csi", message="model-csi %(version)s")
@click.pass_context
def model_csi(context: click.Context) -> None:
    """Mount models from OCI registries as read-only folders.

    Commands talk to a running agent ('model-csi serve') of the same --root, and work without one.

    \b
    Examples:
      model-csi push ./qwen3-8b registry.example.org/acme/qwen3-8b:v1
      model-csi pull registry.example.org/acme/qwen3-8b:v1
      model-csi mount registry.example.org/acme/qwen3-8b:v1 /mnt/qwen3
      model-csi status

    Exit status: 0 done, 1 failed, 2 wrong usage, 128 and the signal's number when interrupted.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        context.exit(USAGE)


for command in (
    serve,
    pull,
    mount,
    unmount,
    push,
    index,
    list_models,
    inspect,
    status,
    gc,
    remove,
    verify,
):
    model_csi.add_command(command)


def main(arguments: Sequence[str], program: Program) -> int:
    """Run one command; returns the exit status."""
    invocation = Invocation(program)
    try:
        status = model_csi.main(list(arguments), "model-csi", obj=invocation, standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        # click reads all options before it tells which of them it took
        as_json = invocation.as_json or "--json" in arguments
        output.error("Usage", _explained(error), as_json=as_json)
        return USAGE
    except ModelError as error:
        output.error(type(error).__name__, error.message, as_json=invocation.as_json)
        return FAILED
    except Interrupted as interrupted:
        output.error("Interrupted", f"ended by {interrupted}", as_json=invocation.as_json)
        return 128 + interrupted.number
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        # who read the output has left; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        form = "json" if invocation.as_json else "text"
        with logs.configured("error", form, sys.stderr):
            logger.exception("fault of this program")
        cause = innermost(error)
        message = f"fault of this program: {type(cause).__name__}: {cause}"
        output.error("Internal", message, as_json=invocation.as_json)
        return FAILED
    return status if isinstance(status, int) else OK


def _explained(error: click.ClickException) -> str:
    message = error.format_message()
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{message.rstrip('.')}; see '{error.ctx.command_path} --help'"
    return message
