"""Selection from a large score store, against sorting the same scores in memory.

    python benchmarks/selection.py [--sequences 50000000] [--tau 64] [--memory 8GB] [--folder DIR]

A synthetic store is made first: losses, sequences, spans and documents, one document to ten
sequences, in shards of a million; one document in a hundred stands in the first shard too, and
each shard's last sequence is padded. What selection needs is worked out from them by the functions
and under the memory limit of publication. Then the best 1/tau is selected by the pipeline's own
query, over everything and by batch, and by numpy's full argsort of the same scores in float32,
which leaves nothing out and has no order at ties; in turn, three rounds, each time in a process of
its own, whose peak memory includes its imports.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import duckdb
import numpy as np

from colorfilter.score_tables import exclude, pair
from colorfilter.selection import count_candidates, select, select_by_batch
from colorfilter.tables import fetch_row
from resources.score_store import PUBLISHING_MEMORY, SCHEMA, STORAGE_VERSION

LENGTH, SHARD, TO_A_DOCUMENT, BATCH = 512, 1_000_000, 10, 1024

MODELS = """
    INSERT INTO models VALUES
        ('prior', 'prior', NULL, '', true), ('conditional', 'conditional', 'books', '', true)
"""

FILL = """
INSERT INTO sequences
    SELECT '{shard}', i, if(i = {size} - 1, {length} // 2, {length}), ''
    FROM range({size}) AS t(i);
INSERT INTO documents BY NAME
    SELECT
        hex(hash({first} + i)) AS doc_id, '{shard}' AS shard,
        sha256((if(i % 100 = 7, i, {first} + i))::VARCHAR) AS sha256
    FROM range({size} // {to_a_document}) AS t(i);
INSERT INTO spans BY NAME
    SELECT
        '{shard}' AS shard, i AS position,
        hex(hash({first} + i // {to_a_document})) AS doc_id
    FROM range({size}) AS t(i);
"""

LOSSES = """
INSERT INTO losses
    SELECT
        '{model}', '{shard}', i,
        (hash({first} + i, '{model}') % 1000003 + hash('{model}', {first} + i) % 1000003) / 5e5,
        {length} - 1, 'float32'
    FROM range({size}) AS t(i);
"""


def shard_names(n: int) -> list[str]:
    """The shards of n sequences."""
    return [f"web-{i:05d}" for i in range(n // SHARD)]


def connect(path: Path, memory: str, read_only: bool = False) -> duckdb.DuckDBPyConnection:
    """The store, opened as publication opens it."""
    connection = duckdb.connect()
    connection.execute("SET enable_progress_bar = false")
    connection.execute(f"SET memory_limit = '{memory}'")
    connection.execute("SET preserve_insertion_order = false")
    connection.execute("SET temp_directory = ?", [str(path.with_suffix(".spill"))])
    form = "READ_ONLY" if read_only else f"STORAGE_VERSION '{STORAGE_VERSION}'"
    connection.execute(f"ATTACH '{path}' AS store ({form})")
    connection.execute("USE store")
    return connection


def fill(path: Path, n: int, memory: str) -> None:
    """Write the synthetic store's published tables."""
    with connect(path, memory) as connection:
        connection.execute("BEGIN")
        connection.execute(SCHEMA)
        connection.execute(MODELS)
        for number, shard in enumerate(shard_names(n)):
            facts = {
                "shard": shard,
                "first": number * SHARD,
                "size": SHARD,
                "length": LENGTH,
                "to_a_document": TO_A_DOCUMENT,
            }
            connection.execute(FILL.format(**facts))
            for model in ("prior", "conditional"):
                connection.execute(LOSSES.format(model=model, **facts))
        connection.execute("COMMIT")


def work_out(path: Path, n: int) -> None:
    """Fill `excluded` and `paired_losses`, in one transaction as publication does."""
    with connect(path, PUBLISHING_MEMORY) as connection:
        connection.execute("BEGIN")
        pair(connection, "books", shard_names(n))
        exclude(connection, LENGTH)
        connection.execute("COMMIT")


def best(path: Path, memory: str, tau: int) -> float:
    """Seconds to select the best 1/tau."""
    with connect(path, memory, read_only=True) as connection:
        begun = time.monotonic()
        keep = count_candidates(connection) // tau
        chosen = select(connection, "color", "books", keep, seed=0)
        seconds = time.monotonic() - begun
    assert len(chosen) == keep
    return seconds


def best_of_batches(path: Path, memory: str, tau: int) -> float:
    """Seconds to select the best 1/tau of every `BATCH * tau`."""
    with connect(path, memory, read_only=True) as connection:
        begun = time.monotonic()
        chosen = select_by_batch(connection, "color", "books", tau, BATCH, seed=0)
        seconds = time.monotonic() - begun
        assert abs(len(chosen) - count_candidates(connection) / tau) <= BATCH
    return seconds


def argsort(path: Path, memory: str, tau: int) -> float:
    """Seconds to sort the scores that lie in memory, and to take the best 1/tau."""
    with connect(path, memory, read_only=True) as connection:
        n = fetch_row(connection, "SELECT count(*) FROM color")[0]
        scores = np.empty(n, np.float32)
        filled = 0
        batches = connection.sql("SELECT color::FLOAT AS score FROM color").to_arrow_reader()
        for batch in batches:
            scores[filled : filled + len(batch)] = batch.column(0).to_numpy()
            filled += len(batch)
    assert filled == n
    begun = time.monotonic()
    np.argsort(scores)[: n // tau].copy()
    return time.monotonic() - begun


def peak_gb() -> float:
    """The most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def alone(measured: Callable[..., float | None], *arguments: object) -> tuple[float, float]:
    """What a function returns in a process of its own, with seconds for None; its peak memory."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        begun = time.monotonic()
        seconds = process.submit(measured, *arguments).result()
        taken = time.monotonic() - begun
        return taken if seconds is None else seconds, process.submit(peak_gb).result()


def main() -> None:
    """Fill, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=50_000_000, help="whole millions")
    parser.add_argument("--tau", type=int, default=64)
    parser.add_argument("--memory", default="8GB", help="DuckDB's limit")
    parser.add_argument("--folder", type=Path, help="where the store is made (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "scores.duckdb"
        seconds, _ = alone(fill, path, options.sequences, options.memory)
        print(f"tables filled in {seconds:.0f} s, {path.stat().st_size / 1e9:.1f} GB", flush=True)
        seconds, peak = alone(work_out, path, options.sequences)
        size = path.stat().st_size / 1e9
        print(f"worked out in {seconds:.0f} s, {peak:.1f} GB; now {size:.1f} GB", flush=True)
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(3):
            for measured in (best, best_of_batches, argsort):
                one = alone(measured, path, options.memory, options.tau)
                found.setdefault(measured.__name__, []).append(one)
                print(f"{measured.__name__}: {one[0]:.1f} s, {one[1]:.1f} GB", flush=True)
    for name, rounds in found.items():
        taken, peaks = zip(*rounds, strict=True)
        middle = statistics.median(taken)
        print(f"{name}: {middle:.1f} s ({min(taken):.1f} to {max(taken):.1f}), {max(peaks):.1f} GB")


if __name__ == "__main__":
    main()
