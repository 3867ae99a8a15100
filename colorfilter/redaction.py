"""Making copies of tables and packed tokens without a document, in which nothing else moves.

A row of a table keeps its place and ids, without its text and with 0 characters. Tokens become
end-of-text tokens, so every other sequence stays where it is.
"""

import functools
import hashlib
import html
import os
import re
import shutil
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from colorfilter.documents import excerpt
from colorfilter.provenance import MANIFEST

# A text is known by pieces of its letters and digits, of this length and this far apart. Whatever
# shows 29 of its characters in a row shows a whole piece; a table in a report shows more.
PIECE = 24
APART = 6
ROWS = 2_048  # rows of a redacted table in a group: what is held in memory at a time


@dataclass(frozen=True)
class Forgotten:
    """A text to remove: its sha256, its ids and its places as `file:line`, and itself if known."""

    sha256: str
    doc_ids: Set[str]
    places: Set[str]
    text: str | None = None

    def is_shown_in(self, page: str) -> bool:
        """Whether a page or a record shows a piece of the text, however it is wrapped."""
        size, pieces = self._pieces
        if size < PIECE:  # too common to be looked for within others
            cells = re.split(r"<[^>]*>|[\n|`]", page)
            return any(_condensed(html.unescape(cell)) in pieces for cell in cells if size)
        # With what is in angle brackets, for it may be no markup, and without it.
        pages = [_condensed(page), _condensed(html.unescape(re.sub(r"<[^>]*>", "", page)))]
        return any(p[i : i + size] in pieces for p in pages for i in range(len(p) - size + 1))

    @functools.cached_property
    def _pieces(self) -> tuple[int, Set[str]]:
        """How long the pieces are that the text is known by, and the pieces."""
        known = _condensed(self.text or "")
        size = min(PIECE, len(known))
        return size, {known[i : i + size] for i in range(0, len(known) - size + 1, APART)}


def _condensed(text: str) -> str:
    """Letters and digits alone, without what escapes, markup and line breaks change."""
    return re.sub(r"\\[nrt]|[\W_]", "", text)


def holding_files(folder: Path, documents: Sequence[Forgotten]) -> list[str]:
    """Tables and packed tokens below a folder that hold documents, as paths relative to it."""
    found: dict[Path, None] = {}
    for table in sorted(folder.rglob("*.parquet")):
        if any(_holds_in_table(table, document) for document in documents):
            found[table] = None
    for packed in sorted(spans.parent for spans in folder.rglob("spans.parquet")):
        if any(_holds_in_tokens(packed, document) for document in documents):
            found |= dict.fromkeys([packed / "tokens.npy", packed / "sequences.parquet"])
    return [str(file.relative_to(folder)) for file in found]


def write_redacted(
    source: Path, target: Path, documents: Sequence[Forgotten], files: Collection[str]
) -> None:
    """Write a folder's content to another folder, without documents in `files`.

    `files` are those that `holding_files` gives. All others are linked, not copied. What an earlier
    attempt left in `target` is replaced.
    """
    shutil.rmtree(target, ignore_errors=True)
    for file in sorted(p for p in source.rglob("*") if p.is_file() and p.name != MANIFEST):
        name = str(file.relative_to(source))
        new = target / name
        new.parent.mkdir(parents=True, exist_ok=True)
        if name not in files:
            _link(file, new)
        elif file.name == "tokens.npy":
            _redact_tokens(file.parent, new.parent, documents)
        elif file.name != "sequences.parquet":  # written with its tokens
            _redact_table(file, new, documents)
    for name in files:  # for the original is removed when these are on the disk
        with (target / name).open("rb") as written:
            os.fsync(written.fileno())


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the filesystem has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _holds_in_table(table: Path, document: Forgotten) -> bool:
    """Whether a Parquet table has rows with the text, a quote or the beginning of it."""
    rule = _rule(table, document)
    if rule is None:
        return False
    return bool(pl.scan_parquet(table).filter(rule[0]).select(pl.len()).collect().item())


def _redact_table(table: Path, target: Path, documents: Sequence[Forgotten]) -> None:
    """Write a table with those rows' text, quote or excerpt empty, and all else as it is."""
    content = pl.scan_parquet(table)
    for document in documents:
        if rule := _rule(table, document):
            rows, empty = rule
            content = content.with_columns(
                pl.when(rows).then(value).otherwise(pl.col(c)).alias(c)
                for c, value in empty.items()
            )
    content.sink_parquet(target, compression="zstd", row_group_size=ROWS)


def _rule(table: Path, document: Forgotten) -> tuple[pl.Expr, dict[str, pl.Expr]] | None:
    """Which rows of a table hold the text, and what their columns become."""
    names = set(pq.read_schema(table).names)
    nothing = pl.lit("", dtype=pl.String)
    ids = pl.col("doc_id").is_in(sorted(document.doc_ids))
    if {"sha256", "text", "n_chars"} <= names:
        rows = (pl.col("sha256") == document.sha256) & (pl.col("n_chars") > 0)
        gone = {"text": nothing, "extra": pl.lit("{}"), "n_chars": pl.lit(0, dtype=pl.Int64)}
        return rows, gone
    if {"doc_id", "quote", "protected"} <= names:
        quotes = ids | pl.col("protected").is_in(sorted(document.places))
        return quotes & (pl.col("quote") != ""), {"quote": nothing}
    if {"doc_id", "excerpt"} <= names:
        return ids & (pl.col("excerpt") != ""), {"excerpt": nothing}
    if {"reason", "excerpt"} <= names and document.text:
        return pl.col("excerpt") == excerpt(document.text), {"excerpt": nothing}
    return None


def touched_sequences(packed: Path, document: Forgotten) -> pl.DataFrame:
    """The sequences of a folder of packed tokens that carry a piece: position, sha256."""
    spans = pl.scan_parquet(packed / "spans.parquet")
    mine = spans.filter(pl.col("doc_id").is_in(sorted(document.doc_ids)))
    sequences = pl.scan_parquet(packed / "sequences.parquet").select("position", "sha256")
    return sequences.join(mine, on="position", how="semi").sort("position").collect()


def _holds_in_tokens(packed: Path, document: Forgotten) -> bool:
    """Whether a folder of packed tokens (colorfilter.tokens) has tokens of the text."""
    tokens = np.load(packed / "tokens.npy", mmap_mode="r")
    end_of_text, pieces = _pieces(packed, tokens, document)
    return any((tokens[place] != end_of_text).any() for place in pieces)


def _redact_tokens(packed: Path, target: Path, documents: Sequence[Forgotten]) -> None:
    """Write packed tokens with the documents' replaced by end-of-text, and the new sha256."""
    shutil.copyfile(packed / "tokens.npy", target / "tokens.npy")
    tokens = np.load(target / "tokens.npy", mmap_mode="r+")
    changed: set[int] = set()
    for document in documents:
        end_of_text, pieces = _pieces(packed, tokens, document)
        for position, where in pieces:
            tokens[position, where] = end_of_text
            changed.add(position)
    tokens.flush()
    rows = pl.read_parquet(packed / "sequences.parquet")
    sha256 = [
        hashlib.sha256(tokens[position][:n].astype("<u4").tobytes()).hexdigest()
        if position in changed
        else was
        for position, n, was in rows.select("position", "n_tokens", "sha256").iter_rows()
    ]
    rows.with_columns(sha256=pl.Series(sha256, dtype=pl.String)).write_parquet(
        target / "sequences.parquet", compression="zstd"
    )


def _pieces(
    packed: Path, tokens: np.ndarray, document: Forgotten
) -> tuple[int, list[tuple[int, slice]]]:
    """The end-of-text token, which closes every document, and where the text's tokens are."""
    spans = (
        pl.scan_parquet(packed / "spans.parquet")
        .filter(pl.col("doc_id").is_in(sorted(document.doc_ids)))
        .sort("doc_id", "doc_start")
        .select("position", "offset", "n_tokens")
        .collect()
    )
    pieces = [(p, slice(offset, offset + n)) for p, offset, n in spans.iter_rows()]
    end_of_text = int(tokens[pieces[-1]][-1]) if pieces else 0
    return end_of_text, pieces
