"""Members by a Service of Kubernetes: its EndpointSlices, listed once and then watched.

The API is that of ``discovery.k8s.io/v1`` and Kubernetes' "Efficient detection of changes": a watch
goes on from the resource version of what is known, and where that is too old (410) everything is
listed again. An API that cannot be reached for a while changes nothing.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import msgspec
import trio

from fetcher.peers.discovery import Found, joined
from fetcher.peers.owners import Member
from fetcher.trust import Trust

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

logger: Final = logging.getLogger(__name__)

_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_PAGE: Final = 500
_WATCH_SECONDS: Final = 300
_LEAST_WATCH: Final = 1.0
_TIMES: Final = httpx.Timeout(10.0, read=30.0)
_WATCH_TIMES: Final = httpx.Timeout(10.0, read=_WATCH_SECONDS + 30.0)
_MAX_LINE: Final = 16 * 1024 * 1024
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 30.0
_GONE: Final = 410
_PORT_NAME: Final = "peer"


class _Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _Conditions(msgspec.Struct):
    ready: bool | None = None


class _Endpoint(msgspec.Struct, rename="camel"):
    addresses: list[str] = []
    conditions: _Conditions = msgspec.field(default_factory=_Conditions)
    node_name: str | None = None
    zone: str | None = None


class _Port(msgspec.Struct):
    name: str | None = None
    port: int | None = None


class _Slice(msgspec.Struct):
    metadata: _Metadata
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None


class _Slices(msgspec.Struct):
    metadata: _Metadata
    items: list[_Slice] = []


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


class _Unusable(Exception):
    """The API gave an answer that is of no use; the message says why."""


class _TooOld(Exception):
    """What is known is too old to go on from."""


class KubernetesPeers:
    """The endpoints of one Service; they are named after their nodes."""

    def __init__(
        self,
        service: str,
        environment: Mapping[str, str] = os.environ,
        account: Path = _ACCOUNT,
    ) -> None:
        """``service`` is ``namespace/name``; the API is found as every pod finds it."""
        self._namespace, _, self._service = service.partition("/")
        host = environment.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc")
        port = environment.get("KUBERNETES_SERVICE_PORT", "443")
        self._base = f"https://{joined(host, int(port))}"
        self._account = account
        self._slices: dict[str, Found] = {}

    async def run(self, found: Callable[[Found], None]) -> None:
        """List and watch, again and again."""
        pause, known = _FIRST_PAUSE, None
        while True:
            problem = None
            try:
                await self._follow(found)
                pause = _FIRST_PAUSE
            except _TooOld:
                pause = _FIRST_PAUSE
            except (httpx.HTTPError, msgspec.MsgspecError, _Unusable, OSError) as error:
                problem = f"{type(error).__name__}: {error}"[:300]
            if problem is not None and problem != known:
                logger.warning("the peers' EndpointSlices cannot be watched: %s", problem)
            known = problem
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _follow(self, found: Callable[[Found], None]) -> None:
        """List everything, and follow its changes for as long as that goes well."""
        async with self._client() as client:
            version = await self._list(client)
            found(self._members())

            def take(line: bytes) -> None:
                nonlocal version
                event = msgspec.json.decode(line, type=_Event)
                version = self._take(event) or version
                if event.type != "BOOKMARK":
                    found(self._members())

            while True:
                began = trio.current_time()
                await self._watch(client, version, take)
                # one that ends at once is not asked for at once again, and again
                await trio.sleep(max(0.0, began + _LEAST_WATCH - trio.current_time()))

    def _members(self) -> Found:
        # of two pods of one node, as while it is updated, one will do
        every = {one.name: one for name in sorted(self._slices) for one in self._slices[name]}
        return tuple(every.values())

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client that trusts the cluster's authority, whose file may have changed."""
        trust = Trust(ca_files=(str(self._account / "ca.crt"),))
        context = await trio.to_thread.run_sync(trust.context)
        async with httpx.AsyncClient(verify=context, trust_env=False, timeout=_TIMES) as client:
            yield client

    async def _list(self, client: httpx.AsyncClient) -> str:
        """Take in everything there is; the version from which a watch goes on."""
        slices: dict[str, Found] = {}
        parameters = {"limit": str(_PAGE)}
        while True:
            body = _Body()
            async with self._ask(client, parameters) as response:
                await _read(response, body.take)
            page = msgspec.json.decode(body.content, type=_Slices)
            slices.update((one.metadata.name, _members_of(one)) for one in page.items)
            if not page.metadata.continue_:
                self._slices = slices
                return page.metadata.resource_version
            parameters["continue"] = page.metadata.continue_

    async def _watch(
        self, client: httpx.AsyncClient, version: str, take: Callable[[bytes], None]
    ) -> None:
        """Have ``take`` see each change behind ``version``, until the API ends the answer."""
        parameters = {
            "watch": "1",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        lines = _Lines(take)
        async with self._ask(client, parameters, timeout=_WATCH_TIMES) as response:
            await _read(response, lines.take)

    def _take(self, event: _Event) -> str:
        """Take in one change; the version that it leads to. Raises :class:`_TooOld`."""
        if event.type == "ERROR":
            status = msgspec.json.decode(event.object, type=_Status)
            if status.code == _GONE:
                raise _TooOld
            raise _Unusable(f"HTTP status {status.code}: {status.message}")
        changed = msgspec.json.decode(event.object, type=_Slice)
        if event.type == "DELETED":
            self._slices.pop(changed.metadata.name, None)
        elif event.type in ("ADDED", "MODIFIED"):
            self._slices[changed.metadata.name] = _members_of(changed)
        return changed.metadata.resource_version

    @contextlib.asynccontextmanager
    async def _ask(
        self, client: httpx.AsyncClient, parameters: Mapping[str, str], **options: Any
    ) -> AsyncIterator[httpx.Response]:
        """One answer of the API. Raises :class:`_TooOld`, :class:`_Unusable`, ``HTTPError``."""
        path = f"/apis/discovery.k8s.io/v1/namespaces/{self._namespace}/endpointslices"
        selector = {"labelSelector": f"kubernetes.io/service-name={self._service}"}
        # read for each request: it is renewed every hour
        token = await trio.to_thread.run_sync((self._account / "token").read_text)
        async with client.stream(
            "GET",
            self._base + path,
            params={**selector, **parameters},
            headers={"Authorization": f"Bearer {token.strip()}", "Accept-Encoding": "identity"},
            **options,
        ) as response:
            if response.status_code == _GONE:
                raise _TooOld
            if response.status_code != 200:
                raise _Unusable(f"the API answers with HTTP status {response.status_code}")
            yield response


async def _read(response: httpx.Response, take: Callable[[bytes], None]) -> None:
    """Have ``take`` see the body, part by part."""
    parts = response.aiter_raw()
    async for part in parts:
        try:
            take(part)
        except Exception:
            # httpx's generators lie in each other: only an error of the innermost ends them all
            await response.aclose()
            with contextlib.suppress(httpx.HTTPError, httpx.StreamError):
                async for _ in parts:
                    pass
            raise


class _Body:
    """One bounded body."""

    def __init__(self) -> None:
        self.content = bytearray()

    def take(self, part: bytes) -> None:
        self.content += part
        if len(self.content) > _MAX_LINE:
            raise _Unusable(f"an answer has more than {_MAX_LINE} bytes")


class _Lines:
    """The lines of a body without an end."""

    def __init__(self, told: Callable[[bytes], None]) -> None:
        self._told = told
        self._begun = bytearray()

    def take(self, part: bytes) -> None:
        *lines, rest = part.split(b"\n")
        for line in lines:
            whole = bytes(self._begun) + line
            self._begun.clear()
            if whole.strip():
                self._told(whole)
        self._begun += rest
        if len(self._begun) > _MAX_LINE:
            raise _Unusable(f"an event has more than {_MAX_LINE} bytes")


def _members_of(found: _Slice) -> Found:
    """The members of one slice: endpoints that are ready, at the port for peers."""
    ports = [one for one in found.ports or [] if one.port]
    port = next((one.port for one in ports if one.name == _PORT_NAME), None)
    if port is None and len(ports) == 1:
        port = ports[0].port
    if port is None:
        return ()
    members = []
    for one in found.endpoints or []:
        address = next(filter(_is_address, one.addresses), None)
        # what is not known counts as ready, says the API
        if address is not None and one.conditions.ready is not False:
            peer = joined(address, port)
            members.append(Member(one.node_name or peer, peer, one.zone or ""))
    return tuple(members)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
