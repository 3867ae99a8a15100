"""Which sequences to keep, as one query on the score tables.

CoLoR-Filter keeps the sequences with the lowest `conditional - prior` (arXiv 2406.10670,
algorithm 1). The order is canonical: score in float64, then shard, then position, so that ties
fall the same way everywhere. Lower is better for every method.
"""

from pathlib import Path

import duckdb
import polars as pl

from colorfilter.errors import InputError
from colorfilter.tables import fetch_frame, fetch_row

# Lots are drawn by splitmix64 (Steele, Lea and Flood, 2014): a shard's sequences are a stream whose
# state is the shard's key. The same in every version of DuckDB, as its own hash is not.
GOLDEN = 0x9E3779B97F4A7C15
MIX = [(30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)]


def _modulo_2_64(product: str) -> str:
    return f"(({product}) & {2**64 - 1}::UHUGEINT)::UBIGINT"


def _mixed(state: str) -> str:
    for shift, factor in MIX:
        state = _modulo_2_64(f"xor({state}, {state} >> {shift})::UHUGEINT * {factor}::UHUGEINT")
    return f"xor({state}, {state} >> 31)"


KEYS = """
    keys AS (
        SELECT shard, md5_number_lower(concat_ws('|', $seed::VARCHAR, shard)) AS key FROM shards
    )
"""
_STATE = _modulo_2_64(f"key::UHUGEINT + (position + 1)::UHUGEINT * {GOLDEN}::UHUGEINT")
# A number in [0, 1) from the sequence's place and the seed.
LOT = f"({_mixed(_STATE)} >> 11)::DOUBLE / {2**53}"

DRAWN = f"""
    {KEYS},
    scores AS NOT MATERIALIZED (
        SELECT shard, position, {LOT} AS score FROM sequences JOIN keys USING (shard)
        WHERE NOT starts_with(shard, '_')
    )
"""

# Scores of the corpus by method.
SCORES = {
    "color": """
        scores AS NOT MATERIALIZED (
            SELECT shard, position, color AS score FROM color
            WHERE domain = $domain AND NOT starts_with(shard, '_')
        )
    """,
    "conditional_only": """
        scores AS NOT MATERIALIZED (
            SELECT shard, position, loss_conditional::DOUBLE AS score FROM color
            WHERE domain = $domain AND NOT starts_with(shard, '_')
        )
    """,
    "random": DRAWN,
    "full": DRAWN,
}

# Sorting is what takes long. So scores are counted by steps first, and only what lies no higher
# than the step that $keep candidates are reached by is sorted: those that are excluded are taken
# to lie lowest, so that there are enough whatever their scores.
STEP = "floor(score * 4096)"
BEST = f"""
    steps AS (
        SELECT step, sum(count(*)) OVER (ORDER BY step) AS up_to
        FROM (SELECT {STEP} AS step FROM scores) GROUP BY step
    ),
    highest AS (
        SELECT coalesce(min(step), 'inf') AS step FROM steps
        WHERE up_to >= $keep + (SELECT count(*) FROM excluded)
    ),
    chosen AS (
        FROM (FROM scores WHERE {STEP} <= (SELECT step FROM highest))
        ANTI JOIN excluded USING (shard, position)
    )
"""

# The candidates in order of their lots, cut into pools, the last one perhaps smaller. Lots are
# counted by ranges, and only a range that a pool ends in is sorted. One order serves all of those,
# less what lies in the ones before (`ahead`): a window for each would take far longer.
RANGES = 2**16
POOLS = f"""
    {KEYS},
    drawn AS NOT MATERIALIZED (
        SELECT number, position, score, {LOT} AS lot, floor(lot * {RANGES})::INTEGER AS range
        FROM scores ANTI JOIN excluded USING (shard, position)
        JOIN shards USING (shard) JOIN keys USING (shard)
    ),
    counted AS (
        SELECT range, count(*) AS n, sum(n) OVER (ORDER BY range)::BIGINT - n AS before
        FROM drawn GROUP BY range
    ),
    ranges AS (
        SELECT range, before, before // $pool AS pool, pool <> (before + n - 1) // $pool AS cut,
            sum(n) FILTER (cut) OVER (ORDER BY range)::BIGINT - n AS ahead
        FROM counted
    ),
    pools AS (
        SELECT number, position, score, pool FROM drawn JOIN ranges USING (range) WHERE NOT cut
        UNION ALL
        SELECT number, position, score,
            (before - ahead + row_number() OVER (ORDER BY lot, number, position) - 1) // $pool
        FROM drawn JOIN ranges USING (range) WHERE cut
    )
"""

# The best of each pool. Sorted is only what may be among them: of a pool that has as many as are
# kept no higher than the step below which twice the kept share of all lies, no more than those.
BEST_OF_POOLS = f"""
    {POOLS},
    steps AS (
        SELECT {STEP} AS step, sum(count(*)) OVER (ORDER BY step) AS up_to FROM pools GROUP BY step
    ),
    low AS (
        SELECT min(step) AS step FROM steps
        WHERE up_to >= (SELECT max(up_to) FROM steps) * least(1, 2 / $tau)
    ),
    sizes AS (
        SELECT pool, count(*) AS n, if(n = $pool, $batch, floor(n / $tau)) AS kept,
            count(*) FILTER ({STEP} <= (SELECT step FROM low)) AS below,
            if(below >= kept, below, n) AS contenders
        FROM pools GROUP BY pool
    ),
    places AS (
        SELECT number, position, score, pool, kept,
            row_number() OVER (ORDER BY pool, score, number, position) - ahead AS place
        FROM pools JOIN (
            SELECT *, sum(contenders) OVER (ORDER BY pool)::BIGINT - contenders AS ahead FROM sizes
        ) USING (pool)
        WHERE below < kept OR {STEP} <= (SELECT step FROM low)
    ),
    best_of_pools AS (SELECT number, position, score, pool FROM places WHERE place <= kept)
"""
CHOSEN_OF_POOLS = f"""
    {BEST_OF_POOLS},
    chosen AS (SELECT shard, position, score FROM best_of_pools JOIN shards USING (number))
"""

# Where the score is another, the color is joined to what was chosen, not to what it is chosen from.
COLORED = "SELECT *, score AS color FROM chosen"
COLOR_JOINED = """
    SELECT chosen.*, color.color
    FROM chosen
    LEFT JOIN (FROM color WHERE domain = $domain) AS color USING (shard, position)
"""

# A number in the order of the names sorts faster than the name.
SHARDS = """
    shards AS (
        SELECT shard, row_number() OVER (ORDER BY shard) AS number
        FROM (SELECT DISTINCT shard FROM sequences)
    )
"""

SELECTION = """
    WITH {shards},
    {scores},
    {chosen},
    colored AS ({colored})
    SELECT shard, position, score, color
    FROM colored JOIN shards USING (shard)
    ORDER BY score, number, position
    LIMIT $keep
"""


def count_candidates(connection: duckdb.DuckDBPyConnection) -> int:
    """How many sequences can be selected: those of the corpus that are not excluded."""
    query = """
        SELECT count(*) - (SELECT count(*) FROM excluded)
        FROM sequences WHERE NOT starts_with(shard, '_')
    """
    return int(fetch_row(connection, query)[0])


def select(
    connection: duckdb.DuckDBPyConnection, method: str, domain: str, keep: int, seed: int
) -> pl.DataFrame:
    """The best `keep` candidates of a method, best first: rank, shard, position, score, color.

    `rank` counts from 1; `score` is float64, lower is better; `color` is null where not scored.
    """
    parameters: dict[str, float | str] = {"domain": domain, "keep": keep}
    if SCORES[method] is DRAWN:
        parameters["seed"] = seed
    return _ranked(connection, method, BEST, parameters)


def select_by_batch(
    connection: duckdb.DuckDBPyConnection,
    method: str,
    domain: str,
    tau: float,
    batch: int,
    seed: int,
) -> pl.DataFrame:
    """The best `batch` of every random `tau * batch` candidates: the paper's streaming form.

    (arXiv 2406.10670, algorithm 1, with selection within a batch.) What is left over is a smaller
    pool of its own. Columns and order as in `select`.
    """
    parameters: dict[str, float | str] = {
        "domain": domain,
        "keep": 2**62,
        "pool": int(tau * batch),
        "batch": batch,
        "tau": tau,
        "seed": seed,
    }
    return _ranked(connection, method, CHOSEN_OF_POOLS, parameters)


def losses_of(
    connection: duckdb.DuckDBPyConnection, places: pl.DataFrame, role: str, domain: str
) -> pl.DataFrame:
    """Losses at these places by a domain's current model of a role: shard, position, loss."""
    rows = places.select("shard", "position").to_arrow()
    connection.register("wanted", rows)
    query = """
        SELECT shard, position, loss
        FROM wanted JOIN losses USING (shard, position) JOIN models USING (model)
        WHERE models.current AND models.role = $role AND models.domain = $domain
    """
    return fetch_frame(connection, query, {"role": role, "domain": domain})


def document_tokens(connection: duckdb.DuckDBPyConnection) -> pl.DataFrame:
    """The corpus's documents by their number of tokens: shard, doc_id, n_tokens."""
    query = """
        SELECT shard, doc_id, n_tokens FROM documents
        WHERE NOT starts_with(shard, '_') AND n_tokens IS NOT NULL
    """
    return fetch_frame(connection, query, {})


def _ranked(
    connection: duckdb.DuckDBPyConnection,
    method: str,
    chosen: str,
    parameters: dict[str, float | str],
) -> pl.DataFrame:
    colored = COLORED if method == "color" else COLOR_JOINED
    parts = {"shards": SHARDS, "scores": SCORES[method], "colored": colored}
    query = SELECTION.format(chosen=chosen, **parts)
    table = fetch_frame(connection, query, parameters)
    return table.with_row_index("rank", offset=1).with_columns(pl.col("rank").cast(pl.Int64))


def write_selection(chosen: pl.DataFrame, folder: Path) -> None:
    """Write `selection.parquet`: rank, shard, position, score, color, a row per sequence."""
    columns = ["rank", "shard", "position", "score", "color"]
    chosen.select(columns).write_parquet(folder / "selection.parquet", compression="zstd")


def n_to_keep(candidates: int, tau: float, needed: int) -> int:
    """floor(candidates / tau), if that holds the sequences that training needs.

    Raises InputError otherwise.
    """
    keep = int(candidates / tau)
    if keep < needed:
        raise InputError(
            f"target.training_tokens: needs {needed} sequences, but 1/{tau:g} of {candidates} "
            f"candidates is {keep}; lower training_tokens or tau, or add to the corpus"
        )
    return keep
