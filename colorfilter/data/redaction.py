"""Removing documents from copies of tables and packed tokens; all other positions stay the same.

A redacted row of a table keeps its position and ids, but has no text and 0 characters. Redacted
tokens become end-of-text tokens, so every other sequence keeps its position.
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

# A text is recognized by its pieces of PIECE letters and digits. A page is checked at every
# APART-th position, so 29 consecutive characters of a text are found; tables of a report show more.
PIECE = 24
APART = 6
LONG = 100_000  # characters of a text from which on its pieces, not the positions, are apart
# Values of the columns of a redacted row; its ids and position stay.
EMPTY: dict[str, str | int] = {"text": "", "extra": "{}", "n_chars": 0, "quote": "", "excerpt": ""}
ROWS = 2_048  # rows per row group of a redacted table, to bound memory


@dataclass(frozen=True)
class Forgotten:
    """A text to remove: its sha256, ids and locations (`file:line`), and the text if known."""

    sha256: str
    doc_ids: Set[str]
    places: Set[str]
    text: str | None = None

    def is_shown_in(self, page: str) -> bool:
        """Return whether a page or record shows a piece of the text, regardless of line breaks."""
        size, pieces = self._pieces
        if size < PIECE:  # a short text may occur in others by chance: compare complete cells
            cells = re.split(r"<[^>]*>|[\n|`]", page)
            return any(_condensed(html.unescape(cell)) in pieces for cell in cells if size)
        # A text with few pieces must not fall between positions.
        apart = 1 if self._is_long else min(APART, len(pieces))
        return any(
            form[i : i + size] in pieces
            for form in _forms(page)
            for i in range(0, len(form), apart)
        )

    @property
    def _is_long(self) -> bool:
        """Whether the pieces are apart in the text, to save memory, and not in the page."""
        return len(self.text or "") > LONG

    @functools.cached_property
    def _pieces(self) -> tuple[int, Set[str]]:
        """The length of the pieces that identify the text, and the pieces."""
        known = _condensed(self.text or "")
        size = min(PIECE, len(known))
        apart = APART if self._is_long else 1
        return size, {known[i : i + size] for i in range(0, len(known) - size + 1, apart)}


@functools.lru_cache(maxsize=1)  # callers check several documents against one page in a row
def _forms(page: str) -> Set[str]:
    """Return a page condensed in two ways: with angle brackets as text, and with tags removed."""
    return {_condensed(page), _condensed(html.unescape(re.sub(r"<[^>]*>", "", page)))}


def _condensed(text: str) -> str:
    """Return the letters and digits of a text, so that escapes and line breaks do not matter."""

    def letters(escaped: re.Match[str]) -> str:
        return bytes.fromhex(re.sub(r"\\+u", "", escaped[0])).decode("utf-16-be", "replace")

    text = re.sub(r"(?:\\+u[0-9a-fA-F]{4})+", letters, text)  # non-ASCII characters in JSON
    return re.sub(r"(?:\\[nrt]|[\W_])+", "", text)


def holding_files(folder: Path, documents: Sequence[Forgotten]) -> list[str]:
    """Return the tables and packed tokens in a folder that contain any of the documents.

    Paths are relative to the folder.
    """
    tables = sorted(folder.rglob("*.parquet"))
    found = [table for table in tables if _redacted_table(table, documents)[1]]
    for spans in sorted(folder.rglob("spans.parquet")):
        if _redacted_tokens(spans.parent, documents)[1]:
            found += [spans.with_name("tokens.npy"), spans.with_name("sequences.parquet")]
    return [str(file.relative_to(folder)) for file in found]


def write_redacted(
    source: Path, target: Path, documents: Sequence[Forgotten], files: Collection[str]
) -> Collection[str]:
    """Write a redacted copy of folder `source` to `target`, and return `files`.

    The documents are removed from `files`, the result of `holding_files`. All other files are
    linked, not copied. Leftovers of an earlier attempt in `target` are replaced.
    """
    link_folder(source, target, without=MANIFEST)
    for name in files:
        old, new = source / name, target / name
        new.unlink()  # a link to the original, which must not be overwritten
        if old.name == "tokens.npy":
            np.save(new, _redacted_tokens(old.parent, documents)[0])
        elif old.name == "sequences.parquet":
            _redacted_sequences(old.parent, documents).write_parquet(new, compression="zstd")
        else:
            table, _ = _redacted_table(old, documents)
            table.sink_parquet(new, compression="zstd", row_group_size=ROWS)
        with new.open("rb") as written:  # flush to disk before the original is removed
            os.fsync(written.fileno())
    return files


def _redacted_table(table: Path, documents: Sequence[Forgotten]) -> tuple[pl.LazyFrame, bool]:
    """Return a table without texts, quotes and excerpts of documents, and whether it had any."""
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
    mine = [pl.col(column).is_in(known[column]) for column in known if column in columns]
    full = pl.any_horizontal(*(pl.col(column) != value for column, value in empty.items()))
    of_documents = pl.any_horizontal(pl.lit(False), *mine)
    redacted = content.with_columns(
        pl.when(of_documents & full).then(pl.lit(value)).otherwise(pl.col(column)).alias(column)
        for column, value in empty.items()
    )
    # Filtered first, so that the texts of other documents are not read.
    return redacted, content.filter(of_documents).select(full.any()).collect().item()


def touched_sequences(packed: Path, document: Forgotten) -> pl.DataFrame:
    """Return the packed sequences that contain tokens of a document: position, sha256."""
    sequences = pl.read_parquet(packed / "sequences.parquet", columns=["position", "sha256"])
    return sequences.join(_spans(packed, [document]), on="position", how="semi").sort("position")


def _redacted_tokens(packed: Path, documents: Sequence[Forgotten]) -> tuple[np.ndarray, Set[int]]:
    """Return packed tokens with the documents' tokens replaced by end-of-text.

    Also returns the positions of the sequences that changed.
    """
    tokens = np.load(packed / "tokens.npy", mmap_mode="c")  # copy-on-write: the file is unchanged
    spans = _spans(packed, documents).select("position", "offset", "n_tokens").rows()
    changed = set()
    if spans:
        position, offset, n = spans[-1]
        end_of_text = tokens[position, offset + n - 1]  # the last token of every document
    for position, offset, n in spans:
        piece = tokens[position, offset : offset + n]
        if (piece != end_of_text).any():
            piece[:] = end_of_text
            changed.add(position)
    return tokens, changed


def _redacted_sequences(packed: Path, documents: Sequence[Forgotten]) -> pl.DataFrame:
    """Return the table of packed sequences with the new sha256 of redacted sequences."""
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
    """Return the spans of documents in packed tokens; the last row closes its document."""
    ids = {doc_id for document in documents for doc_id in document.doc_ids}
    spans = pl.scan_parquet(packed / "spans.parquet").filter(pl.col("doc_id").is_in(ids))
    return spans.sort("doc_id", "doc_start").collect()
