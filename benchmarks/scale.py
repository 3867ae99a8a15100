"""The score store at the size of C4: publish it with the pipeline's code, then select from it.

    python benchmarks/scale.py [--sequences 344000000] [--text thin] [--folder DIR] [--tau 7 64]

Generates Parquet parts like the pipeline's for 256 shards, and publishes them with
`ScoreStore.publish`: the losses of a prior and of the conditionals of two domains. Another process
writes each part just before it is published, and it is deleted afterwards, so that the disk holds
only the store; the time for this is subtracted. Then the best 1/tau of one domain is selected, over
everything and by batch, like the asset `selection`; the selection is published; and one more shard
is published. Every step runs in its own process, whose peak memory includes its imports.

`--text full` has text tables like C4's: 1.06 documents per sequence, spans where they meet, the
sha256 of every sequence, URLs. `--text thin` has little more than selection needs: one document per
ten sequences, no sha256 of sequences, no URLs. In both, 1 % of the documents are copies of
documents of the first shard, and the last sequence of every shard is padded.
"""

import argparse
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import duckdb
from selection import Taken, alone

from colorfilter.selection.select import count_candidates, select, select_by_batch, write_selection
from colorfilter.selection.sql import fetch, fetch_row
from resources import score_parts, score_store
from resources.home import Home
from resources.score_parts import Part, PublishedModel
from resources.score_store import PublishedSelection, ScoreStore

LENGTH, SHARDS, BATCH, CHUNK = 512, 256, 1024, 100_000
MODELS = [
    PublishedModel("a" * 64, "prior", None, "prior"),
    PublishedModel("b" * 64, "conditional", "books", "books/conditional"),
    PublishedModel("c" * 64, "conditional", "tasks", "tasks/conditional"),
]
# SQL expressions: tokens of a document, sha256 of a sequence, and `extra` fields of a document.
TEXTS = {
    "thin": (f"{10 * LENGTH}", "''", "'{{}}'"),
    "full": (
        "greatest(1, -482 * ln(((hash({first} + i, 'tokens') >> 11) + 1) / 2**53))::INTEGER",
        "sha256(({first} + position)::VARCHAR)",
        """'{{"url": "https://www.' || substr(sha256(({first} + i)::VARCHAR), 1, 14) || '.com/'
        || substr(sha256(('url' || ({first} + i))), 1, 30) || '", "timestamp": "2019-04-'
        || (10 + i % 20) || 'T12:57:' || (10 + i % 49) || 'Z"}}'""",
    ),
}

DOCUMENTS = """
    CREATE OR REPLACE TEMP TABLE d AS
    SELECT
        i, n, sum(n) OVER (ORDER BY i)::BIGINT - n AS start,
        substr(sha256(('document' || ({first} + i))), 1, 20) AS doc_id
    FROM (SELECT i, {tokens} AS n FROM range({documents}) AS t(i));
    COPY (
        SELECT
            doc_id, 'en/c4-train.' || {number} || '-of-01024.json.gz' AS source_file,
            i + 1 AS source_line, 'c4' AS source, n * 4 AS n_chars,
            sha256((if(i % 100 = 7, i, {first} + i))::VARCHAR) AS sha256,
            {extra} AS extra, '' AS text
        FROM d ORDER BY i
    ) TO '{folder}/documents.parquet' (COMPRESSION zstd);
"""
PACKED = """
    COPY (
        SELECT
            position, greatest(0, start - position * {length})::INTEGER AS "offset", doc_id,
            greatest(0, position * {length} - start) AS doc_start,
            (least(start + n, (position + 1) * {length}) - greatest(start, position * {length}))
                ::INTEGER AS n_tokens,
            doc_start * 4 AS char_start, (doc_start + n_tokens) * 4 AS char_end
        FROM (
            SELECT *, unnest(range(start // {length}, (start + n - 1) // {length} + 1)) AS position
            FROM d
        )
        WHERE position < {size}
        ORDER BY i, position
    ) TO '{folder}/spans.parquet' (COMPRESSION zstd);
    COPY (
        SELECT
            i AS position, if(i = {size} - 1, {length} // 2, {length})::INTEGER AS n_tokens,
            {sha256} AS sha256
        FROM (SELECT i, i AS position FROM range({size}) AS t(i)) ORDER BY i
    ) TO '{folder}/sequences.parquet' (COMPRESSION zstd);
"""
# Losses from 1.5 to 5.5 nats per token. A conditional's are close to the prior's, as in practice:
# color has a standard deviation of 0.25.
LOSSES = """
    COPY (
        SELECT
            '{model}' AS model, '{shard}' AS shard, i AS position,
            (1.5 + (hash({first} + i) % 1000003 + hash({first} + i, 'x') % 1000003) / 5e5
                + (hash({first} + i, '{model}') % 1000003 + hash('{model}', {first} + i) % 1000003)
                / 1.7e6)::FLOAT AS loss,
            {length} - 1 AS n_tokens, 'bf16' AS precision
        FROM range({start}, {stop}) AS t(i)
    ) TO '{folder}/losses-{start:010}-{stop:010}-x.parquet' (COMPRESSION zstd);
"""


def shard_name(number: int) -> str:
    """Return a name like plan_shards gives: a source's name and ten hex digits, in no order."""
    return f"webtext-{(number * 2654435761 % 2**32):08x}{number % 256:02x}"


def parts_of(folder: Path, number: int) -> list[Part]:
    """Return the parts of a shard to publish."""
    name = shard_name(number)
    text = Part(name, "1", documents=folder / name / "text", tokens=folder / name / "text")
    losses = [Part(name, "1", model=m.model, losses=folder / name / m.path) for m in MODELS]
    return [text, *losses]


def make(part: Part, number: int, size: int, text: str) -> None:
    """Write the files of a part."""
    folder = part.losses or part.tokens
    assert folder is not None
    folder.mkdir(parents=True)
    facts = {"folder": folder, "number": number, "size": size, "length": LENGTH}
    facts |= {"first": number * size, "shard": part.shard, "model": part.model}
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        if part.losses:
            for start in range(0, size, CHUNK):
                stop = min(start + CHUNK, size)
                connection.execute(LOSSES.format(start=start, stop=stop, **facts))
            return
        tokens, sha256, extra = (t.format(**facts) for t in TEXTS[text])
        documents = -(-size // 10) if text == "thin" else round(1.06 * size)
        given = {"tokens": tokens, "sha256": sha256, "extra": extra, "documents": documents}
        connection.execute((DOCUMENTS + PACKED).format(**facts, **given))


def publish(folder: Path, shards: int, size: int, text: str) -> float:
    """Publish `shards` shards. Return the seconds, without those to write their parts."""
    made_in = 0.0
    numbers = {shard_name(i): i for i in range(shards)}

    def make_and_insert(connection: duckdb.DuckDBPyConnection, part: Part) -> None:
        nonlocal made_in
        begun = time.monotonic()
        maker.submit(make, part, numbers[part.shard], size, text).result()
        made_in += time.monotonic() - begun
        score_parts.insert(connection, part)
        begun = time.monotonic()
        shutil.rmtree(part.losses or part.tokens or "")
        made_in += time.monotonic() - begun

    parts = [part for i in range(shards) for part in parts_of(folder / "parts", i)]
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as maker,
        mock.patch.object(score_store, "insert", make_and_insert),
    ):
        begun = time.monotonic()
        ScoreStore(home=str(folder)).publish(parts, MODELS, LENGTH)
        return time.monotonic() - begun - made_in


def best(folder: Path, memory: str, tau: int, by_batch: bool) -> float:
    """Select the best 1/tau, over everything or of every `BATCH * tau`. Return the seconds."""
    with ScoreStore(home=str(folder)).read() as connection:
        if memory:
            connection.execute(f"SET memory_limit = '{memory}'")
        begun = time.monotonic()
        candidates = count_candidates(connection)
        if by_batch:
            chosen = select_by_batch(connection, "color", "books", tau, BATCH, seed=0)
            assert abs(len(chosen) - candidates / tau) <= BATCH
        else:
            chosen = select(connection, "color", "books", candidates // tau, seed=0)
            assert len(chosen) == candidates // tau
    write_selection(chosen, folder)
    return time.monotonic() - begun


def enter(folder: Path) -> None:
    """Publish the last selection."""
    table, models = folder / "selection.parquet", [m.model for m in MODELS]
    new = PublishedSelection("s" * 64, table, "books", "color", models[0], models[1], "now")
    ScoreStore(home=str(folder)).publish_selections([new])


def sizes(folder: Path) -> dict[str, tuple[int, float]]:
    """Return rows and MB of every table, by the blocks that its columns occupy."""
    found = {}
    with ScoreStore(home=str(folder)).read() as connection:
        for (table,) in fetch(connection, "SELECT table_name FROM duckdb_tables()"):
            rows = fetch_row(connection, f"SELECT count(*) FROM {table}")[0]
            blocks = fetch_row(
                connection,
                f"""
                SELECT count(DISTINCT block) FROM (
                    SELECT unnest([block_id] || additional_block_ids) AS block
                    FROM pragma_storage_info('{table}') WHERE persistent
                )
                """,
            )[0]
            found[table] = rows, blocks * 0.262144
    return found


def tell(what: str, taken: Taken, path: Path) -> None:
    """Print time and memory of a step, and the size of the store."""
    print(f"{what}: {taken}; store {path.stat().st_size / 1e9:.2f} GB", flush=True)


def main() -> None:
    """Publish, select, publish one more shard, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=344_000_000)
    parser.add_argument("--text", choices=TEXTS, default="thin")
    parser.add_argument("--tau", type=int, nargs="+", default=[7, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory", default="", help="DuckDB's memory limit when selecting (default: the store's)"
    )
    parser.add_argument("--folder", type=Path, help="folder of the home (default: temporary)")
    parser.add_argument("--keep", action="store_true", help="keep the home for a later call")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp()) if options.folder is None else options.folder
    store, size = Home(folder).claim("scale").scores, options.sequences // SHARDS
    try:
        if not store.exists():
            tell("published", alone(publish, folder, SHARDS, size, options.text), store)
            for table, (rows, mb) in sizes(folder).items():
                each = 1e6 * mb / max(rows, 1)
                print(f"  {table}: {rows:,} rows, {mb:,.0f} MB, {each:.1f} bytes/row", flush=True)
        for _ in range(options.rounds):
            for tau in options.tau:
                for by_batch in (False, True):
                    what = f"tau {tau}, {'by batch' if by_batch else 'over everything'}"
                    taken = alone(best, folder, options.memory, tau, by_batch)
                    tell(what, taken, store)
        if options.rounds:
            tell("selection published", alone(enter, folder), store)
        tell("one more shard", alone(publish, folder, SHARDS + 1, size, options.text), store)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
