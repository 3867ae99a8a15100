"""The distribution of scores, and how far the scores of new shards drift from the others.

New data may differ from the text that the models were trained with. Then its scores drift away
from the others, and a selection takes too much or too little of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
from numpy.typing import NDArray

from colorfilter.selection.select import SCORES
from colorfilter.selection.sql import fetch, fetch_row

BINS = 28


@dataclass(frozen=True)
class Drift:
    """Scores of new shards and of all others: number of sequences, mean, and their difference.

    `size` is the difference of the means in standard deviations of the others; None if there is
    nothing to compare.
    """

    new: int
    others: int
    mean_new: float | None
    mean_others: float | None
    size: float | None


def drift(
    connection: duckdb.DuckDBPyConnection, method: str, domain: str, new: Sequence[str]
) -> Drift:
    """Compare a method's scores of `new` shards with those of all others of the corpus."""
    n_new, n_others, mean_new, mean_others, deviation = fetch_row(
        connection,
        f"""
        WITH {SCORES[method]}, sides AS (
            SELECT score, list_contains($new::VARCHAR[], shard) AS is_new FROM scores
        )
        SELECT
            count(*) FILTER (is_new), count(*) FILTER (NOT is_new),
            avg(score) FILTER (is_new), avg(score) FILTER (NOT is_new),
            stddev_samp(score) FILTER (NOT is_new)
        FROM sides
        """,
        {"domain": domain, "new": list(new)},
    )
    known = bool(n_new and deviation)
    size = (mean_new - mean_others) / deviation if known else None
    return Drift(n_new, n_others, mean_new, mean_others, size)


def histogram(
    connection: duckdb.DuckDBPyConnection, method: str, domain: str, new: Sequence[str] = ()
) -> tuple[NDArray[np.int64], float, float]:
    """Return counts of scores over equal bins and the lowest and highest bin edges.

    Counts are int64 [2, BINS], for the other shards and the new ones. The edges are the 1% and 99%
    quantiles of all scores; the outermost bins also count the scores beyond them.
    """
    parameters = {"domain": domain}
    low, high = fetch_row(
        connection,
        f"WITH {SCORES[method]} "
        "SELECT quantile_cont(score, 0.01), quantile_cont(score, 0.99) FROM scores",
        parameters,
    )
    rows = fetch(
        connection,
        f"""
        WITH {SCORES[method]}
        SELECT
            list_contains($new::VARCHAR[], shard)::INTEGER AS side,
            least(greatest(floor((score - $low) / $width), 0), $last)::INTEGER AS bin, count(*)
        FROM scores GROUP BY ALL
        """,
        {
            **parameters,
            "new": list(new),
            "low": low,
            "width": (high - low) / BINS or 1.0,
            "last": BINS - 1,
        },
    )
    counts = np.zeros((2, BINS), dtype=np.int64)
    for side, bin_number, count in rows:
        counts[side, bin_number] = count
    return counts, low, high
