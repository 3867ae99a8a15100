"""What became of a document or a sequence, and why: from the raw file to the models trained on it.

A document is asked for by its doc_id, or by the line of the file that it was read from (what was
rejected has no doc_id); a sequence by its shard and position. `assets.versions` explains datasets.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from assets.datasets import QUOTE, Records
from assets.standing import MINE, Checkpoint, Standing, checkpoints, standing
from assets.versions import DatasetExplanation, explain_dataset
from colorfilter.errors import InputError
from colorfilter.provenance import stands
from colorfilter.score_tables import EXCLUDED
from colorfilter.tables import fetch
from resources.ledger import Entry
from resources.tombstones import tombstones

PLACE = re.compile(r"(.+):(\d+)")
DOC_ID = re.compile(r"[0-9a-f]{6,20}")
FORMS = "give a doc_id (at least 6 of its hex digits), SHARD:POSITION, FILE:LINE or <domain>/<arm>"
SPLITS = {
    "down": "D_down, which the conditional learned from",
    "held_out": "held-out text, only ever evaluated on",
    "probe": "the probe, which is scored like corpus and never selected",
}
COLUMNS = "doc_id, shard, source_file, source_line, source, n_chars, n_tokens, sha256, extra"


@dataclass(frozen=True)
class Span:
    """A piece of a document in a sequence: `n_tokens` tokens from `offset` on, and their text."""

    doc_id: str
    source_file: str
    source_line: int
    source: str
    file_sha256: str | None
    sha256: str
    offset: int
    n_tokens: int
    char_start: int
    char_end: int
    text: str | None


@dataclass(frozen=True)
class SequenceFacts:
    """A sequence: what it is made of and where it stands."""

    shard: str
    position: int
    n_tokens: int
    sha256: str
    spans: list[Span]
    standing: Standing


@dataclass(frozen=True)
class DocumentFacts:
    """A document: where it came from, what became of it, and its sequences.

    `doc_id` and `sha256` are None for what was rejected, `shard` for text that is no corpus.
    """

    became: str
    doc_id: str | None
    shard: str | None
    source_file: str
    source_line: int
    source: str
    file_sha256: str | None
    sha256: str | None
    n_chars: int | None
    n_tokens: int | None
    extra: str | None
    text: str | None
    copies: list[dict[str, Any]] = field(default_factory=list)
    sequences: list[SequenceFacts] = field(default_factory=list)


@dataclass(frozen=True)
class Explanation:
    """A document or a sequence, and the models that the losses are by."""

    document: DocumentFacts | None
    sequence: SequenceFacts | None
    models: list[Checkpoint]


def explain(records: Records, what: str) -> Explanation | DatasetExplanation:
    """All that is known of a document, sequence or dataset. Raises InputError for what is none."""
    place = PLACE.fullmatch(what)
    if "/" in what and not place:
        return explain_dataset(records, what)
    models = checkpoints(records)
    if place and _is_shard(records, place[1]):
        return Explanation(None, _sequence(records, place[1], int(place[2])), models)
    if place:
        return Explanation(_at_line(records, place[1], int(place[2])), None, models)
    if not DOC_ID.fullmatch(what):
        raise InputError(f"'{what}' names nothing that can be explained; {FORMS}")
    return Explanation(_document(records, what), None, models)


def _is_shard(records: Records, name: str) -> bool:
    query = "SELECT 1 FROM sequences WHERE shard = ? LIMIT 1"
    return bool(fetch(records.connection, query, [name]))


def _sequence(records: Records, shard: str, position: int) -> SequenceFacts:
    found = sequences(records, shard, [position])
    if not found:
        query = "SELECT max(position) FROM sequences WHERE shard = ?"
        ((last,),) = fetch(records.connection, query, [shard])
        raise InputError(
            f"{shard}:{position}: the shard has positions 0 to {last}; give one of them"
        )
    return found[0]


def sequences(records: Records, shard: str, positions: Sequence[int]) -> list[SequenceFacts]:
    """Facts of the sequences at these positions of a shard, in order; unknown ones are left out."""
    mine = {"shard": shard, "positions": list(positions)}
    rows = fetch(
        records.connection,
        f"SELECT position, n_tokens, sha256 FROM sequences {MINE} ORDER BY position",
        mine,
    )
    spans: dict[int, list[tuple[Any, ...]]] = {row[0]: [] for row in rows}
    for position, *span in fetch(
        records.connection,
        f"""
        SELECT position, doc_id, source_file, source_line, source, sha256, "offset", s.n_tokens,
            char_start, char_end
        FROM (FROM spans {MINE}) AS s JOIN documents USING (shard, doc_id)
        ORDER BY position, "offset"
        """,
        mine,
    ):
        spans[position].append(tuple(span))
    raw = records.artifacts.entries().get(("raw_corpus", shard))
    files = raw_files(records, raw)
    texts = _texts(records, raw, sorted({span[0] for of in spans.values() for span in of}))
    stand = standing(records, shard, [row[0] for row in rows])

    def shown(span: tuple[Any, ...]) -> Span:
        doc_id, file, line, source, sha256, offset, n_tokens, start, end = span
        text = texts.get(doc_id)
        piece = text[start : min(end, start + QUOTE)] if text is not None else None
        return Span(
            doc_id, file, line, source, files.get(file), sha256, offset, n_tokens, start, end, piece
        )

    return [
        SequenceFacts(
            shard, position, n_tokens, sha256, [shown(s) for s in spans[position]], stand[position]
        )
        for position, n_tokens, sha256 in rows
    ]


def raw_files(records: Records, raw: Entry | None) -> dict[str, str]:
    """sha256 of the files that a shard was read from, by address, where it has been taken."""
    if raw is None:
        return {}
    if not str(raw["partition"]).startswith("_"):
        return _file_hashes(records.folder(raw))
    # A probe's documents were read with the rest of the domain's text.
    read = [records.one(name, made) for name, made in raw["inputs"].items()]
    return {k: v for e in read if e for k, v in _file_hashes(records.folder(e)).items()}


def _file_hashes(folder: Path) -> dict[str, str]:
    path = folder / "files.parquet"
    if not path.exists():
        return {}
    return dict(pl.read_parquet(path, columns=["uri", "sha256"]).iter_rows())


def _texts(records: Records, raw: Entry | None, doc_ids: Sequence[str]) -> dict[str, str]:
    """Texts of documents of a shard; none where its files are gone."""
    path = records.folder(raw) / "documents.parquet" if raw else None
    if path is None or not path.exists():
        return {}
    found = pl.scan_parquet(path).filter(pl.col("doc_id").is_in(doc_ids)).select("doc_id", "text")
    return dict(found.collect().iter_rows())


def _document(records: Records, prefix: str) -> DocumentFacts:
    """The document whose doc_id begins so."""
    rows = fetch(
        records.connection,
        f"SELECT {COLUMNS} FROM documents WHERE starts_with(doc_id, ?) ORDER BY doc_id LIMIT 20",
        [prefix],
    )
    if len(rows) > 1:
        ids = ", ".join(row[0] for row in rows[:3])
        raise InputError(f"doc_id {prefix}: several documents begin so ({ids}...); give more of it")
    if rows:
        return _in_tables(records, rows[0])
    found = _elsewhere(records, prefix)
    if found is None:
        raise InputError(
            f"doc_id {prefix}: no document of the corpus or of a domain has it; look it up in "
            f"`documents` of {records.artifacts.at.scores}, or give FILE:LINE for what was rejected"
        )
    return found


def _in_tables(records: Records, row: tuple[Any, ...]) -> DocumentFacts:
    """A document of the score tables, with its sequences and its copies in other shards."""
    doc_id, shard, file, line, source, n_chars, n_tokens, sha256, extra = row
    positions = fetch(
        records.connection,
        "SELECT DISTINCT position FROM spans WHERE shard = ? AND doc_id = ? ORDER BY position",
        [shard, doc_id],
    )
    copies = fetch(
        records.connection,
        """
        SELECT doc_id, shard, source_file, source_line FROM documents
        WHERE sha256 = ? AND doc_id <> ? AND NOT starts_with(shard, '_') ORDER BY shard
        """,
        [sha256, doc_id],
    )
    raw = records.artifacts.entries().get(("raw_corpus", shard))
    text = _texts(records, raw, [doc_id]).get(doc_id)
    found = sequences(records, shard, [p for (p,) in positions])
    return DocumentFacts(
        _became(records, row, [c[1] for c in copies], found),
        doc_id,
        shard,
        file,
        line,
        source,
        raw_files(records, raw).get(file),
        sha256,
        n_chars,
        n_tokens,
        extra,
        text[:QUOTE] if text is not None else None,
        [
            dict(zip(("doc_id", "shard", "source_file", "source_line"), c, strict=True))
            for c in copies
        ],
        found,
    )


def _became(
    records: Records,
    row: tuple[Any, ...],
    copies_in: Sequence[str],
    found: Sequence[SequenceFacts],
) -> str:
    """What a document of the score tables is to the pipeline, in words."""
    shard, sha256 = row[1], row[7]
    for made in tombstones(records.artifacts):
        if made.facts["sha256"] == sha256:
            models = ", ".join(name for name, _ in made.facts["learned"]) or "no model"
            return f"forgotten: taken out of all that held it; {models} learned from it"
    if shard.startswith("_"):
        return SPLITS["probe"]
    in_sample = _in_sample(records, shard, sha256)
    if not found:
        if in_sample:
            return "D_prior, which the prior learned from: left out of the sequences, never scored"
        return "left out of the sequences"
    words = ["corpus"]
    if in_sample:
        words.append("also in D_prior, which the prior learned from")
    if copies_in and min(copies_in) < shard:
        words.append(f"a copy of what stands in {min(copies_in)}: never selected here")
    reasons = {s.standing.excluded for s in found}
    if reasons == {"padded"}:
        words.append(f"{EXCLUDED['padded']}, never selected")
    return "; ".join(words)


def _in_sample(records: Records, shard: str, sha256: str) -> bool:
    """Whether a text is in the D_prior that its shard was packed without or the prior learned from.

    By its text: a copy in another shard is left out as well.
    """
    made = [
        records.artifacts.entries().get(k)
        for k in (("corpus_tokens", shard), ("prior_model", None))
    ]
    for plan in {e["inputs"].get("sample_plan") for e in made if e}:
        entry = records.one("sample_plan", plan)
        if entry and stands(records.folder(entry)):
            table = pl.scan_parquet(records.folder(entry) / "documents.parquet")
            if len(table.filter(pl.col("sha256") == sha256).select("sha256").collect()):
                return True
    return False


def _elsewhere(records: Records, prefix: str) -> DocumentFacts | None:
    """A document that the tables do not hold: a domain's text, or a shard that was retired."""
    for entry in records.lineage.newest_first():
        asset = str(entry["asset"])
        if asset.endswith("/domain_text"):
            parts = {
                f"{why} ({asset.removesuffix('/domain_text')})": folder / "documents.parquet"
                for split, why in SPLITS.items()
                if (folder := records.folder(entry) / split).exists()
            }
        elif asset == "raw_corpus":
            parts = {
                f"of the shard {entry['partition']}, which is no longer in the corpus": (
                    records.folder(entry) / "documents.parquet"
                )
            }
        else:
            continue
        for became, path in parts.items():
            if path.exists():
                found = pl.scan_parquet(path).filter(pl.col("doc_id").str.starts_with(prefix))
                for row in found.head(1).collect().to_dicts():
                    files = _file_hashes(records.folder(entry))
                    return _outside(became, row, None, files)
    return None


def _outside(
    became: str, row: dict[str, Any], shard: str | None, files: dict[str, str]
) -> DocumentFacts:
    """A document without sequences, from a row of DOCUMENTS or REJECTS."""
    text = row.get("text", row.get("excerpt"))
    return DocumentFacts(
        became,
        row.get("doc_id"),
        shard,
        row["source_file"],
        row["source_line"],
        row["source"],
        files.get(row["source_file"]),
        row.get("sha256"),
        row.get("n_chars"),
        None,
        row.get("extra"),
        text[:QUOTE] if text is not None else None,
    )


def _at_line(records: Records, file: str, line: int) -> DocumentFacts:
    """The document at a line of a raw file, given by its path or the end of it."""
    rows = fetch(
        records.connection,
        f"""
        SELECT {COLUMNS} FROM documents WHERE source_line = $line
            AND (source_file = $file OR ends_with(source_file, '/' || $file))
        ORDER BY source_file, shard LIMIT 20
        """,
        {"file": file, "line": line},
    )
    if not rows:
        rejected = _rejected(records, file, line)
        if rejected is None:
            raise InputError(f"{file}:{line}: neither a shard nor a raw file has that; {FORMS}")
        return rejected
    if len(rows) > 1:
        files = ", ".join(f"{row[2]} ({row[0]})" for row in rows[:3])
        raise InputError(
            f"{file}:{line}: several documents are of such a file ({files}); give more"
        )
    return _in_tables(records, rows[0])


def _rejected(records: Records, file: str, line: int) -> DocumentFacts | None:
    """What was read at a line of a raw file and not kept, with the reason."""
    for shard in records.artifacts.at.shards():
        if not any(f.uri == file or f.uri.endswith(f"/{file}") for f in shard.files):
            continue
        raw = records.artifacts.entries().get(("raw_corpus", shard.name))
        path = records.folder(raw) / "rejects.parquet" if raw else None
        if path is None or not path.exists():
            continue
        name = pl.col("source_file")
        found = pl.scan_parquet(path).filter(
            pl.col("source_line") == line, (name == file) | name.str.ends_with(f"/{file}")
        )
        for row in found.head(1).collect().to_dicts():
            became = f"rejected: {row['reason']}"
            if row["reason"] == "duplicate":
                became = "a duplicate of a document of its own shard, which stands for both"
                became += _kept_one(path.with_name("documents.parquet"), row["excerpt"])
            return _outside(became, row, shard.name, raw_files(records, raw))
    return None


def _kept_one(documents: Path, excerpt: str) -> str:
    """The documents whose text begins as that of a duplicate, in brackets."""
    begins = pl.scan_parquet(documents).filter(pl.col("text").str.starts_with(excerpt))
    ids = begins.select("doc_id").head(3).collect()["doc_id"].to_list()
    return f" ({', '.join(ids)})" if ids else ""
