"""Examples of what a score rewards: sequences and documents from its best end to its worst.

Sequences come with the text of every token, so that token losses can be shown on the text.
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

# Sequences that could have been selected.
CANDIDATES = f"""
    candidates AS NOT MATERIALIZED (
        SELECT shard, position, color
        FROM color ANTI JOIN excluded USING (shard, position)
        WHERE domain = $domain AND {IN_CORPUS}
    )
"""

# Exact to 1/4096 nat: counting steps takes little memory, sorting or quantile_disc a lot.
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
    """Return candidates from the best end of the color scale to the worst, `n` per place.

    The places are: the lowest color, the edge of each of the best `shares`, each of the `cutoffs`
    (values of color by arm name), and the highest color. Places are sorted by color; rows of a
    place are in canonical order (color, shard, position). Columns: place, shard, position, color,
    and spans: a list, in the sequence's order, of doc_id, source_file, source_line, doc_start,
    n_tokens, char_start, char_end, and closes (whether the document ends there).
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
    """Return the tokens [n, T] of sequences given by shard and position.

    `packed` is the folder of packed tokens by shard.
    """
    opened = {shard: open_tokens(packed[shard]) for shard in chosen["shard"].unique()}
    keys = zip(chosen["shard"], chosen["position"], strict=True)
    return np.stack([opened[shard][position] for shard, position in keys])


def token_texts(
    chosen: pl.DataFrame, documents: Mapping[str, Path], encoder: Encoder
) -> list[list[str]]:
    """Return the text of every token of the sequences that `sequences` returned.

    Texts are cut out of the documents, not decoded, so the joined texts of a sequence are exactly
    the characters of its spans. A character encoded as several tokens belongs to the first of them;
    the others are empty, and so is the end-of-text token. `documents` is the path of the documents
    table by shard.
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
    """A sequence with the loss of each of its tokens under both models.

    `spans`: see sequences. `texts`: see token_texts. `prior` and `conditional`: float32 [T], see
    token_losses.token_losses.
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
    """Combine the rows of `sequences` with their token texts and token losses, float32 [n, T]."""
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
    """Return `n` documents each of lowest, cutoff, median and highest color.

    The cutoff is the edge of the best `share` of documents. Only documents of at least `length`
    tokens, the length of a sequence, are considered. A document's color is the token-weighted mean
    color of the sequences it is packed in.
    """
    parameters = {"domain": domain, "length": length, "share": share, "n": n}
    table = fetch_frame(connection, EXTREMES, parameters)
    order = {"best": 0, "cutoff": 1, "median": 2, "worst": 3}
    return table.sort(pl.col("place").replace_strict(order), "color", "doc_id")


def excerpts(table: pl.DataFrame, documents: Mapping[str, Path], chars: int = 160) -> pl.DataFrame:
    """Add a column `excerpt`: the beginning of each document's text, on one line."""
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
