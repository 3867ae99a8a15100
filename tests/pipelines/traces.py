"""Where a text can still be read in a home, found without the code that takes it out."""

import re
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import tokenizers

from colorfilter.tokens import END_OF_TEXT

PIECE = 30
HASHES = {"doc_id", "sha256", "model", "shard"}
BETWEEN = "Q" * PIECE  # texts, so that the end of one and the beginning of another make no piece


def letters(text: str) -> str:
    return re.sub(r"\\[nrt]|\W|_", "", text)


def pieces(text: str) -> set[str]:
    return {text[i : i + PIECE] for i in range(max(1, len(text) - PIECE + 1))}


def contents(root: Path) -> Iterator[tuple[Path, str]]:
    """Everything below a folder as text: columns of tables, decoded tokens, databases, files."""
    (vocabulary,) = {f.read_bytes() for f in root.rglob("tokenizer.json")}
    tokenizer = tokenizers.Tokenizer.from_buffer(vocabulary)
    for path in root.rglob("*"):
        if path.suffix == ".parquet":
            table = pl.read_parquet(path)
            strings = [
                c for c, kind in table.schema.items() if kind == pl.String and c not in HASHES
            ]
            yield path, BETWEEN.join(text or "" for c in strings for text in table[c])
        elif path.name == "tokens.npy":
            tokens = np.load(path).ravel().tolist()
            text = tokenizer.decode(tokens, skip_special_tokens=False)
            yield path, text.replace(END_OF_TEXT, BETWEEN)
        elif path.suffix == ".duckdb" and path.stat().st_size:
            with duckdb.connect(str(path), read_only=True) as connection:
                query = """
                    SELECT table_name, column_name FROM duckdb_columns()
                    WHERE data_type = 'VARCHAR' AND NOT internal
                """
                for table, column in connection.execute(query).fetchall():
                    if column not in HASHES:
                        rows = connection.execute(f'SELECT "{column}" FROM "{table}"').fetchall()
                        yield path, BETWEEN.join(str(value) for (value,) in rows)
        elif path.suffix == ".html":
            yield path, re.sub(r"<[^>]*>", "", path.read_text())
        elif path.is_file() and path.suffix != ".safetensors":
            yield path, path.read_bytes().decode("utf-8", "ignore")


def telling(root: Path, own: set[str]) -> list[Path]:
    """Files that have one of these pieces, found without the code that withdraws."""
    return [path for path, text in contents(root) if not own.isdisjoint(pieces(letters(text)))]
