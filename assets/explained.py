"""What became of a document or a sequence, and why: from the raw file to the models trained on it.

A document is named by its doc_id, or by its line of a raw file (rejected lines have no doc_id); a
sequence by its shard and position. `assets.versions` explains datasets.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from assets.standing import MINE, QUOTE, Facts, Records, checkpoints, standing
from assets.versions import explain_dataset
from colorfilter.errors import InputError
from colorfilter.score_tables import EXCLUDED
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
DOCUMENTS = "documents.parquet"
AT_LINE = "source_line = $line AND ends_with('/' || source_file, '/' || $file)"
BY_ID = "starts_with(doc_id, $doc_id)"
DOCUMENT = (
    *("became", "doc_id", "shard", "source_file", "source_line", "source", "file_sha256"),
    *("sha256", "n_chars", "n_tokens", "extra", "text", "copies", "sequences"),
)
COPIES = """
    SELECT doc_id, shard, source_file, source_line FROM documents
    WHERE sha256 = $sha256 AND doc_id <> $doc_id AND NOT starts_with(shard, '_') ORDER BY shard
"""
SPANS = f"""
    SELECT position, doc_id, source_file, source_line, source, sha256, "offset", s.n_tokens,
        char_start, char_end
    FROM (FROM spans WHERE {MINE}) AS s JOIN documents USING (shard, doc_id)
    ORDER BY position, "offset"
"""


def explain(records: Records, what: str) -> Facts:
    """All that is known of a document, sequence or dataset.

    Returns the object that `colorfilter explain --json` prints: `document` or `sequence`, and
    `models`, those that the losses are by; for a dataset see `explain_dataset`. Raises InputError
    for a name of nothing.
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
            raise InputError(f"{what}: the shard has positions 0 to {last}; give one of them")
    elif place:
        document = _document(records, what, AT_LINE, file=place[1], line=int(place[2]))
    elif DOC_ID.fullmatch(what):
        document = _document(records, what, BY_ID, doc_id=what)
    else:
        raise InputError(f"'{what}' names nothing that can be explained; {FORMS}")
    return {"document": document, "sequence": sequence, "models": checkpoints(records)}


def sequences(records: Records, shard: str, positions: Sequence[int]) -> list[Facts]:
    """Facts of the sequences at these positions of a shard, in order.

    `spans` are the pieces of documents in a sequence: `n_tokens` tokens from `offset` on, and the
    beginning of their text. Positions that do not exist are left out.
    """
    mine = {"shard": shard, "positions": list(positions)}
    query = "SELECT shard, position, n_tokens, sha256 FROM sequences"
    found = records.rows(f"{query} WHERE {MINE} ORDER BY position", **mine)
    facts = standing(records, shard, [row["position"] for row in found])
    spans = records.rows(SPANS, **mine)
    raw = records.current("raw_corpus", shard)
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


def _file_hashes(records: Records, entry: Entry | None) -> dict[str, str]:
    """sha256 of the files that an artifact was read from, by address, where it is on record.

    A probe's documents were read with the rest of the text of the domain, which is its input.
    """
    inputs = [records.input(entry, name) for name in (entry["inputs"] if entry else ())]
    tables = [records.read(made, "files.parquet", "uri, sha256") for made in (entry, *inputs)]
    return {uri: sha256 for table in tables for uri, sha256 in table.rows()}


def _texts(records: Records, raw: Entry | None, doc_ids: Collection[str]) -> dict[str, str]:
    """Texts of documents of a shard; none where its files are gone."""
    where = "list_contains($doc_ids::VARCHAR[], doc_id)"
    texts = records.read(raw, DOCUMENTS, "doc_id, text", where, doc_ids=list(doc_ids))
    return dict(texts.rows())


def _document(records: Records, what: str, where: str, **wanted: Any) -> Facts:
    """The document that a condition holds for. Raises InputError for none or several."""
    query = f"FROM documents WHERE {where} ORDER BY source_file, shard, doc_id LIMIT 3"
    found = records.rows(query, **wanted)
    in_tables, outside = bool(found), _outside(records, wanted.get("file"))
    while not found and (place := next(outside, None)):
        entry, table, became = place
        found = records.read(entry, table, "*", f"{where} LIMIT 3", **wanted).to_dicts()
    if len(found) > 1:
        places = (f"{d.get('doc_id')} at {d['source_file']}:{d['source_line']}" for d in found)
        raise InputError(f"{what}: several documents ({', '.join(places)}...); give more of it")
    if in_tables:
        return _in_tables(records, found[0])
    if found:
        document = {"became": became, **found[0], **_rejected(records, entry, found[0])}
        return _facts(records, entry, document)
    if "file" in wanted:
        raise InputError(f"{what}: neither a shard nor a raw file has that; {FORMS}")
    raise InputError(
        f"doc_id {what}: no document of the corpus or of a domain has it; look it up in "
        f"`documents` of {records.artifacts.at.scores}, or give FILE:LINE for what was rejected"
    )


def _facts(records: Records, entry: Entry | None, document: Facts) -> Facts:
    """A document by the names of DOCUMENT, null where not known. `entry` read its file."""
    text = document.get("text", document.get("excerpt"))
    found = {"copies": [], "sequences": [], **document, "text": text and text[:QUOTE]}
    found["file_sha256"] = _file_hashes(records, entry).get(document["source_file"])
    return {name: found.get(name) for name in DOCUMENT}


def _in_tables(records: Records, document: Facts) -> Facts:
    """A document of the score tables, with its sequences and its copies in other shards."""
    shard, doc_id = document["shard"], document["doc_id"]
    query = "SELECT DISTINCT position FROM spans WHERE shard = $shard AND doc_id = $doc_id"
    positions = [row["position"] for row in records.rows(query, shard=shard, doc_id=doc_id)]
    document["sequences"] = sequences(records, shard, positions)
    document["copies"] = records.rows(COPIES, sha256=document["sha256"], doc_id=doc_id)
    raw = records.current("raw_corpus", shard)
    document["text"] = _texts(records, raw, [doc_id]).get(doc_id)
    return _facts(records, raw, {**document, "became": _became(records, document)})


def _became(records: Records, document: Facts) -> str:
    """What a document of the score tables is to the pipeline, in words."""
    shard, sha256 = document["shard"], document["sha256"]
    for made in tombstones(records.artifacts):
        if made.facts["sha256"] == sha256:
            models = ", ".join(name for name, _ in made.facts["learned"]) or "no model"
            return f"forgotten: taken out of all that held it; {models} learned from it"
    if shard.startswith("_"):
        return SPLITS["probe"]
    # D_prior is the sample that the shard was packed without, or that the prior learned from. It is
    # compared by text: a copy in another shard is left out as well.
    trained = (records.current("corpus_tokens", shard), records.current("prior_model"))
    plans = [records.input(made, "sample_plan") for made in trained]
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


def _outside(records: Records, file: str | None) -> Iterator[tuple[Entry | None, str, str | None]]:
    """Tables of documents that the score tables do not hold, newest first, and what became of them.

    With a file, first what its shards rejected; `_rejected` says why.
    """
    for shard in records.artifacts.at.shards() if file else ():
        if any(f"/{f.uri}".endswith(f"/{file}") for f in shard.files):
            raw = records.current("raw_corpus", shard.name)
            yield raw, "rejects.parquet", None
    for entry in records.lineage.newest_first():
        domain, _, last = str(entry["asset"]).rpartition("/")
        if last == "domain_text":
            for split, became in SPLITS.items():
                yield entry, f"{split}/{DOCUMENTS}", f"{became} ({domain})"
        elif last == "raw_corpus":
            shard_name = entry["partition"]
            yield entry, DOCUMENTS, f"of the shard {shard_name}, which is no longer in the corpus"


def _rejected(records: Records, raw: Entry | None, row: Facts) -> Facts:
    """The shard of a rejected line, and why it was; of a duplicate, what begins like it."""
    if "reason" not in row:
        return {}
    became = f"rejected: {row['reason']}"
    if row["reason"] == "duplicate":
        became = "a duplicate of a document of its own shard, which stands for both"
        alike, wanted = "starts_with(text, $excerpt) LIMIT 3", {"excerpt": row["excerpt"]}
        kept = records.read(raw, DOCUMENTS, "doc_id", alike, **wanted).rows()
        became += f" ({', '.join(doc_id for (doc_id,) in kept)})" if kept else ""
    return {"became": became, "shard": raw and raw["partition"]}
