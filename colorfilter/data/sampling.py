"""Random draws of documents: the sample for D_prior, and the split of a domain.

A draw sorts documents by a random key that depends on the text and the seed only. So it does not
depend on the order of files or on the shards, and it is the same on every machine.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pyarrow as pa

from colorfilter.data.documents import DOCUMENTS, read_documents
from colorfilter.errors import InputError
from colorfilter.storage.parquet import TableWriter

SAMPLE = DOCUMENTS.append(pa.field("shard", pa.string()))
SPLITS = ("held_out", "probe", "down")


def draw_sample(shards: Mapping[str, Path], seed: int, chars: int, folder: Path) -> dict[str, int]:
    """Draw random documents from shards (name -> folder) until they have `chars` characters.

    The draw depends on the texts and the seed only. Memory grows with the sample, not with the
    corpus. Writes `documents.parquet`, the documents with their shard, and returns counts. Raises
    InputError if the sample would take the whole corpus.
    """
    drawn: dict[bytes, _Drawn] = {}
    skipped = 0
    for name, path in sorted(shards.items()):
        for row in read_documents(path / "documents.parquet", ["sha256", "n_chars"]):
            key = random_key(seed, row["sha256"])
            drawn.setdefault(key, _Drawn(name, row["sha256"], row["n_chars"]))
        kept = _lowest(drawn, chars)
        skipped += len(drawn) - len(kept)
        drawn = kept
    if chars and not skipped:
        raise InputError(
            f"prior.sample_chars: a D_prior of {chars} characters would take the whole corpus "
            f"({sum(d.chars for d in drawn.values())}); lower it or add text to the corpus"
        )
    with TableWriter(folder / "documents.parquet", SAMPLE) as writer:
        for name, path in sorted(shards.items()):
            wanted = {d.sha256 for d in drawn.values() if d.shard == name}
            if wanted:
                for row in read_documents(path / "documents.parquet", DOCUMENTS.names):
                    if row["sha256"] in wanted:
                        writer.add({**row, "shard": name}, len(row["text"]))
    return {"documents": len(drawn), "chars": sum(d.chars for d in drawn.values())}


class _Drawn(NamedTuple):
    shard: str
    sha256: str
    chars: int


def _lowest(drawn: Mapping[bytes, _Drawn], chars: int) -> dict[bytes, _Drawn]:
    """Return the documents with the lowest keys until they have `chars` characters."""
    kept, held = {}, 0
    for key, document in sorted(drawn.items()):
        if held >= chars:
            break
        kept[key] = document
        held += document.chars
    return kept


def random_key(seed: int, sha256: str) -> bytes:
    """Return the sort key of a document in a random order determined by the seed."""
    return hashlib.sha256(f"{seed}|{sha256}".encode()).digest()[:8]


def split_domain(
    documents: Path, seed: int, held_out: float, probe: float, folder: Path
) -> dict[str, int]:
    """Split a domain's documents at random into held-out, probe and D_down, by characters.

    Documents are not divided. Writes `<split>/documents.parquet` for each split, and returns its
    number of documents and characters. Raises InputError if a split would be empty.
    """
    table = pl.read_parquet(documents, columns=["sha256", "n_chars"])
    table = table.with_columns(
        key=pl.Series([random_key(seed, s) for s in table["sha256"]], dtype=pl.Binary)
    ).sort("key")
    before = table["n_chars"].cum_sum().shift(1, fill_value=0) / max(1, table["n_chars"].sum())
    split_of = {
        sha256: "held_out" if share < held_out else "probe" if share < held_out + probe else "down"
        for sha256, share in zip(table["sha256"], before, strict=True)
    }
    counts = dict.fromkeys([f"{s}_{unit}" for s in SPLITS for unit in ("documents", "chars")], 0)
    with contextlib.ExitStack() as stack:
        writers = {}
        for split in SPLITS:
            (folder / split).mkdir(exist_ok=True)
            path = folder / split / "documents.parquet"
            writers[split] = stack.enter_context(TableWriter(path, DOCUMENTS))
        for row in read_documents(documents, DOCUMENTS.names):
            split = split_of[row["sha256"]]
            writers[split].add(row, len(row["text"]))
            counts[f"{split}_documents"] += 1
            counts[f"{split}_chars"] += row["n_chars"]
    empty = [s for s in SPLITS if counts[f"{s}_documents"] == 0]
    if empty:
        raise InputError(
            f"{len(table)} documents are too few to split into D_down, held-out and probe "
            f"({' and '.join(empty)} would be empty); add documents or divide them into smaller "
            "ones"
        )
    return counts


def shared_documents(corpus: Mapping[str, Path], texts: Mapping[str, Path]) -> list[dict[str, str]]:
    """Return the documents of the corpus that are also in one of `texts` (name -> table).

    Documents are compared by the sha256 of the text. Returns rows of source_file, source_line and
    text, the name in `texts`.
    """
    known: dict[str, str] = {}
    for name, path in texts.items():
        known |= dict.fromkeys(pl.read_parquet(path, columns=["sha256"])["sha256"], name)
    wanted = pl.LazyFrame(
        {"sha256": list(known), "text": list(known.values())},
        schema={"sha256": pl.String, "text": pl.String},
    )
    return [
        row
        for path in corpus.values()
        for row in pl.scan_parquet(path)
        .select("sha256", "source_file", "source_line")
        .join(wanted, on="sha256")
        .collect()
        .to_dicts()
    ]
