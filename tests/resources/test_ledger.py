import hashlib
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from resources.ledger import NOTHING, Ledger


def entry(asset: str, partition: str | None = None, **facts: object) -> dict[str, object]:
    return {"asset": asset, "partition": partition, **facts}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def test_each_entry_holds_the_hash_of_the_line_before(ledger: Ledger) -> None:
    assert ledger.head() == NOTHING
    heads = []
    for size in (1, 5_000, 50_000, 2):  # of lines longer and shorter than what is read at once
        ledger.append(entry("thing", text="x" * size))
        heads.append(ledger.head())
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    hashes = [hashlib.sha256(line).hexdigest() for line in lines]
    assert heads == hashes
    assert [json.loads(line)["previous"] for line in lines] == [NOTHING, *hashes[:-1]]
    assert [link.before for link in ledger.links()] == [NOTHING, *hashes[:-1]]


@pytest.mark.parametrize("left", ["{", '{"asset": "cut"', "x" * 10_000])
def test_what_a_crash_has_left_of_an_entry_goes(ledger: Ledger, left: str) -> None:
    ledger.append(entry("one"))
    head = ledger.head()
    with ledger.path.open("a") as stream:
        stream.write(left)
    assert ledger.head() == head
    assert [e["asset"] for e in ledger] == ["one"]
    ledger.append(entry("two"))
    assert [e["asset"] for e in ledger] == ["one", "two"]
    assert list(ledger)[1]["previous"] == head


def test_a_crash_in_the_first_entry_leaves_nothing(ledger: Ledger) -> None:
    ledger.path.write_text('{"asset"')
    ledger.append(entry("one"))
    assert [(e["asset"], e["previous"]) for e in ledger] == [("one", NOTHING)]


def test_a_ledger_from_before_entries_were_chained_is_gone_on_with(ledger: Ledger) -> None:
    old = json.dumps(entry("old")) + "\n"
    ledger.path.write_text(old)
    ledger.append(entry("new"))
    assert list(ledger)[1]["previous"] == hashlib.sha256(old.encode()).hexdigest()


def test_the_last_entry_of_a_partition_is_current(ledger: Ledger) -> None:
    for partition, size in (("a", 1), ("b", 2), ("a", 3), (None, 4)):
        ledger.append(entry("thing", partition, size=size))
    found = {partition: e["size"] for (_, partition), e in ledger.current().items()}
    assert found == {"a": 3, "b": 2, None: 4}


def write_many(path: Path, name: str) -> None:
    for i in range(50):
        Ledger(path).append(entry(name, str(i)))


def test_a_replaced_version_is_current_only_where_the_old_one_was(ledger: Ledger) -> None:
    ledger.append(entry("one", path="older"))
    ledger.append(entry("one", path="newer"))
    ledger.append(entry("one", path="older-2", replaces="older"))
    assert ledger.current()["one", None]["path"] == "newer"
    ledger.append(entry("one", path="newer-2", replaces="newer"))
    assert ledger.current()["one", None]["path"] == "newer-2"
    ledger.append(entry("one", path="newer-3", replaces="newer-2"))
    assert ledger.current()["one", None]["path"] == "newer-3"
    assert ledger.last_version("newer") == "newer-3"
    assert ledger.last_version("older") == "older-2"
    assert ledger.last_version("another") == "another"


@pytest.mark.parametrize("removed", [{"removed": True}, {"withdrawn": "whole"}])
def test_what_is_removed_is_not_current(ledger: Ledger, removed: dict[str, Any]) -> None:
    """Also by a ledger of home format 1."""
    ledger.append(entry("one", path="older"))
    ledger.append(entry("one", path="newer"))
    ledger.append(entry("one", path="older", **removed))
    assert ledger.current()["one", None]["path"] == "newer"
    ledger.append(entry("one", path="newer", **removed))
    assert ledger.current() == {}
    ledger.append(entry("one", path="newest"))
    assert ledger.current()["one", None]["path"] == "newest"


def test_what_was_taken_out_of_in_format_1_stays_current(ledger: Ledger) -> None:
    ledger.append(entry("one", path="older"))
    ledger.append(entry("one", path="newer"))
    ledger.append(entry("one", path="older", withdrawn="part"))
    assert ledger.current()["one", None]["path"] == "newer"
    ledger.append(entry("one", path="newer", withdrawn="part", manifest="amended"))
    assert ledger.current()["one", None]["manifest"] == "amended"


def test_writers_at_the_same_time_make_one_chain(ledger: Ledger) -> None:
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write_many, args=(ledger.path, n)) for n in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    links = list(ledger.links())
    assert len(links) == 100
    assert all(link.entry and link.entry["previous"] == link.before for link in links)
