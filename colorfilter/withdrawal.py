"""Taking a document out of what was made of it, in place, so that nothing else moves.

A row of a table stays, without its text and with 0 characters, by which it is known ever after;
tokens become end-of-text tokens, so that every other sequence stays where it is. What was done
already is not done again.
"""

import functools
import hashlib
import html
import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from colorfilter.documents import excerpt
from colorfilter.files import write_atomically

# Of a text, condensed: how long the pieces are that it is known by, and how far apart. What shows
# any 29 characters of it in a row holds one of them whole: a report's tables show little more.
PIECE = 24
APART = 6
ROWS = 2_048  # of a table that is written anew, in a group: what is held at a time


@dataclass(frozen=True)
class Forgotten:
    """A text that has to go: its sha256, its ids and places as `file:line`, and itself if known."""

    sha256: str
    doc_ids: Set[str]
    places: Set[str]
    text: str | None = None

    def is_told_in(self, page: str) -> bool:
        """Whether a page or a record shows a piece of the text, however it is wrapped."""
        size, pieces = self._pieces
        if size < PIECE:  # too common to be looked for within others
            cells = re.split(r"<[^>]*>|[\n|`]", page)
            return any(_condensed(html.unescape(cell)) in pieces for cell in cells if size)
        # With what stands in angle brackets, for it may be no markup, and without it.
        told = [_condensed(page), _condensed(html.unescape(re.sub(r"<[^>]*>", "", page)))]
        return any(t[i : i + size] in pieces for t in told for i in range(len(t) - size + 1))

    @functools.cached_property
    def _pieces(self) -> tuple[int, Set[str]]:
        """How long the pieces are that the text is known by, and the pieces."""
        known = _condensed(self.text or "")
        size = min(PIECE, len(known))
        return size, {known[i : i + size] for i in range(0, len(known) - size + 1, APART)}


def _condensed(text: str) -> str:
    """Letters and digits alone: what escapes, markup and line breaks change is left out."""
    return re.sub(r"\\[nrt]|[\W_]", "", text)


def holds_in_table(table: Path, forgotten: Forgotten) -> bool:
    """Whether a Parquet table has rows with the text, a quote or the beginning of it."""
    rule = _rule(table, forgotten)
    if rule is None:
        return False
    return bool(pl.scan_parquet(table).filter(rule[0]).select(pl.len()).collect().item())


def withdraw_from_table(table: Path, forgotten: Forgotten) -> None:
    """Empty those rows' text, quote or excerpt; every other row stays as it is."""
    rule = _rule(table, forgotten)
    assert rule is not None
    rows, empty = rule
    columns = [
        pl.when(rows).then(value).otherwise(pl.col(c)).alias(c) for c, value in empty.items()
    ]
    temporary = table.with_suffix(".withdrawn")
    pl.scan_parquet(table).with_columns(columns).sink_parquet(
        temporary, compression="zstd", row_group_size=ROWS
    )
    write_atomically(temporary, table)


def _rule(table: Path, forgotten: Forgotten) -> tuple[pl.Expr, dict[str, pl.Expr]] | None:
    """Which rows of a table tell of the text, and what their columns become."""
    names = set(pq.read_schema(table).names)
    nothing = pl.lit("", dtype=pl.String)
    ids = pl.col("doc_id").is_in(sorted(forgotten.doc_ids))
    if {"sha256", "text", "n_chars"} <= names:
        rows = (pl.col("sha256") == forgotten.sha256) & (pl.col("n_chars") > 0)
        gone = {"text": nothing, "extra": pl.lit("{}"), "n_chars": pl.lit(0, dtype=pl.Int64)}
        return rows, gone
    if {"doc_id", "quote", "protected"} <= names:
        quotes = ids | pl.col("protected").is_in(sorted(forgotten.places))
        return quotes & (pl.col("quote") != ""), {"quote": nothing}
    if {"doc_id", "excerpt"} <= names:
        return ids & (pl.col("excerpt") != ""), {"excerpt": nothing}
    if {"reason", "excerpt"} <= names and forgotten.text:
        return pl.col("excerpt") == excerpt(forgotten.text), {"excerpt": nothing}
    return None


def touched_sequences(packed: Path, forgotten: Forgotten) -> pl.DataFrame:
    """The sequences of a folder of packed tokens that carry a piece: position, sha256."""
    spans = pl.scan_parquet(packed / "spans.parquet")
    mine = spans.filter(pl.col("doc_id").is_in(sorted(forgotten.doc_ids)))
    sequences = pl.scan_parquet(packed / "sequences.parquet").select("position", "sha256")
    return sequences.join(mine, on="position", how="semi").sort("position").collect()


def holds_in_tokens(packed: Path, forgotten: Forgotten) -> bool:
    """Whether a folder of packed tokens (colorfilter.tokens) has tokens of the text."""
    tokens = np.load(packed / "tokens.npy", mmap_mode="r")
    end_of_text, pieces = _pieces(packed, tokens, forgotten)
    return any((tokens[place] != end_of_text).any() for place in pieces)


def withdraw_from_tokens(packed: Path, forgotten: Forgotten) -> None:
    """Make the text's tokens end-of-text tokens, and the sha256 of their sequences those of now."""
    tokens = np.load(packed / "tokens.npy", mmap_mode="r+")
    end_of_text, pieces = _pieces(packed, tokens, forgotten)
    for place in pieces:
        tokens[place] = end_of_text
    tokens.flush()
    rows = pl.read_parquet(packed / "sequences.parquet")
    positions = {int(position) for position, _ in pieces}
    sha256 = [
        hashlib.sha256(tokens[position][:n].astype("<u4").tobytes()).hexdigest()
        if position in positions
        else was
        for position, n, was in rows.select("position", "n_tokens", "sha256").iter_rows()
    ]
    temporary = packed / "sequences.withdrawn"
    rows.with_columns(sha256=pl.Series(sha256)).write_parquet(temporary, compression="zstd")
    write_atomically(temporary, packed / "sequences.parquet")


def _pieces(
    packed: Path, tokens: np.ndarray, forgotten: Forgotten
) -> tuple[int, list[tuple[int, slice]]]:
    """The end-of-text token, which closes every document, and where the text's tokens are."""
    spans = (
        pl.scan_parquet(packed / "spans.parquet")
        .filter(pl.col("doc_id").is_in(sorted(forgotten.doc_ids)))
        .sort("doc_id", "doc_start")
        .select("position", "offset", "n_tokens")
        .collect()
    )
    pieces = [(p, slice(offset, offset + n)) for p, offset, n in spans.iter_rows()]
    end_of_text = int(tokens[pieces[-1]][-1]) if pieces else 0
    return end_of_text, pieces
