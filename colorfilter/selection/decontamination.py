"""Find selected text that quotes, word for word, the text that models are evaluated on.

A filter conditioned on a domain selects exactly the pages that quote the test. The convention here
is that of GPT-3 (arXiv 2005.14165, appendix C) and of lm-evaluation-harness's janitor: 13
consecutive words match, ignoring case and punctuation. Shorter texts are matched as a whole, down
to 8 words, GPT-3's minimum. A word is a run of Unicode letters and digits, in lower case; all other
characters separate words ("don't" is two words, with either apostrophe). In scripts without spaces,
a word is everything between two punctuation marks, so only long quotes are found. Unlike in GPT-3,
frequent runs count too: boilerplate of a held-out page is a match wherever it occurs.

Runs of words are looked up by a 64-bit hash that is equal in every process. It is a polynomial over
words, and a word's hash is a polynomial over characters, so numpy computes all hashes of a text as
differences of running sums. Every hit is then compared word by word.
"""

import bisect
import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from colorfilter.data.tokens import batches_of_text
from colorfilter.selection.dataset import unbroken_runs, whole_documents, with_text

NGRAM_WORDS = 13
LEAST_WORDS = 8
BLOCK_CHARS = 2**18
MOST_SLOTS = 2**27
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
INVERSE = np.uint64(pow(int(BASE), -1, 2**64))


class Match(NamedTuple):
    """An unbroken run of words of a text, all of which are in protected runs of words.

    `text` is the text's index, `char_start` and `char_end` are the run's bounds in it, `protected`
    is the name of the document that contains most of the run.
    """

    text: int
    char_start: int
    char_end: int
    n_words: int
    quote: str
    protected: str


class Protected:
    """The 13-grams of texts that must not be trained on, given as (name, text).

    A text of 8 to 12 words is a single run of words. Shorter texts are not protected; `too_short`
    counts them. Memory: the texts, 24 bytes per word, and a table of 8 to 16 bytes per word but at
    most 128 MiB; twice that during construction.
    """

    def __init__(self, documents: Iterable[tuple[str, str]]) -> None:
        self.too_short = 0
        self._names: list[str] = []
        self._texts: list[str] = []
        self._first_words: list[int] = []  # counted through all texts
        n_words = 0
        bounds = [np.empty((0, 2), np.uint32)]
        ngrams = defaultdict(list)
        for name, text in documents:
            hashes, places = hashed_words(text)
            size = min(NGRAM_WORDS, len(hashes))
            if size < LEAST_WORDS:
                self.too_short += 1
                continue
            self._names.append(name)
            self._texts.append(text)
            self._first_words.append(n_words)
            bounds.append(places.astype(np.uint32))
            ngrams[size].append((hashed_ngrams(hashes, size), n_words))
            n_words += len(hashes)
        self._bounds = np.concatenate(bounds)
        self._ngrams = {size: _Ngrams(parts) for size, parts in sorted(ngrams.items())}

    def __len__(self) -> int:
        return len(self._texts)

    def matches(self, texts: Sequence[str]) -> list[Match]:
        """Return all matches in `texts`, in order. Takes about 50 bytes of memory per word."""
        joined = "\n".join(texts)
        begins = np.cumsum([0, *(len(text) + 1 for text in texts)])
        hashes, bounds = hashed_words(joined)
        owner = np.searchsorted(begins, bounds[:, 0], side="right") - 1
        hits: list[tuple[int, int, int]] = []  # first word, end, protected document
        for size, protected in self._ngrams.items():
            ngrams = hashed_ngrams(hashes, size)
            for first in protected.hits(ngrams):
                end = first + size
                if owner[first] == owner[end - 1]:
                    run = words(joined[bounds[first, 0] : bounds[end - 1, 1]])
                    document = self._document_with(run, protected.places(ngrams[first]))
                    if document is not None:
                        hits.append((first, end, document))
        found = []
        for first, end, document in _joined(sorted(hits), owner):
            text, start, stop = int(owner[first]), int(bounds[first, 0]), int(bounds[end - 1, 1])
            place = (start - int(begins[text]), stop - int(begins[text]))
            name = self._names[document]
            found.append(Match(text, *place, end - first, joined[start:stop], name))
        return found

    def _document_with(self, run: list[str], places: Iterable[int]) -> int | None:
        """Return the first document that has this run of words at one of these word numbers."""
        for place in places:
            document = bisect.bisect_right(self._first_words, place) - 1
            start, end = self._bounds[place, 0], self._bounds[place + len(run) - 1, 1]
            if words(self._texts[document][start:end]) == run:
                return document
        return None


class _Ngrams:
    """Hashes of protected runs of words of one size, each with the number of its first word."""

    def __init__(self, parts: Sequence[tuple[np.ndarray, int]]) -> None:
        hashes = np.concatenate([ngrams for ngrams, _ in parts])
        places = np.concatenate([first + np.arange(len(ngrams)) for ngrams, first in parts])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._places = hashes[order], places[order]
        # Most runs are in no protected text; a table detects that in a tenth of a search's time.
        slots = min(MOST_SLOTS, 1 << (8 * len(hashes)).bit_length())
        self._shift = np.uint64(65 - slots.bit_length())
        self._slots = np.zeros(slots, bool)
        self._slots[hashes >> self._shift] = True

    def hits(self, ngrams: np.ndarray) -> list[int]:
        """Return the indices of hashes that belong to protected runs."""
        perhaps = np.flatnonzero(self._slots[ngrams >> self._shift])
        at = np.searchsorted(self._hashes, ngrams[perhaps])
        same = self._hashes[np.minimum(at, len(self._hashes) - 1)] == ngrams[perhaps]
        hits: list[int] = perhaps[same].tolist()
        return hits

    def places(self, ngram: np.uint64) -> Iterator[int]:
        """Yield the number of the first word of each protected run with this hash, in order."""
        for i in range(int(np.searchsorted(self._hashes, ngram)), len(self._hashes)):
            if self._hashes[i] != ngram:
                return
            yield int(self._places[i])


def _joined(
    hits: Sequence[tuple[int, int, int]], owner: np.ndarray
) -> Iterator[tuple[int, int, int]]:
    """Merge sorted hits that touch within a text; yield start, end and most frequent document."""
    met: Counter[int] = Counter()
    begin = stop = 0
    for first, end, document in hits:
        if met and (first > stop or owner[first] != owner[begin]):
            yield begin, stop, met.most_common(1)[0][0]
            met.clear()
        if not met:
            begin, stop = first, end
        stop = max(stop, end)
        met[document] += 1
    if met:
        yield begin, stop, met.most_common(1)[0][0]


# Words and their hashes ---------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Return the words of a text in the form that is compared."""
    return text.translate(FOLDED).split()


def _folded(char: str) -> str:
    """Return a letter or digit in lower case, any other character as a space: one character."""
    return char.lower()[0] if char.isalnum() else " "


class _Folded(dict[int, str]):
    def __missing__(self, code: int) -> str:
        self[code] = char = _folded(chr(code))
        return char


FOLDED = _Folded()


@functools.cache
def _values() -> np.ndarray:
    """Return a uint64 per code point: 0 if it separates words, equal for upper and lower case."""
    folded = (_folded(chr(code)) for code in range(0x110000))
    return _mixed(np.fromiter((0 if c == " " else ord(c) for c in folded), np.uint64, 0x110000))


def hashed_words(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the words of a text: hashes, uint64 [W], and character bounds, int64 [W, 2]."""
    hashes, bounds = [np.empty(0, np.uint64)], [np.empty((0, 2), np.int64)]
    begin = 0
    while begin < len(text):
        end = begin + BLOCK_CHARS
        while end < len(text) and text[end].isalnum():
            end += 1
        values = _values()[np.frombuffer(text[begin:end].encode("utf-32-le"), np.uint32)]
        edges = np.flatnonzero(np.diff(values != 0, prepend=False, append=False)).reshape(-1, 2)
        hashes.append(_mixed(_polynomials(values, edges[:, 0], edges[:, 1])))
        bounds.append(edges + begin)
        begin = end
    return np.concatenate(hashes), np.concatenate(bounds)


def hashed_ngrams(hashes: np.ndarray, size: int) -> np.ndarray:
    """Return hashes of all runs of `size` words from the words' hashes: uint64 [W - size + 1]."""
    starts = np.arange(max(0, len(hashes) - size + 1))
    return _polynomials(hashes, starts, starts + size)


def _polynomials(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the sum over i of values[start + i] * BASE**i for each start and end, modulo 2**64."""
    powers, inverses = _powers(1 << len(values).bit_length())
    sums = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * powers[: len(values)], out=sums[1:])
    hashes: np.ndarray = (sums[ends] - sums[starts]) * inverses[starts]
    return hashes


@functools.lru_cache(4)
def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return BASE**i and BASE**-i for i < n, modulo 2**64."""
    factors = np.array([[BASE], [INVERSE]]).repeat(n, axis=1)
    factors[:, 0] = 1
    powers, inverses = np.multiply.accumulate(factors, axis=1)
    return powers, inverses


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mix bits one to one, so that each depends on all others; 0 stays 0 (end of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


# Matches in selected text -------------------------------------------------------------------

LEAKS = {
    "shard": pl.String(),
    "positions": pl.List(pl.Int64),
    "doc_id": pl.String(),
    "source_file": pl.String(),
    "char_start": pl.Int64(),
    "char_end": pl.Int64(),
    "n_words": pl.Int64(),
    "quote": pl.String(),
    "protected": pl.String(),
}


def search(
    protected: Protected, rows: Iterable[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], Match]]:
    """Yield all matches in the `text` of rows, each with its row."""
    for batch in batches_of_text(rows):
        for match in protected.matches([row["text"] for row in batch]):
            yield batch[match.text], match


def find_leaks(
    protected: Protected,
    shard: str,
    chosen: pl.DataFrame,
    tokens: Path,
    documents: Path,
    whole: bool,
) -> tuple[pl.DataFrame, int]:
    """Return the text that a shard's selected sequences share with protected texts.

    `chosen` has the `position` and `color` of the selected sequences. A row of the table (columns
    LEAKS) is a match: its quote, its bounds in the document, and `positions`, the selected
    sequences that contain any of its characters. With `whole`, complete documents with any selected
    text are searched, and a match may be in no selected sequence. Also returns the number of texts
    searched at first.

    Removing the matching sequences moves the ends of the remaining text, perhaps into the middle of
    a word, which makes it another word. So the remaining text is searched again until nothing is
    found.
    """
    spans = pl.read_parquet(tokens / "spans.parquet")
    texts = unbroken_runs(spans, chosen)
    if whole:
        texts = whole_documents(texts, spans)
    n_texts = len(texts)
    tables = [pl.DataFrame(schema=LEAKS)]
    while len(texts):
        selected = spans.join(chosen, on="position", how="semi")
        found = [
            _leak(row, match, selected)
            for row, match in search(protected, with_text(texts, documents, shard))
        ]
        tables.append(pl.DataFrame(found, LEAKS))
        gone = tables[-1].select(position=pl.col("positions").explode())
        chosen = chosen.join(gone, on="position", how="anti")
        cut = spans.join(gone, on="position", how="semi")
        texts = unbroken_runs(spans, chosen).join(cut, on="doc_id", how="semi")
    return pl.concat(tables), n_texts


def _leak(row: dict[str, Any], match: Match, selected: pl.DataFrame) -> dict[str, Any]:
    start, end = row["char_start"] + match.char_start, row["char_start"] + match.char_end
    carrying = selected.filter(
        pl.col("doc_id") == row["doc_id"], pl.col("char_start") < end, pl.col("char_end") > start
    )
    return {
        **row,
        **match._asdict(),
        "char_start": start,
        "char_end": end,
        "positions": carrying["position"].to_list(),
    }


def without_leaks(selection: pl.DataFrame | pl.LazyFrame, leaks: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of a selection (`shard`, `position`) that no leak names, in the same order.

    If the selection is a lazy scan, only the returned rows are held in memory.
    """
    named = leaks.select("shard", position="positions").explode("position")
    kept = selection.lazy().join(
        named.lazy(), on=["shard", "position"], how="anti", maintain_order="left"
    )
    return kept.collect(engine="streaming")
