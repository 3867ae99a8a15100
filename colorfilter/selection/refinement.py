"""Refinement at the cutoff: sequences that 16-bit scores could misplace are scored in float32.

A 16-bit score has an error of some thousandths of the scores' spread. That matters only for
sequences whose score is within a few such errors of the cutoff: a thousandth of the corpus or less.
The root mean square error is measured on a sample that is scored in both precisions. All sequences
within RADIUS times this error of a cutoff are scored in float32, so the selection is the float32
selection. Refining moves the cutoff, by at most the largest error, so sequences within a further
MARGIN times the error are scored too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl

from colorfilter.selection.select import (
    BEST,
    BEST_OF_POOLS,
    SCORES,
    SHARDS,
    draw_pools,
    drop_pools,
)
from colorfilter.selection.sql import fetch_frame

SAMPLE = 10_000
SAMPLE_SHARE = 0.1  # at most this share of the corpus; a small corpus needs a smaller sample
RADIUS = 6.0
MARGIN = 4.0

# Candidates near the cutoff of the lowest scores; `exact` if every loss in the score is float32.
NEAR = """
    WITH {near}
    SELECT shard, position, bool_and(losses.precision = 'float32') AS exact
    FROM near
    JOIN losses USING (shard, position)
    JOIN models ON models.model = losses.model AND models.current
        AND (models.role = 'prior' OR models.role = 'conditional' AND models.domain = $domain)
    GROUP BY shard, position
    ORDER BY shard, position
"""
NEAR_ONE = f"""
    {SHARDS},
    {{scores}},
    {BEST},
    cut AS (SELECT max(score) AS cutoff FROM (SELECT score FROM chosen ORDER BY score LIMIT $keep)),
    near AS (
        SELECT shard, position FROM scores ANTI JOIN excluded USING (shard, position)
        WHERE abs(score - (SELECT cutoff FROM cut)) <= $radius
    )
"""
NEAR_EACH_POOL = f"""
    {BEST_OF_POOLS},
    cuts AS (SELECT pool, max(score) AS cutoff FROM best_of_pools GROUP BY pool),
    near AS (
        SELECT shard, position
        FROM pools JOIN cuts USING (pool) JOIN numbered USING (number)
        WHERE abs(score - cutoff) <= $radius
    )
"""


def near_cutoff(
    connection: duckdb.DuckDBPyConnection, method: str, domain: str, keep: int, radius: float
) -> pl.DataFrame:
    """Return candidates whose score is within `radius` (nats per token) of the cutoff.

    The cutoff is the score of the last of the best `keep` candidates. `method` is color or
    conditional_only. Columns: shard, position and `exact` (whether all losses in the score are
    float32).
    """
    query = NEAR.format(near=NEAR_ONE.format(scores=SCORES[method]))
    return fetch_frame(connection, query, {"domain": domain, "keep": keep, "radius": radius})


def near_cutoffs_of_batches(
    connection: duckdb.DuckDBPyConnection,
    method: str,
    domain: str,
    tau: float,
    batch: int,
    seed: int,
    radius: float,
) -> pl.DataFrame:
    """Like near_cutoff, near the cutoff of every pool of select.select_by_batch."""
    draw_pools(connection, method, domain, tau, batch, seed, beyond=radius)
    query = NEAR.format(near=NEAR_EACH_POOL)
    found = fetch_frame(connection, query, {"domain": domain, "radius": radius})
    drop_pools(connection)
    return found


def draw_sample(sequences: Mapping[str, int], seed: int) -> pl.DataFrame:
    """Draw random sequences (shard, position); `sequences` is the number of sequences by shard."""
    shards = sorted(sequences)
    ends = np.cumsum([sequences[s] for s in shards])
    total = int(ends[-1])
    size = sample_size(total)
    drawn = np.sort(np.random.default_rng(seed).choice(total, size, replace=False, shuffle=False))
    which = np.searchsorted(ends, drawn, side="right")
    starts = ends - [sequences[s] for s in shards]
    return pl.DataFrame(
        {"shard": [shards[i] for i in which], "position": drawn - starts[which]},
        schema={"shard": pl.String, "position": pl.Int64},
    )


def sample_size(sequences: int) -> int:
    """Return the size of a sample of a number of sequences."""
    return min(SAMPLE, max(1, int(SAMPLE_SHARE * sequences)))


def losses_of(scored: Path, gathered: Path) -> pl.DataFrame:
    """Return losses of a gathered folder of sequences, with their original shards and positions.

    `scored` contains the chunks. The columns are those of scoring.score_chunk.
    """
    origins = pl.read_parquet(gathered / "sequences.parquet", columns=["row", "shard", "position"])
    chunks = [pl.read_parquet(p) for p in sorted(scored.glob("**/losses-*.parquet"))]
    return (
        pl.concat(chunks)
        .drop("shard")
        .rename({"position": "row"})
        .join(origins.with_columns(pl.col("row").cast(pl.Int64)), on="row")
        .select("model", "shard", "position", "loss", "n_tokens", "precision")
    )


def score_error(
    coarse: pl.DataFrame, exact: pl.DataFrame, prior: str, conditional: str
) -> dict[str, Any]:
    """Measure the error of scores against float32 scores, over sequences that have both.

    `coarse` and `exact` are losses as returned by losses_of. Returns `score_error` (root mean
    square) and `largest_score_error`, in nats per token; `score_spread`, the standard deviation of
    the float32 scores; and `sampled`, the number of sequences.
    """
    both = _colors(coarse, prior, conditional).join(
        _colors(exact, prior, conditional), on=["shard", "position"], suffix="_exact"
    )
    error = (both["color"] - both["color_exact"]).to_numpy()
    return {
        "sampled": len(both),
        "score_error": float(np.sqrt(np.mean(error**2))),
        "largest_score_error": float(np.abs(error).max()),
        "score_spread": float(both["color_exact"].to_numpy().std()),
    }


def _colors(losses: pl.DataFrame, prior: str, conditional: str) -> pl.DataFrame:
    wide = losses.with_columns(pl.col("loss").cast(pl.Float64)).pivot(
        "model", index=["shard", "position"], values="loss"
    )
    return wide.select("shard", "position", color=pl.col(conditional) - pl.col(prior)).drop_nulls()
