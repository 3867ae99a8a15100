import hashlib
import random
from typing import Any

import numpy as np
import polars as pl
import pytest

from colorfilter.errors import InputError
from colorfilter.selection.select import (
    count_candidates,
    n_to_keep,
    select,
    select_by_batch,
)
from colorfilter.selection.sql import fetch

LENGTH = 16
SHARDS = ["web-b", "web-a", "books-z"]


def fill(store: Any, n: int = 40, seed: int = 0) -> dict[tuple[str, int], float]:
    """Shards of n full sequences and a short one, colors with many ties; returns the colors."""
    rng = random.Random(seed)
    colors = {}
    for shard in SHARDS:
        store.add_sequences(shard, [LENGTH] * n + [5])
        mine = {i: rng.choice([-1.5, -1.0, -0.5, 0.0, 0.25]) for i in range(n)}
        store.add_colors(shard, {**mine, n: -9.0})
        colors |= {(shard, i): c for i, c in mine.items()}
    store.add_sequences("_probe_books", [LENGTH] * 5)
    store.add_colors("_probe_books", dict.fromkeys(range(5), -8.0))
    store.publish()
    return colors


def places(table: pl.DataFrame) -> list[tuple[str, int]]:
    return table.select("shard", "position").rows()


# What is selected ----------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 17, 60, 120, 1_000])
def test_the_lowest_colors_are_kept_in_order_of_color_shard_and_position(
    store: Any, keep: int
) -> None:
    colors = fill(store)
    expected = sorted((c, shard, i) for (shard, i), c in colors.items())[:keep]
    table = select(store.connection, "color", "books", keep, seed=0)
    assert table.select("score", "shard", "position").rows() == expected
    assert table["rank"].to_list() == list(range(1, len(expected) + 1))
    assert table["color"].equals(table["score"], check_names=False)
    assert table.schema["score"] == pl.Float64


def candidates(store: Any) -> pl.DataFrame:
    """The candidates with their scores by a plain reading of the rules, from the raw tables."""
    tables = {
        name: pl.DataFrame(store.connection.sql(f"FROM {name}").to_arrow_table())
        for name in ("documents", "spans", "sequences", "losses")
    }
    corpus = {
        name: table.filter(~pl.col("shard").str.starts_with("_")) for name, table in tables.items()
    }
    first = corpus["documents"].group_by("sha256").agg(first=pl.col("shard").min())
    copies = corpus["documents"].join(first, on="sha256").filter(pl.col("shard") > pl.col("first"))
    copied = corpus["spans"].join(copies, on=["shard", "doc_id"], how="semi")
    by = {
        model: part.select("shard", "position", pl.col("loss").cast(pl.Float64))
        for (model,), part in corpus["losses"].group_by(["model"])
    }
    return (
        corpus["sequences"]
        .filter(pl.col("n_tokens") == LENGTH)
        .join(copied, on=["shard", "position"], how="anti")
        .join(by["prior"], on=["shard", "position"])
        .join(by["conditional"], on=["shard", "position"], suffix="_conditional")
        .select("shard", "position", score=pl.col("loss_conditional") - pl.col("loss"))
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [1e-5, 1e-3, 1.0, 1e4])
def test_the_best_are_those_of_a_full_sort_wherever_copies_and_ties_lie(
    store: Any, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n = 300
    for shard in ("c", "a", "b", "_probe_books"):
        store.add_sequences(shard, [LENGTH] * n + [3])
        values = (rng.normal(size=n + 1) * spread).astype(np.float32)
        values[rng.random(n + 1) < 0.4] = np.float32(-spread / 3)
        # The copies lie lowest, among the rest, or highest: nobody may count on where.
        if shard != "a":
            values[:100] += np.float32((-spread, 0.0, spread)[seed % 3] * 2)
        store.add_colors(shard, dict(enumerate(values.tolist())), prior=0.0)
        for i in range(25):
            spans = [(4 * i + j, LENGTH) for j in range(rng.integers(1, 5))]
            store.add_document(shard, f"{shard}{i}", f"text {rng.integers(60)}", spans)
    store.publish()
    expected = candidates(store).sort("score", "shard", "position").with_row_index("rank", 1)
    assert 600 < len(expected) < 880
    assert count_candidates(store.connection) == len(expected)
    for keep in (1, 7, len(expected) // 64, 300, len(expected) - 1, len(expected), 10_000):
        found = select(store.connection, "color", "books", keep, seed=0)
        wanted = expected.head(keep).cast({"rank": pl.Int64}).select(found.columns[:4])
        assert found.drop("color").equals(wanted)


def test_equal_scores_at_the_last_place_go_by_shard_and_position(store: Any) -> None:
    for shard in ("b", "a"):
        store.add_sequences(shard, [LENGTH] * 50)
        store.add_colors(shard, {i: 0.5 if i % 5 else -0.5 for i in range(50)})
    store.publish()
    low = [(s, i) for s in ("a", "b") for i in range(0, 50, 5)]
    high = [(s, i) for s in ("a", "b") for i in range(50) if i % 5]
    for keep in (5, 10, 20, 21, 40, 61, 99):
        found = select(store.connection, "color", "books", keep, seed=0)
        assert places(found) == (low + high)[:keep]


def splitmix64(key: int, index: int) -> int:
    """Output number `index`, from 0, of the published generator started from a key."""
    state = (key + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def test_lots_are_a_splitmix64_stream_for_each_shard_and_seed(store: Any) -> None:
    # The first outputs for 1234567, as the generator's authors' code prints them.
    assert [splitmix64(1234567, i) for i in range(2)] == [6457827717110365317, 3203168211198807973]
    fill(store)
    table = select(store.connection, "random", "books", 1_000, seed=11)
    for shard, position, score in table.select("shard", "position", "score").rows():
        digest = hashlib.md5(f"11|{shard}".encode()).digest()
        # The later eight bytes, the least significant first.
        key = int.from_bytes(digest[8:], "little")
        assert score == (splitmix64(key, position) >> 11) / 2**53
    few = select(store.connection, "random", "books", 30, seed=11)
    assert few.equals(table.head(30))
    assert few["color"].null_count() == 0


@pytest.mark.parametrize(
    ("tau", "batch"), [(4, 5), (4, 1), (2.5, 7), (2.5, 1), (1.5, 3), (8, 100), (1, 3)]
)
def test_by_batch_the_lowest_of_each_random_pool_are_kept(
    store: Any, tau: float, batch: int
) -> None:
    colors = fill(store)
    lots = select(store.connection, "random", "books", len(colors), seed=3)
    pool = int(tau * batch)
    expected = []
    for start in range(0, len(lots), pool):
        places_there = places(lots[start : start + pool])
        best = sorted((colors[p], *p) for p in places_there)
        expected += best[: batch if len(best) == pool else int(len(best) / tau)]
    table = select_by_batch(store.connection, "color", "books", tau, batch, seed=3)
    assert table.select("score", "shard", "position").rows() == sorted(expected)


@pytest.mark.parametrize(("tau", "batch"), [(4, 500), (64, 2), (3, 1)])
def test_pools_of_many_candidates_and_pools_of_few(store: Any, tau: int, batch: int) -> None:
    n = 200_000  # three to a range of lots: pools end within ranges and between them
    store.add_sequences("web", [LENGTH] * n)
    colors = np.random.default_rng(0).normal(size=n).astype(np.float32)
    store.add_colors("web", dict(enumerate(colors.tolist())), prior=0.0)
    store.publish()
    lots = select(store.connection, "random", "books", n, seed=3)["position"].to_numpy()
    whole = lots[: n // (tau * batch) * tau * batch].reshape(-1, tau * batch)
    best = np.take_along_axis(whole, colors[whole].argsort(axis=1, kind="stable"), 1)[:, :batch]
    rest = lots[whole.size :]
    expected = {*best.ravel(), *rest[colors[rest].argsort()][: len(rest) // tau]}
    table = select_by_batch(store.connection, "color", "books", tau, batch, seed=3)
    assert len(table) == len(expected)
    assert set(table["position"]) == expected
    assert table["rank"].to_list() == list(range(1, len(expected) + 1))
    other = select_by_batch(store.connection, "color", "books", tau, batch, seed=4)
    assert other.equals(table) == (tau == 1 or batch == 100)


@pytest.mark.parametrize("n", [4_000, 4_017])
def test_of_a_pool_that_lies_high_as_a_whole_as_many_are_kept(store: Any, n: int) -> None:
    store.add_sequences("web", [LENGTH] * n)
    lots = select(store.connection, "random", "books", n, seed=3)["position"].to_list()
    store.add_colors("web", {p: i / 1_000 for i, p in enumerate(lots)}, prior=0.0)
    store.publish()
    expected = [p for i, p in enumerate(lots) if i % 40 < (10 if i < 4_000 else n % 40 // 4)]
    table = select_by_batch(store.connection, "color", "books", 4, 10, seed=3)
    assert table["position"].to_list() == expected


def test_the_order_does_not_depend_on_the_order_of_the_rows(store: Any) -> None:
    fill(store)
    before = select(store.connection, "color", "books", 50, seed=0)
    for name in ("sequences", "losses", "paired_losses", "excluded"):
        store.connection.execute(f"CREATE TABLE t AS FROM {name} ORDER BY hash(position, shard)")
        store.connection.execute(f"DELETE FROM {name}")
        store.connection.execute(f"INSERT INTO {name} FROM t")
        store.connection.execute("DROP TABLE t")
        if name == "losses":
            store.publish()
    assert select(store.connection, "color", "books", 50, seed=0).equals(before)


def test_the_difference_is_taken_in_float64(store: Any) -> None:
    store.add_sequences("s", [LENGTH] * 2)
    prior = {0: 4.0, 1: 1.0}
    conditional = {0: float(np.float32(5.0000005)), 1: float(np.float32(2.0000002))}
    store.add_losses("prior", "s", prior)
    store.add_losses("conditional", "s", conditional)
    store.publish()
    table = select(store.connection, "color", "books", 2, seed=0)
    expected = {i: float(np.float32(conditional[i])) - prior[i] for i in (0, 1)}
    assert dict(zip(table["position"], table["score"], strict=True)) == expected


def test_another_domain_has_its_own_colors(store: Any) -> None:
    store.add_sequences("s", [LENGTH] * 2)
    store.add_losses("prior", "s", {0: 4.0, 1: 4.0})
    store.add_losses("conditional", "s", {0: 3.0, 1: 5.0})
    store.add_losses("other", "s", {0: 5.0, 1: 3.0})
    store.publish()
    best = {
        domain: select(store.connection, "color", domain, 1, seed=0)["position"][0]
        for domain in ("books", "code")
    }
    assert best == {"books": 0, "code": 1}


def test_conditional_only_goes_by_the_conditional_loss_and_carries_the_color(store: Any) -> None:
    store.add_sequences("a", [LENGTH] * 3)
    store.add_losses("prior", "a", {0: 9.0, 1: 2.0, 2: 5.0})
    store.add_losses("conditional", "a", {0: 4.0, 1: 3.0, 2: 5.0})
    store.publish()
    table = select(store.connection, "conditional_only", "books", 2, seed=0)
    assert table["position"].to_list() == [1, 0]
    assert table["score"].to_list() == [3.0, 4.0]
    assert table["color"].to_list() == [1.0, -5.0]


@pytest.mark.parametrize("method", ["color", "conditional_only", "random", "full"])
def test_reserved_shards_and_short_sequences_are_never_selected(store: Any, method: str) -> None:
    fill(store)
    table = select(store.connection, method, "books", 10_000, seed=0)
    assert sorted(places(table)) == sorted((s, i) for s in SHARDS for i in range(40))
    assert count_candidates(store.connection) == 120


@pytest.mark.parametrize("method", ["color", "conditional_only", "random", "full"])
def test_of_copies_in_several_shards_the_first_shards_is_kept(store: Any, method: str) -> None:
    for shard in ("a", "b", "c", "_probe_books"):
        store.add_sequences(shard, [LENGTH] * 4)
        store.add_colors(shard, {i: float(i) for i in range(4)})
    store.add_document("c", "c1", "same", [(0, 16), (1, 4)])
    store.add_document("c", "c2", "own", [(1, 12), (2, 16), (3, 16)])
    store.add_document("b", "b1", "own of b", [(0, 16), (1, 8)])
    store.add_document("b", "b2", "same", [(1, 8), (2, 12)])
    store.add_document("b", "b3", "more", [(2, 4), (3, 16)])
    store.add_document("a", "a1", "more", [(0, 16), (1, 16), (2, 16), (3, 16)])
    store.add_document("_probe_books", "p1", "own of b", [(0, 16)])
    store.publish()
    expected = {("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0), ("b", 1), ("c", 2), ("c", 3)}
    table = select(store.connection, method, "books", 100, seed=0)
    assert set(places(table)) == expected - {("b", 2)}
    assert count_candidates(store.connection) == len(expected)


def test_what_is_excluded_has_one_reason(store: Any) -> None:
    store.add_sequences("a", [LENGTH] * 3 + [9])
    store.add_sequences("b", [LENGTH] * 3 + [9])
    store.add_sequences("_probe_books", [LENGTH, 9])
    store.add_document("a", "a1", "same", [(0, 16), (1, 16)])
    store.add_document("a", "a2", "twice in a shard", [(2, 8)])
    store.add_document("a", "a3", "twice in a shard", [(2, 8), (3, 9)])
    store.add_document("b", "b1", "other", [(0, 16), (1, 3)])
    store.add_document("b", "b2", "same", [(1, 4), (2, 4)])
    store.add_document("b", "b3", "same", [(2, 12), (3, 9)])
    store.add_document("_probe_books", "p1", "same", [(0, 16)])
    for _ in range(2):
        store.publish()
        assert fetch(store.connection, "FROM excluded ORDER BY ALL") == [
            ("a", 3, "padded"),
            ("b", 1, "copy"),
            ("b", 2, "copy"),
            ("b", 3, "padded"),
        ]


def test_random_is_fixed_by_the_seed(store: Any) -> None:
    fill(store)
    one, same, other = (select(store.connection, "random", "books", 60, seed=s) for s in (1, 1, 2))
    assert one.equals(same)
    assert set(places(one)) != set(places(other))


def test_random_is_even_and_does_not_look_at_color(store: Any) -> None:
    n = 3_000
    store.add_sequences("a", [LENGTH] * n)
    store.add_sequences("b", [LENGTH] * n)
    store.add_colors("a", {i: i / n - 1 for i in range(n)})
    store.publish()
    table = select(store.connection, "random", "books", n, seed=3)
    assert table["score"].is_between(0, 1, closed="left").all()
    assert table["score"].is_sorted()
    assert abs((table["shard"] == "a").sum() - n / 2) < 150
    assert abs(table["position"].mean() - n / 2) < 70
    scores = select(store.connection, "random", "books", 2 * n, seed=3)["score"]
    counts = np.histogram(scores, bins=10, range=(0, 1))[0]
    assert np.abs(counts - 2 * n / 10).max() < 110
    scored = table.filter(pl.col("color").is_not_null())
    assert set(scored["shard"]) == {"a"}
    assert abs(scored["color"].mean() + 0.5) < 0.05


def test_random_keeps_its_numbers_when_a_shard_arrives(store: Any) -> None:
    fill(store)
    before = select(store.connection, "random", "books", 1_000, seed=0)
    store.add_sequences("new", [LENGTH] * 20)
    store.publish()
    after = select(store.connection, "random", "books", 1_000, seed=0)
    kept = after.filter(pl.col("shard") != "new").select("shard", "position", "score")
    assert kept.equals(before.select("shard", "position", "score"))


@pytest.mark.parametrize(
    ("candidates", "tau", "needed", "keep"),
    [(100, 8, 12, 12), (100, 1, 100, 100), (7, 2.5, 0, 2), (1_000_000_007, 64, 5, 15_625_000)],
)
def test_the_best_1_by_tau_are_kept_rounded_down(
    candidates: int, tau: float, needed: int, keep: int
) -> None:
    assert n_to_keep(candidates, tau, needed) == keep


def test_too_few_candidates_for_the_training_are_refused() -> None:
    with pytest.raises(InputError, match=r"target\.training_tokens: needs 13 .* is 12;") as raised:
        n_to_keep(100, 8, 13)
    assert "\n" not in str(raised.value)
