"""``Retry-After`` in both of its forms, and in none."""

from __future__ import annotations

import email.utils
import time

import pytest

from fetcher.network_errors import retry_after


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        (" 7 ", 7),
        ("120", 120),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1.5", None),
        ("\u0663", None),
        ("9" * 400, 999_999_999),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
)
def test_what_a_server_may_say(text: str, seconds: float | None) -> None:
    assert retry_after(text) == seconds


def test_a_date_that_is_to_come_is_some_seconds_away() -> None:
    found = retry_after(email.utils.formatdate(time.time() + 100, usegmt=True))
    assert found is not None
    assert 0 < found <= 100
