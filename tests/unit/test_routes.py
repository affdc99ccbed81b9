"""Redirects as a pure rule: where they may lead, and what goes along."""

from __future__ import annotations

import pytest

from fetcher.errors import AccessDenied
from fetcher.routes import Hop, Route
from fetcher.trust import Trust

OURS = Trust(verify=False, ca_files=("ca.pem",), client=("cert.pem", "key.pem"))
HEADERS = (("Accept", "a/b"), ("Authorization", "Bearer t"), ("X-Custom", "secret"))
FIRST = Hop("https://reg.example/v2/a/blobs/x", HEADERS, OURS)
ROUTE = Route("reg.example", "reg.example", plain_http=("plain.lan",), insecure=("lab.lan",))


def test_on_the_same_host_everything_goes_along() -> None:
    hop = ROUTE.follow(FIRST, "/elsewhere?signature=1")
    assert hop.url == "https://reg.example/elsewhere?signature=1"
    assert (hop.headers, hop.trust) == (HEADERS, OURS)
    assert not ROUTE.steered(hop)
    assert ROUTE.follow(FIRST, "https://reg.example:443/x").headers == HEADERS


@pytest.mark.parametrize(
    "location",
    ["https://cdn.example/x", "https://reg.example:444/x", "//cdn.example/x", "http://plain.lan/x"],
)
def test_elsewhere_nothing_secret_goes_along(location: str) -> None:
    hop = ROUTE.follow(FIRST, location)
    assert hop.headers == (("Accept", "a/b"),)
    assert hop.trust == Trust(verify=True, ca_files=("ca.pem",))
    assert ROUTE.follow(hop, FIRST.url).headers == hop.headers


def test_a_host_that_is_not_verified_by_name_is_not_verified_there_either() -> None:
    assert not ROUTE.follow(FIRST, "https://lab.lan/x").trust.verify


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://cdn.example/x", "unencrypted"),
        ("ftp://cdn.example/x", "plain web address"),
        ("https://user@cdn.example/x", "plain web address"),
        ("https://cdn.example:0/x", "plain web address"),
        ("https://169.254.169.254/latest", "link-local"),
        ("https://127.0.0.1/x", "this machine"),
        ("https://localhost/x", "this machine"),
        ("https://[::ffff:127.0.0.1]/x", "this machine"),
    ],
)
def test_where_redirects_do_not_lead(location: str, reason: str) -> None:
    with pytest.raises(AccessDenied, match=reason):
        ROUTE.follow(FIRST, location)


def test_a_registry_on_this_machine_may_redirect_to_it() -> None:
    route = Route("127.0.0.1:5000", "127.0.0.1:5000")
    hop = route.follow(Hop("http://127.0.0.1:5000/v2/", (), Trust()), "http://localhost:81/x")
    assert not route.steered(hop)
