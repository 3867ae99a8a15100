"""Selection from a large score store, against sorting the same scores in memory.

    python benchmarks/selection.py [--sequences 50000000] [--memory 8GB] [--folder DIR]

A synthetic store is made first (losses, sequences, spans and documents, one document to ten
sequences, in shards of a million). Then the best 1/64 is selected by the pipeline's own query, and
by numpy's full argsort of the scores, which has neither ties in order nor text to join; in turn,
three rounds. Peak memory is that of the process while the query runs.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import duckdb
import numpy as np

from colorfilter.selection import count_candidates, select
from resources.score_store import SCHEMA

LENGTH, TAU, SHARD, TO_A_DOCUMENT = 512, 64, 1_000_000, 10

FILL = """
INSERT INTO sequences
    SELECT printf('web-%05d', i // {shard}), i % {shard}, {length}, '' FROM range({n}) AS t(i);
INSERT INTO documents BY NAME
    SELECT
        md5(i::VARCHAR)[:20] AS doc_id, printf('web-%05d', i // {documents}) AS shard,
        md5(i::VARCHAR) AS sha256
    FROM range({n} // {to_a_document}) AS t(i);
INSERT INTO spans BY NAME
    SELECT
        printf('web-%05d', i // {shard}) AS shard, i % {shard} AS position,
        md5((i // {to_a_document})::VARCHAR)[:20] AS doc_id
    FROM range({n}) AS t(i);
INSERT INTO models VALUES
    ('prior', 'prior', NULL, '', true), ('conditional', 'conditional', 'books', '', true);
INSERT INTO losses
    SELECT
        m.model, printf('web-%05d', i // {shard}), i % {shard},
        3 + sqrt(-2 * ln(1 - hash(i, m.model, 0) / 18446744073709551616.0))
            * cos(2 * pi() * hash(i, m.model, 1) / 18446744073709551616.0),
        {length} - 1, 'float32'
    FROM range({n}) AS t(i), models AS m;
"""


def fill(path: Path, n: int, memory: str) -> None:
    """Write the synthetic store."""
    with duckdb.connect(str(path)) as connection:
        connection.execute(f"SET memory_limit = '{memory}'")
        connection.execute("SET preserve_insertion_order = false")
        connection.execute(SCHEMA)
        sizes = {
            "n": n,
            "shard": SHARD,
            "length": LENGTH,
            "to_a_document": TO_A_DOCUMENT,
            "documents": SHARD // TO_A_DOCUMENT,
        }
        connection.execute(FILL.format(**sizes))


def main() -> None:
    """Fill, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=50_000_000)
    parser.add_argument("--memory", default="8GB", help="DuckDB's limit")
    parser.add_argument("--folder", type=Path, help="where the store is made (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "scores.duckdb"
        begun = time.monotonic()
        fill(path, options.sequences, options.memory)
        size = path.stat().st_size / 1e9
        print(f"store of {size:.1f} GB made in {time.monotonic() - begun:.0f} s", flush=True)
        with duckdb.connect(str(path), read_only=True) as connection:
            connection.execute(f"SET memory_limit = '{options.memory}'")
            connection.execute("SET temp_directory = ?", [folder])
            peak = 0.0
            seconds: dict[str, list[float]] = {"count": [], "select": [], "argsort": []}
            for _ in range(3):
                begun = time.monotonic()
                keep = count_candidates(connection, LENGTH) // TAU
                seconds["count"].append(time.monotonic() - begun)
                begun = time.monotonic()
                chosen = select(connection, "color", "books", LENGTH, keep, seed=0)
                seconds["select"].append(time.monotonic() - begun)
                peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
                scores = np.random.default_rng(0).normal(size=options.sequences)
                begun = time.monotonic()
                best = np.argsort(scores.astype(np.float32))[:keep]
                seconds["argsort"].append(time.monotonic() - begun)
                assert len(best) == len(chosen) == keep
                del scores, best, chosen
    for name, taken in seconds.items():
        print(f"{name}: {statistics.median(taken):.1f} s ({min(taken):.1f} to {max(taken):.1f})")
    print(f"peak memory of the first query: {peak:.1f} GB")


if __name__ == "__main__":
    main()
