"""Which proxy a request goes through, by the environment's variables."""

from __future__ import annotations

import pytest

from fetcher.errors import InvalidRequest
from fetcher.proxies import Proxies

PROXY = "http://proxy.lan:3128"


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "https://ghcr.io/v2/", None),
        ({"HTTPS_PROXY": PROXY}, "https://ghcr.io/v2/", PROXY),
        ({"https_proxy": PROXY}, "https://ghcr.io/v2/", PROXY),
        ({"HTTPS_PROXY": PROXY}, "http://ghcr.io/v2/", None),
        ({"HTTP_PROXY": "proxy.lan:3128"}, "http://ghcr.io/v2/", PROXY),
        ({"ALL_PROXY": PROXY}, "https://ghcr.io/v2/", PROXY),
        ({"all_proxy": "http://a", "HTTPS_PROXY": PROXY}, "https://ghcr.io/v2/", PROXY),
        ({"https_proxy": "http://a:1", "HTTPS_PROXY": PROXY}, "https://ghcr.io/", "http://a:1"),
        ({"HTTPS_PROXY": ""}, "https://ghcr.io/v2/", None),
        ({"ALL_PROXY": PROXY}, "http://localhost:5000/v2/", None),
        ({"ALL_PROXY": PROXY}, "http://127.0.0.9:5000/v2/", None),
        ({"ALL_PROXY": PROXY}, "http://[::1]:5000/v2/", None),
        ({"ALL_PROXY": "http://name:word@proxy.lan"}, "http://a/", "http://name:word@proxy.lan"),
    ],
)
def test_the_variables(environment: dict[str, str], url: str, proxy: str | None) -> None:
    assert Proxies.of_environment(environment).of(url) == proxy


@pytest.mark.parametrize(
    ("rule", "host", "direct"),
    [
        ("ghcr.io", "ghcr.io", True),
        ("ghcr.io", "eu.ghcr.io", True),
        ("ghcr.io", "notghcr.io", False),
        (".ghcr.io", "eu.ghcr.io", True),
        (".ghcr.io", "ghcr.io", False),
        ("*.ghcr.io", "eu.ghcr.io", True),
        ("GHCR.IO", "ghcr.io", True),
        ("a, ghcr.io ,b", "ghcr.io", True),
        ("a ghcr.io", "ghcr.io", True),
        ("*", "anything.example", True),
        ("ghcr.io:443", "ghcr.io", True),
        ("ghcr.io:8443", "ghcr.io", False),
        ("reg.lan:5000", "reg.lan:5000", True),
        ("reg.lan", "reg.lan:5000", True),
        ("10.0.0.0/8", "10.1.2.3:5000", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.1/8", "10.9.9.9", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3:5000", "10.1.2.3:5000", True),
        ("10.1.2.3:5000", "10.1.2.3:5001", False),
        ("10.1.2.3", "10.1.2.30", False),
        ("fd00::/8", "[fd00::7]:5000", True),
        ("fd00::7", "[fd00::7]:5000", True),
        ("[fd00::7]:5000", "[fd00::7]:5000", True),
        ("10.0.0.0/99", "10.1.2.3", False),
        ("10.0.0.0/8", "ten.example", False),
        ("", "ghcr.io", False),
        (",", "ghcr.io", False),
    ],
)
def test_the_exceptions(rule: str, host: str, direct: bool) -> None:
    proxies = Proxies.of_environment({"HTTPS_PROXY": PROXY, "NO_PROXY": rule})
    assert proxies.of(f"https://{host}/v2/") == (None if direct else PROXY)


@pytest.mark.parametrize("text", ["socks5://proxy.lan", "http://", "http://[x", "http://a:0"])
def test_a_proxy_that_is_none_is_said_without_its_password(text: str) -> None:
    with pytest.raises(InvalidRequest, match="HTTPS_PROXY") as caught:
        Proxies.of_environment({"HTTPS_PROXY": text.replace("://", "://name:s3cr3t@", 1)})
    assert "s3cr3t" not in str(caught.value)


def test_a_password_of_a_proxy_is_in_no_repr() -> None:
    proxies = Proxies.of_environment({"ALL_PROXY": "http://name:s3cr3t@proxy.lan"})
    assert "s3cr3t" not in repr(proxies)
