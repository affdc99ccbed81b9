"""Options that several commands share, and the configuration that they make."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from csi.config import Config, Setting, settings
from fetcher.agent_protocol import Login
from fetcher.credentials import DockerConfig, docker_config_path
from fetcher.errors import InvalidRequest
from fetcher.policy import PullPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from csi.cli.program import Program
    from fetcher.oci import Reference

Decorated = TypeVar("Decorated", bound="Callable[..., Any]")

_GLOBAL: Final = frozenset({"root", "log_level"})
REGISTRIES: Final = ("plain_http", "https", "insecure_registries", "ca_file", "docker_config")
_PATHS: Final = frozenset({"root", "ca_file", "docker_config", "kubelet_dir"})
_MAX_PASSWORD: Final = 64 * 1024


@dataclass
class Invocation:
    """One run of the program: what its options have said so far."""

    program: Program
    as_json: bool = False
    config_file: Path | None = None
    flags: dict[str, object] = field(default_factory=dict)

    def config(self, *, serving: bool = False) -> Config:
        """The configuration, flags over environment over file.

        The log of a command is for whoever runs it: warnings, unless a flag says otherwise, and
        for a program nothing but faults beside the result or the error.
        """
        flags = dict(self.flags)
        if not serving:
            flags.setdefault("log_level", "error" if self.as_json else "warning")
            flags["log_format"] = "json" if self.as_json else "text"
        try:
            return Config.load(flags, os.environ, self.config_file)
        except InvalidRequest as error:
            raise click.UsageError(error.message) from error


pass_invocation = click.make_pass_decorator(Invocation)


def global_options(command: Decorated) -> Decorated:
    """``--root``, ``--config``, ``--json`` and ``--log-level``: before the command or after it."""
    known = {setting.field: setting for setting in settings()}
    options = (
        click.option(
            "--root",
            metavar="DIR",
            expose_value=False,
            callback=_take_flag,
            help=f"The folder below which everything is kept.  [default: {known['root'].default}]",
        ),
        click.option(
            "--config",
            metavar="FILE",
            expose_value=False,
            callback=_take_config,
            help="A YAML file of settings.",
        ),
        click.option(
            "--json",
            is_flag=True,
            expose_value=False,
            callback=_take_json,
            help="Print the result, or the error, as JSON.",
        ),
        click.option(
            "--log-level",
            type=click.Choice(known["log_level"].choices),
            expose_value=False,
            callback=_take_flag,
            help="The least grave log lines on standard error.  [default: warning; serve: info]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def setting_options(names: tuple[str, ...] | None) -> Callable[[Decorated], Decorated]:
    """An option for each of these settings, or for every one."""
    chosen = [
        setting
        for setting in settings()
        if setting.field not in _GLOBAL and (names is None or setting.field in names)
    ]

    def decorate(command: Decorated) -> Decorated:
        for setting in reversed(chosen):
            command = _setting_option(setting)(command)
        return command

    return decorate


def selection_options(command: Decorated) -> Decorated:
    """Which of a model's files, and when the registry is asked."""
    command = click.option(
        "--exclude-weights", is_flag=True, help="Config, tokenizer, documents and code only."
    )(command)
    command = click.option(
        "--exclude",
        metavar="PATTERN",
        multiple=True,
        help="Leave out what this gitignore-style pattern matches; may be repeated.",
    )(command)
    return click.option(
        "--pull-policy",
        type=click.Choice([policy.value for policy in PullPolicy]),
        default=PullPolicy.IF_NOT_PRESENT.value,
        show_default=True,
        help="When the registry is asked.",
    )(command)


def registry_options(command: Decorated) -> Decorated:
    """How registries are reached, and as whom."""
    command = click.option(
        "--password-stdin", is_flag=True, help="Read the password from standard input."
    )(command)
    command = click.option(
        "--username", metavar="NAME", help="Log in to the reference's registry as NAME."
    )(command)
    return setting_options(REGISTRIES)(command)


def _setting_option(setting: Setting) -> Callable[[Decorated], Decorated]:
    default = setting.default
    shown = ", ".join(default) if isinstance(default, tuple) else default
    summary = setting.summary[0].upper() + setting.summary[1:]
    return click.option(
        f"--{setting.name}",
        type=click.Choice(setting.choices) if setting.choices else str,
        multiple=setting.multiple,
        metavar=None if setting.choices else "VALUE",
        expose_value=False,
        callback=_take_flag,
        help=f"{summary}." + (f"  [default: {shown}]" if shown not in (None, "") else ""),
    )


def _invocation(context: click.Context) -> Invocation:
    found = context.find_object(Invocation)
    if found is None:
        raise RuntimeError("a command was started without its program")
    return found


def _take_flag(context: click.Context, parameter: click.Parameter, value: object) -> None:
    if parameter.name and value is not None and value != ():
        if parameter.name in _PATHS and isinstance(value, str) and value:
            # on a command line, a path may start where the user is
            value = os.path.abspath(value)
        _invocation(context).flags[parameter.name] = value


def _take_config(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        _invocation(context).config_file = Path(value)


def _take_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        _invocation(context).as_json = True


def read_password(username: str | None, from_stdin: bool) -> str | None:
    """The password of ``--username``, from standard input. Raises :class:`click.UsageError`."""
    if username is None and not from_stdin:
        return None
    if username is None or not from_stdin:
        raise click.UsageError("--username and --password-stdin belong together")
    line = sys.stdin.readline(_MAX_PASSWORD + 1).rstrip("\r\n")
    if not line or len(line) > _MAX_PASSWORD:
        raise click.UsageError("there is no password on standard input, or no end of it")
    return line


async def login_for(
    reference: Reference, username: str | None, password: str | None
) -> Login | None:
    """What this user shows to the registry: the options', else their docker config's."""
    if username is not None and password is not None:
        return Login(username=username, password=password)
    keychain = DockerConfig(docker_config_path(os.environ))
    found = await keychain.lookup(reference.registry, reference.repository)
    if found is None:
        return None
    return Login(
        username=found.username, password=found.password, identity_token=found.identity_token
    )
