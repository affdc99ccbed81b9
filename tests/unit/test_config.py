"""Settings: where they come from, what is refused, and that the page about them tells the truth."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi.config import Config, Setting, settings
from csi.values import parse_duration, parse_size
from fetcher.errors import InvalidRequest, ModelError

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def load(
    *, environment: dict[str, str] | None = None, file: Path | None = None, **flags: object
) -> Config:
    return Config.load(flags, environment or {}, file)


def written(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text)
    return file


def refusal(flags: dict[str, object], file: Path | None) -> str:
    """What ``load`` says against them; nothing when it takes them."""
    try:
        Config.load(flags, {}, file)
    except ModelError as error:
        return error.message
    return ""


def test_defaults() -> None:
    config = load()
    assert config == Config()
    assert config.node_id == socket.gethostname()
    assert config.root == Path("/var/lib/model-csi")
    assert config.chunk_size == 4 * 1024 * 1024
    assert config.socket_path == Path("/csi/csi.sock")


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = written(tmp_path, "connections: 2\nnode-id: from-file\nlog-level: debug\n")
    environment = {"MODEL_CSI_CONNECTIONS": "3", "MODEL_CSI_NODE_ID": "from-environment"}
    config = load(environment=environment, file=file, connections=4)
    assert (config.connections, config.node_id, config.log_level) == (
        4,
        "from-environment",
        "debug",
    )


def test_flags_that_were_not_given_do_not_count() -> None:
    config = load(environment={"MODEL_CSI_PLAIN_HTTP": "a:1"}, plain_http=(), node_id=None)
    assert config.plain_http == ("a:1",)


def test_flags_may_be_spelled_with_dashes() -> None:
    assert Config.load({"chunk-size": "1MiB"}, {}, None).chunk_size == 1024 * 1024


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "connections: 5")
    assert load(environment={"MODEL_CSI_CONFIG": str(file)}).connections == 5


@pytest.mark.parametrize("value", ["a:5000,b", "a:5000 b", "a:5000, b"])
def test_lists_in_the_environment(value: str) -> None:
    assert load(environment={"MODEL_CSI_PLAIN_HTTP": value}).plain_http == ("a:5000", "b")


def test_lists_in_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "insecure-registries: [a.example.org, '[::1]:5000']")
    assert load(file=file).insecure_registries == ("a.example.org", "[::1]:5000")


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    assert load(environment={"MODEL_CSI_CA_FILE": "", "MODEL_CSI_NODE_ID": ""}) == Config()


def test_other_variables_are_not_ours() -> None:
    assert load(environment={"HOME": "/root", "MODEL_CSI": "x"}) == Config()


@pytest.mark.parametrize(
    "variable",
    [
        "MODEL_CSI_SERVICE_HOST",
        "MODEL_CSI_SERVICE_PORT",
        "MODEL_CSI_SERVICE_PORT_METRICS",
        "MODEL_CSI_PORT",
        "MODEL_CSI_PORT_9090_TCP",
        "MODEL_CSI_PORT_9090_TCP_ADDR",
        "MODEL_CSI_CONTROLLER_SERVICE_HOST",
        "MODEL_CSI_PEERS_PORT_5000_TCP_PROTO",
    ],
)
def test_what_kubelet_injects_for_services_is_no_setting(variable: str) -> None:
    assert load(environment={variable: "tcp://10.0.0.1:9090"}) == Config()


@pytest.mark.parametrize(
    ("environment", "near"),
    [
        ({"MODEL_CSI_CONECTIONS": "3"}, "MODEL_CSI_CONNECTIONS"),
        ({"MODEL_CSI_CHUNKSIZE": "3"}, "MODEL_CSI_CHUNK_SIZE"),
    ],
)
def test_an_unknown_variable_names_the_near_one(environment: dict[str, str], near: str) -> None:
    with pytest.raises(InvalidRequest, match=f"did you mean '{near}'"):
        load(environment=environment)


@pytest.mark.parametrize("key", ["chunk_size", "chunksize", "Chunk-Size"])
def test_an_unknown_key_names_the_near_one(key: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'chunk-size'"):
        load(file=written(tmp_path, f"{key}: 4MiB"))


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'connections'"):
        load(connexions=3)


@pytest.mark.parametrize(
    "text",
    [
        "- a",
        "just text",
        "a: [",
        "connections: 2\nconnections: 3",
        "!!python/object/apply:os.system ['true']",
        "connections: [2]",
        "connections: true",
        "node-id: 17",
        "plain-http: {a: b}",
        "? [a, b]\n: c",
        "\x00",
        "[" * 5000,
    ],
)
def test_a_file_that_is_wrong(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"config\.yaml"):
        load(file=written(tmp_path, text))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InvalidRequest, match="is not YAML"):
        load(file=file)


def test_a_file_that_is_empty_or_says_nothing(tmp_path: Path) -> None:
    assert load(file=written(tmp_path, "")) == Config()
    assert load(file=written(tmp_path, "connections:\n")) == Config()


def test_a_file_that_is_missing_or_too_big(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file"):
        load(file=tmp_path / "none.yaml")
    with pytest.raises(InvalidRequest, match="not a configuration"):
        load(file=written(tmp_path, "#" * 1_100_000))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("driver_name", "-bad"),
        ("driver_name", "a..b"),
        ("driver_name", "under_score.org"),
        ("driver_name", "a" * 64),
        ("driver_name", ""),
        ("driver_name", "a/b"),
        ("driver_name", "a.org\n"),
        ("endpoint", "/csi/csi.sock"),
        ("endpoint", "tcp://127.0.0.1:1"),
        ("endpoint", "unix://csi.sock"),
        ("endpoint", "unix:///" + "a" * 120),
        ("root", "relative"),
        ("root", "/"),
        ("root", "/a/../b"),
        ("root", ""),
        ("root", "/a\0b"),
        ("kubelet_dir", "~"),
        ("ca_file", "ca.pem"),
        ("docker_config", "config.json"),
        ("chunk_size", "3MiB"),
        ("chunk_size", "32KiB"),
        ("chunk_size", "128MiB"),
        ("chunk_size", "4 parsecs"),
        ("chunk_size", "-4"),
        ("chunk_size", 4.5),
        ("connections", 0),
        ("connections", 65),
        ("connections", "many"),
        ("connections", True),
        ("stall_timeout", "0"),
        ("stall_timeout", "nan"),
        ("stall_timeout", float("inf")),
        ("stall_timeout", "30 fortnights"),
        ("deadline_margin", -1),
        ("deadline_margin", 1e9),
        ("max_unpacked_ratio", "nan"),
        ("max_unpacked_ratio", 0.5),
        ("mode", "nodes"),
        ("log_level", "loud"),
        ("log_format", 3),
        ("node_id", "two words"),
        ("node_id", "n" * 257),
        ("node_id", "a\nb"),
        ("plain_http", "http://a"),
        ("insecure_registries", "a/b"),
        ("insecure_registries", "*"),
    ],
)
def test_bad_values_name_the_setting(setting: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"^--{setting.replace('_', '-')}: "):
        Config.load({setting: value}, {}, None)


def test_a_choice_that_is_misspelled() -> None:
    with pytest.raises(InvalidRequest, match="one of node, controller, all; did you mean 'node'"):
        load(mode="noed")


@pytest.mark.parametrize(
    ("text", "size"),
    [("65536", 65536), ("4MiB", 4 << 20), ("4Mi", 4 << 20), ("64 kib", 65536), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("30s", 30), ("500ms", 0.5), ("2m", 120), ("1.5h", 5400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


def test_numbers_of_the_file_are_taken_as_they_are(tmp_path: Path) -> None:
    config = load(file=written(tmp_path, "stall-timeout: 10\nchunk-size: 1048576\n"))
    assert (config.stall_timeout, config.chunk_size) == (10.0, 1 << 20)


@given(st.sampled_from(settings()), st.text())
def test_any_text_is_taken_or_refused(setting: Setting, text: str) -> None:
    assert len(refusal({setting.field: text}, None)) < 700


@given(st.binary(max_size=200))
def test_any_file_is_taken_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    assert refusal({}, file) == "" or "any.yaml" in refusal({}, file)


def test_the_page_names_the_settings_that_exist() -> None:
    rows = re.findall(r"^\| `--([a-z-]+)` \| `(MODEL_CSI_[A-Z_]+)` \|", PAGE.read_text(), re.M)
    assert rows == [(setting.name, setting.environment) for setting in settings()]


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.name)
def test_the_page_tells_the_default(setting: Setting) -> None:
    name = setting.name
    default = setting.default
    row = re.search(rf"^\| `--{name}` \| [^|]+\| ([^|]+)\|", PAGE.read_text(), re.M)
    assert row is not None
    told = row[1].strip().strip("`")
    if default in (None, ()):
        assert told == "none"
    elif name == "node-id":
        assert told == default
    else:
        assert getattr(Config.load({name: told}, {}, None), name.replace("-", "_")) == default
