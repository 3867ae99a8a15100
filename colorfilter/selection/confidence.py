"""Confidence at the cutoff: how much of a selection another seed of the conditional would change.

A score is an estimate: the conditional saw D_down in one of many orders. A second conditional,
trained the same way in another order, scores a sample of sequences. The sequences of the sample
that only one of the two would select are near the cutoff; whether they are selected is chance.
"""

import duckdb
import polars as pl

from colorfilter.config.recipe import Arm
from colorfilter.selection.select import SCORES
from colorfilter.selection.sql import fetch_frame

FLIPS = {
    "arm": pl.String,
    "sampled": pl.Int64,
    "selected": pl.Int64,
    "flips": pl.Int64,
    "correlation": pl.Float64,
}

SAMPLED = """
    WITH {scores}
    SELECT shard, position, loss_prior, scores.score
    FROM scores JOIN wanted USING (shard, position) JOIN color USING (shard, position)
    ANTI JOIN excluded USING (shard, position)
    WHERE color.domain = $domain
"""


def flips(
    connection: duckdb.DuckDBPyConnection, arm: Arm, domain: str, losses: pl.DataFrame
) -> dict[str, str | int | float]:
    """Compare an arm's selection from a sample with a second conditional's; return a row of FLIPS.

    `losses` (shard, position, loss) are the sample's losses under the second conditional. The arm's
    method is color or conditional_only. `sampled` is the number of candidates in the sample,
    `selected` how many have the lowest 1/tau of the published scores, and `flips` how many of the
    selected would not be by the second conditional. `correlation` is Spearman's, between the two
    scores.
    """
    assert arm.tau is not None
    connection.register("wanted", losses.select("shard", "position").to_arrow())
    query = SAMPLED.format(scores=SCORES[arm.method])
    published = fetch_frame(connection, query, {"domain": domain})
    loss = pl.col("loss").cast(pl.Float64)
    second = loss - pl.col("loss_prior") if arm.method == "color" else loss
    both = published.join(losses, on=["shard", "position"]).with_columns(second=second)
    keep = max(1, int(len(both) / arm.tau))
    kept, again = (
        both.sort(by, "shard", "position").head(keep).select("shard", "position")
        for by in ("score", "second")
    )
    correlation = both.select(pl.corr("score", "second", method="spearman")).item()
    return {
        "arm": arm.name,
        "sampled": len(both),
        "selected": keep,
        "flips": len(kept.join(again, on=["shard", "position"], how="anti")),
        "correlation": correlation,
    }
