"""Lists of chunk digests from other members, where the registry has none.

Who has completed a model has made its list on the way, and offers it (:mod:`fetcher.peers.offers`).
It is asked for beside the download, which never waits for it, from members that say they have all
of a blob. A list is proven once all chunks fit it, and nobody is believed before: it is hearsay,
nothing is shown to anybody by it, and who sent one that the registry's own bytes contradict is
banned.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import quote

import msgspec
import trio

from fetcher.chunk_digests import LIST_TYPE, MAX_LIST_BYTES, ChunkDigests
from fetcher.chunk_lists import KnownList
from fetcher.chunk_sizes import chunk_size_for
from fetcher.errors import InvalidArtifact, ModelError, NotFound, Unavailable
from fetcher.exchange import Exchange, Patience, Question, RegistrySettings
from fetcher.oci import IMAGE_INDEX, IMAGE_MANIFEST, MAX_MANIFEST_BYTES, Digest
from fetcher.peers.showing import shown_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from fetcher.credentials import Keychain
    from fetcher.modelpack import Model
    from fetcher.oci import Reference
    from fetcher.peers.client import PeerClient
    from fetcher.peers.owners import Member
    from fetcher.registry import Registry

logger: Final = logging.getLogger(__name__)

T = TypeVar("T")

_MOST_ASKED: Final = 6
"""Questions for the list of one model, while it is pulled."""
_SECONDS: Final = 10.0
"""For one of them, with all that belongs to it."""
_PAUSE: Final = 0.2
"""Between two of them."""


class _Row(msgspec.Struct):
    digest: str
    artifact_type: str = msgspec.field(name="artifactType", default="")


class _Index(msgspec.Struct):
    manifests: list[_Row]


class _Layer(msgspec.Struct):
    digest: str


class _ListManifest(msgspec.Struct):
    layers: list[_Layer]


@dataclass(frozen=True, slots=True)
class _Talk:
    """Questions to one member about one model."""

    member: Member
    reference: Reference
    authorization: str | None


def _large(model: Model, chunk_size: int) -> set[Digest]:
    """The blobs of several chunks: of others there is nothing to know."""
    return {one.descriptor.digest for one in model.layers if one.descriptor.size > chunk_size}


class PeerLists:
    """Asks other members for lists. Belongs to the trio thread."""

    def __init__(self, client: PeerClient, registry: Registry) -> None:
        self._client = client
        self._registry = registry

    def seeking(self, model: Model, chunk_size: int) -> AbstractContextManager[None]:
        """Inside the block the registry is asked for a list of the model, and members may be next:
        nobody is put to the test by other means meanwhile.
        """
        return self._client.wholes.seeking(_large(model, chunk_size), ())

    async def follow(
        self,
        reference: Reference,
        model: Model,
        keychain: Keychain,
        chunk_size: int,
        offer: Callable[[KnownList], None],
    ) -> None:
        """Have ``offer`` called with a list of the model once a member has sent one, and with
        another one where that was contradicted. Returns once nobody is asked any more.

        Of use are lists of the chunks that this node has, of ``chunk_size`` bytes as a rule. Raises
        nothing that is meant for a user.
        """
        layers = [one for one in model.layers if one.descriptor.size > chunk_size]
        blobs = _large(model, chunk_size)
        sizes = {one.descriptor.digest: chunk_size_for(one, chunk_size) for one in layers}
        asked: set[str] = set()
        in_vain: set[str] = set()
        with self._client.wholes.seeking(blobs, in_vain):
            for _ in range(_MOST_ASKED if blobs else 0):
                name = await self._client.wholes.another(blobs, asked)
                asked.add(name)
                digests = await self._fitting(name, reference, model, keychain, sizes)
                if digests is not None:
                    logger.info("peer %s sent the chunk digests of %s", name, reference)
                    over = trio.Event()
                    belied = self._belied(name, over)
                    offer(KnownList(digests, reference, model.digest, belied, is_hearsay=True))
                    await over.wait()
                in_vain.add(name)
                await trio.sleep(_PAUSE)

    async def _fitting(
        self,
        name: str,
        reference: Reference,
        model: Model,
        keychain: Keychain,
        sizes: Mapping[Digest, int],
    ) -> ChunkDigests | None:
        """What a member's list says of blobs in chunks of these ``sizes``; None where that is
        nothing.
        """
        try:
            found = await self._ask(name, reference, model, keychain)
        except ModelError as error:
            logger.debug("no chunk digests from peer %s: %s", name, error.message)
            return None
        fits = (one for one in found.blobs.values() if one.chunk_size == sizes.get(one.digest))
        digests = ChunkDigests.over(fits, found.chunk_size)
        return digests if digests.blobs else None

    def _belied(self, name: str, over: trio.Event) -> Callable[[], None]:
        def contradicted() -> None:
            """By any of the model's blobs; the others are told by the first."""
            if not over.is_set():
                over.set()
                seconds = self._client.standings.lied(name, trio.current_time())
                logger.warning(
                    "peer %s sent chunk digests that are wrong: it is not asked for %.0f s",
                    name,
                    seconds,
                )

        return contradicted

    async def _ask(
        self, name: str, reference: Reference, model: Model, keychain: Keychain
    ) -> ChunkDigests:
        """The list that a member has. Raises :class:`ModelError` where there is none."""
        member = self._client.members.find(name)
        if member is None or not self._client.standings.is_usable(name, trio.current_time()):
            raise Unavailable(f"peer {name} is not to be asked")
        blob = model.layers[0].descriptor.digest
        authorization = await shown_for(self._registry, reference, blob, keychain)
        talk = _Talk(member, reference, authorization)
        # one for each list, as there are few: nothing of it has to be kept
        exchange = Exchange(RegistrySettings(answer_timeout=_SECONDS))
        try:
            with trio.move_on_after(_SECONDS):
                return await self._read(exchange, talk, model)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await exchange.aclose()
        raise Unavailable(f"peer {name} did not send a list in {_SECONDS:.0f} s")

    async def _read(self, exchange: Exchange, talk: _Talk, model: Model) -> ChunkDigests:
        """Index, manifest and list: the referrers of the model, as the specification has them."""
        kind = f"&artifactType={quote(LIST_TYPE, safe='')}"
        body = await self._get(
            exchange, talk, f"referrers/{model.digest}", IMAGE_INDEX, MAX_MANIFEST_BYTES, kind
        )
        rows = _decoded(body, _Index).manifests
        row = next((one for one in rows if one.artifact_type == LIST_TYPE), None)
        if row is None:
            raise NotFound("it has no list")
        found = Digest.parse(row.digest)
        body = await self._get(
            exchange, talk, f"manifests/{found}", IMAGE_MANIFEST, MAX_MANIFEST_BYTES
        )
        layer = next(iter(_decoded(body, _ListManifest).layers), None)
        if not found.matches(body) or layer is None:
            raise InvalidArtifact("it sent something else")
        path = f"blobs/{Digest.parse(layer.digest)}"
        body = await self._get(exchange, talk, path, "*/*", MAX_LIST_BYTES)
        return ChunkDigests.parse(body, (one.descriptor for one in model.layers))

    async def _get(
        self,
        exchange: Exchange,
        talk: _Talk,
        what: str,
        accept: str,
        most: int,
        query: str = "",
    ) -> bytes:
        registry = quote(talk.reference.registry, safe=":")
        path = f"/v2/{talk.reference.repository}/{what}?ns={registry}{query}"
        shown = {"Accept": accept, **self._client.shown(talk.authorization)}
        hop, route = self._client.way(talk.member, path, shown)
        settings = self._client.settings
        patience = Patience(settings.connect_timeout, settings.stall_timeout, 1, 0.0)
        question = Question("GET", hop, route, max_bytes=most, follow=False, patience=patience)
        answer = await exchange.ask(question)
        if answer.status != 200:
            raise NotFound(f"{route.who} answered with status {answer.status}")
        return answer.body


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArtifact("it sent something that cannot be read") from error
