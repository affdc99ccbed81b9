"""Reading ``hosts.toml``: the forms that containerd documents and that mirrors' own guides give."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from fetcher.exchange import RegistrySettings
from fetcher.glances import GLANCE_SECONDS
from fetcher.hosts import Host, Hosts, HostSet, parse_hosts
from tests.support.clocks import HandClock

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path("/certs.d/it")
ANYTHING = frozenset({"pull", "resolve", "push", "referrers"})


def parsed(text: str, registry: str = "docker.io", **settings: object) -> HostSet:
    return parse_hosts(text.encode(), FOLDER, registry, RegistrySettings(**settings))  # type: ignore[arg-type]  # checked by the dataclass


def looked_up(root: Path, registry: str, **settings: object) -> HostSet:
    return trio.run(Hosts(RegistrySettings(hosts_dir=root, **settings)).lookup, registry)  # type: ignore[arg-type]  # checked by the dataclass


def write(root: Path, folder: str, text: str) -> Path:
    file = root / folder / "hosts.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_every_field_as_containerd_documents_it() -> None:
    found = parsed(
        """
server = "https://test-default.registry"
ca = "/etc/path/default"
[header]
  x-custom-1 = "custom header"

[host."https://mirror.registry"]
  capabilities = ["pull"]
  ca = "/etc/certs/mirror.pem"
  skip_verify = false
  [host."https://mirror.registry".header]
    x-custom-2 = ["value1", "value2"]

[host."https://mirror-bak.registry/us"]
  capabilities = ["pull"]
  skip_verify = true

[host."http://mirror.registry"]
  capabilities = ["PULL"]

[host."https://test-1.registry"]
  capabilities = ["pull", "resolve", "push"]
  ca = ["/etc/certs/test-1-ca.pem", "special.pem"]
  client = [["/etc/certs/client.cert", "/etc/certs/client.key"],["/etc/certs/client.pem", ""]]

[host."https://test-2.registry"]
  client = "client.pem"

[host."https://test-3.registry"]
  client = ["/etc/certs/client-1.pem", "/etc/certs/client-2.pem"]

[host."https://non-compliant-mirror.registry/v2/upstream"]
  capabilities = ["pull"]
  override_path = true

[host."https://noprefix.registry"]
  override_path = true

[host."https://onlyheader.registry".header]
  x-custom-1 = "justaheader"

[host."https://dial-timeout.registry"]
  dial_timeout = "1m1.5s"
"""
    )
    assert [one.base for one in found.mirrors] == [
        "https://mirror.registry/v2",
        "https://mirror-bak.registry/us/v2",
        "http://mirror.registry/v2",
        "https://test-1.registry/v2",
        "https://test-2.registry/v2",
        "https://test-3.registry/v2",
        "https://non-compliant-mirror.registry/v2/upstream",
        "https://noprefix.registry",
        "https://onlyheader.registry/v2",
        "https://dial-timeout.registry/v2",
    ]
    mirror, backup, plain, one, two, three, _, bare, header, timed = found.mirrors
    assert mirror.capabilities == backup.capabilities == plain.capabilities == {"pull"}
    assert one.capabilities == {"pull", "resolve", "push"}
    assert two.capabilities == ANYTHING
    assert mirror.trust.ca_files == ("/etc/certs/mirror.pem",)
    assert mirror.headers == (("x-custom-2", "value1"), ("x-custom-2", "value2"))
    assert (mirror.trust.verify, backup.trust.verify, plain.trust.verify) == (True, False, True)
    assert one.trust.ca_files == ("/etc/certs/test-1-ca.pem", "/certs.d/it/special.pem")
    assert one.trust.client == ("/etc/certs/client.cert", "/etc/certs/client.key")
    assert two.trust.client == ("/certs.d/it/client.pem", "/certs.d/it/client.pem")
    assert three.trust.client == ("/etc/certs/client-1.pem", "/etc/certs/client-1.pem")
    assert bare.url("/a/blobs/x") == "https://noprefix.registry/a/blobs/x?ns=docker.io"
    assert header.headers == (("x-custom-1", "justaheader"),)
    assert timed.connect_timeout == 61.5
    server = found.server
    assert (server.base, server.mirror) == ("https://test-default.registry/v2", False)
    assert server.trust.ca_files == ("/etc/path/default",)
    assert server.headers == (("x-custom-1", "custom header"),)
    assert all(host.mirror for host in found.mirrors)


DRAGONFLY = """
server = "https://index.docker.io"

[host."http://127.0.0.1:4001"]
capabilities = ["pull", "resolve"]

[host."http://127.0.0.1:4001".header]
X-Dragonfly-Registry = "https://index.docker.io"
"""
SPEGEL = """
[host]

[host.'http://10.0.0.3:30020']
capabilities = ['pull', 'resolve']
dial_timeout = '200ms'

[host.'http://10.0.0.3:30021']
capabilities = ['pull', 'resolve']
dial_timeout = '200ms'
"""
HARBOR = """
server = "https://registry-1.docker.io"

[host."https://harbor.lan/v2/dockerhub-proxy"]
  capabilities = ["pull", "resolve"]
  override_path = true
"""


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        (DRAGONFLY, ["http://127.0.0.1:4001/v2/a/b?ns=docker.io"]),
        (
            SPEGEL,
            [
                "http://10.0.0.3:30020/v2/a/b?ns=docker.io",
                "http://10.0.0.3:30021/v2/a/b?ns=docker.io",
            ],
        ),
        (HARBOR, ["https://harbor.lan/v2/dockerhub-proxy/a/b?ns=docker.io"]),
    ],
    ids=["dragonfly", "spegel", "harbor"],
)
def test_mirrors_as_their_guides_configure_them(text: str, addresses: list[str]) -> None:
    found = parsed(text)
    assert [one.url("/a/b") for one in found.mirrors] == addresses
    assert [one.base for one in found.able("resolve")] == [one.base for one in found.mirrors]
    assert found.server.name == "docker.io" or "index.docker.io" in found.server.netloc


def test_the_hub_is_where_its_registry_is() -> None:
    found = parsed('server = "https://docker.io"\n[host."https://registry-1.docker.io"]\n')
    assert found.server.url("/a") == "https://registry-1.docker.io/v2/a"
    assert found.mirrors == ()
    assert found.server.name == "docker.io"


def test_what_is_said_of_the_registry_as_a_host_is_how_it_is_asked() -> None:
    text = '[host."http://reg.lan:5000"]\ncapabilities = ["pull", "resolve"]\n[host."http://m"]\n'
    found = parsed(text, "reg.lan:5000")
    assert found.server.url("/a") == "http://reg.lan:5000/v2/a"
    assert not found.server.mirror
    assert [one.netloc for one in found.mirrors] == ["m"]


def test_another_server_stands_for_the_registry_under_its_own_name() -> None:
    found = parsed('server = "registry.example.com"', "ghcr.io")
    assert found.server.url("/a") == "https://registry.example.com/v2/a?ns=ghcr.io"
    assert found.server.name == "registry.example.com"
    assert not found.server.is_own


def test_an_authorization_in_the_file_is_not_joined_by_another() -> None:
    text = '[host."https://m".header]\nauthorization = "Basic a"\n[host."https://n"]\n'
    mirror, other = parsed(text).mirrors
    assert mirror.showing("Basic b") == (("authorization", "Basic a"),)
    assert other.showing("Basic b") == (("Authorization", "Basic b"),)
    assert "Basic a" not in repr(mirror)


def test_settings_by_name_hold_for_whom_they_name() -> None:
    text = '[host."https://mirror.lan"]\n[host."https://other.lan"]\n'
    found = parsed(text, "ghcr.io", insecure=("mirror.lan",), ca_file=Path("/ca.pem"))
    mirror, other = found.mirrors
    assert (mirror.trust.verify, other.trust.verify, found.server.trust.verify) == (
        False,
        True,
        True,
    )
    assert other.trust.ca_files == ("/ca.pem",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("server = 1", "server"),
        ("host = 1", "host"),
        ('[host."https://m"]\ncapabilities = ["pul"]', "no capability 'pul'"),
        ('[host."https://m"]\ncapabilities = "pull"', "capabilities"),
        ('[host."https://m"]\nca = 1', "ca"),
        ('[host."https://m"]\nclient = [["a", "b", "c"]]', "client"),
        ('[host."https://m"]\nskip_verify = "yes"', "skip_verify"),
        ('[host."https://m"]\ndial_timeout = "soon"', "not a duration"),
        ('[host."https://m".header]\nx = 1', "header"),
        ('[host."https://m".header]\nx = "a\\nb"', "cannot be sent"),
        ('[host."https://m".header]\nx = "ä"', "cannot be sent"),
        ('[host."https://m".header]\n"x y" = "a"', "name of a header"),
        ('[host."ftp://m"]', "not the address"),
        ('[host."https://m:0"]', "not the address"),
        ("[host", "table declaration"),
        ("server = 'a'\nserver = 'b'", "overwrite"),
    ],
)
def test_what_cannot_be_used_says_why(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parsed(text)


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    try:
        found = parsed(text)
    except ValueError:
        return
    assert isinstance(found.server, Host)


@pytest.mark.parametrize(
    ("folder", "registry", "found"),
    [
        ("ghcr.io", "ghcr.io", True),
        ("reg.lan:5000", "reg.lan:5000", True),
        ("reg.lan_5000_", "reg.lan:5000", True),
        ("reg.lan", "reg.lan:5000", False),
        ("[::1]_5000_", "[::1]:5000", True),
        ("[::1]:5000", "[::1]:5000", True),
        ("[::1]", "[::1]", True),
        ("_default", "whatever.example", True),
        ("docker.io", "docker.io", True),
        ("other.io", "ghcr.io", False),
    ],
)
def test_folders_have_the_names_that_containerd_gives_them(
    tmp_path: Path, folder: str, registry: str, found: bool
) -> None:
    write(tmp_path, folder, '[host."http://mirror"]')
    assert bool(looked_up(tmp_path, registry).mirrors) is found


def test_the_nearest_folder_decides(tmp_path: Path) -> None:
    for folder, mirror in (("reg:1", "two"), ("_default", "three"), ("reg_1_", "one")):
        write(tmp_path, folder, f'[host."http://{mirror}"]')
    assert looked_up(tmp_path, "reg:1").mirrors[0].netloc == "one"
    write(tmp_path, "bare:2", "").unlink()
    assert looked_up(tmp_path, "bare:2").mirrors == ()


def test_without_a_folder_there_is_the_registry(tmp_path: Path) -> None:
    for root in (None, tmp_path, tmp_path / "none"):
        found = trio.run(Hosts(RegistrySettings(hosts_dir=root)).lookup, "ghcr.io")
        assert found == HostSet(Host("ghcr.io", "https", "ghcr.io"))


def test_an_address_is_a_host_and_a_path() -> None:
    (found,) = parsed('[host."https://user:word@M.lan/a/./b/?c=d#e"]').mirrors
    assert found.base == "https://m.lan/a/b/v2"


@pytest.mark.parametrize(
    ("text", "settings", "scheme"),
    [
        ("", {}, "http"),
        ("skip_verify = true", {}, "https"),
        ('ca = "ca.crt"', {}, "https"),
        ('ca = "ca.crt"', {"plain_http": ("127.0.0.1",)}, "http"),
        ('server = "http://127.0.0.1:5000"\nca = "ca.crt"', {}, "http"),
    ],
)
def test_certificates_for_a_registry_on_this_machine_mean_tls(
    text: str, settings: dict[str, tuple[str, ...]], scheme: str
) -> None:
    assert parsed(text, "127.0.0.1:5000", **settings).server.scheme == scheme


def test_a_root_that_may_not_be_read_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "x" * 300  # no file system has such a name: neither there nor absent

    async def main() -> None:
        clock = HandClock()
        hosts = Hosts(RegistrySettings(hosts_dir=tmp_path), clock)
        for _ in range(3):
            clock.pass_by(GLANCE_SECONDS)
            found = await hosts.lookup(name)
            assert found.server.netloc == name

    with caplog.at_level(logging.ERROR):
        trio.run(main)
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage()


def test_certificates_in_dockers_form(tmp_path: Path) -> None:
    folder = tmp_path / "127.0.0.1_5000_"
    folder.mkdir()
    for name in ("a.crt", "b.crt", "client.cert", "client.key", "readme.txt"):
        (folder / name).write_text("")
    server = looked_up(tmp_path, "127.0.0.1:5000").server
    assert server.base == "https://127.0.0.1:5000/v2"
    assert server.trust.ca_files == (str(folder / "a.crt"), str(folder / "b.crt"))
    assert server.trust.client == (str(folder / "client.cert"), str(folder / "client.key"))
    (folder / "client.key").unlink()
    server = looked_up(tmp_path, "127.0.0.1:5000").server
    assert server.trust.client == (str(folder / "client.cert"), str(folder / "client.cert"))


def _rewrite(file: Path) -> None:
    file.write_text('[host."http://second"]')


def _replace(file: Path) -> None:
    new = file.with_name("new")
    new.write_text('[host."http://second"]')
    stamp = file.stat().st_mtime_ns
    os.utime(new, ns=(stamp, stamp))
    new.rename(file)


@pytest.mark.parametrize("change", [_rewrite, _replace])
def test_a_file_that_changed_is_read_again(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """Within a second: a pull looks a hundred times for the same."""
    file = write(tmp_path, "ghcr.io", '[host."http://first-one"]')
    clock = HandClock()

    async def main() -> None:
        hosts = Hosts(RegistrySettings(hosts_dir=tmp_path), clock)
        first = await hosts.lookup("ghcr.io")
        assert [one.netloc for one in first.mirrors] == ["first-one"]
        clock.pass_by(GLANCE_SECONDS)
        assert await hosts.lookup("ghcr.io") is first
        change(file)
        assert await hosts.lookup("ghcr.io") is first
        assert (await hosts.lookup("quay.io")).mirrors == ()
        clock.pass_by(GLANCE_SECONDS)
        assert [one.netloc for one in (await hosts.lookup("ghcr.io")).mirrors] == ["second"]
        file.unlink()
        clock.pass_by(GLANCE_SECONDS)
        assert (await hosts.lookup("ghcr.io")).mirrors == ()

    trio.run(main)


@pytest.mark.parametrize("content", [b"[host", b"\xff\xfe", b"x" * (1024 * 1024 + 1), None])
def test_a_broken_file_is_told_once_and_the_registry_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    file = write(tmp_path, "ghcr.io", "")
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)

    async def main() -> None:
        clock = HandClock()
        hosts = Hosts(RegistrySettings(hosts_dir=tmp_path), clock)
        for _ in range(3):
            clock.pass_by(GLANCE_SECONDS)
            assert (await hosts.lookup("ghcr.io")).server.base == "https://ghcr.io/v2"

    with caplog.at_level(logging.ERROR):
        trio.run(main)
    (record,) = caplog.records
    assert str(file) in record.getMessage()
    assert "asking ghcr.io itself" in record.getMessage()
