"""``index``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
import msgspec
import trio

from csi.agent import Watch
from csi.agent_calls import keychain_for
from csi.agent_client import AgentLost
from csi.cli import output
from csi.cli.calling import client, work
from csi.cli.options import (
    Invocation,
    global_options,
    login_for,
    pass_invocation,
    read_password,
    registry_options,
    setting_options,
)
from fetcher import agent_protocol as protocol
from fetcher.oci import Reference
from fetcher.quantities import bytes_text

if TYPE_CHECKING:
    from csi.config import Config
    from csi.progress import Show
    from fetcher.credentials import Keychain

_SHOW_SECONDS = 0.25


class IndexOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What ``index --json`` prints."""

    reference: str
    digest: str
    chunk_size: int
    blobs: int
    bytes: int
    fetched: int
    list: str | None
    """The digest of the list's manifest; None where no blob has more than one chunk."""
    pushed: bool
    tag: str


@click.command(short_help="Publish the chunk digests of a model beside it.")
@click.argument("reference", metavar="REF")
@setting_options(("chunk_size",))
@registry_options
@global_options
@pass_invocation
def index(
    invocation: Invocation, reference: str, username: str | None, password_stdin: bool
) -> None:
    """Make the list of the chunk digests of the model REF, and push it as a referrer of REF.

    With it, nodes prove every chunk when it arrives, whoever sent it. Blobs that are in the store
    of a running agent are read there, others are read from the registry and not kept. A list that
    is there already is not pushed again. Needs no store and no agent, and the right to push to the
    repository.

    \b
    Examples:
      model-csi index ghcr.io/acme/qwen3-8b:v1
      model-csi index --json ghcr.io/acme/qwen3-8b:v1 | jq -r .list
    """
    password = read_password(username, password_stdin)
    wanted = Reference.parse(reference)

    async def task(config: Config, show: Show) -> IndexOutput:
        login = await login_for(wanted, username, password)
        keychain = keychain_for(wanted, login, invocation.program.keychain(config))
        params = protocol.IndexParams(
            reference=reference, chunk_size=config.chunk_size, login=login
        )
        made = await _Making(invocation, config, show).make(params, wanted, keychain)
        return await _publish(invocation, config, made, keychain)

    result = work(invocation, f"indexing {reference}", task)
    output.result(result) if invocation.as_json else _print(result)


@dataclass(frozen=True)
class _Making:
    """Has the list made, by the agent or here."""

    invocation: Invocation
    config: Config
    show: Show

    async def make(
        self, params: protocol.IndexParams, wanted: Reference, keychain: Keychain
    ) -> protocol.IndexResult:
        agent = client(self.invocation, self.config, self.show)
        if await agent.reachable():
            with contextlib.suppress(AgentLost):
                found = await agent.ask_running(protocol.INDEX, params)
                if found is not None:
                    return found
        return await self._make_here(params.chunk_size, wanted, keychain)

    async def _make_here(
        self, chunk_size: int, wanted: Reference, keychain: Keychain
    ) -> protocol.IndexResult:
        # here, as what it imports would make every other command start slower
        from csi.index_calls import make_list

        async def tell(done: int, total: int) -> None:
            self.show(done, total)

        watch, finished = Watch(), trio.Event()
        async with (
            self.invocation.program.registry(self.config) as registry,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(watch.report, tell, _SHOW_SECONDS, finished)
            made = await make_list(registry, wanted, keychain, chunk_size, watch)
            finished.set()
        return made


async def _publish(
    invocation: Invocation, config: Config, made: protocol.IndexResult, keychain: Keychain
) -> IndexOutput:
    digest, pushed, tag = None, False, ""
    if made.blobs:
        # here, as what it imports would double the time that other commands take to start
        from fetcher.publishing import publish

        pinned = Reference.parse(made.reference)
        settings = invocation.program.registry_settings(config)
        done = await publish(made.list.encode(), made.chunk_size, pinned, keychain, settings)
        digest, pushed, tag = str(done.digest), done.pushed, done.tag
    return IndexOutput(
        reference=made.reference,
        digest=made.digest,
        chunk_size=made.chunk_size,
        blobs=made.blobs,
        bytes=made.bytes,
        fetched=made.fetched,
        list=digest,
        pushed=pushed,
        tag=tag,
    )


def _print(found: IndexOutput) -> None:
    where = "not needed: no blob has more than one chunk"
    if found.list is not None:
        where = found.list + ("" if found.pushed else ", which was there already")
    rows = [
        ("reference", found.reference),
        ("digest", found.digest),
        ("indexed", f"{bytes_text(found.bytes)} in {found.blobs} blobs"),
        ("fetched", bytes_text(found.fetched)),
        ("chunk size", bytes_text(found.chunk_size)),
        ("list", where),
    ]
    if found.tag:
        rows.append(("tag", f"{found.tag}, as the registry does not list referrers itself"))
    output.facts(rows)
