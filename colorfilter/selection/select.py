"""Select the sequences to keep, by queries on the score tables.

CoLoR-Filter keeps the sequences with the lowest `conditional - prior` (arXiv 2406.10670,
algorithm 1). The order is canonical: score in float64, then shard, then position, so that ties
are broken the same way everywhere. Lower is better for every method.
"""

from pathlib import Path

import duckdb
import polars as pl

from colorfilter.errors import InputError
from colorfilter.selection.sql import fetch_frame, fetch_row
from colorfilter.stages import IN_CORPUS

# Random keys come from splitmix64 (Steele, Lea and Flood, 2014): each shard is a stream whose state
# is the shard's key. DuckDB's own hash differs between versions.
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
# A number in [0, 1) from the seed and the sequence's shard and position.
RANDOM_KEY = f"({_mixed(_STATE)} >> 11)::DOUBLE / {2**53}"

DRAWN = f"""
    {KEYS},
    scores AS NOT MATERIALIZED (
        SELECT shard, position, {RANDOM_KEY} AS score FROM sequences JOIN keys USING (shard)
        WHERE {IN_CORPUS}
    )
"""

# Scores of the corpus by method.
SCORES = {
    "color": f"""
        scores AS NOT MATERIALIZED (
            SELECT shard, position, color AS score FROM color
            WHERE domain = $domain AND {IN_CORPUS}
        )
    """,
    "conditional_only": f"""
        scores AS NOT MATERIALIZED (
            SELECT shard, position, loss_conditional::DOUBLE AS score FROM color
            WHERE domain = $domain AND {IN_CORPUS}
        )
    """,
    "random": DRAWN,
    "full": DRAWN,
}

# Sorting takes most of the time. So scores are first counted by steps, and only scores up to the
# step that completes $keep candidates are sorted. Excluded sequences are counted as if they had the
# lowest scores, so that enough candidates remain whatever the scores of the excluded.
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

# Selection by batch divides the candidates into pools in the order of their random keys; the last
# pool may be smaller. All candidates must never be stored or sorted at once, which DuckDB would do
# for a part shared within one query; so these are separate statements. One pass counts candidates
# by ranges of random keys and by steps of the score; a second pass takes only contenders.
RANGES_OF_A_POOL = 16
MOST_RANGES = 2**20

NUMBERED = """
    CREATE OR REPLACE TEMP TABLE numbered AS
    WITH {shards},
    {keys}
    SELECT shard, number, key FROM shards JOIN keys USING (shard)
"""

DRAWN_CANDIDATES = f"""
    drawn AS NOT MATERIALIZED (
        SELECT number, position, score, {RANDOM_KEY} AS random_key,
            floor(random_key * $ranges)::INTEGER AS range
        FROM (SELECT number, key, position, score FROM scores JOIN numbered USING (shard))
        ANTI JOIN (SELECT number, position FROM excluded JOIN numbered USING (shard))
            USING (number, position)
    )
"""

COUNTED = """
    CREATE OR REPLACE TEMP TABLE counted AS
    WITH {scores},
    {drawn}
    SELECT range, step, count(*) AS n
    FROM (SELECT range, {step} AS step FROM drawn) GROUP BY GROUPING SETS ((range), (step))
"""

# For each range: its first pool, whether that pool ends within the range (`cut`), and how many
# candidates are in earlier ranges (`before`) and in earlier ranges that are cut (`ahead`).
RANGED = """
    CREATE OR REPLACE TEMP TABLE ranges AS
    SELECT range, before, before // $pool AS pool, pool <> (before + n - 1) // $pool AS cut,
        sum(n) FILTER (cut) OVER (ORDER BY range)::BIGINT - n AS ahead
    FROM (
        SELECT range, n, sum(n) OVER (ORDER BY range)::BIGINT - n AS before
        FROM counted WHERE step IS NULL
    )
"""

SIZED = """
    CREATE OR REPLACE TEMP TABLE sizes AS
    SELECT pool, if(n = $pool, $batch, floor(n / $tau)) AS kept
    FROM (
        SELECT pool, least($pool, total - pool * $pool) AS n
        FROM (
            SELECT total, unnest(range((total + $pool - 1) // $pool)) AS pool
            FROM (SELECT sum(n)::BIGINT AS total FROM counted WHERE step IS NULL)
        )
    )
"""

# A score below which almost every pool has all the candidates it keeps: more than the kept share of
# all candidates is below it, by a margin.
LOW = """
    SELECT (coalesce(min(step), 0) + 1) / 4096
    FROM (
        SELECT step, sum(n) OVER (ORDER BY step) AS up_to FROM counted WHERE range IS NULL
    )
    WHERE up_to >= (SELECT sum(n) FROM counted WHERE range IS NULL)
        * least(1, (1 + 5 / sqrt($batch)) / $tau)
"""

# Contenders: low scores, and all candidates of cut ranges. Only cut ranges sort by random key.
POOLED = """
    CREATE OR REPLACE TEMP TABLE pools AS
    WITH {scores},
    {drawn},
    contenders AS MATERIALIZED (
        SELECT * FROM drawn
        WHERE score <= $low + $beyond OR range IN (SELECT range FROM ranges WHERE cut)
    )
    SELECT number, position, score, pool
    FROM contenders JOIN ranges USING (range) WHERE NOT cut
    UNION ALL
    SELECT number, position, score,
        (before - ahead + row_number() OVER (ORDER BY random_key, number, position) - 1) // $pool
    FROM contenders JOIN ranges USING (range) WHERE cut
"""

SHORT = """
    CREATE OR REPLACE TEMP TABLE short AS
    SELECT pool FROM sizes LEFT JOIN (FROM pools WHERE score < $low) USING (pool)
    GROUP BY pool, kept HAVING count(score) < kept
"""
REST_OF_SHORT = """
    INSERT INTO pools
    WITH {scores},
    {drawn}
    SELECT number, position, score, pool
    FROM drawn JOIN ranges USING (range) JOIN short USING (pool)
    WHERE NOT cut AND score > $low + $beyond
"""

# One sort serves all pools: subtracting the size of earlier pools (`ahead`) gives the rank within
# a pool. A window per pool would take far longer.
BEST_OF_POOLS = """
    places AS (
        SELECT number, position, score, pool, kept,
            row_number() OVER (ORDER BY pool, score, number, position) - ahead AS place
        FROM pools JOIN (
            SELECT pool, sum(count(*)) OVER (ORDER BY pool)::BIGINT - count(*) AS ahead
            FROM pools GROUP BY pool
        ) USING (pool) JOIN sizes USING (pool)
    ),
    best_of_pools AS (SELECT number, position, score, pool FROM places WHERE place <= kept)
"""
CHOSEN_OF_POOLS = f"""
    {BEST_OF_POOLS},
    chosen AS (SELECT shard, position, score FROM best_of_pools JOIN numbered USING (number))
"""

# If the score is not the color, the color is joined only to the chosen sequences.
COLORED = "FROM chosen"
COLOR_JOINED = """
    SELECT chosen.*, color.color
    FROM chosen
    LEFT JOIN (FROM color WHERE domain = $domain) AS color USING (shard, position)
"""

# Shards are numbered in the order of their names, because numbers sort faster than names.
SHARDS = """
    shards AS (
        SELECT shard, row_number() OVER (ORDER BY shard) AS number
        FROM (SELECT DISTINCT shard FROM sequences)
    )
"""

# Millions of names would take most of the memory. So queries return shard numbers, and each name is
# held in memory only once.
NAMES = "SELECT DISTINCT shard FROM sequences ORDER BY shard"

SELECTION = """
    WITH {shards},
    {scores},
    {chosen},
    colored AS ({colored})
    SELECT number::INTEGER AS number, * EXCLUDE (shard, number)
    FROM colored JOIN shards USING (shard)
    ORDER BY score, number, position
    LIMIT $keep
"""


def count_candidates(connection: duckdb.DuckDBPyConnection) -> int:
    """Return how many sequences can be selected: those of the corpus that are not excluded."""
    query = f"""
        SELECT count(*) - (SELECT count(*) FROM excluded)
        FROM sequences WHERE {IN_CORPUS}
    """
    return int(fetch_row(connection, query)[0])


def select(
    connection: duckdb.DuckDBPyConnection, method: str, domain: str, keep: int, seed: int
) -> pl.DataFrame:
    """Return the best `keep` candidates of a method, best first.

    Columns: rank (from 1), shard, position, score (float64, lower is better) and color (null for
    sequences without scores).
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
    """Return the best `batch` of every random `tau * batch` candidates: the paper's streaming form.

    This is algorithm 1 of arXiv 2406.10670 with selection within a batch. Remaining candidates form
    a last, smaller pool. Columns and order are those of `select`.
    """
    draw_pools(connection, method, domain, tau, batch, seed)
    chosen = _ranked(connection, method, CHOSEN_OF_POOLS, {"domain": domain, "keep": 2**62})
    drop_pools(connection)
    return chosen


def draw_pools(
    connection: duckdb.DuckDBPyConnection,
    method: str,
    domain: str,
    tau: float,
    batch: int,
    seed: int,
    beyond: float = 0.0,
) -> None:
    """Create the temporary tables of select_by_batch.

    `numbered` has a number for each shard, in the order of names. `sizes` has how many candidates
    each pool keeps. `pools` has shard number, position, score and pool of candidates: in every
    pool, at least those that are kept and all whose score is at most `beyond` above theirs.
    """
    pool = int(tau * batch)
    pools = -(-count_candidates(connection) // pool)
    ranges = min(2 ** (RANGES_OF_A_POOL * pools).bit_length(), MOST_RANGES)
    parts = {"scores": SCORES[method], "drawn": DRAWN_CANDIDATES, "step": STEP}
    drawn = {"ranges": ranges, "domain": domain}
    shares = {"batch": batch, "tau": tau}
    connection.execute(NUMBERED.format(shards=SHARDS, keys=KEYS), {"seed": seed})
    connection.execute(COUNTED.format(**parts), drawn)
    connection.execute(RANGED, {"pool": pool})
    connection.execute(SIZED, {"pool": pool, **shares})
    low = {"low": fetch_row(connection, LOW, shares)[0]}
    connection.execute(POOLED.format(**parts), {**drawn, **low, "beyond": beyond, "pool": pool})
    connection.execute(SHORT, low)
    if fetch_row(connection, "SELECT count(*) FROM short")[0]:
        connection.execute(REST_OF_SHORT.format(**parts), {**drawn, **low, "beyond": beyond})


def drop_pools(connection: duckdb.DuckDBPyConnection) -> None:
    """Drop the tables that draw_pools creates."""
    for table in ("numbered", "counted", "ranges", "sizes", "pools", "short"):
        connection.execute(f"DROP TABLE {table}")


def losses_of(
    connection: duckdb.DuckDBPyConnection, places: pl.DataFrame, role: str, domain: str
) -> pl.DataFrame:
    """Return losses of sequences under a domain's current model of a role.

    `places` and the result are tables of sequences by shard and position; the result adds loss.
    """
    rows = places.select("shard", "position").to_arrow()
    connection.register("wanted", rows)
    query = """
        SELECT shard, position, loss
        FROM wanted JOIN losses USING (shard, position) JOIN models USING (model)
        WHERE models.current AND models.role = $role AND models.domain = $domain
    """
    return fetch_frame(connection, query, {"role": role, "domain": domain})


def document_tokens(connection: duckdb.DuckDBPyConnection) -> pl.DataFrame:
    """Return the number of tokens of the corpus's documents: shard, doc_id, n_tokens."""
    query = f"""
        SELECT shard, doc_id, n_tokens FROM documents
        WHERE {IN_CORPUS} AND n_tokens IS NOT NULL
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
    names = fetch_frame(connection, NAMES, {})["shard"]
    return table.select(
        rank=pl.int_range(1, pl.len() + 1, dtype=pl.Int64),
        shard=names.gather(table["number"] - 1),
        position="position",
        score="score",
        color="score" if method == "color" else "color",
    )


def write_selection(chosen: pl.DataFrame, folder: Path) -> None:
    """Write `selection.parquet`, a row per sequence: rank, shard, position, score, color."""
    columns = ["rank", "shard", "position", "score", "color"]
    chosen.select(columns).write_parquet(folder / "selection.parquet", compression="zstd")


def n_to_keep(candidates: int, tau: float, needed: int) -> int:
    """Return floor(candidates / tau), the number of sequences to keep.

    Raises InputError if training needs more.
    """
    keep = int(candidates / tau)
    if keep < needed:
        raise InputError(
            f"target.training_tokens: needs {needed} sequences, but 1/{tau:g} of {candidates} "
            f"candidates is {keep}; lower training_tokens or tau, or add to the corpus"
        )
    return keep
