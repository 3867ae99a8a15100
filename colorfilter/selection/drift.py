"""How the scores of the corpus are distributed, and how those of new shards lie against the rest.

What arrives later may be other text than what the models were trained beside: then its scores
drift away from the others', and a selection fills with it or passes it over.
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
    """Scores of new shards and of the others: numbers of sequences, means, and how far apart.

    `size` is the difference of the means in standard deviations of the others; None where there is
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
    """The scores by a method of these shards against all others of the corpus."""
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
    """Counts of scores over equal bins, int64 [2, BINS]: the other shards' and the new ones'.

    With the lower edge of the first bin and the upper one of the last: the outermost hundredths
    of all scores, which the outermost bins hold as well.
    """
    asked = {"domain": domain}
    low, high = fetch_row(
        connection,
        f"WITH {SCORES[method]} "
        "SELECT quantile_cont(score, 0.01), quantile_cont(score, 0.99) FROM scores",
        asked,
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
            **asked,
            "new": list(new),
            "low": low,
            "width": (high - low) / BINS or 1.0,
            "last": BINS - 1,
        },
    )
    counts = np.zeros((2, BINS), dtype=np.int64)
    for side, place, count in rows:
        counts[side, place] = count
    return counts, low, high
