"""Pushing model folders to a real registry."""

from __future__ import annotations

import json
import logging
import os
import struct
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from fetcher.errors import (
    AccessDenied,
    DigestMismatch,
    InvalidRequest,
    ModelError,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from fetcher.model_facts import Facts, read_facts
from fetcher.modelpack import Kind, Packing, read_model
from fetcher.oci import Digest, Manifest, Reference
from fetcher.packaging import kind_of, scan
from fetcher.push import push
from tests.support.faulty_registry import FaultyRegistry, Reply, serve_faulty
from tests.support.registry import RegistryServer, make_tls, serve_registry
from tests.support.registry_calls import NOBODY, QUICK, ROBOT, WRONG, ask, manifest
from tests.support.token_server import PASSWORD, TokenServer

if TYPE_CHECKING:
    from pathlib import Path

    from fetcher.credentials import Keychain


def safetensors(path: Path, **tensors: tuple[str, list[int], int]) -> None:
    """A file of zeros: data type, shape and bytes for each name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(position))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with something of everything."""
    root = tmp_path / "tiny-bert"
    (root / "1_Pooling").mkdir(parents=True)
    (root / ".cache").mkdir()
    (root / ".cache" / "junk").write_text("junk")
    (root / ".gitattributes").write_text("junk")
    (root / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertModel"], "torch_dtype": "float32"})
    )
    (root / "1_Pooling" / "config.json").write_text("{}")
    (root / "README.md").write_text("# Tiny")
    (root / "vocab.txt").write_text("a\nb\n")
    (root / "convert.sh").write_text("#!/bin/sh\n")
    (root / "convert.sh").chmod(0o755)
    (root / "empty.txt").write_bytes(b"")
    safetensors(
        root / "model.safetensors",
        weights=("BF16", [1000, 1024], 2_048_000),
        position=("I64", [512], 4096),
    )
    for number, path in enumerate(sorted(root.rglob("*"))):
        os.utime(path, ns=(0, 1_700_000_000_123_456_789 + number))
    return root


def pushed(folder: Path, reference: str, keychain: Keychain = NOBODY, **settings: Any) -> Digest:
    return trio.run(
        partial(push, folder, Reference.parse(reference), keychain, replace(QUICK, **settings))
    )


def test_a_folder_becomes_a_model(registry: RegistryServer, folder: Path) -> None:
    reference = registry.reference("push/tiny", "v1")
    digest = pushed(folder, reference)
    found = manifest(reference)
    assert isinstance(found, Manifest)
    assert found.digest == digest
    model = read_model(found)
    assert {layer.path: layer.kind for layer in model.layers} == {
        "1_Pooling/config.json": Kind.WEIGHT_CONFIG,
        "README.md": Kind.DOC,
        "config.json": Kind.WEIGHT_CONFIG,
        "convert.sh": Kind.CODE,
        "empty.txt": Kind.DOC,
        "model.safetensors": Kind.WEIGHT,
        "vocab.txt": Kind.WEIGHT_CONFIG,
    }
    for layer in model.layers:
        assert layer.path is not None
        source = folder / layer.path
        assert layer.packing is Packing.RAW
        assert layer.executable is (layer.path == "convert.sh")
        assert layer.mtime_ns == source.stat().st_mtime_ns
        assert registry.blob_path(layer.descriptor.digest).read_bytes() == source.read_bytes()


def test_the_config_tells_what_the_folder_tells(registry: RegistryServer, folder: Path) -> None:
    reference = registry.reference("push/told", "v1")
    pushed(folder, reference)
    found = manifest(reference)
    body = ask(
        lambda client, parsed: client.blob(parsed, found.config.digest, found.config.size, NOBODY),
        reference,
    )
    document = json.loads(body)
    assert document["descriptor"]["name"] == "told"
    assert document["descriptor"]["family"] == "bert"
    assert document["descriptor"]["createdAt"].startswith("2023-11-14T22:13:20.1234567")
    assert document["config"] == {
        "architecture": "BertModel",
        "format": "safetensors",
        "paramSize": "1M",
        "precision": "bf16",
    }
    assert document["modelfs"] == {
        "type": "layers",
        "diffIds": [str(layer.digest) for layer in found.layers],
    }


def test_the_same_folder_is_the_same_artifact_and_nothing_is_sent_twice(
    faulty: FaultyRegistry, folder: Path
) -> None:
    first = pushed(folder, faulty.reference("push/again", "v1"))
    assert len([one for one in faulty.requests if one.method == "PUT"]) == 9
    faulty.requests.clear()
    assert pushed(folder, faulty.reference("push/again", "v2")) == first
    (only,) = [one for one in faulty.requests if one.method == "PUT"]
    assert only.path == "/v2/push/again/manifests/v2"


def test_progress_is_told_on_the_way(registry: RegistryServer, folder: Path) -> None:
    (folder / "model.bin").write_bytes(bytes(20_000_000))
    told: list[tuple[int, int]] = []

    async def main() -> None:
        def progress(done: int, total: int) -> None:
            assert trio.lowlevel.in_trio_run()
            told.append((done, total))

        reference = Reference.parse(registry.reference("push/progress", "v1"))
        await push(folder, reference, NOBODY, QUICK, progress)

    trio.run(main)
    size = scan(folder).size
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len([done for done, _ in told if 0 < done < size]) > 4


def test_a_push_that_is_cancelled_ends_soon(faulty: FaultyRegistry, folder: Path) -> None:
    (folder / "model.bin").write_bytes(os.urandom(50_000_000))

    async def main() -> None:
        with trio.CancelScope() as scope:
            await push(
                folder,
                Reference.parse(faulty.reference("push/cancelled", "v1")),
                NOBODY,
                QUICK,
                lambda done, total: scope.cancel() if done > 5_000_000 else None,
            )
        assert scope.cancelled_caught

    trio.run(main)
    assert not faulty.asked("/manifests/")


# Names and passwords


def test_a_password_is_needed_where_it_is(tmp_path: Path, folder: Path) -> None:
    tls = make_tls(tmp_path / "tls")
    with serve_registry(tmp_path / "registry", users={"robot": PASSWORD}, tls=tls) as server:
        reference = server.reference("a.b/c/d", "v1")
        trusting = {"https": ("127.0.0.1",), "ca_file": tls.ca}
        digest = pushed(folder, reference, ROBOT, **trusting)
        assert manifest(reference, ROBOT, **trusting).digest == digest
        assert pushed(folder, reference, ROBOT, insecure=("127.0.0.1",)) == digest
        with pytest.raises(Unauthenticated, match=r"write to .* none were found"):
            pushed(folder, reference, NOBODY, **trusting)
        with pytest.raises(Unauthenticated, match="does not accept"):
            pushed(folder, reference, WRONG, **trusting)
        with pytest.raises(Unavailable, match="is not trusted"):
            pushed(folder, reference, ROBOT, https=("127.0.0.1",))


def test_tokens_are_asked_for_writing_and_renewed(
    token_registry: RegistryServer, tokens: TokenServer, folder: Path
) -> None:
    reference = token_registry.reference("push/tokens", "v1")
    pushed(folder, reference, ROBOT)
    assert {one.parameters["scope"] for one in tokens.requests} == {
        "repository:push/tokens:pull,push",
        "repository:push/tokens:pull",
    }
    tokens.requests.clear()
    (folder / "new.txt").write_text("new")
    with serve_faulty(token_registry) as near:
        challenge = f'Bearer realm="{tokens.realm}",service="registry under test"'
        expired = Reply(401, {"WWW-Authenticate": challenge})
        near.add("/blobs/uploads/", expired, times=1, method="PUT")
        pushed(folder, near.reference("push/tokens", "v2"), ROBOT)
    assert len(tokens.requests) == 3


def test_the_home_folders_netrc_is_left_alone(
    faulty: FaultyRegistry, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine 127.0.0.1 login robot password {PASSWORD}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    pushed(folder, faulty.reference("push/netrc", "v1"))
    assert {noted.authorization for noted in faulty.requests} == {None}


# Trouble


def test_an_upload_that_breaks_starts_again(faulty: FaultyRegistry, folder: Path) -> None:
    faulty.add("/blobs/uploads/", drop=True, times=1, method="PUT")
    faulty.add("/blobs/uploads/", Reply(502), times=1, method="POST")
    faulty.add("/manifests/", Reply(429), times=1, method="PUT")
    digest = pushed(folder, faulty.reference("push/broken", "v1"))
    assert manifest(faulty.reference("push/broken", "v1")).digest == digest


def test_trouble_that_stays_ends_in_words(
    faulty: FaultyRegistry, folder: Path, tmp_path: Path
) -> None:
    for status, error in (
        (500, Unavailable),
        (403, AccessDenied),
        (404, NotFound),
        (413, InvalidRequest),
    ):
        fault = faulty.add("/blobs/uploads/", Reply(status), method="POST")
        with pytest.raises(error):
            pushed(folder, faulty.reference("push/trouble", "v1"), attempts=2)
        fault.times = 0
    with (
        serve_registry(tmp_path / "frozen", read_only=True) as server,
        pytest.raises(Unavailable, match="HTTP status 405"),
    ):
        pushed(folder, server.reference("push/frozen", "v1"))
    with pytest.raises(Unavailable, match="there is no host"):
        pushed(folder, "nowhere.invalid/push/model:v1")


@pytest.mark.parametrize(
    "location",
    ["http://169.254.169.254/upload", "ftp://files.example/x", "http://[broken/x", ""],
)
def test_an_upload_is_not_led_astray(faulty: FaultyRegistry, folder: Path, location: str) -> None:
    faulty.add("/blobs/uploads/", Reply(202, {"Location": location}), method="POST")
    with pytest.raises((AccessDenied, Unavailable)):
        pushed(folder, faulty.reference("push/astray", "v1"), attempts=1)


def test_an_upload_elsewhere_gets_no_password(
    tmp_path: Path, registry: RegistryServer, folder: Path
) -> None:
    with (
        serve_registry(tmp_path / "guarded", users={"robot": PASSWORD}) as guarded,
        serve_faulty(guarded) as near,
        serve_faulty(registry) as far,
    ):
        elsewhere = Reply(202, {"Location": f"http://{far.address}/v2/x/blobs/uploads/1?a=b"})
        near.add("/blobs/uploads/", elsewhere, method="POST")
        far.add("/v2/x/", Reply(201))
        near.add("/manifests/", Reply(400), method="PUT")
        with pytest.raises(Unavailable):
            pushed(folder, near.reference("push/elsewhere", "v1"), ROBOT)
        assert near.requests[-1].authorization is not None
        assert {noted.authorization for noted in far.requests} == {None}
        assert len(far.requests) == 8


def test_a_registry_that_changes_the_manifest_is_found_out(
    faulty: FaultyRegistry, folder: Path
) -> None:
    other = {"Docker-Content-Digest": str(Digest.of(b"other"))}
    faulty.add("/manifests/", Reply(200, other), method="HEAD")
    with pytest.raises(DigestMismatch, match="was pushed as"):
        pushed(folder, faulty.reference("push/changed", "v1"))


def test_secrets_are_in_no_error_and_in_no_log(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    with (
        serve_registry(tmp_path / "guarded", users={"robot": PASSWORD}) as guarded,
        serve_faulty(guarded) as near,
    ):
        reference = near.reference("push/secret", "v1")
        pushed(folder, reference, ROBOT)
        echo = json.dumps({"errors": [{"code": "X", "message": f"robot:{PASSWORD}"}]}).encode()
        (folder / "new.txt").write_text("new")
        for where, method in (("/uploads/", "POST"), ("/uploads/", "PUT"), ("/manifests/", "PUT")):
            for status in (400, 401, 403, 500):
                fault = near.add(where, Reply(status, body=echo), method=method)
                try:
                    pushed(folder, reference, ROBOT, attempts=2)
                except ModelError as error:
                    told.append(f"{error!r} {error.context} {error.__cause__!r}")
                fault.times = 0
    assert len(told) == 12
    everything = "\n".join([*told, caplog.text, *(str(vars(one)) for one in caplog.records)])
    assert PASSWORD not in everything
    assert "_state=" not in everything


# Folders


def test_folders_that_are_not_pushed(tmp_path: Path) -> None:
    def refused(words: str) -> None:
        with pytest.raises(InvalidRequest, match=words):
            pushed(tmp_path / "model", "127.0.0.1:1/a/b:v1")

    refused("is not a folder")
    root = tmp_path / "model"
    root.mkdir()
    (root / ".hidden").write_text("x")
    refused("has no files to push")
    (tmp_path / "outside").write_text("secret")
    (root / "link").symlink_to("../outside")
    refused("link is a link that leaves the folder")
    (root / "link").unlink()
    (root / "link").symlink_to("nowhere")
    refused("something that is not there")
    (root / "link").unlink()
    (root / "link").symlink_to("link")
    refused("something that is not there")
    (root / "link").unlink()
    (root / "sub").mkdir()
    (root / "link").symlink_to("sub")
    refused("link is a link to a folder")
    (root / "link").unlink()
    os.mkfifo(root / "pipe")
    refused("pipe is neither a file nor a folder")
    (root / "pipe").unlink()
    (root / "line\nbreak").write_text("x")
    refused("has a name that no volume can show")
    (root / "line\nbreak").unlink()
    with open(os.fsencode(root) + b"/latin-\xe9", "wb"):
        pass
    refused("has a name that no volume can show")


def test_a_reference_with_a_digest_cannot_be_pushed_to(folder: Path) -> None:
    for reference in (f"127.0.0.1:1/a/b@{Digest.of(b'')}", f"127.0.0.1:1/a/b:v1@{Digest.of(b'')}"):
        with pytest.raises(InvalidRequest, match="pushed to a tag"):
            pushed(folder, reference)


def test_a_link_inside_the_folder_is_its_file(registry: RegistryServer, folder: Path) -> None:
    (folder / "latest.safetensors").symlink_to("model.safetensors")
    reference = registry.reference("push/linked", "v1")
    pushed(folder, reference)
    layers = {
        layer.path: layer.descriptor.digest for layer in read_model(manifest(reference)).layers
    }
    assert layers["latest.safetensors"] == layers["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model-00001-of-00004.safetensors", Kind.WEIGHT),
        ("MODEL.SAFETENSORS", Kind.WEIGHT),
        ("pytorch_model.bin", Kind.WEIGHT),
        ("llama-q4_k_m.gguf", Kind.WEIGHT),
        ("model.onnx", Kind.WEIGHT),
        ("consolidated.00.pth", Kind.WEIGHT),
        ("model.safetensors.index.json", Kind.WEIGHT_CONFIG),
        ("config.json", Kind.WEIGHT_CONFIG),
        ("tokenizer.json", Kind.WEIGHT_CONFIG),
        ("tokenizer.model", Kind.WEIGHT_CONFIG),
        ("tokenizer.model.v3", Kind.WEIGHT_CONFIG),
        ("spiece.model", Kind.WEIGHT_CONFIG),
        ("sentencepiece.bpe.model", Kind.WEIGHT_CONFIG),
        ("vocab.txt", Kind.WEIGHT_CONFIG),
        ("merges.txt", Kind.WEIGHT_CONFIG),
        ("chat_template.jinja", Kind.WEIGHT_CONFIG),
        ("qwen.tiktoken", Kind.WEIGHT_CONFIG),
        ("README.md", Kind.DOC),
        ("LICENSE", Kind.DOC),
        ("LICENSE.txt", Kind.DOC),
        ("figure.png", Kind.DOC),
        ("modeling_qwen.py", Kind.CODE),
        ("run.sh", Kind.CODE),
        ("requirements.txt", Kind.CODE),
        ("train.parquet", Kind.DATASET),
        ("eval.jsonl", Kind.DATASET),
        ("labels.csv", Kind.DATASET),
        ("something.xyz", Kind.CODE),
        ("something", Kind.CODE),
    ],
)
def test_kinds_go_by_name(name: str, kind: Kind) -> None:
    assert kind_of(name, 1000) is kind


def test_what_is_unknown_and_large_is_weights() -> None:
    assert kind_of("something.xyz", 129 * 1024 * 1024) is Kind.WEIGHT
    assert kind_of("README.md", 129 * 1024 * 1024) is Kind.DOC


def test_facts_are_only_what_files_say(tmp_path: Path) -> None:
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"

    def facts(**document: object) -> Facts:
        config.write_text(json.dumps(document))
        return read_facts(config, [weights])

    weights.write_bytes(b"not one")
    assert facts() == Facts()
    assert facts(torch_dtype="bfloat16") == Facts(precision="bf16")
    assert facts(dtype="float16", torch_dtype=None) == Facts(precision="fp16")
    assert facts(torch_dtype=7, model_type="bert") == Facts()
    safetensors(weights, a=("F16", [1_500_000, 1000], 8), b=("F16", [5], 8))
    assert facts(torch_dtype="float32") == Facts(precision="fp16", param_size="1.5B")
    safetensors(weights, a=("F16", [1000, 500], 8), b=("F32", [1000, 500], 8))
    assert facts() == Facts(precision="mixed", param_size="1M")
    safetensors(weights, a=("I32", [1000, 500], 8), b=("F16", [1000], 8))
    quantized = facts(quantization_config={"quant_method": "gptq", "bits": 4})
    assert quantized == Facts(quantization="gptq")
    assert facts().param_size == ""
    weights.write_bytes(b"\xff" * 100)
    assert facts() == Facts()
    config.write_bytes(b"[" * 100_000)
    assert read_facts(config, []) == Facts()
    assert read_facts(None, []) == Facts()
