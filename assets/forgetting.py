"""Forgetting documents: found, taken out of every artifact that holds them, with a tombstone left.

All folders of artifacts are searched, whatever asset they belong to and however old they are. An
artifact never changes: it is replaced by a version without the documents, or removed. Interrupted,
the same call completes it: the tables of texts, by which the rest is known, come last.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from assets.explained import DOC_ID, PLACE
from colorfilter.errors import InputError
from colorfilter.order import training_order
from colorfilter.provenance import MANIFEST
from colorfilter.redaction import (
    Forgotten,
    holding_files,
    touched_sequences,
    write_redacted,
)
from colorfilter.stages import ArtifactName, Stage
from resources.artifacts import ROWS, Artifact, ArtifactStore, Work
from resources.audit import Finding
from resources.ledger import Entry, is_removed
from resources.lineage import Lineage, name_of
from resources.pruning import folders
from resources.tombstones import FORGOTTEN, SEQUENCES, tombstones

TEXTS = {Stage.RAW_CORPUS, Stage.SAMPLE_PLAN, Stage.DOMAIN_TEXT}  # those that have texts themselves
PAGES = {".html", ".md"}
TOUCHED = {"shard": pl.String, "position": pl.Int64, "sha256": pl.String}


@dataclass(frozen=True)
class Holding:
    """A folder that holds documents, or may hold them: an unfinished attempt.

    `name` is that of the artifact, `path` relative to the home. `redacted` are the files that its
    next version has without them; it is removed where it has none, as datasets and reports.
    """

    name: str
    path: str
    redacted: list[str]
    unfinished: bool = False


@dataclass(frozen=True)
class Survey:
    """Where a document is.

    `touched` are the sequences that carry it: shard (null outside the corpus), position, sha256.
    `learned` are the models that trained on it, by name and fingerprint.
    """

    document: Forgotten
    holdings: list[Holding]
    touched: pl.DataFrame
    learned: list[tuple[str, str]]


def find(artifacts: ArtifactStore, what: str) -> Forgotten:
    """The document of this doc_id, or its first digits, or at this FILE:LINE, with all its copies.

    Raises InputError where there is none, or several.
    """
    place = PLACE.fullmatch(what)
    if place:
        file = pl.col("source_file")
        here = (file == place[1]) | file.str.ends_with(f"/{place[1]}")
        wanted = here & (pl.col("source_line") == int(place[2]))
    elif DOC_ID.fullmatch(what):
        wanted = pl.col("doc_id").str.starts_with(what)
    else:
        raise InputError(f"'{what}' names no document; give 6 digits of a doc_id, or FILE:LINE")
    rows = _documents(artifacts, wanted)
    texts = rows["sha256"].unique(maintain_order=True)
    if len(texts) != 1:
        places = "; ".join(f"{doc_id} at {f}:{line}" for doc_id, f, line, *_ in rows.rows()[:3])
        many = f"several documents ({places}...); give more of it"
        raise InputError(f"{what}: {many if places else 'no document of this home'}")
    copies = _documents(artifacts, pl.col("sha256") == texts[0])
    return Forgotten(
        str(texts[0]),
        set(copies["doc_id"]),
        {f"{file}:{line}" for _, file, line, *_ in copies.rows()},
        next((text for *_, text in copies.rows() if text), None),
    )


def _documents(artifacts: ArtifactStore, wanted: pl.Expr) -> pl.DataFrame:
    """Rows of every table of documents: doc_id, source_file, source_line, sha256, text."""
    columns = ["doc_id", "source_file", "source_line", "sha256", "text"]
    whole = [f for f in folders(artifacts.at.artifacts) if (f / MANIFEST).exists()]
    tables = sorted(table for folder in whole for table in folder.rglob("documents.parquet"))
    if not tables:
        raise InputError(f"home {artifacts.at.root}: no text has been read yet")
    found = (pl.scan_parquet(table).filter(wanted).select(columns).collect() for table in tables)
    return pl.concat(found)


def survey(artifacts: ArtifactStore, document: Forgotten) -> Survey:
    """Everything that holds a document or learned from it."""
    entries = artifacts.ledger.by_path()
    tables = [pl.DataFrame(schema=TOUCHED)]
    for folder in _folders(artifacts):
        entry = entries.get(str(folder.relative_to(artifacts.at.root)), {})
        shard = entry.get("partition") if entry.get("asset") == "corpus_tokens" else None
        if not (folder / MANIFEST).exists():
            continue
        for spans in sorted(folder.rglob("spans.parquet")):
            rows = touched_sequences(spans.parent, document)
            shards = pl.lit(shard, dtype=pl.String).alias("shard")
            tables.append(rows.select(shards, "position", "sha256"))
    here = pl.concat(tables)
    # Before another document was taken out of them, some had another sha256, by which datasets may
    # hold them; and where this one was begun to be taken out, all had.
    before = {m.facts["sha256"]: pl.read_parquet(m.path / SEQUENCES) for m in tombstones(artifacts)}
    earlier = [t.join(here, on=["shard", "position"], how="semi") for t in before.values()]
    mine = before.get(document.sha256, here)
    touched = pl.concat([here, *earlier, mine]).unique(maintain_order=True)
    holdings = list(_holdings(artifacts, [document], set(touched["sha256"])))
    learned = _learned(artifacts, holdings, touched)
    return Survey(document, holdings, touched, [(name_of(e), e["fingerprint"]) for e in learned])


def _folders(artifacts: ArtifactStore) -> list[Path]:
    """The folders of artifacts, finished or not; those that have texts themselves come last."""
    root = artifacts.at.artifacts
    found = [f for f in folders(root) if f.relative_to(root).parts[0] != FORGOTTEN]
    return sorted(found, key=lambda f: (not TEXTS.isdisjoint(f.parts), f))


def _holdings(
    artifacts: ArtifactStore, documents: Sequence[Forgotten], touched: Set[str]
) -> Iterator[Holding]:
    """Folders that hold documents; `touched` are the sha256 of the sequences that carry them."""
    entries = artifacts.ledger.by_path()
    for folder in _folders(artifacts):
        path = str(folder.relative_to(artifacts.at.root))
        asset = str(folder.parent.relative_to(artifacts.at.artifacts))
        name = name_of(entries[path]) if path in entries else asset
        if not (folder / MANIFEST).exists():
            if _files_of_attempt(folder):
                yield Holding(name, path, [], unfinished=True)
        elif (folder / ROWS).exists():
            carried = pl.read_parquet(folder / ROWS, columns=["sha256"])["sha256"]
            if not touched.isdisjoint(carried):
                yield Holding(name, path, [])
        elif redacted := holding_files(folder, documents):
            yield Holding(name, path, redacted)
        elif _is_shown(folder, documents):
            yield Holding(name, path, [])


def _is_shown(folder: Path, documents: Sequence[Forgotten]) -> bool:
    """Whether a page of a folder shows text of the documents."""
    pages = (p.read_text(encoding="utf-8") for p in sorted(folder.rglob("*")) if p.suffix in PAGES)
    return any(document.is_shown_in(page) for page in pages for document in documents)


def _learned(
    artifacts: ArtifactStore, holdings: Iterable[Holding], touched: pl.DataFrame
) -> list[Entry]:
    """The tokenizers and models that were trained on a document, or begun from one that was."""
    lineage = Lineage(artifacts)
    held = {holding.path: holding for holding in holdings}
    taught: set[tuple[str, str]] = set()
    learned: dict[tuple[str, str], Entry] = {}
    for entry in artifacts.ledger:
        identity = name_of(entry), str(entry["fingerprint"])
        stage = ArtifactName.parse(entry["asset"]).stage
        holding = held.get(entry["path"])
        in_down = holding and any(f.startswith("down/") for f in holding.redacted)
        if (holding and stage is Stage.SAMPLE_PLAN) or (in_down and stage is Stage.DOMAIN_TOKENS):
            taught.add(identity)
        trained = stage is Stage.TOKENIZER or {"checkpoint", "checkpoints"} & entry["facts"].keys()
        # A target model is only evaluated on a domain's tokens.
        only_seen = Stage.DOMAIN_TOKENS if stage is Stage.TARGET_MODEL else None
        by = {i for i in entry["inputs"].items() if ArtifactName.parse(i[0]).stage != only_seen}
        if trained and (taught & by or _reached(artifacts, lineage, entry, touched)):
            taught.add(identity)
            learned[identity] = entry
    return list(learned.values())


def _reached(
    artifacts: ArtifactStore, lineage: Lineage, model: Entry, touched: pl.DataFrame
) -> bool:
    """Whether a target model's training came to one of the sequences."""
    for name, fingerprint in model["inputs"].items():
        of = ArtifactName.parse(name)
        if (of.stage, of.part) != (Stage.FILTERED_DATASET, "tokens"):
            continue
        for dataset in lineage.find(name, fingerprint):
            rows = artifacts.rows_of(dataset)
            if rows is not None:
                mine = set(rows.join(touched, on="sha256", how="semi")["row"])
                order = training_order(model["seed"], len(rows))
                if not mine.isdisjoint(order[: max(model["recipe"]["endpoints"])].tolist()):
                    return True
    return False


def forget(artifacts: ArtifactStore, surveys: Sequence[Survey]) -> None:
    """Take documents out of every artifact that holds them, and leave a tombstone of each.

    The tombstones come first: from then on the texts are not read again.
    """
    for found in surveys:
        _leave_tombstone(artifacts, found)
    documents = [found.document for found in surveys]
    touched = {sha256 for found in surveys for sha256 in found.touched["sha256"]}
    holdings = list(_holdings(artifacts, documents, touched))
    entries = artifacts.ledger.by_path()
    for holding in holdings:
        if holding.unfinished:
            _clear(artifacts.at.root / holding.path)
    for holding in holdings:
        if holding.redacted and holding.path in entries:
            write = partial(_write, documents, holding.redacted)
            artifacts.replace(entries[holding.path], write)
    for holding in holdings:
        if holding.unfinished:
            continue
        if holding.redacted or holding.path not in entries:
            artifacts.discard(artifacts.at.root / holding.path)
        else:
            artifacts.remove(entries[holding.path])
    # What was pruned cannot be searched, and backups may have it.
    for path, entry in artifacts.ledger.by_path().items():
        gone = not (artifacts.at.root / path).exists() and not is_removed(entry)
        if gone and artifacts.ledger.last_version(path) == path:
            artifacts.remove(entry)


def _clear(folder: Path) -> None:
    """Remove the files of an unfinished attempt, which is begun anew, but for losses."""
    for file in _files_of_attempt(folder):
        file.unlink()


def _files_of_attempt(folder: Path) -> list[Path]:
    """The files that may have text of an attempt."""
    return [f for f in folder.rglob("*") if f.is_file() and not f.match("losses-*.parquet")]


def _write(
    documents: Sequence[Forgotten], files: Sequence[str], old: Path, new: Path
) -> Sequence[str]:
    write_redacted(old, new, documents, files)
    return files


def _leave_tombstone(artifacts: ArtifactStore, found: Survey) -> Artifact:
    document = found.document

    def build(folder: Path) -> dict[str, Any]:
        found.touched.write_parquet(folder / SEQUENCES)
        return {
            "sha256": document.sha256,
            "doc_ids": sorted(document.doc_ids),
            "places": sorted(document.places),
            "sequences": int(found.touched["shard"].count()),
            "held": [holding.name for holding in found.holdings],
            "learned": found.learned,
        }

    work = Work(FORGOTTEN, document.sha256[:20], recipe={"sha256": document.sha256})
    return artifacts.make(work, build)


def remaining(artifacts: ArtifactStore) -> Iterator[Finding]:
    """What still holds a forgotten document and, as warnings, what learned from one."""
    known = artifacts.ledger.by_path()
    current = {(name_of(e), e["fingerprint"]) for e in artifacts.entries().values()}
    for made in tombstones(artifacts):
        facts = made.facts
        # Not by its places: what stands there by now may be another text.
        document = Forgotten(facts["sha256"], set(facts["doc_ids"]), set())
        what = f"{facts['places'][0]}, which was forgotten"
        touched = set(pl.read_parquet(made.path / SEQUENCES)["sha256"])
        for holding in _holdings(artifacts, [document], touched):
            if holding.unfinished or holding.path not in known:
                continue  # made of what there is by now
            for file in holding.redacted or [""]:
                where = f"{holding.path}/{file}"
                yield Finding(holding.name, where, f"nothing of {what}", "it")
        for name, fingerprint in facts["learned"]:
            if (name, fingerprint) in current:
                wanted = f"a model that never saw {what}"
                yield Finding(name, fingerprint[:16], wanted, "one that did", warning=True)
