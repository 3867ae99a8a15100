"""Drift and histograms of random scores, compared with numpy."""

from typing import Any

import numpy as np
import pytest

from colorfilter.selection.drift import BINS, drift, histogram


@pytest.fixture
def scores(store: Any) -> dict[str, np.ndarray]:
    """Colors of two old shards and a new one, as float32 losses give them."""
    rng = np.random.default_rng(0)
    drawn = {
        "web-a": rng.normal(-1.0, 0.5, 400),
        "web-b": rng.normal(-1.2, 0.7, 300),
        "web-new": rng.normal(0.1, 0.3, 200),
    }
    colors = {}
    for shard, values in drawn.items():
        losses = (4.0 + values).astype(np.float32)
        colors[shard] = losses.astype(np.float64) - 4.0
        store.add_colors(shard, dict(enumerate(values)))
    store.add_colors("_probe_books", dict.fromkeys(range(50), -9.0))
    store.publish()
    return colors


@pytest.mark.parametrize(("method", "offset"), [("color", 0.0), ("conditional_only", 4.0)])
def test_drift_is_the_difference_of_means_in_deviations_of_the_others(
    store: Any, scores: dict[str, np.ndarray], method: str, offset: float
) -> None:
    new = scores["web-new"] + offset
    others = np.concatenate([scores["web-a"], scores["web-b"]]) + offset
    found = drift(store.connection, method, "books", ["web-new"])
    assert (found.new, found.others) == (200, 700)
    assert found.mean_new == pytest.approx(new.mean(), abs=1e-9)
    assert found.mean_others == pytest.approx(others.mean(), abs=1e-9)
    assert found.size == pytest.approx((new.mean() - others.mean()) / others.std(ddof=1), abs=1e-9)


def test_without_new_shards_or_without_others_nothing_drifts(
    store: Any, scores: dict[str, np.ndarray]
) -> None:
    assert drift(store.connection, "color", "books", []).size is None
    assert drift(store.connection, "color", "books", list(scores)).size is None


def test_a_histogram_counts_both_sides_and_leaves_the_probe_out(
    store: Any, scores: dict[str, np.ndarray]
) -> None:
    counts, low, high = histogram(store.connection, "color", "books", ["web-new"])
    both = np.concatenate(list(scores.values()))
    assert (low, high) == pytest.approx(np.quantile(both, [0.01, 0.99]), abs=1e-9)
    edges = np.linspace(low, high, BINS + 1)
    for side, shards in enumerate((("web-a", "web-b"), ("web-new",))):
        values = np.concatenate([scores[s] for s in shards])
        expected, _ = np.histogram(np.clip(values, low, high), edges)
        assert counts[side].sum() == len(values)
        assert np.abs(counts[side] - expected).sum() <= 2  # a value on an edge


def test_a_histogram_of_one_value_has_one_bin(store: Any) -> None:
    store.add_colors("web-a", dict.fromkeys(range(10), 0.5))
    store.publish()
    counts, low, high = histogram(store.connection, "color", "books")
    assert low == high == 0.5
    assert counts.sum() == counts.max() == 10
