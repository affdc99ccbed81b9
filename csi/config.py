"""The one configuration of a process: frozen, typed, checked once at the start.

A setting is a field of :class:`Config`. Its name in the YAML file is the field's with dashes, and
so is its flag (``--chunk-size``); its environment variable is ``MODEL_CSI_CHUNK_SIZE``. Flags win
over the environment, the environment over the file, the file over the defaults.
``docs/configuration.md`` lists the same settings; a test compares the two.
"""

import dataclasses
import math
import re
import socket
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import msgspec

from csi import values
from csi.peer_config import PeerConfig
from csi.values import Rule
from fetcher.errors import InvalidRequest

ENVIRONMENT_PREFIX: Final = "MODEL_CSI_"
CONFIG_FILE_VARIABLE: Final = "MODEL_CSI_CONFIG"
"""Names the YAML file where no flag does."""

Given = dict[str, tuple[object, str]]
"""Values as they were given, by field, each with where it came from."""

# What kubelet injects for a Service named "model-csi…" looks like a setting and is none.
_SERVICE_LINK: Final = re.compile(
    r"(?:.*_)?(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?"
    r"|PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)"
)


@dataclass(frozen=True, kw_only=True)
class Config(PeerConfig):
    """Every setting, as its rule says. Made by :meth:`load`; nothing changes later."""

    mode: Annotated[
        Literal["node", "controller", "all"],
        Rule("which services are served: the node's, the controller's, or both"),
    ] = "node"
    endpoint: Annotated[
        str, Rule("the socket on which CSI calls arrive", values.check_endpoint)
    ] = "unix:///csi/csi.sock"
    node_id: Annotated[
        str, Rule("this node's name, as NodeGetInfo answers it", values.check_node_id)
    ] = dataclasses.field(default_factory=socket.gethostname)
    root: Annotated[
        Path,
        Rule(
            "the folder below which everything is kept: blobs, models, records", values.check_folder
        ),
    ] = Path("/var/lib/model-csi")
    driver_name: Annotated[
        str,
        Rule(
            "the driver's name, and the prefix of its volume attributes", values.check_driver_name
        ),
    ] = "model.csi.example.org"
    kubelet_dir: Annotated[
        Path, Rule("kubelet's folder: target paths must lie below it", values.check_folder)
    ] = Path("/var/lib/kubelet")
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Rule("the least grave log lines that are written"),
    ] = "info"
    log_format: Annotated[Literal["text", "json"], Rule("how log lines are written")] = "text"
    chunk_size: Annotated[
        int,
        Rule(
            "bytes of a chunk, the unit in which blobs are fetched",
            values.check_chunk_size,
            values.parse_size,
        ),
    ] = 4 * values.MIB
    chunk_digests: Annotated[
        Literal["use", "ignore"],
        Rule("whether chunks are proven by a list of their digests, where one was published"),
    ] = "use"
    connections: Annotated[
        int, Rule("parallel connections of all pulls of the node", values.check_connections)
    ] = 8
    stall_timeout: Annotated[
        float,
        Rule(
            "seconds without a byte after which a connection is given up and tried again",
            values.check_stall_timeout,
            values.parse_duration,
        ),
    ] = 30.0
    deadline_margin: Annotated[
        float,
        Rule(
            "seconds before a call's deadline at which it answers with the download's progress",
            values.check_deadline_margin,
            values.parse_duration,
        ),
    ] = 5.0
    max_unpacked_ratio: Annotated[
        int, Rule("how many times its size a compressed layer may unpack to", values.check_ratio)
    ] = 100
    pull_grace: Annotated[
        float,
        Rule(
            "seconds for which a download goes on that nobody waits for any more",
            values.check_pull_grace,
            values.parse_duration,
        ),
    ] = 60.0
    fuse: Annotated[
        Literal["auto", "off"],
        Rule("whether volumes may be shown while their model is still fetched, through FUSE"),
    ] = "auto"
    read_timeout: Annotated[
        float,
        Rule(
            "seconds in which a read of what a lazy volume has not fetched yet ends",
            values.check_read_timeout,
            values.parse_duration,
        ),
    ] = 60.0
    lazy_sources: Annotated[
        Literal["registry", "mirrors", "peers"],
        Rule("whose bytes lazy volumes show before the whole file is verified"),
    ] = "registry"
    prefetch_rate: Annotated[
        int | None,
        Rule(
            "bytes per second at which lazy volumes fetch what nobody reads, all together",
            values.check_rate,
            values.parse_size,
        ),
    ] = None
    worker_cgroup: Annotated[
        Path | None,
        Rule(
            "the cgroup of the processes that serve lazy volumes, which outlive the driver's",
            values.check_path,
        ),
    ] = None
    spare_worker: Annotated[
        bool, Rule("whether a process that will serve the next lazy volume is kept ready")
    ] = True
    allowed_models: Annotated[
        tuple[str, ...],
        Rule(
            "registries and repositories that models may come from, such as ghcr.io/acme/*",
            values.check_models,
            values.parse_names,
        ),
    ] = ()
    require_digest: Annotated[
        bool, Rule("whether references have to name a digest, and tags alone are refused")
    ] = False
    max_size: Annotated[
        int | None,
        Rule(
            "bytes that everything below the root may take, records included; never passed",
            values.check_max_size,
            values.parse_size,
        ),
    ] = None
    min_free: Annotated[
        int,
        Rule(
            "bytes of the root's disk that are left free",
            values.check_min_free,
            values.parse_size,
        ),
    ] = 1024 * values.MIB
    gc_high_watermark: Annotated[
        int,
        Rule(
            "percent of max-size, else of the disk, above which unused models are evicted",
            values.check_percent,
        ),
    ] = 80
    gc_low_watermark: Annotated[
        int, Rule("percent at which evicting unused models ends", values.check_percent)
    ] = 70
    plain_http: Annotated[
        tuple[str, ...],
        Rule(
            "registries that are spoken to without TLS, besides those on this machine",
            values.check_hosts,
            values.parse_names,
        ),
    ] = ()
    https: Annotated[
        tuple[str, ...],
        Rule(
            "registries on this machine that do speak TLS", values.check_hosts, values.parse_names
        ),
    ] = ()
    insecure_registries: Annotated[
        tuple[str, ...],
        Rule(
            "registries whose TLS certificate is not verified",
            values.check_hosts,
            values.parse_names,
        ),
    ] = ()
    ca_file: Annotated[
        Path | None,
        Rule(
            "PEM file of certificate authorities, trusted besides the system's",
            values.check_path,
        ),
    ] = None
    hosts_dir: Annotated[
        Path,
        Rule("the folder of containerd's hosts.toml folders: mirrors", values.check_path),
    ] = Path("/etc/containerd/certs.d")
    docker_config: Annotated[
        Path | None,
        Rule(
            "the node's docker config.json with credentials and credential helpers",
            values.check_path,
        ),
    ] = None

    @property
    def socket_path(self) -> Path:
        """The path within :attr:`endpoint`."""
        return Path(self.endpoint.removeprefix("unix://"))

    @classmethod
    def load(
        cls, flags: Mapping[str, object], environment: Mapping[str, str], file: Path | None
    ) -> Self:
        """Combine the sources.

        ``flags`` maps names with dashes or underscores to values; None and empty tuples are flags
        that were not given. ``file`` (else ``MODEL_CSI_CONFIG``) has to exist if named. Raises
        :class:`InvalidRequest` naming the setting and where its value came from.
        """
        file = file or _file_of(environment)
        given = _from_file(file) if file is not None else {}
        given |= _from_environment(environment)
        given |= _from_flags(flags)
        rules = _rules()
        config = cls(
            **{
                name: _converted(*rules[name], value, origin)
                for name, (value, origin) in given.items()
            }
        )
        if config.gc_low_watermark > config.gc_high_watermark:
            raise InvalidRequest(
                f"gc-low-watermark is {config.gc_low_watermark} and gc-high-watermark "
                f"{config.gc_high_watermark}: evicting has to end below where it begins",
                setting="gc-low-watermark",
            )
        return config


@dataclass(frozen=True)
class Setting:
    """One setting as it is offered: what the command line and the documentation are made from."""

    field: str
    name: str
    environment: str
    summary: str
    default: object
    """None where there is none; for ``node_id`` the text ``the host's name``."""
    choices: tuple[str, ...]
    multiple: bool


def settings() -> tuple[Setting, ...]:
    """Every setting, in the order of :class:`Config`; those about peers come last."""
    rules = _rules()
    peers = [field.name for field in dataclasses.fields(PeerConfig)]
    return tuple(
        Setting(
            field=field.name,
            name=_kebab(field.name),
            environment=_variable(field.name),
            summary=rules[field.name][1].summary,
            default="the host's name" if field.default is dataclasses.MISSING else field.default,
            choices=_choices(rules[field.name][0]),
            multiple=typing.get_origin(rules[field.name][0]) is tuple,
        )
        for field in sorted(dataclasses.fields(Config), key=lambda one: one.name in peers)
    )


def _rules() -> dict[str, tuple[Any, Rule]]:
    """Type and rule of every setting, by its field."""
    hints = typing.get_type_hints(Config, include_extras=True)
    annotated = {field.name: hints[field.name] for field in dataclasses.fields(Config)}
    return {name: (hint.__origin__, hint.__metadata__[0]) for name, hint in annotated.items()}


def _kebab(field: str) -> str:
    return field.replace("_", "-")


def _variable(field: str) -> str:
    return ENVIRONMENT_PREFIX + field.upper()


def _choices(hint: object) -> tuple[str, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _names() -> dict[str, str]:
    return {_kebab(field.name): field.name for field in dataclasses.fields(Config)}


def _file_of(environment: Mapping[str, str]) -> Path | None:
    name = environment.get(CONFIG_FILE_VARIABLE)
    return Path(name) if name else None


def _from_flags(flags: Mapping[str, object]) -> Given:
    names = _names()
    given: Given = {}
    for flag, value in flags.items():
        name = _kebab(flag)
        if value is None or value == ():
            continue
        if name not in names:
            raise InvalidRequest(
                f"there is no setting --{name[:100]}{values.near_match(name, names)}",
                setting=name[:100],
            )
        given[names[name]] = (value, f"--{name}")
    return given


def _from_environment(environment: Mapping[str, str]) -> Given:
    known = {_variable(field): field for field in _names().values()}
    given: Given = {}
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == CONFIG_FILE_VARIABLE:
            continue
        if variable in known:
            # a variable that is set to nothing is how manifests leave a setting out
            if value:
                given[known[variable]] = (value, variable)
        elif not _SERVICE_LINK.fullmatch(variable.removeprefix(ENVIRONMENT_PREFIX)):
            raise InvalidRequest(
                f"the environment variable {variable[:100]} names no setting"
                f"{values.near_match(variable, known)}",
                setting=variable[:100],
            )
    return given


def _from_file(file: Path) -> Given:
    # here, as YAML would make every command start slower that has no file to read
    from csi.config_file import read_config_file

    names = _names()
    given: Given = {}
    for key, value in read_config_file(file).items():
        if key not in names:
            raise InvalidRequest(
                f"{file}: {str(key)[:100]!r} is not a setting{values.near_match(str(key), names)}",
                setting=str(key)[:100],
            )
        if value is not None:
            given[names[key]] = (value, f"{key} in {file}")
    return given


def _converted(hint: Any, rule: Rule, value: object, origin: str) -> Any:
    """``value`` as the setting has it, checked."""
    try:
        raw = rule.read(value) if rule.read else value
        converted = msgspec.convert(raw, hint, strict=False, dec_hook=_as_path)
        reason = rule.check(converted) if rule.check else None
    except (msgspec.ValidationError, ValueError) as error:
        raise _bad_value(value, origin, _reason(hint, value, error)) from error
    if isinstance(converted, float) and not math.isfinite(converted):
        raise _bad_value(value, origin, "expected a finite number")
    if reason is not None:
        raise _bad_value(value, origin, reason)
    return converted


def _as_path(hint: type, value: object) -> object:
    if hint is Path and isinstance(value, str | Path) and str(value):
        return Path(value)
    raise ValueError("expected a path")


def _reason(hint: object, value: object, error: Exception) -> str:
    if choices := _choices(hint):
        return f"expected one of {', '.join(choices)}{values.near_match(str(value), choices)}"
    return str(error)


def _bad_value(value: object, origin: str, reason: str) -> InvalidRequest:
    shown = str(value)
    shown = shown if len(shown) <= 100 else shown[:100] + "…"
    return InvalidRequest(f"{origin}: {shown!r} cannot be used: {reason}", setting=origin)
