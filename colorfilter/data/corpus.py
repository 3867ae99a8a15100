"""Building a shard of the corpus, from raw files to packed tokens, in a worker process."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from colorfilter.compute import local_pool
from colorfilter.config.recipe import Source
from colorfilter.data import documents, tokens
from colorfilter.data.shards import InputFile


def read_shard(
    folder: Path, files: Sequence[InputFile], sources: Sequence[Source], unwanted: Mapping[str, str]
) -> dict[str, int]:
    """Build one shard of `raw_corpus`; return counts (see documents.write_documents)."""
    return documents.write_documents(files, sources, folder, local_pool.report, unwanted)


def pack_shard(
    folder: Path, raw: Path, tokenizer: Path, left_out: Sequence[Path], length: int
) -> dict[str, int]:
    """Build one shard of `corpus_tokens`, excluding the documents of the folders in `left_out`.

    Returns counts (see tokens.pack).
    """
    skipped = {
        row["sha256"]
        for plan in left_out
        for row in documents.read_documents(plan / "documents.parquet", ["sha256"])
    }
    rows = documents.read_documents(raw / "documents.parquet")
    return tokens.pack(rows, tokens.Encoder(tokenizer), length, folder, skipped, local_pool.report)
