"""Log lines show requests without their secrets."""

from __future__ import annotations

import pytest

from csi.redaction import MAX_SHOWN, redacted, shown
from proto import csi_pb2

SECRET = "correct horse battery staple"


def _messages_with_secrets() -> list[str]:
    return [
        name
        for name, descriptor in csi_pb2.DESCRIPTOR.message_types_by_name.items()
        if "secrets" in descriptor.fields_by_name
    ]


@pytest.mark.parametrize("name", _messages_with_secrets())
def test_no_request_shows_its_secrets(name: str) -> None:
    request = getattr(csi_pb2, name)(secrets={"username": "somebody", "password": SECRET})

    assert shown(request) == ""
    assert request.secrets["password"] == SECRET


def test_every_request_with_secrets_was_tried() -> None:
    assert len(_messages_with_secrets()) == 19


def test_the_rest_of_a_request_is_shown() -> None:
    request = csi_pb2.NodePublishVolumeRequest(
        volume_id="csi-1",
        target_path="/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/model/mount",
        secrets={".dockerconfigjson": SECRET},
        volume_context={"model.csi.example.org/reference": "ghcr.io/acme/qwen3-8b:v1"},
    )

    assert "csi-1" in shown(request)
    assert "ghcr.io/acme/qwen3-8b:v1" in shown(request)
    assert SECRET not in shown(request)
    assert ".dockerconfigjson" not in shown(request)


@pytest.mark.parametrize(
    "key",
    [
        "csi.storage.k8s.io/serviceAccount.tokens",
        "SERVICEACCOUNT.TOKENS",
        "x/serviceaccount.tokens/y",
    ],
)
def test_tokens_of_pods_are_hidden(key: str) -> None:
    request = csi_pb2.NodePublishVolumeRequest(
        volume_context={key: SECRET, "csi.storage.k8s.io/pod.name": "server"}
    )

    assert SECRET not in shown(request)
    assert "server" in shown(request)
    assert redacted(request).volume_context[key] == "***"
    assert request.volume_context[key] == SECRET


def test_secrets_are_found_at_any_depth() -> None:
    answer = csi_pb2.ListVolumesResponse(
        entries=[
            csi_pb2.ListVolumesResponse.Entry(
                volume=csi_pb2.Volume(volume_context={"a/serviceAccount.tokens": SECRET})
            )
        ]
    )

    assert SECRET not in shown(answer)


def test_a_field_of_a_newer_contract_is_not_shown() -> None:
    unknown = csi_pb2.NodeUnpublishVolumeRequest(volume_id=SECRET).SerializeToString()
    # field 1 of that request is sent as field 15 of this one
    request = csi_pb2.ProbeRequest.FromString(bytes([15 << 3 | 2]) + unknown[1:])

    assert SECRET not in shown(request)


def test_a_line_stays_one_line_and_bounded() -> None:
    request = csi_pb2.NodePublishVolumeRequest(volume_id="a\nb\r\x1b[31m\u2028" + "x" * 1_000_000)

    assert len(shown(request)) < MAX_SHOWN + 100
    assert shown(request).isprintable()
    assert shown(request).endswith("characters)")
