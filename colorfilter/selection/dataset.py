"""A filtered dataset: the selected sequences as tokens to train on, and the same as text."""

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

BLOCK_BYTES = 2**29  # of tokens, held in memory at a time
FACTS_ROWS = 2**13  # of a table that is read by ranges of rows


def write_tokens(
    selection: pl.DataFrame, tokens: Mapping[str, Path], seed: int, out: Path
) -> dict[str, int]:
    """Gather the selected sequences into `tokens.npy` [n, T] and `sequences.parquet`.

    The rows stand in a random order that `seed` fixes, so that a single pass over the file is a
    fair pass; `sequences.parquet` says where each came from. Returns counts.

    Every shard is read once, in its own order, into a file for each block of rows; then the blocks
    are put in order one by one. So neither memory nor the disk is asked for rows here and there.
    """
    n = len(selection)
    row = np.empty(n, np.uint32)
    row[np.random.default_rng(seed).permutation(n)] = np.arange(n, dtype=np.uint32)
    placed = selection.select(pl.Series("row", row), pl.all())
    first = open_tokens(tokens[selection["shard"][0]])
    block = max(1, BLOCK_BYTES // first[0].nbytes)
    folder = out / "blocks"
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was interrupted
    folder.mkdir(parents=True)
    orders = _write_blocks(placed, tokens, block, folder)
    written = _join_blocks(orders, (n, *first.shape[1:]), first.dtype, folder, out)
    shutil.rmtree(folder)
    return {"sequences": n, "tokens": written}


def _by_shard(selection: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """The rows of every shard, by position; shards by name."""
    ordered = selection.sort("shard", "position")
    start = 0
    for shard, size in ordered.group_by("shard", maintain_order=True).len().iter_rows():
        yield shard, ordered[start : start + size]
        start += size


def _write_blocks(
    placed: pl.DataFrame, tokens: Mapping[str, Path], block: int, folder: Path
) -> list[np.ndarray]:
    """Write the tokens of each block of rows as they come, and the facts of each shard's rows.

    Returns which row of the block each one is that was written.
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
    return [np.concatenate(places) for places in orders]


def _join_blocks(
    orders: list[np.ndarray], shape: tuple[int, ...], dtype: np.dtype, folder: Path, out: Path
) -> int:
    """Put the blocks in order, one after the other; returns the number of real tokens."""
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
    (token-weighted mean of its sequences), and `fraction`, the selected share of the whole
    document's tokens. With `whole_documents_from` a row is a whole document instead, given for
    those of which at least that fraction was selected, but not for those whose `doc_id` is in
    `left_out`. Returns counts.
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
    names = runs.columns
    place = names.index("doc_id")
    by_document: dict[str, list[tuple[Any, ...]]] = {}
    for row in runs.iter_rows():
        by_document.setdefault(row[place], []).append(row)
    for batch in pq.ParquetFile(documents).iter_batches(
        batch_size=256, columns=["doc_id", "source_file", "source", "extra", "text"]
    ):
        wanted = [i for i, d in enumerate(batch["doc_id"].to_pylist()) if d in by_document]
        for document in batch.take(wanted).to_pylist() if wanted else ():
            for row in by_document[document["doc_id"]]:
                run = dict(zip(names, row, strict=True))
                text = document["text"][run["char_start"] : run["char_end"]]
                yield {**document, **run, "text": text, "shard": shard}


LICENCE = "Each text is under the licence of the document that it was selected from."

CARD = """---
{header}---
# {title}

{sentence}

{licence}

- `documents/*.parquet`: the selected text, a row per unbroken run of a document: `text`, `doc_id`,
  `source`, `color` (conditional minus prior loss, nats per token, lower is better), `fraction` of
  the document that was selected, `n_tokens`, place and other fields.
- `tokens/tokens.npy`: {sequences} sequences of {length} tokens, shuffled, ready to train on;
  `tokens/sequences.parquet` says where each came from.
- `croissant.json`: files and fields for machines, by MLCommons Croissant.
- `manifest.json`: every file with its sha256.

From within this folder, the text:

```python
from pathlib import Path

from datasets import load_dataset

texts = load_dataset(str(Path.cwd()), split="train")
```

and the tokens:

```python
import numpy as np

tokens = np.load("tokens/tokens.npy", mmap_mode="r")  # [{sequences}, {length}]
```
"""


def write_card(
    folder: Path, title: str, sentence: str, texts: int, sequences: int, length: int
) -> None:
    """A dataset card of the Hugging Face form: `datasets.load_dataset(folder)` gives the text.

    `texts` is the number of rows of `documents/`; `sequences` and `length` the shape of the tokens.
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
    """The Hugging Face Hub's word for so many rows."""
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    place = bisect.bisect_right([10**power for power in range(3, 13)], rows)
    if place == 0:
        return "n<1K"
    if place == len(bounds):
        return "n>1T"
    return f"{bounds[place - 1]}<n<{bounds[place]}"
