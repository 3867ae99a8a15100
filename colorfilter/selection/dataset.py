"""A filtered dataset: the selected sequences, as tokens to train on and as text."""

import bisect
import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from colorfilter.data.tokens import open_tokens
from colorfilter.storage.parquet import TableWriter

BLOCK_BYTES = 2**29  # size of tokens held in memory at a time
FACTS_ROWS = 2**13  # row group size of tables that are read by ranges of rows


def write_tokens(
    selection: pl.DataFrame, tokens: Mapping[str, Path], seed: int, out: Path
) -> dict[str, int]:
    """Gather the selected sequences into `tokens.npy` [n, T] and `sequences.parquet`.

    Rows are shuffled with `seed`, so that any part of the file is a fair sample of the selection.
    `sequences.parquet` records where each row came from. Returns counts.

    Every shard is read once, in its own order, into one file per block of rows. Then each block is
    put in order. This avoids random access to memory and disk.
    """
    n = len(selection)
    row = np.empty(n, np.uint32)
    row[np.random.default_rng(seed).permutation(n)] = np.arange(n, dtype=np.uint32)
    placed = selection.select(pl.Series("row", row), pl.all())
    first = open_tokens(tokens[selection["shard"][0]])
    block = max(1, BLOCK_BYTES // first[0].nbytes)
    folder = out / "blocks"
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted attempt
    folder.mkdir(parents=True)
    orders = _write_blocks(placed, tokens, block, folder)
    written = _join_blocks(orders, (n, *first.shape[1:]), first.dtype, folder, out)
    shutil.rmtree(folder)
    return {"sequences": n, "tokens": written}


def _by_shard(selection: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """Yield the rows of each shard, sorted by position; shards are sorted by name."""
    ordered = selection.sort("shard", "position")
    start = 0
    for shard, size in ordered.group_by("shard", maintain_order=True).len().iter_rows():
        yield shard, ordered[start : start + size]
        start += size


def _write_blocks(
    placed: pl.DataFrame, tokens: Mapping[str, Path], block: int, folder: Path
) -> list[np.ndarray]:
    """Write the tokens of each block of rows in shard order, and a table of each shard's rows.

    Returns, for each block, the row within the block of each written sequence.
    """
    orders: list[list[np.ndarray]] = [[] for _ in range(0, len(placed), block)]
    for shard, part in _by_shard(placed):
        facts = pl.read_parquet(tokens[shard] / "sequences.parquet")
        table = part.join(facts, on="position", how="left").sort("row")
        table.write_parquet(folder / f"{shard}.parquet", row_group_size=FACTS_ROWS)
        source = open_tokens(tokens[shard])
        rows, positions = part["row"].to_numpy(), part["position"].to_numpy()
        for number in np.unique(rows // block):
            mine = rows // block == number
            orders[number].append(rows[mine] % block)
            with (folder / str(number)).open("ab") as stream:
                source[positions[mine]].tofile(stream)
    return [np.concatenate(rows) for rows in orders]


def _join_blocks(
    orders: list[np.ndarray], shape: tuple[int, ...], dtype: np.dtype, folder: Path, out: Path
) -> int:
    """Put the blocks in order, one after the other, and return the number of real tokens."""
    n_tokens = start = 0
    facts = pl.scan_parquet(folder / "*.parquet")
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context((out / "tokens.npy").open("wb"))
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        schema = facts.collect_schema().to_frame().to_arrow().schema
        path = out / "sequences.parquet"
        writer = stack.enter_context(pq.ParquetWriter(path, schema, compression="zstd"))
        for number, order in enumerate(orders):
            rows = np.empty((len(order), *shape[1:]), dtype)
            rows[order] = np.fromfile(folder / str(number), dtype).reshape(rows.shape)
            rows.tofile(stream)
            (folder / str(number)).unlink()
            mine = pl.col("row").is_between(start, start + len(order), closed="left")
            table = facts.filter(mine).collect().sort("row")
            writer.write_table(table.to_arrow())
            n_tokens += int(table["n_tokens"].sum())
            start += len(order)
    return n_tokens


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
    (token-weighted mean of its sequences), and `fraction`, the selected share of the document's
    tokens. With `whole_documents_from`, a row is a complete document instead. Documents of which a
    smaller fraction was selected are omitted, and so are those whose `doc_id` is in `left_out`.
    Returns counts.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts = {"texts": 0, "chars": 0}
    for shard, chosen in _by_shard(selection):
        spans = pl.read_parquet(tokens[shard] / "spans.parquet")
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


# Weighted by tokens; null if any sequence was not scored.
MEAN_COLOR = (
    pl.when(pl.col("color").null_count() == 0)
    .then((pl.col("color") * pl.col("n_tokens")).sum() / pl.col("n_tokens").sum())
    .otherwise(None)
)


def unbroken_runs(spans: pl.DataFrame, chosen: pl.DataFrame) -> pl.DataFrame:
    """Merge selected spans into unbroken runs.

    Columns: doc_id, char_start, char_end, n_tokens, color, fraction.
    """
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
    """Return every document that has selected runs as one run over all of its text."""
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
    """Yield runs in the order of the documents, with their text and fields of their documents."""
    names = runs.columns
    column = names.index("doc_id")
    by_document: dict[str, list[tuple[Any, ...]]] = {}
    for row in runs.iter_rows():
        by_document.setdefault(row[column], []).append(row)
    for batch in pq.ParquetFile(documents).iter_batches(
        batch_size=256, columns=["doc_id", "source_file", "source", "extra", "text"]
    ):
        wanted = [i for i, d in enumerate(batch["doc_id"].to_pylist()) if d in by_document]
        for document in batch.take(wanted).to_pylist() if wanted else ():
            for row in by_document[document["doc_id"]]:
                run = dict(zip(names, row, strict=True))
                text = document["text"][run["char_start"] : run["char_end"]]
                yield {**document, **run, "text": text, "shard": shard}


LICENCE = "Each text has the licence of the document that it was selected from."

CARD = """---
{header}---
# {title}

{sentence}

{licence}

- `documents/*.parquet`: the selected text. A row is a contiguous run of a document, or a complete
  document, with `text`, `doc_id`, `source`, `color` (conditional minus prior loss in nats per
  token, lower is better), `fraction` (share of the document's tokens that were selected),
  `n_tokens`, its position in the document and other fields.
- `tokens/tokens.npy`: {sequences} sequences of {length} tokens, shuffled and ready to train on.
  `tokens/sequences.parquet` records where each sequence came from.
- `croissant.json`: machine-readable description of files and fields (MLCommons Croissant).
- `manifest.json`: every file with its sha256.

To load the text, run in this folder:

```python
from pathlib import Path

from datasets import load_dataset

texts = load_dataset(str(Path.cwd()), split="train")
```

To load the tokens:

```python
import numpy as np

tokens = np.load("tokens/tokens.npy", mmap_mode="r")  # [{sequences}, {length}]
```
"""


def write_card(
    folder: Path, title: str, sentence: str, texts: int, sequences: int, length: int
) -> None:
    """Write a Hugging Face dataset card, with which `datasets.load_dataset(folder)` loads the text.

    `texts` is the number of rows of `documents/`; the tokens have shape [`sequences`, `length`].
    """
    header = {
        "pretty_name": title,
        "license": "unknown",
        "task_categories": ["text-generation"],
        "task_ids": ["language-modeling"],
        "size_categories": [size_category(texts)],
        "tags": ["pretraining", "data-selection", "color-filter"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "documents/*.parquet"}],
            }
        ],
    }
    text = CARD.format(
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
        title=title,
        sentence=sentence,
        licence=LICENCE,
        sequences=sequences,
        length=length,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def size_category(rows: int) -> str:
    """Return the Hugging Face Hub's size category for a number of rows."""
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    index = bisect.bisect_right([10**power for power in range(3, 13)], rows)
    if index == 0:
        return "n<1K"
    if index == len(bounds):
        return "n>1T"
    return f"{bounds[index - 1]}<n<{bounds[index]}"
