"""What a node believes of its peers."""

from __future__ import annotations

from fetcher.peers.standings import Standings


def test_a_peer_that_begins_answers_and_ends_none_rests_longer_each_time() -> None:
    standings, now, rests = Standings(), 0.0, []
    for _ in range(5):
        standings.began("a")
        standings.answered("a", 0.1)
        standings.ended("a")
        rests.append(standings.failed("a", now + 5, started=now))
        now += 5 + rests[-1]
    assert rests == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_what_was_brought_to_its_end_forgives() -> None:
    standings = Standings()
    standings.failed("a", 1.0, started=0.0)
    standings.failed("a", 5.0, started=4.0)
    standings.succeeded("a")
    assert standings.failed("a", 20.0, started=19.0) == 1.0


def test_one_request_shows_whether_a_peer_that_failed_is_better_now() -> None:
    standings = Standings()
    standings.failed("a", 1.0, started=0.0)
    assert not standings.is_tried("a")
    standings.began("a")
    assert standings.is_tried("a")
    standings.succeeded("a")
    assert not standings.is_tried("a")


def test_who_lied_is_banned_longer_each_time_and_counted() -> None:
    standings = Standings()
    assert standings.lied("a", 0.0) == 600.0
    assert not standings.is_usable("a", 599.0)
    assert standings.is_usable("a", 601.0)
    assert standings.lied("a", 601.0) == 1200.0
    assert standings.counts["banned"] == standings.counts["wrong"] == 2


def test_who_is_spared_is_known_once_peers_have_told() -> None:
    standings = Standings()
    standings.began("one")
    assert standings.spare(["one", "two"]) is None
    standings.told("one", 3)
    assert standings.spare(["one", "two"]) == 4
    standings.told("two", 5)
    assert standings.spare(["one", "two"]) == 5


def test_guesses_are_fewer_the_less_comes_of_them() -> None:
    standings = Standings()
    first = standings.guess_pause
    for _ in range(20):
        standings.guessed(found=False)
    longest = standings.guess_pause
    assert longest > 10 * first
    standings.guessed(found=True)
    assert standings.guess_pause < longest
    for _ in range(20):
        standings.guessed(found=True)
    assert standings.guess_pause == first
