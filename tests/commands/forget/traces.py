"""Search a home for traces of a text, independently of the code that removes it."""

import re
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import tokenizers

from colorfilter.data.tokens import END_OF_TEXT

PIECE = 30
HASHES = {"doc_id", "sha256", "model", "shard"}
BETWEEN = "Q" * PIECE  # texts, so that the end of one and the beginning of another make no piece


def letters(text: str) -> str:
    return re.sub(r"(?:\\[nrt]|[\W_])+", "", text)


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
                    SELECT table_name, column_name
                    FROM duckdb_columns() SEMI JOIN duckdb_tables() USING (table_oid)
                    WHERE data_type = 'VARCHAR'
                """
                for table, column in connection.execute(query).fetchall():
                    if column not in HASHES:
                        rows = connection.execute(f'SELECT "{column}" FROM "{table}"').fetchall()
                        yield path, BETWEEN.join(str(value) for (value,) in rows)
        elif path.suffix == ".html":
            yield path, re.sub(r"<[^>]*>", "", path.read_text())
        elif path.is_file() and path.suffix != ".safetensors":
            yield path, path.read_bytes().decode("utf-8", "ignore")


def hashes(text: str) -> np.ndarray:
    """A number for each piece of a text, in order; the same for the same piece."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    n = max(0, len(codes) - PIECE + 1)
    numbers = np.zeros(n, np.uint64)
    for k in range(PIECE):
        numbers = numbers * np.uint64(0x9E3779B97F4A7C15) + codes[k : k + n]
    return numbers


def telling(root: Path, own: set[str]) -> list[Path]:
    """Files that have one of these pieces, found without the code that redacts."""
    numbers = np.concatenate([hashes(piece) for piece in sorted(own)])
    found = []
    for path, text in contents(root):
        kept = letters(text)
        # A set of all pieces of a home's texts takes ten times as long.
        places = np.flatnonzero(np.isin(hashes(kept), numbers))
        if any(kept[i : i + PIECE] in own for i in places.tolist()):
            found.append(path)
    return found
