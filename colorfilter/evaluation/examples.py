"""What a score rewards, to look at: sequences and documents from its best end to its worst.

Sequences come with the text of every token, so that the losses per token can be shown on it.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl

from colorfilter.data.tokens import Encoder, open_tokens, token_ends
from colorfilter.selection.sql import fetch_frame, fetch_row
from colorfilter.stages import IN_CORPUS

SHARES = (1 / 64, 1 / 16, 1 / 4, 1 / 2)

# What could have been selected.
CANDIDATES = f"""
    candidates AS NOT MATERIALIZED (
        SELECT shard, position, color
        FROM color ANTI JOIN excluded USING (shard, position)
        WHERE domain = $domain AND {IN_CORPUS}
    )
"""

# To 1/4096 of a nat: counting steps takes little memory, sorting or quantile_disc takes much.
EDGE = f"""
    WITH {CANDIDATES},
    steps AS (
        SELECT step, sum(count(*)) OVER (ORDER BY step) / sum(count(*)) OVER () AS share
        FROM (SELECT floor(color * 4096) / 4096 AS step FROM candidates) GROUP BY step
    )
    SELECT min(step) FROM steps WHERE share >= $share
"""

SEQUENCES = f"""
    WITH {CANDIDATES},
    chosen AS (FROM candidates ORDER BY {{order}}, shard, position LIMIT $n)
    SELECT
        $place AS place, shard, position, color,
        list(
            struct_pack(
                doc_id := d.doc_id, source_file := d.source_file, source_line := d.source_line,
                doc_start := s.doc_start, n_tokens := s.n_tokens,
                char_start := s.char_start, char_end := s.char_end,
                closes := s.doc_start + s.n_tokens = d.n_tokens
            )
            ORDER BY s."offset"
        ) AS spans
    FROM chosen JOIN spans AS s USING (shard, position) JOIN documents AS d USING (shard, doc_id)
    GROUP BY shard, position, color
    ORDER BY color, shard, position
"""


def sequences(
    connection: duckdb.DuckDBPyConnection,
    domain: str,
    cutoffs: Mapping[str, float],
    shares: Sequence[float] = SHARES,
    n: int = 5,
) -> pl.DataFrame:
    """Candidates of the lowest color, at the edge of the best `shares`, at cutoffs, of the highest.

    `cutoffs` are values of color by the arm's name. `n` of each place are given, in canonical order
    (color, shard, position), places from low to high. Columns: place, shard, position, color, and
    spans: a list, in the sequence's order, of doc_id, source_file, source_line, doc_start,
    n_tokens, char_start, char_end, and closes: whether the document ends there.
    """

    def chosen(place: str, order: str, **value: float) -> pl.DataFrame:
        parameters = {"domain": domain, "place": place, "n": n, **value}
        return fetch_frame(connection, SEQUENCES.format(order=order), parameters)

    between = {f"cutoff of {arm}": cutoff for arm, cutoff in cutoffs.items()}
    for share in shares:
        found = fetch_row(connection, EDGE, {"domain": domain, "share": share})
        between[f"edge of the best 1/{1 / share:g}"] = found[0]
    near = [
        chosen(place, "abs(color - $value), color", value=between[place])
        for place in sorted(between, key=lambda place: (between[place], place))
    ]
    return pl.concat([chosen("best", "color"), *near, chosen("worst", "color DESC")])


def sequence_tokens(chosen: pl.DataFrame, packed: Mapping[str, Path]) -> np.ndarray:
    """The tokens [n, T] of sequences given by shard and position, from folders of packed tokens."""
    opened = {shard: open_tokens(packed[shard]) for shard in chosen["shard"].unique()}
    places = zip(chosen["shard"], chosen["position"], strict=True)
    return np.stack([opened[shard][position] for shard, position in places])


def token_texts(
    chosen: pl.DataFrame, documents: Mapping[str, Path], encoder: Encoder
) -> list[list[str]]:
    """The text of every token of the sequences that `sequences` gave.

    Cut out of the documents and not decoded, so that a sequence's pieces joined are exactly the
    characters of its spans. A character of several tokens stands with the first of them, the others
    are empty; so is the end-of-text token. `documents` are the tables of documents by shard.
    """
    cut: dict[tuple[str, str], tuple[str, list[int]]] = {}
    for shard in chosen["shard"].unique():
        spans = chosen.filter(pl.col("shard") == shard)["spans"]
        wanted = {span["doc_id"] for of_sequence in spans for span in of_sequence}
        rows = (
            pl.scan_parquet(documents[shard])
            .filter(pl.col("doc_id").is_in(sorted(wanted)))
            .select("doc_id", "text")
            .collect()
        )
        for doc_id, text in rows.iter_rows():
            (encoding,) = encoder.encode([text])
            cut[shard, doc_id] = text, token_ends(encoding, len(text))
    return [
        [
            piece
            for span in row["spans"]
            for piece in _pieces(*cut[row["shard"], span["doc_id"]], span)
        ]
        for row in chosen.iter_rows(named=True)
    ]


def _pieces(text: str, ends: list[int], span: Mapping[str, Any]) -> list[str]:
    own = ends[span["doc_start"] : span["doc_start"] + span["n_tokens"]]
    return [text[a:b] for a, b in itertools.pairwise([span["char_start"], *own])]


@dataclass(frozen=True)
class Example:
    """A sequence with what each of its tokens costs both models.

    `texts` as of token_texts, `prior` and `conditional` float32 [T] as of
    token_losses.token_losses, `spans` as of sequences.
    """

    place: str
    shard: str
    position: int
    color: float
    spans: Sequence[Mapping[str, Any]]
    texts: Sequence[str]
    prior: np.ndarray
    conditional: np.ndarray


def examples(
    chosen: pl.DataFrame,
    texts: Sequence[Sequence[str]],
    prior: np.ndarray,
    conditional: np.ndarray,
) -> list[Example]:
    """What `sequences` gave, with the texts of its tokens and their losses, float32 [n, T]."""
    rows = zip(chosen.to_dicts(), texts, prior, conditional, strict=True)
    return [
        Example(**row, texts=text, prior=before, conditional=after)
        for row, text, before, after in rows
    ]


EXTREMES = """
    WITH per_document AS (
        SELECT
            d.shard, d.doc_id, d.source_file, d.source_line, d.n_tokens,
            sum(c.color * s.n_tokens) / sum(s.n_tokens) AS color
        FROM documents AS d
        JOIN spans AS s USING (shard, doc_id)
        JOIN color AS c ON c.shard = s.shard AND c.position = s.position AND c.domain = $domain
        WHERE NOT starts_with(d.shard, '_') AND d.n_tokens >= $length AND d.n_chars > 0
        GROUP BY ALL
    )
    (SELECT 'best' AS place, * FROM per_document ORDER BY color, doc_id LIMIT $n)
    UNION ALL
    (
        SELECT 'cutoff', * FROM per_document
        ORDER BY abs(color - (SELECT quantile_disc(color, $share) FROM per_document)), doc_id
        LIMIT $n
    )
    UNION ALL
    (
        SELECT 'median', * FROM per_document
        ORDER BY abs(color - (SELECT median(color) FROM per_document)), doc_id
        LIMIT $n
    )
    UNION ALL
    (SELECT 'worst', * FROM per_document ORDER BY color DESC, doc_id LIMIT $n)
"""


def extremes(
    connection: duckdb.DuckDBPyConnection, domain: str, length: int, share: float, n: int = 5
) -> pl.DataFrame:
    """The documents of lowest color, around the best `share`'s edge, median, and highest.

    Documents of at least one sequence's length; their color is the token-weighted mean of the
    sequences they stand in.
    """
    parameters = {"domain": domain, "length": length, "share": share, "n": n}
    table = fetch_frame(connection, EXTREMES, parameters)
    order = {"best": 0, "cutoff": 1, "median": 2, "worst": 3}
    return table.sort(pl.col("place").replace_strict(order), "color", "doc_id")


def excerpts(table: pl.DataFrame, documents: Mapping[str, Path], chars: int = 160) -> pl.DataFrame:
    """Add `excerpt`, the beginning of each document's text, on one line."""
    if table.is_empty():
        return table.with_columns(excerpt=pl.lit("", dtype=pl.String))
    parts = []
    for (shard,), part in table.group_by(["shard"], maintain_order=True):
        texts = (
            pl.scan_parquet(documents[str(shard)])
            .filter(pl.col("doc_id").is_in(list(part["doc_id"])))
            .select("doc_id", excerpt=pl.col("text").str.slice(0, 4 * chars))
            .collect()
        )
        parts.append(part.join(texts, on="doc_id", maintain_order="left"))
    one_line = pl.col("excerpt").str.replace_all(r"\s+", " ").str.strip_chars().str.slice(0, chars)
    joined = pl.concat(parts).with_columns(one_line)
    return table.join(
        joined.select("doc_id", "excerpt").unique(), on="doc_id", maintain_order="left"
    )
