"""What an agent does for commands: pull, mount, unmount, list, inspect, tell its status.

What it does with the store itself is in :mod:`csi.store_calls`.

The same code runs for a call over the socket and for a command that is the agent itself. Every
value arrives from another process and is checked here before it is used.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
import trio

from csi.attributes import VolumeAttributes
from csi.index_calls import make_list
from csi.mount_table import mount_at
from csi.store_calls import StoreCalls
from csi.volumes import PublishRequest
from fetcher import agent_protocol as protocol
from fetcher.credentials import Chain, Credentials
from fetcher.errors import AccessDenied, InvalidRequest, NotFound, Unsupported
from fetcher.modelpack import read_model
from fetcher.oci import Reference

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from msgspec import Struct

    from csi.agent import Watch
    from csi.state import VolumeRecord
    from csi.volumes import Volumes
    from fetcher.credentials import Keychain
    from fetcher.modelpack import Model, Selection
    from fetcher.peers.client import PeerClient
    from fetcher.peers.served import Served
    from fetcher.pull import Progress, Pull, Pulls, Resolved
    from fetcher.registry import Registry
    from fetcher.store import Store

ParamsT = TypeVar("ParamsT", bound="Struct")
ResultT = TypeVar("ResultT", bound="Struct")

_RATE_SECONDS: Final = 0.5
_MAX_CONFIG_BYTES: Final = 256 * 1024
_MAX_CONFIG_DEPTH: Final = 50


def volume_id_of(target: Path) -> str:
    """The id of the volume that ``mount`` publishes at ``target``."""
    return f"cli-{hashlib.sha256(os.fsencode(target)).hexdigest()[:32]}"


@dataclass(frozen=True, slots=True)
class OneRegistry:
    """What a caller showed for the registry of its call's own reference."""

    registry: str
    credentials: Credentials = field(repr=False)

    async def lookup(self, registry: str, repository: str) -> Credentials | None:
        """The caller's credentials for that registry, nothing for any other."""
        return self.credentials if registry == self.registry else None


def keychain_for(reference: Reference, login: protocol.Login | None, node: Keychain) -> Keychain:
    """The caller's credentials if it sent some, else the node's own keychain."""
    if login is None:
        return node
    credentials = Credentials(login.username, login.password, login.identity_token)
    return Chain(OneRegistry(reference.registry, credentials), node)


async def inspect_model(
    registry: Registry, reference: Reference, keychain: Keychain
) -> protocol.InspectResult:
    """What the registry has under ``reference``, without downloading a layer."""
    manifest, named = await registry.resolve_model(reference, keychain)
    model = read_model(manifest)
    return protocol.InspectResult(
        reference=str(reference.with_digest(named.digest)),
        digest=str(model.digest),
        artifact_type=model.artifact_type,
        size=model.size,
        layers=tuple(
            protocol.LayerRow(
                digest=str(layer.descriptor.digest),
                media_type=layer.descriptor.media_type,
                kind=layer.kind.value,
                packing=layer.packing.value,
                size=layer.descriptor.size,
                path=layer.path,
            )
            for layer in model.layers
        ),
        annotations=dict(model.annotations),
        config=await _config(registry, reference, model, keychain),
    )


async def _config(
    registry: Registry, reference: Reference, model: Model, keychain: Keychain
) -> object:
    """The model's config as plain values; None when it is long, deep, or not JSON."""
    if model.config.size > _MAX_CONFIG_BYTES:
        return None
    digest, size = model.config.digest, model.config.size
    body = await registry.blob(reference, digest, size, keychain)
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if _is_shallow(found) else None


def _is_shallow(value: object) -> bool:
    """Whether ``value`` can be written again, inside of a result, without deep recursion."""
    level = [value]
    for _ in range(_MAX_CONFIG_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return not level


def require_root(what: str) -> None:
    """Raise :class:`AccessDenied` where this process may not mount."""
    if os.geteuid() != 0:
        raise AccessDenied(f"{what} needs root: run it with sudo, or use 'model-csi pull'")


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """Who this agent is, as ``status`` tells it."""

    role: str
    """``serve``, or ``command`` where a command is the agent for the time of its call."""
    mode: str
    driver_name: str
    version: str
    started: float = field(default_factory=time.time)


class AgentCalls:
    """Runs the calls of :mod:`fetcher.agent_protocol`. Belongs to the trio thread."""

    def __init__(
        self,
        *,
        store: Store,
        registry: Registry,
        pulls: Pulls,
        volumes: Volumes,
        keychain: Keychain,
        facts: AgentFacts,
        served: Served | None = None,
        asked: PeerClient | None = None,
    ) -> None:
        """``keychain`` is the node's own, ``served`` what it has sent to its peers, and ``asked``
        how it asks them.
        """
        self._store = store
        self._registry = registry
        self._pulls = pulls
        self._volumes = volumes
        self._keychain = keychain
        self._facts = facts
        self._served = served
        self._asked = asked
        self._store_calls = StoreCalls(store, volumes, pulls, keychain)
        self._table: Mapping[str, Callable[[Any, Watch], Awaitable[Struct]]] = {
            protocol.PING.name: self._ping,
            protocol.PULL.name: self._pull,
            protocol.MOUNT.name: self._mount,
            protocol.UNMOUNT.name: self._unmount,
            protocol.LIST.name: self._list,
            protocol.INSPECT.name: self._inspect,
            protocol.INDEX.name: self._index,
            protocol.STATUS.name: self._status,
            protocol.GC.name: self._store_calls.collect,
            protocol.VERIFY.name: self._store_calls.verify,
            protocol.REMOVE.name: self._store_calls.remove,
        }

    async def run(
        self, call: protocol.Call[ParamsT, ResultT], params: ParamsT, watch: Watch
    ) -> ResultT:
        """Run one call; see :class:`csi.agent.Calls`."""
        result = await self._table[call.name](params, watch)
        if not isinstance(result, call.result):
            raise TypeError(f"{call.name} gave a {type(result).__name__}")
        return result

    async def _ping(self, _: protocol.NoParams, __: Watch) -> protocol.PingResult:
        return protocol.PingResult(version=self._facts.version, pid=os.getpid())

    # -- models ------------------------------------------------------------------------------------

    async def _pull(self, params: protocol.PullParams, watch: Watch) -> protocol.PullResult:
        attributes = self._attributes(params)
        keychain = keychain_for(attributes.reference, params.login, self._keychain)
        started = trio.current_time()
        resolved = await self._pulls.resolve(attributes.reference, keychain, attributes.pull_policy)
        missing = self._missing(resolved, attributes.selection)
        with self._pulls.join(resolved, attributes.selection) as pull:
            watch.follow(pull.progress)
            tree = await pull.wait()
        return protocol.PullResult(
            reference=str(resolved.reference),
            digest=str(tree.digest),
            path=str(tree.path),
            size=tree.size,
            files=tree.files,
            fetched=missing,
            seconds=trio.current_time() - started,
        )

    def _attributes(self, params: protocol.PullParams, **others: str) -> VolumeAttributes:
        """What a volume with these parameters would be: one set of rules, one set of errors."""
        prefix = f"{self._facts.driver_name}/"
        context = {
            f"{prefix}reference": params.reference,
            f"{prefix}pull-policy": params.pull_policy,
            **{prefix + name: value for name, value in others.items() if value},
        }
        if params.exclude_weights:
            context[f"{prefix}exclude-model-weights"] = "true"
        if params.exclude_patterns:
            patterns = msgspec.json.encode(params.exclude_patterns).decode()
            context[f"{prefix}exclude-file-patterns"] = patterns
        return VolumeAttributes.parse(context, self._facts.driver_name)

    def _missing(self, resolved: Resolved, selection: Selection) -> int:
        """Bytes of the wanted layers that are not in the store."""
        if self._store.tree(resolved.model.digest, selection) is not None:
            return 0
        return sum(
            self._store.missing_bytes(layer.descriptor)
            for layer in selection.layers(resolved.model).values()
            if not self._store.has_content(layer)
        )

    async def _list(self, _: protocol.NoParams, __: Watch) -> protocol.ListResult:
        volumes = self._volumes.list()
        return protocol.ListResult(
            models=tuple(
                protocol.ModelRow(
                    digest=str(model.digest),
                    selection=model.selection,
                    references=model.references,
                    size=model.size,
                    files=model.files,
                    last_used=model.last_used,
                    volumes=tuple(
                        record.volume_id
                        for record in volumes
                        if (record.model, record.selection) == (str(model.digest), model.selection)
                    ),
                )
                for model in self._store.catalog.models()
            )
        )

    async def _inspect(self, params: protocol.InspectParams, _: Watch) -> protocol.InspectResult:
        reference = Reference.parse(params.reference)
        keychain = keychain_for(reference, params.login, self._keychain)
        return await inspect_model(self._registry, reference, keychain)

    async def _index(self, params: protocol.IndexParams, watch: Watch) -> protocol.IndexResult:
        reference = Reference.parse(params.reference)
        self._pulls.check(reference)
        keychain = keychain_for(reference, params.login, self._keychain)
        return await make_list(
            self._registry, reference, keychain, params.chunk_size, watch, self._store
        )

    # -- volumes -----------------------------------------------------------------------------------

    async def _mount(self, params: protocol.MountParams, watch: Watch) -> protocol.MountResult:
        self._require_node()
        require_root("mounting")
        target = _target(params.target)
        volume_id = volume_id_of(target)
        attributes = self._attributes(params, mode=params.mode, prefetch=params.prefetch)
        keychain = keychain_for(attributes.reference, params.login, self._keychain)
        watch.follow(lambda: self._progress_of(attributes))
        await self._volumes.publish(
            PublishRequest(volume_id, target, attributes, keychain), wait=None
        )
        shown = [record for record in self._volumes.list() if record.volume_id == volume_id]
        if not shown:
            raise NotFound(f"{target} was unmounted again at once", target=target)
        [record] = shown
        return protocol.MountResult(
            reference=record.reference,
            digest=record.digest,
            target=str(target),
            volume_id=volume_id,
            shown=record.shown.value,
            reason=record.reason,
        )

    def _require_node(self) -> None:
        if self._facts.mode == "controller":
            raise Unsupported("this agent is a controller: it mounts nothing")

    def _progress_of(self, attributes: VolumeAttributes) -> Progress | None:
        """How far the pull that a publish waits for is; None while there is none."""
        for pull in self._pulls.running():
            asked = any(
                one.digest and one == attributes.reference.with_digest(one.digest)
                for one in (source.reference for source in pull.sources)
            )
            if asked and pull.selection == attributes.selection:
                return pull.progress()
        return None

    async def _unmount(self, params: protocol.UnmountParams, _: Watch) -> protocol.UnmountResult:
        self._require_node()
        require_root("unmounting")
        target = _target(params.target)
        volume_id = volume_id_of(target)
        known = any(record.volume_id == volume_id for record in self._volumes.list())
        # without either, unpublish would take the user's own empty folder for one of ours
        there = known or mount_at(target) is not None
        if there:
            await self._volumes.unpublish(volume_id, target)
        return protocol.UnmountResult(target=str(target), volume_id=volume_id, was_mounted=there)

    # -- status ------------------------------------------------------------------------------------

    async def _status(self, _: protocol.NoParams, __: Watch) -> protocol.StatusResult:
        return protocol.StatusResult(
            root=str(self._store.root),
            agent=protocol.AgentRow(
                pid=os.getpid(),
                role=self._facts.role,
                mode=self._facts.mode,
                driver_name=self._facts.driver_name,
                version=self._facts.version,
                started=self._facts.started,
            ),
            volumes=tuple(self._volume_row(record) for record in self._volumes.list()),
            pulls=await self._running_pulls(),
            unknown_mounts=tuple(
                protocol.MountRow(
                    target=str(tree.target), digest=str(tree.model), selection=tree.selection
                )
                for tree in self._volumes.unknown_mounts()
            ),
            disk=await self._store_calls.disk(),
            uploads=self._uploads(),
            asked=self._peers(),
        )

    def _peers(self) -> protocol.AskedRow | None:
        """What peers were asked for."""
        asked = self._asked
        if asked is None:
            return None
        counts = {"members": asked.members.count, **asked.standings.counts}
        return msgspec.convert(counts, protocol.AskedRow)

    def _uploads(self) -> protocol.UploadsRow | None:
        """What was sent to peers."""
        served = self._served
        return None if served is None else msgspec.convert(asdict(served), protocol.UploadsRow)

    def _volume_row(self, record: VolumeRecord) -> protocol.VolumeRow:
        progress = self._volumes.progress(record)
        return protocol.VolumeRow(
            id=record.volume_id,
            target=str(record.target),
            reference=record.reference,
            digest=record.digest,
            state=record.state.value,
            pod=record.pod,
            shown=record.shown.value,
            reason=record.reason,
            done=progress.done if progress else 0,
            total=progress.total if progress else 0,
            problem=self._volumes.problem(record),
        )

    async def _running_pulls(self) -> tuple[protocol.PullRow, ...]:
        """Every running pull, with what arrives of it while this looks."""
        before = {pull: pull.progress().done for pull in self._pulls.running()}
        if not before:
            return ()
        started = trio.current_time()
        await trio.sleep(_RATE_SECONDS)
        elapsed = trio.current_time() - started
        return tuple(_pull_row(pull, done, elapsed) for pull, done in before.items())


def _pull_row(pull: Pull, before: int, elapsed: float) -> protocol.PullRow:
    progress = pull.progress()
    return protocol.PullRow(
        reference=str(pull.resolved.reference),
        digest=str(pull.resolved.model.digest),
        done=progress.done,
        total=progress.total,
        rate=max(progress.done - before, 0) / elapsed,
        waiters=pull.waiters,
    )


def _target(text: str) -> Path:
    """A folder that another process names: absolute and in its normal form."""
    if not os.path.isabs(text) or os.path.normpath(text) != text or "\0" in text:
        raise InvalidRequest(
            f"the target {text[:200]!r} is not an absolute path in its normal form", target=text
        )
    if text.startswith("//") or text == "/":
        raise InvalidRequest(f"nothing can be mounted at {text}", target=text)
    return Path(text)
