"""Volume attributes: what a pod spec may say, what it may not, and the way back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.attributes import ATTRIBUTES, Mode, VolumeAttributes, differences
from fetcher.errors import InvalidRequest, ModelError
from fetcher.modelpack import Selection
from fetcher.oci import Digest, Reference
from fetcher.policy import PullPolicy
from fetcher.schedule import Prefetch

DRIVER = "model.csi.example.org"
PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def parse(**attributes: str) -> VolumeAttributes:
    """Attributes as keywords, underscores for dashes, with a reference unless one is given."""
    values = {"reference": "ghcr.io/acme/qwen3-8b:v1"} | attributes
    context = {f"{DRIVER}/{name.replace('_', '-')}": value for name, value in values.items()}
    return VolumeAttributes.parse(context, DRIVER)


def test_a_reference_is_enough() -> None:
    assert parse() == VolumeAttributes(
        reference=Reference("ghcr.io", "acme/qwen3-8b", "v1"),
        mode=Mode.EAGER,
        pull_policy=PullPolicy.IF_NOT_PRESENT,
        selection=Selection(),
        prefetch=Prefetch.ALL,
    )


def test_everything_at_once() -> None:
    attributes = parse(
        mode="auto",
        pull_policy="Always",
        exclude_model_weights="true",
        exclude_file_patterns='["*.bin", "original/"]',
        prefetch="opened",
    )
    assert attributes.mode is Mode.AUTO
    assert attributes.pull_policy is PullPolicy.ALWAYS
    assert attributes.selection == Selection(True, ("*.bin", "original/"))
    assert attributes.prefetch is Prefetch.OPENED


def test_the_spec_of_the_other_driver_is_taken_as_it_is() -> None:
    context = {
        "model.csi.modelpack.org/reference": "registry.example.org/models/qwen:v1",
        "csi.storage.k8s.io/ephemeral": "true",
        "csi.storage.k8s.io/pod.name": "p",
    }
    attributes = VolumeAttributes.parse(context, "model.csi.modelpack.org")
    assert str(attributes.reference) == "registry.example.org/models/qwen:v1"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("pull_policies", "; did you mean 'pull-policy'?"),
        ("exclude_file_pattern", "; did you mean 'exclude-file-patterns'?"),
        ("Mode", "; did you mean 'mode'?"),
        ("zzz", "; known are reference, mode, "),
    ],
)
def test_an_unknown_attribute_names_the_known_ones(name: str, near: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(near)) as caught:
        parse(**{name: "x"})
    assert all(known in caught.value.message for known in ATTRIBUTES)


@pytest.mark.parametrize("key", ["reference", "model.csi.modelpack.org/reference"])
def test_a_missing_prefix_is_told(key: str) -> None:
    with pytest.raises(InvalidRequest, match=f"there is '{key}'.* start with {DRIVER}/"):
        VolumeAttributes.parse({key: "ghcr.io/acme/m:v1"}, DRIVER)


def test_no_reference_at_all() -> None:
    with pytest.raises(InvalidRequest, match=f"{DRIVER}/reference is missing"):
        VolumeAttributes.parse({"csi.storage.k8s.io/pod.name": "reference"}, DRIVER)
    with pytest.raises(InvalidRequest, match="is missing"):
        VolumeAttributes.parse({}, DRIVER)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reference", ""),
        ("reference", "https://ghcr.io/acme/m"),
        ("mode", "lazily"),
        ("mode", ""),
        ("mode", "EAGER"),
        ("pull_policy", "ifnotpresent"),
        ("exclude_model_weights", "yes"),
        ("exclude_model_weights", "True"),
        ("exclude_model_weights", ""),
        ("prefetch", "all"),  # the mode is eager
        ("exclude_file_patterns", ""),
        ("exclude_file_patterns", "*.bin"),
        ("exclude_file_patterns", "{}"),
        ("exclude_file_patterns", '"*.bin"'),
        ("exclude_file_patterns", "[1]"),
        ("exclude_file_patterns", "null"),
        ("exclude_file_patterns", '[""]'),
        ("exclude_file_patterns", '["a", " "]'),
        ("exclude_file_patterns", '["a\\u0000b"]'),
        ("exclude_file_patterns", '["a\\nb"]'),
        ("exclude_file_patterns", '["[a"]'),
        ("exclude_file_patterns", "[" * 60_000),
        ("exclude_file_patterns", json.dumps(["a" * 1025])),
        ("exclude_file_patterns", json.dumps(["a"] * 257)),
        ("exclude_file_patterns", json.dumps(["a" * 1000] * 70)),
        ("exclude_file_patterns", '["\udcff"]'),
    ],
)
def test_bad_values_name_the_attribute(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**{name: value})
    assert name.replace("_", "-") in caught.value.message
    assert len(caught.value.message) < 600


def test_a_misspelled_choice_names_the_near_one() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'eager'"):
        parse(mode="eagre")


def test_prefetch_belongs_to_lazy_volumes() -> None:
    assert parse(mode="lazy", prefetch="none").prefetch is Prefetch.NONE
    with pytest.raises(InvalidRequest, match="lazy and auto"):
        parse(mode="eager", prefetch="none")
    with pytest.raises(InvalidRequest, match="all, opened, none"):
        parse(mode="lazy", prefetch="some")


def test_a_fingerprint_is_stable_and_names_what_differs() -> None:
    one = parse(exclude_file_patterns='["*.bin","a/"]').fingerprint()
    same = parse(mode="eager", exclude_file_patterns='[ "*.bin", "a/" ]').fingerprint()
    other = parse(mode="auto", pull_policy="Always").fingerprint()
    assert one == same
    assert one == (
        '{"exclude-file-patterns":"[\\"*.bin\\", \\"a/\\"]","mode":"eager",'
        '"pull-policy":"IfNotPresent","reference":"ghcr.io/acme/qwen3-8b:v1"}'
    )
    assert differences(one, same) == ()
    assert differences(one, other) == ("mode", "pull-policy", "exclude-file-patterns", "prefetch")


def test_defaults_that_are_spelled_out_are_the_same_parameters() -> None:
    spelled = parse(mode="eager", pull_policy="IfNotPresent", exclude_model_weights="false")
    assert spelled.fingerprint() == parse().fingerprint()


def all_attributes() -> st.SearchStrategy[VolumeAttributes]:
    patterns = st.from_regex(r"!?[a-z?][a-z*?ü]{0,10}/?", fullmatch=True)

    def build(
        mode: Mode, policy: PullPolicy, weights: bool, names: list[str], prefetch: Prefetch,
        pinned: bool,
    ) -> VolumeAttributes:  # fmt: skip
        reference = Reference("ghcr.io", "acme/m", "v1")
        return VolumeAttributes(
            reference=reference.with_digest(Digest.of(b"")) if pinned else reference,
            mode=mode,
            pull_policy=policy,
            selection=Selection(weights, tuple(names)),
            prefetch=Prefetch.ALL if mode is Mode.EAGER else prefetch,
        )

    return st.builds(
        build,
        st.sampled_from(Mode),
        st.sampled_from(PullPolicy),
        st.booleans(),
        st.lists(patterns, max_size=4),
        st.sampled_from(Prefetch),
        st.booleans(),
    )


@given(all_attributes())
def test_the_context_says_the_same(attributes: VolumeAttributes) -> None:
    context = attributes.to_context(DRIVER) | {"csi.storage.k8s.io/pod.name": "p"}
    again = VolumeAttributes.parse(context, DRIVER)
    assert again == attributes
    assert again.fingerprint() == attributes.fingerprint()


@given(
    st.dictionaries(
        st.one_of(
            st.text(max_size=20), st.sampled_from([f"{DRIVER}/{name}" for name in ATTRIBUTES])
        ),
        st.text(max_size=60),
        max_size=6,
    )
)
def test_any_context_is_taken_or_refused(context: dict[str, str]) -> None:
    try:
        VolumeAttributes.parse(context, DRIVER)
    except ModelError:
        return


def test_the_page_names_the_attributes_that_exist() -> None:
    section = PAGE.read_text().partition("## Volume attributes")[2]
    assert tuple(re.findall(r"^\| `([a-z-]+)` \|", section, re.M)) == ATTRIBUTES
