"""Making copies of tables and packed tokens without a document, in which nothing else moves.

A row of a table keeps its place and ids, without its text and with 0 characters. Tokens become
end-of-text tokens, so every other sequence stays where it is.
"""

import functools
import hashlib
import html
import os
import re
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from colorfilter.data.documents import excerpt
from colorfilter.storage.files import link_folder
from colorfilter.storage.manifest import MANIFEST

# A text is known by its pieces of this many letters and digits. A page is looked at in places this
# far apart: what shows 29 of its characters in a row is found; a table in a report shows more.
PIECE = 24
APART = 6
# What is in the columns of a redacted row; its ids and its place stay.
EMPTY: dict[str, str | int] = {"text": "", "extra": "{}", "n_chars": 0, "quote": "", "excerpt": ""}
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
        apart = min(APART, len(pieces))  # so that one of few pieces is at such a place as well
        return any(
            form[i : i + size] in pieces
            for form in _forms(page)
            for i in range(0, len(form), apart)
        )

    @functools.cached_property
    def _pieces(self) -> tuple[int, Set[str]]:
        """How long the pieces are that the text is known by, and the pieces."""
        known = _condensed(self.text or "")
        size = min(PIECE, len(known))
        return size, {known[i : i + size] for i in range(len(known) - size + 1)}


@functools.lru_cache(maxsize=1)  # the next document is looked for in the same page
def _forms(page: str) -> Set[str]:
    """A page condensed, with what is in angle brackets, for it may be no markup, and without it."""
    return {_condensed(page), _condensed(html.unescape(re.sub(r"<[^>]*>", "", page)))}


def _condensed(text: str) -> str:
    """Letters and digits alone, without what escapes, markup and line breaks change."""

    def letters(escaped: re.Match[str]) -> str:
        return bytes.fromhex(re.sub(r"\\+u", "", escaped[0])).decode("utf-16-be", "replace")

    text = re.sub(r"(?:\\+u[0-9a-fA-F]{4})+", letters, text)  # as JSON has what is not ASCII
    return re.sub(r"(?:\\[nrt]|[\W_])+", "", text)


def holding_files(folder: Path, documents: Sequence[Forgotten]) -> list[str]:
    """Tables and packed tokens below a folder that hold documents, as paths relative to it."""
    tables = sorted(folder.rglob("*.parquet"))
    found = [table for table in tables if _redacted_table(table, documents)[1]]
    for spans in sorted(folder.rglob("spans.parquet")):
        if _redacted_tokens(spans.parent, documents)[1]:
            found += [spans.with_name("tokens.npy"), spans.with_name("sequences.parquet")]
    return [str(file.relative_to(folder)) for file in found]


def write_redacted(
    source: Path, target: Path, documents: Sequence[Forgotten], files: Collection[str]
) -> Collection[str]:
    """Write a folder's content to another folder, without documents in `files`. Return `files`.

    `files` are those that `holding_files` gives. All others are linked, not copied. What an earlier
    attempt left in `target` is replaced.
    """
    link_folder(source, target, without=MANIFEST)
    for name in files:
        old, new = source / name, target / name
        new.unlink()  # a second name of the old file
        if old.name == "tokens.npy":
            np.save(new, _redacted_tokens(old.parent, documents)[0])
        elif old.name == "sequences.parquet":
            _redacted_sequences(old.parent, documents).write_parquet(new, compression="zstd")
        else:
            table, _ = _redacted_table(old, documents)
            table.sink_parquet(new, compression="zstd", row_group_size=ROWS)
        with new.open("rb") as written:  # on the disk before the original is removed
            os.fsync(written.fileno())
    return files


def _redacted_table(table: Path, documents: Sequence[Forgotten]) -> tuple[pl.LazyFrame, bool]:
    """A table without texts, quotes and excerpts of documents, and whether it had any."""
    content, columns = pl.scan_parquet(table), set(pq.read_schema(table).names)
    empty = {column: value for column, value in EMPTY.items() if column in columns}
    if not empty:
        return content, False
    known = {
        "sha256": {document.sha256 for document in documents},
        "doc_id": {doc_id for document in documents for doc_id in document.doc_ids},
        "protected": {place for document in documents for place in document.places},
        "excerpt": {excerpt(document.text) for document in documents if document.text},
    }
    mine = (pl.col(column).is_in(known[column]) for column in known if column in columns)
    full = (pl.col(column) != value for column, value in empty.items())
    rows = pl.any_horizontal(pl.lit(False), *mine) & pl.any_horizontal(*full)
    redacted = content.with_columns(
        pl.when(rows).then(pl.lit(value)).otherwise(pl.col(column)).alias(column)
        for column, value in empty.items()
    )
    return redacted, content.select(rows.any()).collect().item()


def touched_sequences(packed: Path, document: Forgotten) -> pl.DataFrame:
    """The sequences of a folder of packed tokens that carry a piece: position, sha256."""
    sequences = pl.read_parquet(packed / "sequences.parquet", columns=["position", "sha256"])
    return sequences.join(_spans(packed, [document]), on="position", how="semi").sort("position")


def _redacted_tokens(packed: Path, documents: Sequence[Forgotten]) -> tuple[np.ndarray, Set[int]]:
    """Packed tokens with the documents' replaced by end-of-text, and the positions that changed."""
    tokens = np.load(packed / "tokens.npy", mmap_mode="c")  # changed in memory, not in the file
    spans = _spans(packed, documents).select("position", "offset", "n_tokens").rows()
    changed = set()
    if spans:
        position, offset, n = spans[-1]
        end_of_text = tokens[position, offset + n - 1]  # it closes every document
    for position, offset, n in spans:
        piece = tokens[position, offset : offset + n]
        if (piece != end_of_text).any():
            piece[:] = end_of_text
            changed.add(position)
    return tokens, changed


def _redacted_sequences(packed: Path, documents: Sequence[Forgotten]) -> pl.DataFrame:
    """The table of packed sequences with the sha256 of those that changed."""
    tokens, changed = _redacted_tokens(packed, documents)
    rows = pl.read_parquet(packed / "sequences.parquet")
    sha256 = {
        position: hashlib.sha256(tokens[position, :n].astype("<u4").tobytes()).hexdigest()
        for position, n in rows.select("position", "n_tokens").iter_rows()
        if position in changed
    }
    now = pl.col("position").replace_strict(sha256, default=pl.col("sha256"))
    return rows.with_columns(sha256=now)


def _spans(packed: Path, documents: Sequence[Forgotten]) -> pl.DataFrame:
    """Where packed tokens have pieces of documents. The last of them closes its document."""
    ids = {doc_id for document in documents for doc_id in document.doc_ids}
    spans = pl.scan_parquet(packed / "spans.parquet").filter(pl.col("doc_id").is_in(ids))
    return spans.sort("doc_id", "doc_start").collect()
