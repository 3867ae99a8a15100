"""DSIR: select documents by the importance of their hashed n-grams, with its authors' package.

Importance resampling (arXiv 2302.03169): a bag of hashed words and word pairs is fitted to the
domain and to the corpus, and documents are drawn without replacement by the ratio of the two, with
Gumbel noise on its logarithm. The package `data-selection` fits the bags and computes the weights.
It does not seed its noise; here the noise is seeded, so that the package itself selects the same
set after `numpy.random.seed(seed)`.
"""

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl

from colorfilter.data.documents import DOCUMENTS, read_documents
from colorfilter.errors import InputError
from colorfilter.progress import Progress, silent

MEMORY = "2GB"


def rank_documents(
    raw: Mapping[str, Path],
    domain: Path,
    left_out: Set[str],
    seed: int,
    progress: Progress = silent,
) -> pl.DataFrame:
    """Return all corpus documents that DSIR considers, in the order in which it draws them.

    `raw` is documents.parquet by shard, `domain` is the documents.parquet of D_down. Documents
    whose sha256 is in `left_out` are excluded, and so are documents of fewer than 100 words (the
    package's default); of identical documents only the first drawn is kept. Returns shard, doc_id,
    sha256 and `score`, the negated sum of log importance and noise: lower is better. `progress` is
    called with characters of the corpus, each read twice. Raises InputError if the package is not
    installed.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars would garble other progress bars
    refuse_without_package()
    from data_selection import HashedNgramDSIR

    shards = sorted(raw)

    def texts(path: str) -> Iterator[dict[str, Any]]:
        for row in read_documents(Path(path), ["sha256", "text"]):
            progress(len(row["text"]))
            if row["sha256"] not in left_out:
                yield row

    with tempfile.TemporaryDirectory() as cache:
        package: Any = HashedNgramDSIR(
            [str(raw[shard]) for shard in shards],
            [str(domain)],
            cache,
            raw_load_dataset_fn=texts,
            target_load_dataset_fn=lambda path: read_documents(Path(path), ["text"]),
            num_proc=1,  # so that weights, and the noise on them, are in file order
        )
        package.fit_importance_estimator()
        package.compute_importance_weights()
        weights = np.concatenate([np.load(f) for f in _parts(package.log_importance_weights_dir)])
        words = np.concatenate([np.load(f) for f in _parts(package.perexample_metadata_dir)])
    long_enough = package.perexample_metadata_filter(words)
    weights = weights[long_enough]
    noise = np.random.RandomState(seed).gumbel(size=weights.shape)
    considered = pl.concat(
        pl.read_parquet(raw[shard], columns=["doc_id", "sha256"])
        .filter(~pl.col("sha256").is_in(list(left_out)))
        .select(pl.lit(shard).alias("shard"), "doc_id", "sha256")
        for shard in shards
    )
    return (
        considered.filter(pl.Series(long_enough))
        .with_columns(score=pl.Series(-(weights + noise)))
        .sort("score", "shard", "doc_id")
        .unique("sha256", keep="first", maintain_order=True)
    )


def refuse_without_package() -> None:
    """Raise InputError if the package data-selection is not installed."""
    if importlib.util.find_spec("data_selection") is None:
        raise InputError("arms: dsir needs the package data-selection; pip install '.[dsir]'")


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npy"), key=lambda path: int(path.stem))


def write_in_order(ranked: pl.DataFrame, raw: Mapping[str, Path], out: Path) -> None:
    """Write documents.parquet of the ranked documents, in their order, with a memory limit."""
    files_by_shard = pl.DataFrame(
        {"shard": list(raw), "filename": [str(path) for path in raw.values()]}
    )
    wanted = ranked.with_row_index("rank").join(files_by_shard, on="shard").to_arrow()
    columns = ", ".join(DOCUMENTS.names)
    with tempfile.TemporaryDirectory() as spill, duckdb.connect() as connection:
        connection.execute(f"SET memory_limit = '{MEMORY}'")
        connection.execute("SET temp_directory = ?", [spill])
        connection.register("wanted", wanted)
        files = sorted({str(raw[shard]) for shard in ranked["shard"].unique()})
        table = connection.sql(
            f"SELECT {columns} FROM wanted "
            "JOIN read_parquet($files, filename = true, hive_partitioning = false) "
            "USING (filename, doc_id, sha256) "
            "ORDER BY rank",
            params={"files": files},
        )
        table.write_parquet(str(out), compression="zstd")
