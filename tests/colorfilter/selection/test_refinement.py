from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from colorfilter.selection.refinement import (
    draw_sample,
    losses_of,
    near_cutoff,
    near_cutoffs_of_batches,
    score_error,
)
from colorfilter.selection.score_tables import pair
from colorfilter.selection.select import select, select_by_batch
from colorfilter.selection.sql import fetch

LENGTH = 16
N = 400


@pytest.fixture
def colors(store: Any) -> dict[tuple[str, int], float]:
    """Two shards of scored sequences and a probe; 'web-b' was scored by the prior in bf16."""
    rng = np.random.default_rng(0)
    made = {}
    for shard in ("web-b", "web-a", "_probe_books"):
        store.add_sequences(shard, [LENGTH] * N + [5])
        values = rng.normal(size=N + 1).astype(np.float32)
        store.add_colors(shard, dict(enumerate(values.tolist())), prior=0.0)
        made |= {(shard, i): float(values[i]) for i in range(N) if shard != "_probe_books"}
    store.connection.execute(
        "UPDATE losses SET precision = 'bf16' WHERE shard = 'web-b' AND model = 'prior'"
    )
    store.publish()
    return made


def found_places(found: pl.DataFrame) -> list[tuple[str, int]]:
    return found.select("shard", "position").rows()


@pytest.mark.parametrize("keep", [1, 100, 799, 800])
@pytest.mark.parametrize("radius", [0.0, 0.05, 10.0])
def test_near_the_cutoff_is_what_lies_within_the_radius(
    store: Any, colors: dict[tuple[str, int], float], keep: int, radius: float
) -> None:
    cutoff = sorted(colors.values())[keep - 1]
    expected = sorted(p for p, c in colors.items() if abs(c - cutoff) <= radius)
    assert expected
    found = near_cutoff(store.connection, "color", "books", keep, radius)
    assert found_places(found) == expected
    assert found["exact"].to_list() == [shard == "web-a" for shard, _ in expected]


def test_near_the_cutoffs_of_batches_is_near_the_cutoff_of_each(
    store: Any, colors: dict[tuple[str, int], float]
) -> None:
    lots = select(store.connection, "random", "books", len(colors), seed=3)
    chosen = set(found_places(select_by_batch(store.connection, "color", "books", 4, 10, seed=3)))
    expected = []
    for start in range(0, len(lots), 40):
        pool = found_places(lots[start : start + 40])
        cutoff = max(colors[p] for p in pool if p in chosen)
        expected += [p for p in pool if abs(colors[p] - cutoff) <= 0.1]
    found = near_cutoffs_of_batches(store.connection, "color", "books", 4, 10, 3, 0.1)
    assert found_places(found) == sorted(expected)
    assert 20 < len(expected) < len(colors) / 2


@pytest.mark.parametrize("tau", [4, 16])
def test_with_exact_losses_near_the_cutoff_the_selection_is_the_exact_one(
    store: Any, tau: int
) -> None:
    """What the paper's selection would be in float32 comes out of scores that err."""
    rng = np.random.default_rng(tau)
    n, error = 4_000, 0.01
    exact = (rng.normal(size=n) * 0.3).astype(np.float32)
    coarse = (exact + rng.normal(size=n) * error).astype(np.float32)
    store.add_sequences("web", [LENGTH] * n)
    store.add_colors("web", dict(enumerate(coarse.tolist())), prior=0.0)
    store.publish()
    keep = n // tau
    wanted = set(np.argsort(exact, kind="stable")[:keep].tolist())
    before = set(select(store.connection, "color", "books", keep, seed=0)["position"])
    assert before != wanted
    near = near_cutoff(store.connection, "color", "books", keep, 6 * error)
    assert keep / 20 < len(near) < n / 2
    for position in near["position"]:
        store.connection.execute(
            "UPDATE losses SET loss = ? WHERE model = 'conditional' AND position = ?",
            [float(exact[position]), position],
        )
    pair(store.connection, "books", ["web"])
    assert set(select(store.connection, "color", "books", keep, seed=0)["position"]) == wanted
    rows = fetch(store.connection, "SELECT count(*) FROM color WHERE domain = 'books'")
    assert rows == [(n,)]


def test_a_sample_is_of_all_shards_and_fixed_by_the_seed() -> None:
    sizes = {"b": 3_000, "a": 1_000, "empty": 0}
    sample = draw_sample(sizes, seed=1)
    assert len(sample) == 400
    assert sample.is_unique().all()
    assert sample.equals(sample.sort("shard", "position"))
    for shard, n in sizes.items():
        positions = sample.filter(pl.col("shard") == shard)["position"]
        assert abs(len(positions) - n / 10) < 40
        assert positions.is_between(0, n - 1).all()
    assert sample.equals(draw_sample(sizes, seed=1))
    assert not sample.equals(draw_sample(sizes, seed=2))
    assert len(draw_sample({"a": 10**9}, seed=0)) == 10_000
    assert draw_sample({"a": 1}, seed=0).rows() == [("a", 0)]


def table(losses: dict[str, list[float]], precision: str) -> pl.DataFrame:
    rows = [
        (model, "s", i, loss, 7, precision)
        for model, values in losses.items()
        for i, loss in enumerate(values)
    ]
    columns = ["model", "shard", "position", "loss", "n_tokens", "precision"]
    return pl.DataFrame(rows, schema=columns, orient="row").cast({"loss": pl.Float32})


def test_the_error_of_a_score_is_that_of_the_difference() -> None:
    exact = table({"p": [1.0, 2.0, 3.0], "c": [0.5, 2.5, 3.0]}, "float32")
    coarse = table({"p": [1.5, 2.0, 3.0], "c": [1.0, 2.25, 3.0]}, "bf16")
    found = score_error(coarse, exact, prior="p", conditional="c")
    assert found["sampled"] == 3
    assert found["score_error"] == pytest.approx(0.25 / np.sqrt(3))
    assert found["largest_score_error"] == 0.25
    assert found["score_spread"] == pytest.approx(np.std([-0.5, 0.5, 0.0]))


def test_losses_of_gathered_sequences_stand_under_their_own_places(tmp_path: Path) -> None:
    tokens, scored = tmp_path / "tokens", tmp_path / "scored"
    for folder in (tokens, scored / "m1", scored / "m2"):
        folder.mkdir(parents=True)
    pl.DataFrame(
        {"row": [0, 1, 2], "shard": ["b", "a", "b"], "position": [7, 5, 1], "n_tokens": [8] * 3},
        schema_overrides={"row": pl.UInt32},
    ).write_parquet(tokens / "sequences.parquet")
    for name in ("m1", "m2"):
        for rows in ([0, 1], [2]):
            part = table({name: [1.0, 2.0, 3.0]}, "float32")[rows]
            part.write_parquet(scored / name / f"losses-{rows[0]}-{rows[-1]}.parquet")
    found = losses_of(scored, tokens).sort("model", "loss")
    assert found.select("model", "shard", "position", "loss").rows() == [
        (m, *row) for m in ("m1", "m2") for row in (("b", 7, 1.0), ("a", 5, 2.0), ("b", 1, 3.0))
    ]
