"""``model-csi index``: lists of chunk digests, made, pushed beside the model, and found again."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import trio

from fetcher.chunk_digests import CHUNK_SIZE_KEY, LIST_TYPE, ChunkDigests
from fetcher.credentials import Anonymous
from fetcher.errors import DigestMismatch, InvalidArtifact, Unavailable
from fetcher.indexing import Indexing
from fetcher.modelpack import Kind, Packing, read_model
from fetcher.oci import IMAGE_INDEX, Digest, Reference
from fetcher.publishing import publish
from fetcher.referrers import Referrers, referrers_tag
from tests.support.commands import ModelCsi
from tests.support.driver import serve_driver
from tests.support.faulty_registry import FaultyRegistry, Reply
from tests.support.models import ModelBuilder
from tests.support.proxy import serve_proxy
from tests.support.referrers import list_referrers
from tests.support.registry import OCI_MANIFEST
from tests.support.registry_calls import NOBODY, QUICK, ask, opened
from tests.support.stores import CHUNK, NO_FLOOR, pull, pulling
from tests.support.token_server import PASSWORD

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fetcher.registry import Registry
    from tests.support.registry import RegistryServer

MIB = 1024 * 1024


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[ModelCsi]:
    home = tmp_path / "home"
    home.mkdir()
    cli = ModelCsi(tmp_path / "root", home)
    yield cli
    cli.stop()


def model() -> ModelBuilder:
    """Something of every packing, large and small."""
    return (
        ModelBuilder()
        .add_raw("model-1.safetensors", os.urandom(700_000))
        .add_raw("model-2.safetensors", os.urandom(3 * CHUNK))
        .add_raw("config.json", b"{}", Kind.WEIGHT_CONFIG)
        .add_tar({"tokenizer/a.bin": os.urandom(400_000)}, Packing.TAR, Kind.WEIGHT_CONFIG)
        .add_tar({"code/b.bin": os.urandom(300_000)}, Packing.TAR_ZSTD, Kind.CODE)
    )


def large(builder: ModelBuilder) -> list[bytes]:
    return [data for data in builder.blobs.values() if len(data) > CHUNK]


def get(registry: RegistryServer, repository: str, path: str) -> Any:
    accept = {"Accept": f"{IMAGE_INDEX}, {OCI_MANIFEST}"}
    target = f"/v2/{repository}/{path}"
    status, _, body = registry.request("GET", repository, target, headers=accept)
    assert status == 200, body
    return json.loads(body)


def check_list(found: ChunkDigests, builder: ModelBuilder) -> None:
    """Every chunk of every large blob is proven by the list, and nothing else is."""
    assert {str(one) for one in found.blobs} == {str(Digest.of(one)) for one in large(builder)}
    for data in large(builder):
        blob = found.of(Digest.of(data))
        assert blob is not None
        for number in range(blob.count):
            chunk = data[number * blob.chunk_size : (number + 1) * blob.chunk_size]
            assert blob.check(number, [chunk])
            assert not blob.check(number, [chunk[:-1] + bytes([chunk[-1] ^ 1])])


def test_a_list_is_pushed_beside_its_model(registry: RegistryServer, cli: ModelCsi) -> None:
    builder = model()
    reference = builder.push(registry, "index/plain", "v1")
    done = cli.run("index", "--json", "--chunk-size", "64KiB", reference)
    assert done.status == 0, done.errors
    tag = f"sha256-{builder.digest.hex}"
    assert done.json["digest"] == str(builder.digest)
    assert (done.json["pushed"], done.json["tag"], done.json["blobs"]) == (True, tag, 4)
    assert done.json["fetched"] == sum(map(len, large(builder)))
    assert not cli.root.exists()

    index = get(registry, "index/plain", f"manifests/{tag}")
    [row] = index["manifests"]
    assert (row["digest"], row["artifactType"]) == (done.json["list"], LIST_TYPE)
    manifest = get(registry, "index/plain", f"manifests/{row['digest']}")
    assert manifest["subject"]["digest"] == str(builder.digest)
    assert manifest["annotations"] == {CHUNK_SIZE_KEY: str(CHUNK)}
    [layer] = manifest["layers"]
    body = registry.blob_path(Digest.parse(layer["digest"])).read_bytes()
    check_list(
        ChunkDigests.parse(body, [one.descriptor for one in read_model(builder.manifest()).layers]),
        builder,
    )

    again = cli.run("index", "--json", "--chunk-size", "64KiB", reference)
    assert (again.json["list"], again.json["pushed"]) == (done.json["list"], False)
    shown = cli.run("index", "--chunk-size", "64KiB", reference)
    assert "which was there already" in shown.output

    # another list stands beside it
    other = cli.run("index", "--json", "--chunk-size", "128KiB", reference)
    index = get(registry, "index/plain", f"manifests/{tag}")
    assert [one["digest"] for one in index["manifests"]] == [done.json["list"], other.json["list"]]


def test_other_referrers_under_the_tag_are_kept(registry: RegistryServer, cli: ModelCsi) -> None:
    builder = model()
    reference = builder.push(registry, "index/others", "v1")
    other = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.example.signature",
        "config": builder.document["config"],
        "layers": [],
    }
    body = json.dumps(other).encode()
    digest = registry.push_manifest("index/others", str(Digest.of(body)), body)
    row = {
        "mediaType": OCI_MANIFEST,
        "digest": str(digest),
        "size": len(body),
        "artifactType": other["artifactType"],
        "annotations": {"who": "knows"},
        "custom": True,
    }
    index = {
        "schemaVersion": 2,
        "mediaType": IMAGE_INDEX,
        "manifests": [row],
        "annotations": {"kept": "too"},
    }
    tag = referrers_tag(builder.digest)
    registry.push_manifest("index/others", tag, json.dumps(index).encode(), IMAGE_INDEX)
    done = cli.run("index", "--json", "--chunk-size", "64KiB", reference)
    assert done.status == 0, done.errors
    found = get(registry, "index/others", f"manifests/{tag}")
    assert found["manifests"][0] == row
    assert found["manifests"][1]["digest"] == done.json["list"]
    assert found["annotations"] == index["annotations"]


def test_a_registry_that_lists_referrers_needs_no_tag(
    registry: RegistryServer, faulty: FaultyRegistry, cli: ModelCsi
) -> None:
    builder = model()
    builder.push(registry, "index/listed", "v1")
    list_referrers(faulty, registry, "index/listed", builder.digest)
    reference = faulty.reference("index/listed", "v1")
    done = cli.run("index", "--json", "--chunk-size", "64KiB", reference)
    assert done.status == 0, done.errors
    assert (done.json["pushed"], done.json["tag"]) == (True, "")
    again = cli.run("index", "--json", "--chunk-size", "64KiB", reference)
    assert (again.json["list"], again.json["pushed"]) == (done.json["list"], False)
    assert not faulty.asked(referrers_tag(builder.digest))
    assert all("artifactType=" in one.path for one in faulty.asked("/referrers/"))


def test_a_model_of_small_blobs_needs_no_list(registry: RegistryServer, cli: ModelCsi) -> None:
    reference = model().push(registry, "index/small", "v1")
    done = cli.run("index", "--json", reference)
    assert done.status == 0, done.errors
    assert (done.json["blobs"], done.json["list"], done.json["pushed"]) == (0, None, False)
    assert "no blob has more than one chunk" in cli.run("index", reference).output


def test_who_may_not_push_is_told(guarded: RegistryServer, cli: ModelCsi) -> None:
    reference = model().push(guarded, "index/guarded", "v1")
    done = cli.run("index", "--json", "--chunk-size", "64KiB", reference)
    assert (done.status, done.error["code"]) == (1, "Unauthenticated")
    login = ("--username", "robot", "--password-stdin")
    done = cli.run("index", "--json", "--chunk-size", "64KiB", *login, reference, input=PASSWORD)
    assert done.status == 0, done.errors
    assert done.json["pushed"]


def test_a_running_agent_reads_what_it_has(
    registry: RegistryServer, tmp_path: Path, cli: ModelCsi
) -> None:
    builder = model()
    reference = builder.push(registry, "index/agent", "v1")
    with serve_driver(tmp_path / "node", "--min-free", "0") as driver:
        of_node = ModelCsi(driver.root, cli.home)
        assert of_node.run("pull", reference).status == 0
        done = of_node.run("index", "--json", "--chunk-size", "64KiB", reference)
        assert done.status == 0, done.errors
    [packed] = [
        layer.descriptor.size
        for layer in read_model(builder.manifest()).layers
        if layer.packing is Packing.TAR_ZSTD
    ]
    # of a compressed layer only its files are kept
    assert (done.json["fetched"], done.json["pushed"]) == (packed, True)


def in_registry(
    reference: str, builder: ModelBuilder, settings: Any = QUICK
) -> tuple[ChunkDigests, int]:
    """A list made from the registry alone, and what was fetched for it."""

    async def main() -> tuple[ChunkDigests, int]:
        async with opened(settings) as registry:
            parsed = Reference.parse(reference).with_digest(builder.digest)
            indexing = Indexing(registry, parsed, NOBODY)
            made = await indexing.make(read_model(builder.manifest()), CHUNK)
            done, total = indexing.progress()
            assert done == total == sum(blob.size for blob in made.blobs.values())
            return made, indexing.fetched

    made: tuple[ChunkDigests, int] = trio.run(main)
    return made


def test_a_registry_that_fails_on_the_way_is_asked_again(
    registry: RegistryServer, faulty: FaultyRegistry
) -> None:
    builder = model()
    builder.push(registry, "index/faulty", "v1")
    faulty.add("/blobs/", Reply(503), method="GET", times=1)
    faulty.add("/blobs/", drop=True, method="GET", times=1)
    faulty.add("/blobs/", Reply(401), method="GET", times=1)
    made, fetched = in_registry(faulty.reference("index/faulty", "v1"), builder)
    check_list(made, builder)
    assert fetched == sum(map(len, large(builder)))


def test_no_list_is_made_of_wrong_bytes(registry: RegistryServer, faulty: FaultyRegistry) -> None:
    builder = model()
    builder.push(registry, "index/wrong", "v1")
    bad = bytes(len(large(builder)[0]))
    faulty.add(str(Digest.of(large(builder)[0])), Reply(200, {}, bad), method="GET")
    with pytest.raises(DigestMismatch, match="something else"):
        in_registry(faulty.reference("index/wrong", "v1"), builder)


def test_a_damaged_blob_of_the_store_is_read_from_the_registry(
    registry: RegistryServer, tmp_path: Path
) -> None:
    builder = model()
    reference = builder.push(registry, "index/damaged", "v1")

    async def main() -> None:
        async with pulling(tmp_path / "root", NO_FLOOR) as (pulls, store):
            await pull(pulls, reference)
            victim = Digest.of(large(builder)[0])
            store.blob_path(victim).chmod(0o600)
            with store.blob_path(victim).open("r+b") as file:
                file.write(bytes(100))
            async with opened() as registry:
                parsed = Reference.parse(reference).with_digest(builder.digest)
                indexing = Indexing(registry, parsed, NOBODY, store)
                made = await indexing.make(read_model(builder.manifest()), CHUNK)
            check_list(made, builder)
            packed = large(builder)[-1]
            assert indexing.fetched == len(large(builder)[0]) + len(packed)

    trio.run(main)


def test_a_list_that_would_be_too_long_has_larger_chunks(
    registry: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = model()
    reference = builder.push(registry, "index/long", "v1")
    monkeypatch.setattr("fetcher.indexing.MAX_LIST_BYTES", 2200)
    made, _ = in_registry(reference, builder)
    assert made.chunk_size == 2 * CHUNK
    monkeypatch.setattr("fetcher.indexing.MAX_LIST_BYTES", 100)
    with pytest.raises(InvalidArtifact, match="too large for a list"):
        in_registry(reference, builder)


# Referrers


LIST = Digest.of(b"a list")


def referrer(digest: Digest, artifact_type: str = LIST_TYPE) -> dict[str, Any]:
    return {
        "mediaType": OCI_MANIFEST,
        "digest": str(digest),
        "size": 6,
        "artifactType": artifact_type,
    }


def index_of(*rows: dict[str, Any], link: str = "") -> Reply:
    body = {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": list(rows)}
    headers = {"Content-Type": IMAGE_INDEX} | ({"Link": link} if link else {})
    return Reply(200, headers, json.dumps(body).encode())


SUBJECT = Digest.of(b"a model")


def referrers(faulty: FaultyRegistry) -> list[Digest]:
    async def call(registry: Registry, reference: Reference) -> Any:
        return await Referrers(registry).of(reference, SUBJECT, LIST_TYPE, Anonymous())

    return [one.digest for one in ask(call, faulty.reference("some/model"))]


def test_referrers_of_other_types_are_left_out(faulty: FaultyRegistry) -> None:
    other = Digest.of(b"a signature")
    faulty.add("/referrers/", index_of(referrer(other, "application/x"), referrer(LIST)))
    assert referrers(faulty) == [LIST]


def test_referrers_are_read_page_by_page(faulty: FaultyRegistry) -> None:
    second = Digest.of(b"another")
    link = f'</v2/some/model/referrers/{SUBJECT}?last=1&n=1>; rel="next"'
    faulty.add("last=1", index_of(referrer(second)))
    faulty.add("/referrers/", index_of(referrer(LIST), link=link))
    assert referrers(faulty) == [LIST, second]


def test_a_list_that_never_ends_and_one_that_leads_away_are_bounded(faulty: FaultyRegistry) -> None:
    link = f'<http://169.254.1.1/v2/some/model/referrers/{SUBJECT}?x=1>; rel="next"'
    faulty.add("/referrers/", index_of(referrer(LIST), link=link))
    assert len(referrers(faulty)) == 8
    assert len(faulty.requests) == 8
    faulty.faults.clear()
    faulty.requests.clear()
    link = '</v2/other/model/referrers/sha256:1?x=1>; rel="next"'
    faulty.add("/referrers/", index_of(referrer(LIST), link=link))
    assert referrers(faulty) == [LIST]
    assert len(faulty.requests) == 1


@pytest.mark.parametrize("reply", [Reply(404), Reply(200, {"Content-Type": "text/html"}, b"<p>")])
def test_without_the_interface_the_tag_is_asked(faulty: FaultyRegistry, reply: Reply) -> None:
    faulty.add("/referrers/", reply)
    assert referrers(faulty) == []
    faulty.add(f"/manifests/sha256-{SUBJECT.hex}", index_of(referrer(LIST)))
    assert referrers(faulty) == [LIST]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (Reply(200, {}, b"{}"), InvalidArtifact),
        (Reply(200, {}, b" " * (5 * MIB)), InvalidArtifact),
        (Reply(400), Unavailable),
    ],
)
def test_what_is_no_index_is_an_error(
    faulty: FaultyRegistry, reply: Reply, error: type[Exception]
) -> None:
    faulty.add("/referrers/", reply)
    with pytest.raises(error):
        referrers(faulty)


def test_a_registry_that_does_not_list_what_it_took_is_an_error(
    registry: RegistryServer, faulty: FaultyRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = model()
    builder.push(registry, "index/forgetful", "v1")
    faulty.add("/referrers/", index_of())
    monkeypatch.setattr("fetcher.publishing._SEEN_SECONDS", 0.1)
    reference = Reference.parse(faulty.reference("index/forgetful", "v1"))

    async def main() -> None:
        await publish(b"{}", CHUNK, reference.with_digest(builder.digest), NOBODY, QUICK)

    with pytest.raises(Unavailable, match="nobody will find it"):
        trio.run(main)


def test_two_publishers_at_one_time_keep_each_others_rows(
    registry: RegistryServer, faulty: FaultyRegistry
) -> None:
    builder = model()
    builder.push(registry, "index/race", "v1")
    tag = referrers_tag(builder.digest)
    reference = Reference.parse(faulty.reference("index/race", "v1"))
    pinned = reference.with_digest(builder.digest)
    lost = faulty.add(f"/manifests/{tag}", Reply(201), method="PUT", times=1)

    async def main() -> None:
        # the first write is lost, as if somebody else's had come behind it
        first = await publish(b"{}", CHUNK, pinned, NOBODY, QUICK)
        assert lost.times == 0
        second = await publish(b"{ }", 2 * CHUNK, pinned, NOBODY, QUICK)
        rows = get(registry, "index/race", f"manifests/{tag}")["manifests"]
        assert [row["digest"] for row in rows] == [str(first.digest), str(second.digest)]

    trio.run(main)


@pytest.mark.parametrize("setting", ["use", "ignore"])
def test_a_node_looks_for_a_list_unless_it_is_told_not_to(
    registry: RegistryServer, cli: ModelCsi, setting: str
) -> None:
    builder = model()
    reference = builder.push(registry, f"index/node-{setting}", "v1")
    assert cli.run("index", "--chunk-size", "64KiB", reference).status == 0
    cli.environment.update(MODEL_CSI_CHUNK_SIZE="64KiB", MODEL_CSI_CHUNK_DIGESTS=setting)
    with serve_proxy(registry.address) as proxy:
        # the list comes beside the blobs: these take their time
        proxy.faults.bytes_per_second = 768 * 1024
        through = f"{proxy.address}/index/node-{setting}:v1"
        done = cli.run("pull", "--log-level", "info", through)
        asked = [path for _, path in proxy.counts.requests if "/referrers/" in path]
    assert done.status == 0, done.errors
    assert bool(asked) == (setting == "use")
    assert ("has chunk digests for 4 blobs" in done.errors) == (setting == "use")
