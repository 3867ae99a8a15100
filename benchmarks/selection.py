"""Selection from a large score store, compared with sorting the same scores in memory.

    python benchmarks/selection.py [--sequences 50000000] [--tau 7 64] [--rounds 3] [--memory 1GB]

First creates a synthetic store: losses, sequences, spans and documents, one document per ten
sequences, in shards of a million. One document in a hundred is also in the first shard, and the
last sequence of each shard is padded. The derived tables that selection needs are computed with the
functions and the memory limit of publication. Then the best 1/tau is selected with the pipeline's
query, over everything and by batch, and numpy's argsort sorts all scores in float32, without
excluding any or ordering ties. These take turns for `--rounds` rounds, each time in a new process,
whose peak memory includes its imports.
"""

import argparse
import itertools
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np

from colorfilter.selection.score_tables import exclude, pair
from colorfilter.selection.select import count_candidates, select, select_by_batch
from colorfilter.selection.sql import fetch_row
from resources.databases import PUBLISHING_MEMORY, READING_MEMORY, STORAGE_VERSION
from resources.score_store import SCHEMA

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
    """Return the names of the shards for n sequences."""
    return [f"webtext-{i:010x}" for i in range(n // SHARD)]


def connect(path: Path, memory: str, read_only: bool = False) -> duckdb.DuckDBPyConnection:
    """Open the store like publication does."""
    connection = duckdb.connect()
    connection.execute("SET enable_progress_bar = false")
    connection.execute(f"SET memory_limit = '{memory}'")
    connection.execute("SET preserve_insertion_order = false")
    connection.execute("SET temp_directory = ?", [str(path.with_suffix(".spill"))])
    form = "READ_ONLY" if read_only else f"STORAGE_VERSION '{STORAGE_VERSION}'"
    connection.execute(f"ATTACH '{path}' AS store ({form})")
    connection.execute("USE store")
    return connection


def fill(path: Path, n: int) -> None:
    """Write the synthetic store's published tables."""
    with connect(path, PUBLISHING_MEMORY) as connection:
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


def work_out(path: Path, n: int) -> None:
    """Fill `excluded` and `paired_losses` as publication does."""
    with connect(path, PUBLISHING_MEMORY) as connection:
        pair(connection, "books", shard_names(n))
        exclude(connection, LENGTH)


def best(path: Path, memory: str, tau: int) -> float:
    """Select the best 1/tau and return the seconds."""
    with connect(path, memory, read_only=True) as connection:
        begun = time.monotonic()
        keep = count_candidates(connection) // tau
        chosen = select(connection, "color", "books", keep, seed=0)
        seconds = time.monotonic() - begun
    assert len(chosen) == keep
    return seconds


def best_of_batches(path: Path, memory: str, tau: int) -> float:
    """Select the best 1/tau of every `BATCH * tau` and return the seconds."""
    with connect(path, memory, read_only=True) as connection:
        begun = time.monotonic()
        chosen = select_by_batch(connection, "color", "books", tau, BATCH, seed=0)
        seconds = time.monotonic() - begun
        assert abs(len(chosen) - count_candidates(connection) / tau) <= BATCH
    return seconds


def argsort(path: Path, memory: str) -> float:
    """Sort all scores in memory and return the seconds, without those to load them."""
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
    np.argsort(scores)
    return time.monotonic() - begun


class Taken(NamedTuple):
    """Wall time and CPU time in seconds, and peak memory in GB."""

    seconds: float
    cpu: float
    peak: float

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {self.cpu:.1f} s CPU, {self.peak:.2f} GB"


def spent() -> tuple[float, float]:
    """Return the CPU time of this process in seconds, and its peak memory in GB."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9


def alone(measured: Callable[..., float | None], *arguments: object) -> Taken:
    """Run a function in a new process and measure it. If it returns seconds, those are used."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as process:
        before, _ = process.submit(spent).result()
        begun = time.monotonic()
        seconds = process.submit(measured, *arguments).result()
        taken = time.monotonic() - begun
        cpu, peak = process.submit(spent).result()
    return Taken(taken if seconds is None else seconds, cpu - before, peak)


def main() -> None:
    """Fill the store, run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=50_000_000, help="a multiple of a million")
    parser.add_argument("--tau", type=int, nargs="+", default=[7, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default=READING_MEMORY, help="DuckDB's limit when selecting")
    parser.add_argument("--folder", type=Path, help="folder of the store (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "scores.duckdb"
        taken = alone(fill, path, options.sequences)
        print(f"filled: {taken}; store {path.stat().st_size / 1e9:.1f} GB", flush=True)
        taken = alone(work_out, path, options.sequences)
        print(f"derived tables: {taken}; store {path.stat().st_size / 1e9:.1f} GB", flush=True)
        found: dict[str, list[Taken]] = {}
        for _ in range(options.rounds):
            of_tau = itertools.product(options.tau, (best, best_of_batches))
            for measured, *tau in [*((m, t) for t, m in of_tau), (argsort,)]:
                taken = alone(measured, path, options.memory, *tau)
                name = " ".join([measured.__name__, *(f"tau {t}" for t in tau)])
                found.setdefault(name, []).append(taken)
                print(f"{name}: {taken}", flush=True)
    for name, rounds in found.items():
        seconds = [taken.seconds for taken in rounds]
        spread = f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
        print(f"{name}: {spread}, {max(taken.peak for taken in rounds):.2f} GB")


if __name__ == "__main__":
    main()
