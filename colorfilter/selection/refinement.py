"""Exact at the cutoff: what 16 bits could decide wrongly is scored again in float32.

A score in 16 bits errs by some thousandths of the scores' spread. That matters only to a sequence
whose score lies within a few such errors of the cutoff: a thousandth of the corpus or less. The
error is measured on a sample that is scored in both precisions; within RADIUS times its root mean
square of a cutoff everything is scored in float32, and the selection is the float32 selection. The
cutoff itself moves by it, by no more than the largest error; so all within MARGIN more is scored
too.
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
SAMPLE_SHARE = 0.1  # of the corpus at the most: of a small one, fewer say enough
RADIUS = 6.0
MARGIN = 4.0

# Lowest scores first up to the cutoff, and what lies around it; `exact` where every loss that the
# score is made of is float32.
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
    """Candidates whose score lies within `radius` (nats per token) of that of the last of `keep`.

    `method` is color or conditional_only. shard, position and `exact`: whether both losses are
    float32.
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
    """The same around the cutoff of every pool of selection.select_by_batch."""
    draw_pools(connection, method, domain, tau, batch, seed, beyond=radius)
    query = NEAR.format(near=NEAR_EACH_POOL)
    found = fetch_frame(connection, query, {"domain": domain, "radius": radius})
    drop_pools(connection)
    return found


def draw_sample(sequences: Mapping[str, int], seed: int) -> pl.DataFrame:
    """Some places at random, shard and position, out of so many sequences of each shard."""
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
    """How many of so many sequences a sample has."""
    return min(SAMPLE, max(1, int(SAMPLE_SHARE * sequences)))


def losses_of(scored: Path, gathered: Path) -> pl.DataFrame:
    """Losses of a gathered folder of sequences, under the shards and positions they came from.

    `scored` holds the chunks; columns as theirs (scoring.score_chunk).
    """
    places = pl.read_parquet(gathered / "sequences.parquet", columns=["row", "shard", "position"])
    chunks = [pl.read_parquet(p) for p in sorted(scored.glob("**/losses-*.parquet"))]
    return (
        pl.concat(chunks)
        .drop("shard")
        .rename({"position": "row"})
        .join(places.with_columns(pl.col("row").cast(pl.Int64)), on="row")
        .select("model", "shard", "position", "loss", "n_tokens", "precision")
    )


def score_error(
    coarse: pl.DataFrame, exact: pl.DataFrame, prior: str, conditional: str
) -> dict[str, Any]:
    """How far scores lie from those in float32, of sequences with both (as of losses_of).

    Returns `score_error`, root mean square, and `largest_score_error`, nats per token;
    `score_spread`, standard deviation of the scores; `sampled`, their number.
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
