"""Trace a document or a sequence from the raw file to the models trained on it.

A document is named by its doc_id, or by its line in a raw file (rejected lines have no doc_id). A
sequence is named by shard and position. Datasets are explained by
`commands.explain.dataset_changes`.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from colorfilter.errors import InputError
from colorfilter.selection.score_tables import EXCLUDED
from colorfilter.stages import IN_CORPUS, ArtifactName, ShardKind, Stage
from commands.explain.dataset_changes import explain_dataset
from commands.explain.decisions import MINE, QUOTE, UNKNOWN, Facts, Records, checkpoints, standing
from commands.names import AT_LINE, BY_ID, DOC_ID, DOCUMENTS, PLACE
from resources.exclusions import tombstones
from resources.ledger import Entry

FORMS = "give a doc_id (at least 6 of its hex digits), SHARD:POSITION, FILE:LINE or <domain>/<arm>"
SPLITS = {
    "down": "D_down, which the conditional learned from",
    "held_out": "held-out text, only ever evaluated on",
    "probe": "the probe, which is scored like corpus and never selected",
}
DOCUMENT = (
    *("became", "doc_id", "shard", "source_file", "source_line", "source", "file_sha256"),
    *("sha256", "n_chars", "n_tokens", "extra", "text", "copies", "sequences"),
)
COPIES = f"""
    SELECT doc_id, shard, source_file, source_line FROM documents
    WHERE sha256 = $sha256 AND doc_id <> $doc_id AND {IN_CORPUS} ORDER BY shard
"""
SPANS = f"""
    SELECT position, doc_id, source_file, source_line, source, sha256, "offset", s.n_tokens,
        char_start, char_end
    FROM (FROM spans WHERE {MINE}) AS s JOIN documents USING (shard, doc_id)
    ORDER BY position, "offset"
"""


def explain(records: Records, what: str) -> Facts:
    """Return the object that `colorfilter explain --json` prints.

    It has `document` or `sequence`, and `models`, with which the losses were computed. For a
    dataset see `explain_dataset`. Raises InputError if `what` names nothing.
    """
    place = PLACE.fullmatch(what)
    if "/" in what and not place:
        return explain_dataset(records, what)
    document = sequence = None
    query = "SELECT max(position) AS last FROM sequences WHERE shard = $shard"
    last = records.rows(query, shard=place[1])[0]["last"] if place else None
    if place and last is not None:
        sequence = next(iter(sequences(records, place[1], [int(place[2])])), None)
        if sequence is None:
            raise InputError(f"{what}: no such position; the shard has positions 0 to {last}")
    elif place:
        document = _document(records, what, AT_LINE, file=place[1], line=int(place[2]))
    elif DOC_ID.fullmatch(what):
        document = _document(records, what, BY_ID, doc_id=what)
    else:
        raise InputError(f"'{what}' is not the name of a document, sequence or dataset; {FORMS}")
    return {"document": document, "sequence": sequence, "models": checkpoints(records)}


def sequences(records: Records, shard: str, positions: Sequence[int]) -> list[Facts]:
    """Return the facts of the sequences at some positions of a shard, in order.

    `spans` lists the pieces of documents in a sequence: `n_tokens` tokens from `offset` on, and the
    beginning of their text. Positions that do not exist are omitted.
    """
    mine = {"shard": shard, "positions": list(positions)}
    query = "SELECT shard, position, n_tokens, sha256 FROM sequences"
    found = records.rows(f"{query} WHERE {MINE} ORDER BY position", **mine)
    facts = standing(records, shard, [row["position"] for row in found])
    spans = records.rows(SPANS, **mine)
    raw = records.current(Stage.RAW_CORPUS, shard)
    files = _file_hashes(records, raw)
    texts = _texts(records, raw, {span["doc_id"] for span in spans})
    by_position: dict[int, list[Facts]] = {row["position"]: [] for row in found}
    for span in spans:
        start, text = span["char_start"], texts.get(span["doc_id"])
        span["file_sha256"] = files.get(span["source_file"])
        span["text"] = text and text[start : min(span["char_end"], start + QUOTE)]
        by_position[span.pop("position")].append(span)
    for row in found:
        row |= {"spans": by_position[row["position"]], "standing": facts[row["position"]]}
    return found


def _file_hashes(records: Records, entry: Entry) -> dict[str, str]:
    """Return the recorded sha256 of the files that an artifact was read from, by URI.

    The files of inputs are included: a probe was read as part of its domain's text, its input.
    """
    inputs = [records.input(entry, name) for name in entry["inputs"]]
    tables = [records.read(made, "files.parquet", "uri, sha256") for made in (entry, *inputs)]
    return {uri: sha256 for table in tables for uri, sha256 in table.rows()}


def _texts(records: Records, raw: Entry, doc_ids: Collection[str]) -> dict[str, str]:
    """Return the texts of documents of a shard, by doc_id; empty if its files are gone."""
    where = "list_contains($doc_ids::VARCHAR[], doc_id)"
    texts = records.read(raw, DOCUMENTS, "doc_id, text", where, doc_ids=list(doc_ids))
    return dict(texts.rows())


def _document(records: Records, what: str, where: str, **wanted: Any) -> Facts:
    """Return the document that matches a condition, with the keys DOCUMENT, null if unknown.

    Raises InputError if none matches, or several do.
    """
    places = _places(records, where, wanted)
    found, entry, became = next((place for place in places if place[0]), ([], UNKNOWN, ""))
    if not found and "file" in wanted:
        raise InputError(f"{what}: not found, neither in a shard nor in a raw file; {FORMS}")
    if not found:
        raise InputError(
            f"doc_id {what}: no document in the corpus or a domain has it; look it up in the table "
            f"`documents` of {records.artifacts.at.scores}, or give FILE:LINE of a rejected line"
        )
    if len(found) > 1:
        named = (f"{d.get('doc_id')} at {d['source_file']}:{d['source_line']}" for d in found)
        raise InputError(
            f"{what}: several documents match ({', '.join(named)}...); give more of the name"
        )
    document = {"copies": [], "sequences": [], "became": became, **found[0]}
    if entry is UNKNOWN:
        shard, doc_id = document["shard"], document["doc_id"]
        entry = records.current(Stage.RAW_CORPUS, shard)
        query = "SELECT DISTINCT position FROM spans WHERE shard = $shard AND doc_id = $doc_id"
        positions = [row["position"] for row in records.rows(query, shard=shard, doc_id=doc_id)]
        document["sequences"] = sequences(records, shard, positions)
        document["copies"] = records.rows(COPIES, sha256=document["sha256"], doc_id=doc_id)
        document["text"] = _texts(records, entry, [doc_id]).get(doc_id)
        document["became"] = _became(records, document)
    elif "reason" in document:
        document |= _rejected(records, entry, document)
    text = document.get("text", document.get("excerpt"))
    document["text"] = text and text[:QUOTE]
    document["file_sha256"] = _file_hashes(records, entry).get(document["source_file"])
    return {name: document.get(name) for name in DOCUMENT}


def _places(
    records: Records, where: str, wanted: Facts
) -> Iterator[tuple[list[Facts], Entry, str]]:
    """Yield up to 3 matching documents per table, the table's artifact, and what became of them.

    The score tables are searched first, with UNKNOWN as the artifact. If a file is given, lines
    that its shards rejected are next. Then come all artifacts with text, newest first.
    """

    def read(entry: Entry, table: str) -> list[Facts]:
        return records.read(entry, table, "*", f"{where} LIMIT 3", **wanted).to_dicts()

    query = f"FROM documents WHERE {where} ORDER BY source_file, shard, doc_id LIMIT 3"
    yield records.rows(query, **wanted), UNKNOWN, ""
    for shard in records.artifacts.at.shards() if "file" in wanted else ():
        if any(f"/{f.uri}".endswith(f"/{wanted['file']}") for f in shard.files):
            raw = records.current(Stage.RAW_CORPUS, shard.name)
            yield read(raw, "rejects.parquet"), raw, "rejected"
    for entry in records.lineage.newest_first():
        of = ArtifactName.parse(entry["asset"])
        if of.stage is Stage.DOMAIN_TEXT:
            for split, became in SPLITS.items():
                yield read(entry, f"{split}/{DOCUMENTS}"), entry, f"{became} ({of.domain})"
        elif of.stage is Stage.RAW_CORPUS:
            gone = f"of the shard {entry['partition']}, which is no longer in the corpus"
            yield read(entry, DOCUMENTS), entry, gone


def _rejected(records: Records, raw: Entry, row: Facts) -> Facts:
    """Return the shard of a rejected line and the reason; for a duplicate, the document it repeats.

    A duplicate is matched by the beginning of its text.
    """
    became = f"rejected: {row['reason']}"
    if row["reason"] == "duplicate":
        became = "a duplicate of a document of its own shard, which stands for both"
        alike, wanted = "starts_with(text, $excerpt) LIMIT 3", {"excerpt": row["excerpt"]}
        kept = records.read(raw, DOCUMENTS, "doc_id", alike, **wanted)
        became += f" ({', '.join(kept['doc_id'])})" if len(kept) else ""
    return {"became": became, "shard": raw["partition"]}


def _became(records: Records, document: Facts) -> str:
    """Return, in words, what became of a document that is in the score tables."""
    shard, sha256 = document["shard"], document["sha256"]
    for made in tombstones(records.artifacts):
        if made.facts["sha256"] == sha256:
            models = ", ".join(name for name, _ in made.facts["learned"]) or "no model"
            return f"forgotten: taken out of all that held it; {models} learned from it"
    if ShardKind.of(shard) is ShardKind.PROBE:
        return SPLITS["probe"]
    # D_prior is the sample that was excluded when packing the shard, or that the prior was trained
    # on. Compared by text, because copies in other shards are excluded too.
    trained = records.current(Stage.CORPUS_TOKENS, shard), records.current(Stage.PRIOR_MODEL)
    plans = [records.input(made, Stage.SAMPLE_PLAN) for made in trained]
    here = {"columns": "1", "where": "sha256 = $text", "text": sha256}
    in_sample = any(len(records.read(plan, DOCUMENTS, **here)) for plan in plans)
    if not document["sequences"]:
        if in_sample:
            return "D_prior, which the prior learned from: left out of the sequences, never scored"
        return "left out of the sequences"
    words = ["corpus"]
    if in_sample:
        words.append("also in D_prior, which the prior learned from")
    first = min([copy["shard"] for copy in document["copies"]], default=shard)
    if first < shard:
        words.append(f"a copy of a document of {first}: never selected here")
    if {s["standing"]["excluded"] for s in document["sequences"]} == {"padded"}:
        words.append(f"{EXCLUDED['padded']}, never selected")
    return "; ".join(words)
