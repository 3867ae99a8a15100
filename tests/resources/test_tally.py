"""Progress of scoring: finished chunks per shard and per machine."""

import logging

import pytest

from resources import tally
from resources.tally import Tally


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def test_the_first_and_the_last_chunk_are_told(said: pytest.LogCaptureFixture) -> None:
    count = Tally(["a", "a", "b"])
    for shard, node in (("a", "one"), ("b", "two"), ("a", "one")):
        count.add(shard, node)
    assert [record.getMessage() for record in said.records] == [
        "chunks: 1 of 3; shards: 0 of 2 complete, a 1 of 2; by node: one 1",
        "chunks: 3 of 3; shards: 2 of 2 complete; by node: one 2, two 1",
    ]


def test_between_them_it_is_told_from_time_to_time(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(tally.time, "monotonic", lambda: now)
    count = Tally(["a"] * 100)
    for _ in range(50):
        count.add("a", None)
        now += tally.TALLY_SECONDS / 10
    assert len(said.records) == 5
