"""Members that say they have a blob: what they send is used only once they were tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fetcher.peers.client import PeerClientSettings
from tests.integration.test_chunk_proofs import files_of, indexed
from tests.integration.test_peer_faults import always, honest, lying, peers, pulled_among
from tests.support.stores import CHUNK, weights

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from tests.integration.test_peer_faults import Done
    from tests.support.proxy import BlobAnswer, Proxy, Rewrite
    from tests.support.registry import RegistryServer

COUNT = 96
TRYING = PeerClientSettings(tried_from=0)


def pulled(
    registry: RegistryServer,
    root: Path,
    reference: str,
    *answers: Rewrite,
) -> Done:
    """Pull among peers that try who has a blob; each of them changes its answers so."""
    with peers(registry, len(answers)) as members:
        for one, answer in zip(members, answers, strict=True):
            one.faults = always(answer)
        addresses = (one.address for one in members)
        return pulled_among(root, reference, *addresses, settings=TRYING)


def test_nothing_of_a_liar_is_used(
    registry: RegistryServer, home: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = weights(COUNT * CHUNK)
    builder.push(registry, "trials/liar", "v1")
    reference = f"{home.address}/trials/liar:v1"
    done = pulled(registry, tmp_path / "root", reference, lying("all"), *[honest("all")] * 3)
    assert done.files == files_of(builder)
    assert done.standings.of("peer-0").wrong == 1
    assert not any(done.standings.of(f"peer-{number}").wrong for number in range(1, 4))
    assert "comparing" not in caplog.text
    # a part of one chunk of each, and what it is to fetch in any case
    assert home.counts.total < COUNT * CHUNK / 2


def test_where_all_lie_the_registry_sends_it_once(
    registry: RegistryServer, home: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = weights(COUNT * CHUNK)
    builder.push(registry, "trials/liars", "v1")
    reference = f"{home.address}/trials/liars:v1"
    done = pulled(registry, tmp_path / "root", reference, *[lying("all")] * 5)
    assert done.files == files_of(builder)
    assert [done.standings.of(f"peer-{number}").wrong for number in range(5)] == [1] * 5
    assert "comparing" not in caplog.text
    assert home.counts.total <= (COUNT + 5) * CHUNK


def test_who_tells_the_truth_is_tried_once(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(COUNT * CHUNK)
    builder.push(registry, "trials/honest", "v1")
    reference = f"{home.address}/trials/honest:v1"
    done = pulled(registry, tmp_path / "root", reference, *[honest("all")] * 3)
    assert done.files == files_of(builder)
    assert done.standings.counts["wrong"] == 0
    assert home.counts.total <= 3 * CHUNK


def test_chunk_digests_save_all_but_the_first_trials(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(COUNT * CHUNK)
    reference = indexed(registry, home.address, builder, "trials/indexed")
    sent = home.counts.total
    done = pulled(registry, tmp_path / "root", reference, *[honest("all")] * 2)
    assert done.files == files_of(builder)
    # the list, which may come after the first bytes
    assert home.counts.total - sent <= 3 * CHUNK


def test_a_registry_that_does_not_say_keeps_nobody_from_being_used(
    registry: RegistryServer, home: Proxy, tmp_path: Path
) -> None:
    builder = weights(COUNT * CHUNK)
    builder.push(registry, "trials/silent", "v1")
    home.faults.ignore_range = True
    reference = f"{home.address}/trials/silent:v1"
    done = pulled(registry, tmp_path / "root", reference, *[honest("all")] * 2)
    assert done.files == files_of(builder)
    assert done.standings.counts["wrong"] == 0
    assert done.standings.counts["requests"] >= COUNT


def test_an_answer_that_ends_before_it_could_be_judged_is_not_used(
    registry: RegistryServer, home: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    builder = weights(COUNT * CHUNK)
    builder.push(registry, "trials/short", "v1")

    def short(answer: BlobAnswer) -> BlobAnswer:
        answer = lying("all")(answer)
        answer.body = answer.body[: len(answer.body) // 2]
        return answer

    reference = f"{home.address}/trials/short:v1"
    done = pulled(registry, tmp_path / "root", reference, short, honest("all"))
    assert done.files == files_of(builder)
    assert "comparing" not in caplog.text
    assert done.standings.of("peer-1").wrong == 0
