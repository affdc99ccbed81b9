"""Claims, and the Controller service through a socket, on a real database."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trio
import trio.testing

from csi.attributes import VolumeAttributes
from csi.claims import Capacity, Claim, ClaimRequest, Claims, volume_id_of
from csi.config import Config
from csi.controller import ControllerService
from csi.node.requests import read_publish
from fetcher.credentials import Anonymous
from fetcher.errors import Conflict, InProgress, NotFound, OutOfRange, Unavailable
from fetcher.modelpack import Kind, Layer, Model, Packing
from fetcher.oci import Descriptor, Digest, Reference
from fetcher.policy import PullPolicy
from fetcher.pull import Resolved
from fetcher.store import Database
from proto import csi_pb2
from tests.support.csi_client import (
    MULTI_NODE_READER_ONLY,
    SINGLE_NODE_WRITER,
    CsiClient,
    capability,
)
from tests.support.edge import in_thread, refusal, serving
from tests.support.steps import cancelled_at

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from fetcher.credentials import Credentials, Keychain

DRIVER = "model.csi.example.org"
MODEL = "ghcr.io/acme/qwen3-8b:v1"
PARAMETERS = {f"{DRIVER}/reference": MODEL}
GIB = 1024**3
Rpc = csi_pb2.ControllerServiceCapability.RPC


class TagRegistry:
    """Resolves tags to models of one weight file and one document, and counts."""

    def __init__(self) -> None:
        self.digests = {MODEL: Digest.of(b"first")}
        self.weights = 10_000
        self.asked = 0
        self.policies: list[PullPolicy] = []
        self.credentials: Credentials | None = None
        self.open = trio.Event()
        self.open.set()
        self.failure: Exception | None = None

    async def resolve(
        self, reference: Reference, keychain: Keychain, policy: PullPolicy
    ) -> Resolved:
        self.asked += 1
        self.policies.append(policy)
        self.credentials = await keychain.lookup(reference.registry, reference.repository)
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        digest = reference.digest or self.digests[str(reference)]
        return Resolved(reference.with_digest(digest), self._model(digest), keychain)

    def _model(self, digest: Digest) -> Model:
        config = Descriptor("application/vnd.cncf.model.config.v1+json", Digest.of(b"{}"), 2)
        weights = Descriptor("x", Digest.of(b"weights"), self.weights)
        document = Descriptor("x", Digest.of(b"document"), 24)
        layers = (
            Layer(weights, Kind.WEIGHT, Packing.RAW, "model.safetensors", False, None),
            Layer(document, Kind.DOC, Packing.RAW, "README.md", False, None),
        )
        return Model(digest, "application/vnd.cncf.model.manifest.v1+json", config, layers, {})


class Controller:
    """A controller on a folder, as it is after a start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = TagRegistry()
        self.start()

    def start(self) -> None:
        self.database = Database(self.folder / "state.db")
        self.claims = Claims(self.database, self.registry, DRIVER)

    def restart(self) -> None:
        self.database.close()
        self.start()

    def run(self, body: Callable[[CsiClient], Awaitable[None]]) -> None:
        socket = self.folder / "csi.sock"
        config = Config(mode="controller", driver_name=DRIVER)

        async def main() -> None:
            service = ControllerService(config, self.claims, Anonymous())
            async with serving(socket, [service]):
                with CsiClient(socket, timeout=20) as client:
                    await body(client)

        trio.run(main)


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    controller = Controller(tmp_path)
    yield controller
    controller.database.close()


def claim(
    name: str = "pvc-1",
    parameters: dict[str, str] = PARAMETERS,
    modes: frozenset[str] = frozenset({"MULTI_NODE_READER_ONLY"}),
    capacity: Capacity | None = None,
) -> ClaimRequest:
    attributes = VolumeAttributes.parse(parameters, DRIVER)
    return ClaimRequest(name, attributes, modes, capacity or Capacity(), Anonymous())


# -- claims ----------------------------------------------------------------------------------------


def test_a_tag_is_resolved_once_though_it_moves(controller: Controller) -> None:
    async def main() -> Claim:
        first = await controller.claims.create(claim())
        controller.registry.digests[MODEL] = Digest.of(b"second")
        assert await controller.claims.create(claim()) == first
        return first

    first = trio.run(main)
    controller.restart()
    assert trio.run(controller.claims.create, claim()) == first
    assert controller.registry.asked == 1
    assert first.context[f"{DRIVER}/reference"] == f"{MODEL}@{Digest.of(b'first')}"


def test_the_registry_itself_is_asked_whatever_the_policy(controller: Controller) -> None:
    never = {**PARAMETERS, f"{DRIVER}/pull-policy": "Never"}

    made = trio.run(controller.claims.create, claim(parameters=never))

    assert controller.registry.policies == [PullPolicy.ALWAYS]
    assert made.context[f"{DRIVER}/pull-policy"] == "Never"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"parameters": {**PARAMETERS, f"{DRIVER}/exclude-model-weights": "true"}}, "exclude"),
        ({"parameters": {f"{DRIVER}/reference": "ghcr.io/acme/other:v1"}}, "reference"),
        ({"modes": frozenset({"SINGLE_NODE_WRITER"})}, "access modes"),
        ({"capacity": Capacity(required=2 * GIB)}, "capacity"),
        ({"capacity": Capacity(limit=GIB - 1)}, "capacity"),
    ],
)
def test_the_same_name_for_something_else_is_a_conflict(
    controller: Controller, changes: dict[str, Any], word: str
) -> None:
    async def main() -> None:
        await controller.claims.create(claim(capacity=Capacity(required=GIB)))
        with pytest.raises(Conflict, match=word):
            await controller.claims.create(claim(**{"capacity": Capacity(required=GIB), **changes}))
        # a range that the volume is in is no other
        await controller.claims.create(claim(capacity=Capacity(GIB // 2, 2 * GIB)))

    trio.run(main)


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (Capacity(), 10_024),
        (Capacity(required=5), 10_024),
        (Capacity(required=GIB), GIB),
        (Capacity(required=GIB, limit=GIB), GIB),
        (Capacity(limit=10_024), 10_024),
    ],
)
def test_the_capacity_is_the_models_or_what_is_required(
    controller: Controller, asked: Capacity, given: int
) -> None:
    assert trio.run(controller.claims.create, claim(capacity=asked)).capacity == given


@pytest.mark.parametrize("asked", [Capacity(limit=10_023), Capacity(required=GIB, limit=GIB - 1)])
def test_a_capacity_that_cannot_be(controller: Controller, asked: Capacity) -> None:
    with pytest.raises(OutOfRange):
        trio.run(controller.claims.create, claim(capacity=asked))
    assert controller.claims.after(0, 10) == []


def test_what_is_excluded_takes_no_capacity(controller: Controller) -> None:
    parameters = {**PARAMETERS, f"{DRIVER}/exclude-model-weights": "true"}
    assert trio.run(controller.claims.create, claim(parameters=parameters)).capacity == 24


def test_calls_for_one_name_exclude_each_other_and_no_others(controller: Controller) -> None:
    async def main() -> None:
        controller.registry.open = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(controller.claims.create, claim())
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(InProgress):
                await controller.claims.create(claim())
            with pytest.raises(InProgress):
                controller.claims.delete(volume_id_of("pvc-1"))
            controller.claims.delete(volume_id_of("pvc-2"))
            controller.registry.open.set()
        assert controller.registry.asked == 1
        controller.claims.delete(volume_id_of("pvc-1"))

    trio.run(main)


def test_a_failure_leaves_nothing_and_may_be_tried_again(controller: Controller) -> None:
    async def main() -> None:
        controller.registry.failure = Unavailable("ghcr.io does not answer")
        with pytest.raises(Unavailable):
            await controller.claims.create(claim())
        assert controller.claims.after(0, 10) == []
        controller.registry.failure = None
        await controller.claims.create(claim())

    trio.run(main)


def test_a_cancellation_leaves_nothing_or_all(controller: Controller) -> None:
    async def main() -> None:
        step = 0
        while await cancelled_at(step, lambda: controller.claims.create(claim())):
            assert controller.claims.after(0, 10) == []
            step += 1
        assert step > 1
        assert len(controller.claims.after(0, 10)) == 1

    trio.run(main)


def test_what_is_deleted_is_gone_for_good(controller: Controller) -> None:
    made = trio.run(controller.claims.create, claim())
    for _ in range(2):
        controller.claims.delete(made.volume_id)
    controller.restart()
    with pytest.raises(NotFound):
        controller.claims.get(made.volume_id)
    controller.registry.digests[MODEL] = Digest.of(b"second")
    again = trio.run(controller.claims.create, claim())
    assert again.volume_id == made.volume_id
    assert again.number > made.number
    assert str(Digest.of(b"second")) in again.context[f"{DRIVER}/reference"]


# -- the service -----------------------------------------------------------------------------------


def test_a_volume_as_the_provisioner_makes_it(controller: Controller) -> None:
    async def body(client: CsiClient) -> None:
        parameters = {**PARAMETERS, "csi.storage.k8s.io/pvc/name": "models"}
        secrets = {"username": "someone", "password": "something"}
        volume = await in_thread(
            lambda: client.create("pvc-1", parameters, required=GIB, secrets=secrets)
        )
        assert volume.capacity_bytes == GIB
        assert volume.volume_id == volume_id_of("pvc-1")
        assert controller.registry.credentials is not None
        assert controller.registry.credentials.username == "someone"
        # and the node takes what the controller gave
        request = csi_pb2.NodePublishVolumeRequest(
            volume_id=volume.volume_id,
            target_path="/var/lib/kubelet/pods/1/mount",
            volume_capability=capability(MULTI_NODE_READER_ONLY),
            volume_context=volume.volume_context,
        )
        attributes = read_publish(request, DRIVER, Anonymous()).attributes
        assert str(attributes.reference) == f"{MODEL}@{Digest.of(b'first')}"
        for _ in range(2):
            await in_thread(lambda: client.delete(volume.volume_id))

    controller.run(body)
    # secrets are nowhere on the disk
    assert b"something" not in b"".join(
        path.read_bytes() for path in controller.folder.glob("state.db*")
    )


def _create(**changes: Any) -> csi_pb2.CreateVolumeRequest:
    fields: dict[str, Any] = {
        "name": "pvc-1",
        "parameters": PARAMETERS,
        "volume_capabilities": [capability(MULTI_NODE_READER_ONLY)],
    }
    return csi_pb2.CreateVolumeRequest(**{**fields, **changes})


_BLOCK = csi_pb2.VolumeCapability(
    block=csi_pb2.VolumeCapability.BlockVolume(),
    access_mode=csi_pb2.VolumeCapability.AccessMode(mode=SINGLE_NODE_WRITER),
)
_FROM_VOLUME = csi_pb2.VolumeContentSource(
    volume=csi_pb2.VolumeContentSource.VolumeSource(volume_id="x")
)


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (_create(name=""), "name is missing"),
        (_create(name="x" * 129), "more than 128 bytes"),
        (_create(name="a\nb"), "control characters"),
        (_create(volume_capabilities=[]), "capabilities are missing"),
        (_create(volume_capabilities=[capability(), _BLOCK]), "block volume"),
        (_create(parameters={}), f"{DRIVER}/reference is missing"),
        (_create(parameters={**PARAMETERS, "type": "ssd"}), "known are reference, mode"),
        (_create(parameters={**PARAMETERS, f"{DRIVER}/mod": "lazy"}), "did you mean 'mode'"),
        (_create(parameters={f"{DRIVER}/reference": "UPPER"}), "lower-case"),
        (_create(secrets={"token": "x"}), "no registry credentials"),
        (_create(volume_content_source=_FROM_VOLUME), "from another volume"),
        (_create(accessibility_requirements=csi_pb2.TopologyRequirement()), "topology"),
        (_create(mutable_parameters={"a": "b"}), "mutable"),
        (_create(capacity_range=csi_pb2.CapacityRange(required_bytes=-1)), "negative"),
    ],
)
def test_what_cannot_be_created(
    controller: Controller, request_: csi_pb2.CreateVolumeRequest, word: str
) -> None:
    async def body(client: CsiClient) -> None:
        code, details = await refusal(lambda: client.controller.CreateVolume(request_))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert word in details

    controller.run(body)
    assert controller.registry.asked == 0


def test_the_longest_name_is_taken(controller: Controller) -> None:
    async def body(client: CsiClient) -> None:
        await in_thread(lambda: client.create("x" * 128, PARAMETERS))

    controller.run(body)


def test_capabilities_are_confirmed_or_the_reason_is_told(controller: Controller) -> None:
    Request = csi_pb2.ValidateVolumeCapabilitiesRequest

    async def body(client: CsiClient) -> None:
        volume = await in_thread(lambda: client.create("pvc-1", PARAMETERS))
        known = {"volume_id": volume.volume_id, "volume_capabilities": [capability()]}

        def validate(**changes: Any) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
            return client.controller.ValidateVolumeCapabilities(Request(**{**known, **changes}))

        answer = await in_thread(
            lambda: validate(volume_context=volume.volume_context, parameters=PARAMETERS)
        )
        assert answer.confirmed.volume_capabilities == [capability()]
        assert answer.confirmed.volume_context == volume.volume_context
        for changes, word in (
            ({"volume_capabilities": [capability(), _BLOCK]}, "block"),
            ({"volume_context": {"a": "b"}}, "context"),
            ({"parameters": {f"{DRIVER}/reference": "ghcr.io/a/b:v1"}}, "other parameters"),
            ({"parameters": {"type": "ssd"}}, "not known"),
            ({"mutable_parameters": {"a": "b"}}, "mutable"),
        ):
            answer = await in_thread(partial(validate, **changes))
            assert not answer.HasField("confirmed")
            assert word in answer.message
        code, _ = await refusal(lambda: validate(volume_capabilities=[]))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        code, _ = await refusal(lambda: validate(volume_id="fake-vol-id"))
        assert code is grpc.StatusCode.NOT_FOUND
        code, _ = await refusal(lambda: validate(volume_id=""))
        assert code is grpc.StatusCode.INVALID_ARGUMENT

    controller.run(body)


def test_volumes_are_listed_in_pages_that_survive_deletions(controller: Controller) -> None:
    async def body(client: CsiClient) -> None:
        def page(token: str = "", count: int = 2) -> tuple[list[str], str]:
            request = csi_pb2.ListVolumesRequest(max_entries=count, starting_token=token)
            answer = client.controller.ListVolumes(request)
            return [entry.volume.volume_id for entry in answer.entries], answer.next_token

        assert await in_thread(page) == ([], "")
        names = [f"pvc-{number}" for number in range(5)]
        for name in names:
            await in_thread(partial(client.create, name, PARAMETERS))
        ids = [volume_id_of(name) for name in names]
        first, token = await in_thread(page)
        assert first == ids[:2]
        # neither the last of a page nor what is added meanwhile confuses the next one
        for gone in first:
            await in_thread(partial(client.delete, gone))
        await in_thread(lambda: client.create("pvc-new", PARAMETERS))
        second, token = await in_thread(lambda: page(token))
        assert second == ids[2:4]
        third, token = await in_thread(lambda: page(token))
        assert third == [ids[4], volume_id_of("pvc-new")]
        assert token == ""
        assert (await in_thread(lambda: page(count=0))) == (second + third, "")

    controller.run(body)


@pytest.mark.parametrize("token", ["invalid-token", "-1", "1 OR 1=1", "9" * 19, "٣"])
def test_tokens_that_are_none(controller: Controller, token: str) -> None:
    async def body(client: CsiClient) -> None:
        request = csi_pb2.ListVolumesRequest(starting_token=token)
        code, _ = await refusal(lambda: client.controller.ListVolumes(request))
        assert code is grpc.StatusCode.ABORTED
        negative = csi_pb2.ListVolumesRequest(max_entries=-1)
        code, _ = await refusal(lambda: client.controller.ListVolumes(negative))
        assert code is grpc.StatusCode.INVALID_ARGUMENT

    controller.run(body)


def test_a_page_is_bounded_in_bytes(controller: Controller) -> None:
    async def main() -> None:
        patterns = "[" + ", ".join(f'"{"x" * 250}{number}"' for number in range(60)) + "]"
        parameters = {**PARAMETERS, f"{DRIVER}/exclude-file-patterns": patterns}
        for number in range(200):
            await controller.claims.create(claim(f"pvc-{number}", parameters))

    trio.run(main)

    async def body(client: CsiClient) -> None:
        found, token = 0, ""
        while True:
            request = csi_pb2.ListVolumesRequest(starting_token=token)
            answer = await in_thread(partial(client.controller.ListVolumes, request))
            assert answer.ByteSize() < 3 * 1024 * 1024
            found += len(answer.entries)
            token = answer.next_token
            if not token:
                break
        assert found == 200

    controller.run(body)


def test_one_volume_is_told(controller: Controller) -> None:
    async def body(client: CsiClient) -> None:
        made = await in_thread(lambda: client.create("pvc-1", PARAMETERS))
        request = csi_pb2.ControllerGetVolumeRequest(volume_id=made.volume_id)
        answer = await in_thread(lambda: client.controller.ControllerGetVolume(request))
        assert answer.volume == made
        assert answer.HasField("status")
        unknown = csi_pb2.ControllerGetVolumeRequest(volume_id="fake-vol-id")
        code, _ = await refusal(lambda: client.controller.ControllerGetVolume(unknown))
        assert code is grpc.StatusCode.NOT_FOUND

    controller.run(body)


def test_it_offers_only_what_it_does(controller: Controller) -> None:
    async def body(client: CsiClient) -> None:
        request = csi_pb2.ControllerGetCapabilitiesRequest()
        answer = await in_thread(lambda: client.controller.ControllerGetCapabilities(request))
        types = {one.rpc.type for one in answer.capabilities}
        assert types == {Rpc.CREATE_DELETE_VOLUME, Rpc.LIST_VOLUMES, Rpc.GET_VOLUME}
        calls: tuple[Callable[[], object], ...] = (
            lambda: client.controller.ControllerPublishVolume(
                csi_pb2.ControllerPublishVolumeRequest()
            ),
            lambda: client.controller.CreateSnapshot(csi_pb2.CreateSnapshotRequest()),
            lambda: client.controller.ControllerExpandVolume(
                csi_pb2.ControllerExpandVolumeRequest()
            ),
            lambda: client.controller.GetCapacity(csi_pb2.GetCapacityRequest()),
        )
        for call in calls:
            code, _ = await refusal(call)
            assert code is grpc.StatusCode.UNIMPLEMENTED

    controller.run(body)
