"""The vendored contract is the specification's, and the vendored stubs are the contract's."""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.text_format import MessageToString

from proto import csi_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto
    from google.protobuf.message import Message

REPOSITORY = Path(__file__).resolve().parents[2]
STUBS = ("csi_pb2.py", "csi_pb2.pyi", "csi_pb2_grpc.py", "csi_pb2_grpc.pyi")


def test_the_contract_is_that_of_the_specification() -> None:
    expected, actual = _parts(_specification()), _parts(_ours())

    assert actual.keys() == expected.keys()
    differing = [name for name in expected if actual[name] != expected[name]]
    assert not differing, "\n".join(_difference(expected[name], actual[name]) for name in differing)
    # so that a comparison of nothing with nothing is no success
    counts = {kind: sum(name.startswith(kind) for name in expected) for kind in KINDS}
    assert counts == {"message ": 134, "enum ": 8, "service ": 5, "extension ": 7, "file": 1}


def test_a_difference_is_found() -> None:
    """The comparison itself: each kind of change of the contract shows."""
    changes: list[FileDescriptorProto] = [_ours() for _ in range(6)]
    changes[0].message_type[0].name = "Other"
    changes[1].message_type[1].field[0].number = 9
    changes[2].message_type[1].field[0].options.Extensions[csi_pb2.csi_secret] = True
    changes[3].service[0].method[0].server_streaming = True
    changes[4].enum_type[0].value[0].name = "OTHER"
    changes[5].options.go_package = "other"

    for changed in changes:
        assert _parts(changed) != _parts(_ours())


def test_the_contract_has_none_of_the_specifications_prose() -> None:
    header, _, contract = (REPOSITORY / "proto/csi.proto").read_text().partition("\nsyntax = ")

    assert "//" not in contract
    assert "/*" not in contract
    assert len(header.splitlines()) < 10


def test_the_stubs_are_generated_from_the_contract(tmp_path: Path) -> None:
    run = subprocess.run(
        ["make", "--no-print-directory", "stubs-into", f"INTO={tmp_path}"],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )

    assert run.returncode == 0, run.stderr.decode()
    for stub in STUBS:
        generated, vendored = tmp_path / "proto" / stub, REPOSITORY / "proto" / stub
        assert generated.read_bytes() == vendored.read_bytes(), f"{stub}: run 'make proto'"


KINDS = ("message ", "enum ", "service ", "extension ", "file")


def _go() -> str:
    """The Go toolchain: the Makefile's, the virtual environment's, or the machine's."""
    for candidate in (os.environ.get("GO"), str(REPOSITORY / ".venv/bin/go"), "go"):
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    pytest.fail("there is no Go to compare the contract with: 'make setup' installs one")


def _specification() -> FileDescriptorProto:
    """What the Go module of the specification says."""
    run = subprocess.run(
        [_go(), "run", "-mod=readonly", "."],
        cwd=REPOSITORY / "proto/descriptors",
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, f"go run in proto/descriptors failed:\n{run.stderr.decode()}"
    return FileDescriptorProto.FromString(run.stdout)


def _ours() -> FileDescriptorProto:
    """What the stubs say, with the JSON names that protoc leaves out of them."""
    file = FileDescriptorProto()
    csi_pb2.DESCRIPTOR.CopyToProto(file)
    for field in [*_fields(file.message_type), *file.extension]:
        field.json_name = _json_name(field.name)
    return file


def _fields(messages: Iterable[DescriptorProto]) -> Iterator[FieldDescriptorProto]:
    for message in messages:
        yield from message.field
        yield from _fields(message.nested_type)


def _json_name(field: str) -> str:
    first, *others = field.split("_")
    return first + "".join(other.capitalize() for other in others)


def _parts(file: FileDescriptorProto) -> dict[str, Message]:
    """Every message, enum, service and extension by its kind and name; ``file`` is the rest."""
    rest = FileDescriptorProto()
    rest.CopyFrom(file)
    for name in ("message_type", "enum_type", "service", "extension", "source_code_info", "name"):
        rest.ClearField(name)
    parts: dict[str, Message] = {"file": rest}
    parts.update((f"enum {enum.name}", enum) for enum in file.enum_type)
    parts.update((f"service {service.name}", service) for service in file.service)
    parts.update(
        (f"extension {one.extendee} {one.number} {one.name}", one) for one in file.extension
    )
    for message in file.message_type:
        parts.update(_message_parts(message, ""))
    return parts


def _message_parts(message: DescriptorProto, outer: str) -> Iterator[tuple[str, Message]]:
    name = f"{outer}{message.name}"
    for nested in message.nested_type:
        yield from _message_parts(nested, f"{name}.")
    for enum in message.enum_type:
        yield f"enum {name}.{enum.name}", enum
    alone = type(message)()
    alone.CopyFrom(message)
    alone.ClearField("nested_type")
    alone.ClearField("enum_type")
    yield f"message {name}", alone


def _difference(expected: Message, actual: Message) -> str:
    lines = difflib.unified_diff(
        MessageToString(expected).splitlines(),
        MessageToString(actual).splitlines(),
        "the specification",
        "proto/csi.proto",
        lineterm="",
    )
    return "\n".join(lines)
