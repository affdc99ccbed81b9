"""How a command does its work: with the agent, or as the agent, showing how far it is."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TypeVar

from csi.agent_client import AgentClient
from csi.cli.running import run
from csi.progress import shown
from fetcher import logs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from csi.cli.options import Invocation
    from csi.config import Config
    from csi.progress import Show

T = TypeVar("T")


def work(invocation: Invocation, title: str, task: Callable[[Config, Show], Awaitable[T]]) -> T:
    """Run ``task`` with the configuration and with what shows its progress."""
    config = invocation.config()
    with (
        logs.configured(config.log_level, config.log_format, sys.stderr),
        shown(title, sys.stderr, quiet=invocation.as_json) as show,
    ):
        return run(lambda: task(config, show))


def has_store(config: Config) -> bool:
    """Whether there is anything to look at below the root: looking does not make one."""
    return os.path.exists(config.root)


def client(invocation: Invocation, config: Config, show: Show) -> AgentClient:
    """The way to the agent of the configured root."""
    become = invocation.program.become
    return AgentClient(config.root, lambda: become(config), show)
