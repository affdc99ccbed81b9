"""Volume attributes: what a pod spec or a StorageClass says about a volume, checked.

A volume's context arrives as a map of strings. Keys with the driver's prefix are ours, and one of
them that is not known is an error: a misspelled ``exclude-file-patterns`` must not mount all files.
Keys without it belong to others (kubelet adds ``csi.storage.k8s.io/pod.name`` and more).
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from csi.values import near_match
from fetcher.errors import InvalidRequest
from fetcher.modelpack import Selection
from fetcher.oci import Reference
from fetcher.patterns import Patterns
from fetcher.policy import PullPolicy
from fetcher.schedule import Prefetch

if TYPE_CHECKING:
    from collections.abc import Mapping

REFERENCE: Final = "reference"
MODE: Final = "mode"
PULL_POLICY: Final = "pull-policy"
EXCLUDE_MODEL_WEIGHTS: Final = "exclude-model-weights"
EXCLUDE_FILE_PATTERNS: Final = "exclude-file-patterns"
PREFETCH: Final = "prefetch"

ATTRIBUTES: Final = (
    REFERENCE,
    MODE,
    PULL_POLICY,
    EXCLUDE_MODEL_WEIGHTS,
    EXCLUDE_FILE_PATTERNS,
    PREFETCH,
)
"""Every attribute, without the prefix. ``docs/configuration.md`` lists the same: a test looks."""

MAX_PATTERNS_CHARACTERS: Final = 64 * 1024
"""Of the whole JSON list; what one pattern may be, :mod:`fetcher.patterns` says."""


class Mode(enum.Enum):
    """How a volume gets its bytes; design section 4."""

    EAGER = "eager"
    LAZY = "lazy"
    AUTO = "auto"


Choice = TypeVar("Choice", bound=enum.Enum)


@dataclass(frozen=True)
class VolumeAttributes:
    """What a volume shows, and how. Two volumes with equal attributes are published alike."""

    reference: Reference
    mode: Mode = Mode.EAGER
    pull_policy: PullPolicy = PullPolicy.IF_NOT_PRESENT
    selection: Selection = field(default_factory=Selection)
    prefetch: Prefetch = Prefetch.ALL

    @classmethod
    def parse(cls, volume_context: Mapping[str, str], driver_name: str) -> VolumeAttributes:
        """Read the attributes that carry ``driver_name``'s prefix.

        Raises :class:`InvalidRequest` naming the attribute, what it may be, and the near match of
        one that is not known.
        """
        values = _own_values(volume_context, driver_name)
        reference = values.get(REFERENCE)
        if reference is None:
            raise _without_reference(volume_context, driver_name)
        mode = _choice(values, MODE, Mode.EAGER)
        return cls(
            reference=Reference.parse(reference),
            mode=mode,
            pull_policy=_choice(values, PULL_POLICY, PullPolicy.IF_NOT_PRESENT),
            selection=Selection(_excludes_weights(values), _patterns(values)),
            prefetch=_prefetch(values, mode),
        )

    def to_context(self, driver_name: str) -> dict[str, str]:
        """The inverse of :meth:`parse`: the context that means exactly these attributes."""
        return {f"{driver_name}/{name}": value for name, value in self._values().items()}

    def fingerprint(self) -> str:
        """Stable text of everything that makes two publishes of a volume "the same parameters"."""
        return json.dumps(self._values(), sort_keys=True, separators=(",", ":"))

    def _values(self) -> dict[str, str]:
        values = {
            REFERENCE: str(self.reference),
            MODE: self.mode.value,
            PULL_POLICY: self.pull_policy.value,
        }
        if self.selection.exclude_weights:
            values[EXCLUDE_MODEL_WEIGHTS] = "true"
        if self.selection.exclude_patterns:
            values[EXCLUDE_FILE_PATTERNS] = json.dumps(list(self.selection.exclude_patterns))
        if self.mode is not Mode.EAGER:
            values[PREFETCH] = self.prefetch.value
        return values


def differences(one: str, other: str) -> tuple[str, ...]:
    """The attributes in which two fingerprints differ, by name."""
    ours, theirs = json.loads(one), json.loads(other)
    return tuple(name for name in ATTRIBUTES if ours.get(name) != theirs.get(name))


def _own_values(volume_context: Mapping[str, str], driver_name: str) -> dict[str, str]:
    prefix = f"{driver_name}/"
    values = {
        key.removeprefix(prefix): value
        for key, value in volume_context.items()
        if key.startswith(prefix)
    }
    for name in values:
        if name not in ATTRIBUTES:
            raise InvalidRequest(
                f"the volume attribute {_shown(prefix + name)} is not known"
                f"{near_match(name, ATTRIBUTES)}; known are {', '.join(ATTRIBUTES)}, each after "
                f"{prefix}",
                attribute=name[:100],
            )
    return values


def _without_reference(volume_context: Mapping[str, str], driver_name: str) -> InvalidRequest:
    wanted = f"{driver_name}/{REFERENCE}"
    for key in sorted(volume_context):
        if key == REFERENCE or key.endswith(f"/{REFERENCE}"):
            return InvalidRequest(
                f"the volume attribute {wanted} is missing; there is {_shown(key)}: attributes of "
                f"this driver start with {driver_name}/",
                attribute=REFERENCE,
            )
    return InvalidRequest(
        f"the volume attribute {wanted} is missing: it names the model, such as "
        "ghcr.io/acme/qwen3-8b:v1",
        attribute=REFERENCE,
    )


def _choice(values: Mapping[str, str], name: str, default: Choice) -> Choice:
    value = values.get(name)
    if value is None:
        return default
    known = {choice.value: choice for choice in type(default)}
    if value not in known:
        raise _bad_value(name, value, f"expected {', '.join(known)}{near_match(value, known)}")
    return known[value]


def _prefetch(values: Mapping[str, str], mode: Mode) -> Prefetch:
    if PREFETCH in values and mode is Mode.EAGER:
        raise _bad_value(
            PREFETCH, values[PREFETCH], "it belongs to the modes lazy and auto: an eager volume "
            "has all of its bytes before it is mounted"
        )  # fmt: skip
    return _choice(values, PREFETCH, Prefetch.ALL)


def _excludes_weights(values: Mapping[str, str]) -> bool:
    value = values.get(EXCLUDE_MODEL_WEIGHTS, "false")
    if value not in ("true", "false"):
        raise _bad_value(EXCLUDE_MODEL_WEIGHTS, value, "expected true or false")
    return value == "true"


def _patterns(values: Mapping[str, str]) -> tuple[str, ...]:
    text = values.get(EXCLUDE_FILE_PATTERNS)
    if text is None:
        return ()
    if len(text) > MAX_PATTERNS_CHARACTERS:
        raise _bad_patterns(text, f"it has more than {MAX_PATTERNS_CHARACTERS} characters")
    try:
        patterns = msgspec.json.decode(text.encode(), type=list[str])
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise _bad_patterns(text, 'expected a JSON list of texts, such as ["*.bin"]') from error
    for pattern in patterns:
        if not pattern.strip() or not pattern.isprintable():
            raise _bad_patterns(pattern, "a pattern is empty or has control characters")
    try:
        Patterns(patterns)
    except InvalidRequest as error:
        raise _bad_patterns(text, error.message) from error
    return tuple(patterns)


def _bad_patterns(value: str, reason: str) -> InvalidRequest:
    return _bad_value(EXCLUDE_FILE_PATTERNS, value, reason)


def _bad_value(name: str, value: str, reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"the volume attribute {name} cannot be {_shown(value)}: {reason}", attribute=name
    )


def _shown(value: str) -> str:
    return repr(value if len(value) <= 100 else value[:100] + "…")
