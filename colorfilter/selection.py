"""Which sequences to keep, as one query on the score tables, and their text.

CoLoR-Filter keeps the sequences with the lowest `conditional - prior` (arXiv 2406.10670,
algorithm 1). The order is canonical: score in float64, then shard, then position, so that ties
fall the same way everywhere. Lower is better for every method.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from colorfilter.errors import InputError
from colorfilter.parquet import TableWriter
from colorfilter.tables import fetch_frame, fetch_row
from colorfilter.tokens import open_tokens

# A number in [0, 1) from the sequence's place and the seed: the same in every version.
LOT = """
    md5_number_lower(concat_ws('|', $seed::VARCHAR, shard, position))::DOUBLE
        / 18446744073709551616.0
"""

# A lot is dear, so that it is kept rather than worked out twice.
DRAWN = f"""
    scores AS MATERIALIZED (
        SELECT shard, position, {LOT} AS score FROM sequences
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

# The candidates in random order, cut into pools; the best 1/tau of each are kept. The pools stand
# one behind the other in a single order: a window for each of them would take far longer.
POOLS = f"""
    pools AS (
        SELECT
            number, position, score,
            (row_number() OVER (ORDER BY {LOT}, number, position) - 1) // $pool AS pool
        FROM scores ANTI JOIN excluded USING (shard, position) JOIN shards USING (shard)
    ),
    places AS (
        SELECT
            number, position, score, pool,
            row_number() OVER (ORDER BY pool, score, number, position) - pool * $pool AS place
        FROM pools
    ),
    total AS (SELECT count(*) AS n FROM scores ANTI JOIN excluded USING (shard, position)),
    best_of_pools AS (
        SELECT number, position, score, pool FROM places
        WHERE $tau * place <= least($pool, (SELECT n FROM total) - pool * $pool)
    )
"""
BEST_OF_POOLS = f"""
    {POOLS},
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
        "pool": max(1, int(tau * batch)),
        "tau": tau,
        "seed": seed,
    }
    return _ranked(connection, method, BEST_OF_POOLS, parameters)


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


def write_tokens(
    selection: pl.DataFrame, tokens: Mapping[str, Path], seed: int, out: Path
) -> dict[str, int]:
    """Gather the selected sequences into `tokens.npy` [n, T] and `sequences.parquet`.

    The rows stand in a random order that `seed` fixes, so that a single pass over the file is a
    fair pass; `sequences.parquet` says where each came from. Returns counts.
    """
    out.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(seed).permutation(len(selection))
    shuffled = selection[order].with_row_index("row")
    first = open_tokens(tokens[selection["shard"][0]])
    n, length = len(selection), first.shape[1]
    rows = np.lib.format.open_memmap(out / "tokens.npy", "w+", first.dtype, (n, length))
    tables = []
    for (shard,), part in shuffled.group_by(["shard"], maintain_order=True):
        positions = part["position"].to_numpy()
        rows[part["row"].to_numpy()] = open_tokens(tokens[str(shard)])[positions]
        facts = pl.read_parquet(tokens[str(shard)] / "sequences.parquet")
        tables.append(part.join(facts, on="position", how="left", maintain_order="left"))
    rows.flush()
    table = pl.concat(tables).sort("row")
    table.write_parquet(out / "sequences.parquet", compression="zstd")
    return {"sequences": n, "tokens": int(table["n_tokens"].sum())}


FILTERED = pa.schema(
    [
        ("text", pa.string()),
        ("doc_id", pa.string()),
        ("source", pa.string()),
        ("color", pa.float64()),
        ("fraction", pa.float64()),
        ("n_tokens", pa.int64()),
        ("shard", pa.string()),
        ("char_start", pa.int64()),
        ("char_end", pa.int64()),
        ("extra", pa.string()),
    ]
)


def write_selected_text(
    selection: pl.DataFrame,
    tokens: Mapping[str, Path],
    documents: Mapping[str, Path],
    whole_documents_from: float | None,
    out: Path,
    left_out: Collection[str] = (),
) -> dict[str, int]:
    """Write the selected spans as text, one Parquet file per shard.

    A row is an unbroken run of selected text of one document: its original characters, `color`
    (token-weighted mean of its sequences), and `fraction`, the selected share of the whole
    document's tokens. With `whole_documents_from` a row is a whole document instead, given for
    those of which at least that fraction was selected, but not for those whose `doc_id` is in
    `left_out`. Returns counts.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts = {"texts": 0, "chars": 0}
    for shard in sorted(selection["shard"].unique()):
        spans = pl.read_parquet(tokens[shard] / "spans.parquet")
        chosen = selection.filter(pl.col("shard") == shard)
        runs = unbroken_runs(spans, chosen)
        if whole_documents_from is not None:
            runs = whole_documents(runs, spans).filter(
                pl.col("fraction") >= whole_documents_from,
                ~pl.col("doc_id").is_in(list(left_out)),
            )
        with TableWriter(out / f"{shard}.parquet", FILTERED) as writer:
            for row in with_text(runs, documents[shard], shard):
                writer.add(row, len(row["text"]))
                counts["texts"] += 1
                counts["chars"] += len(row["text"])
    return counts


# Weighted by tokens; null where a sequence was not scored.
MEAN_COLOR = (
    pl.when(pl.col("color").null_count() == 0)
    .then((pl.col("color") * pl.col("n_tokens")).sum() / pl.col("n_tokens").sum())
    .otherwise(None)
)


def unbroken_runs(spans: pl.DataFrame, chosen: pl.DataFrame) -> pl.DataFrame:
    """Unbroken runs of selected spans: doc_id, char_start, char_end, n_tokens, color, fraction."""
    size = spans.group_by("doc_id").agg(document_tokens=pl.col("n_tokens").sum())
    selected = spans.join(chosen.select("position", "color"), on="position").sort(
        "doc_id", "doc_start"
    )
    end_before = (pl.col("doc_start") + pl.col("n_tokens")).shift(1).over("doc_id")
    broken = (end_before != pl.col("doc_start")).fill_null(True)
    return (
        selected.with_columns(run=broken.cum_sum())
        .group_by("doc_id", "run", maintain_order=True)
        .agg(
            pl.col("char_start").first(),
            pl.col("char_end").last(),
            color=MEAN_COLOR,
            n_tokens=pl.col("n_tokens").sum().cast(pl.Int64),
        )
        .join(size, on="doc_id", maintain_order="left")
        .with_columns(fraction=pl.col("n_tokens").sum().over("doc_id") / pl.col("document_tokens"))
        .drop("run", "document_tokens")
        .filter(pl.col("char_end") > pl.col("char_start"))
    )


def whole_documents(runs: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """The documents that have selected runs, each as a run from end to end, in the same columns."""
    whole = spans.group_by("doc_id").agg(
        pl.col("char_end").max(), whole_tokens=pl.col("n_tokens").sum().cast(pl.Int64)
    )
    return (
        runs.group_by("doc_id", maintain_order=True)
        .agg(
            pl.col("fraction").first(),
            char_start=pl.lit(0, dtype=pl.Int64),
            color=MEAN_COLOR,
        )
        .join(whole, on="doc_id", maintain_order="left")
        .rename({"whole_tokens": "n_tokens"})
    )


def with_text(runs: pl.DataFrame, documents: Path, shard: str) -> Iterator[dict[str, Any]]:
    """Runs in the order of the documents, with their text and fields of their documents."""
    by_document = runs.partition_by("doc_id", as_dict=True)
    for batch in pq.ParquetFile(documents).iter_batches(
        batch_size=256, columns=["doc_id", "source_file", "source", "extra", "text"]
    ):
        for document in batch.to_pylist():
            part = by_document.get((document["doc_id"],))
            for run in part.iter_rows(named=True) if part is not None else ():
                text = document["text"][run["char_start"] : run["char_end"]]
                yield {**document, **run, "text": text, "shard": shard}


CARD = """---
configs:
- config_name: default
  data_files: documents/*.parquet
---
# {title}

{sentence}

- `documents/*.parquet`: the selected text, a row per unbroken run of a document: `text`, `doc_id`,
  `source`, `color` (conditional minus prior loss, nats per token, lower is better), `fraction` of
  the document that was selected, `n_tokens`, place and other fields.
- `tokens/tokens.npy`: {sequences} sequences of {length} tokens, shuffled, ready to train on;
  `tokens/sequences.parquet` says where each came from.
- `manifest.json`: every file with its sha256.
"""


def write_card(folder: Path, title: str, sentence: str, sequences: int, length: int) -> None:
    """A dataset card, so that `datasets.load_dataset(folder)` gives the selected text."""
    text = CARD.format(title=title, sentence=sentence, sequences=sequences, length=length)
    (folder / "README.md").write_text(text, encoding="utf-8")
