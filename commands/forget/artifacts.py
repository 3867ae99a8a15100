"""Find documents, remove them from every artifact that contains them, and leave tombstones.

Every artifact folder is searched, current or old. Artifacts are immutable: each is replaced by a
version without the documents, or deleted. If interrupted, the same call completes the work, because
the tables of texts, which the rest is found by, are replaced last.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl

from colorfilter.data.redaction import Forgotten, holding_files, touched_sequences, write_redacted
from colorfilter.errors import InputError
from colorfilter.selection.sql import fetch, fetch_frame, fetch_row
from colorfilter.stages import ArtifactName, Stage
from colorfilter.storage.manifest import MANIFEST
from colorfilter.training.schedule import training_order
from commands.names import AT_LINE, BY_ID, DOC_ID, DOCUMENTS, PLACE
from resources.artifacts import ROWS, ArtifactStore, Work
from resources.audit import Finding
from resources.exclusions import EXCLUSION, SEQUENCES, tombstones
from resources.ledger import Entry, is_removed
from resources.lineage import Lineage, name_of
from resources.pruning import folders

Shows = Callable[[str], bool]

TEXTS = {Stage.RAW_CORPUS, Stage.SAMPLE_PLAN, Stage.DOMAIN_TEXT}  # stages that store text
PAGES = {".html", ".md"}
BINARY = {".npy", ".parquet", ".safetensors"}
BLOCK = 1 << 24  # characters of a file to search at a time
OVERLAP = 4_096  # characters that blocks overlap; longer than any displayed piece of a text
TOUCHED = {"shard": pl.String, "position": pl.Int64, "sha256": pl.String}
COLUMNS = """
    SELECT table_name, column_name FROM duckdb_columns() SEMI JOIN duckdb_tables() USING (table_oid)
    WHERE data_type = 'VARCHAR'
"""


@dataclass(frozen=True)
class Holding:
    """An artifact folder that contains documents, or an unfinished one that may contain them.

    `name` is the artifact's name, `path` is relative to the home. `files` are the files to rewrite
    without the documents in the next version. If empty, the artifact is deleted (datasets and
    reports). In an unfinished folder `files` are deleted.
    """

    name: str
    path: str
    files: Sequence[str] = ()
    unfinished: bool = False


@dataclass(frozen=True)
class Survey:
    """What contains a document, and which models were trained on it.

    `touched` has a row per sequence that contains a part of it: shard (null outside the corpus),
    position, sha256. `learned` has the name and fingerprint of each model trained on it.
    """

    document: Forgotten
    holdings: list[Holding]
    touched: pl.DataFrame
    learned: list[tuple[str, str]]


def find(artifacts: ArtifactStore, what: str) -> Forgotten:
    """Find a document and all its copies by doc_id, its first digits, or FILE:LINE.

    Raises InputError if no document matches, or several do.
    """
    if place := PLACE.fullmatch(what):
        named = _documents(artifacts, AT_LINE, file=place[1], line=int(place[2]))
    elif DOC_ID.fullmatch(what):
        named = _documents(artifacts, BY_ID, doc_id=what)
    else:
        raise InputError(
            f"'{what}' is not the name of a document; give at least 6 digits of a doc_id, or "
            "FILE:LINE"
        )
    texts = named["sha256"].unique()
    if len(texts) != 1:
        rows = named.select("doc_id", "place").head(3).rows()
        places = "; ".join(f"{doc_id} at {place}" for doc_id, place in rows)
        many = f"several documents match ({places}...); give more of the name"
        raise InputError(f"{what}: {many if places else 'no document in this home matches'}")
    return find_copies(artifacts, str(texts[0]))


def find_copies(artifacts: ArtifactStore, sha256: str) -> Forgotten:
    """Find all documents with a text, by its sha256."""
    copies = _documents(artifacts, "sha256 = $sha256", sha256=sha256)
    text = next(filter(None, copies["text"]), None)
    return Forgotten(sha256, set(copies["doc_id"]), set(copies["place"]), text)


def _documents(artifacts: ArtifactStore, where: str, **wanted: Any) -> pl.DataFrame:
    """Return matching rows of all document tables: doc_id, place (`file:line`), sha256, text."""
    whole = [f for f in folders(artifacts.at.artifacts) if (f / MANIFEST).exists()]
    tables = [str(table) for folder in whole for table in folder.rglob(DOCUMENTS)]
    if not tables:
        raise InputError(f"home {artifacts.at.root}: no text read yet; use `colorfilter run` first")
    query = f"""
        SELECT doc_id, source_file || ':' || source_line AS place, sha256, text
        FROM read_parquet($tables, union_by_name = true, hive_partitioning = false)
        WHERE {where} ORDER BY place, doc_id
    """
    with duckdb.connect() as connection:
        return fetch_frame(connection, query, {"tables": tables, **wanted})


def survey(artifacts: ArtifactStore, document: Forgotten) -> Survey:
    """Find everything that contains a document, and all models trained on it."""
    tables = [pl.DataFrame(schema=TOUCHED)]
    for folder in folders(artifacts.at.artifacts):
        of_corpus = folder.parents[1].name == Stage.CORPUS_TOKENS
        shard = pl.lit(folder.parent.name if of_corpus else None, dtype=pl.String).alias("shard")
        for spans in folder.rglob("spans.parquet") if (folder / MANIFEST).exists() else ():
            rows = touched_sequences(spans.parent, document)
            tables.append(rows.select(shard, "position", "sha256"))
    here = pl.concat(tables)
    # Datasets may hold sequences under the sha256 they had before another document was removed from
    # them, or before an interrupted removal of this one.
    before = {m.facts["sha256"]: pl.read_parquet(m.path / SEQUENCES) for m in tombstones(artifacts)}
    earlier = [t.join(here, on=["shard", "position"], how="semi") for t in before.values()]
    mine = before.get(document.sha256, here)
    touched = pl.concat([here, *earlier, mine]).unique(maintain_order=True)
    holdings = list(_holdings(artifacts, [document], set(touched["sha256"])))
    return Survey(document, holdings, touched, _learned(artifacts, holdings, touched))


def _holdings(
    artifacts: ArtifactStore, documents: Sequence[Forgotten], touched: Set[str]
) -> Iterator[Holding]:
    """Yield folders that contain documents, those that store text last.

    `touched` are the sha256 of the sequences that contain parts of the documents.
    """
    entries, root = artifacts.ledger.by_path(), artifacts.at.artifacts
    for folder in sorted(folders(root), key=lambda f: (_has_texts(f.relative_to(root)), f)):
        path = str(folder.relative_to(artifacts.at.root))
        asset = str(folder.parent.relative_to(root))
        name = name_of(entries[path]) if path in entries else asset
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if not (folder / MANIFEST).exists():
            # Losses contain no text, so they are kept.
            begun = [str(f.relative_to(folder)) for f in files if not f.match("losses-*.parquet")]
            if begun:
                yield Holding(name, path, begun, unfinished=True)
        elif (folder / ROWS).exists():
            carried = pl.read_parquet(folder / ROWS, columns=["sha256"])["sha256"]
            if not touched.isdisjoint(carried):
                yield Holding(name, path)
        elif redacted := holding_files(folder, documents):
            yield Holding(name, path, redacted)
        elif any(showing((f for f in files if f.suffix in PAGES), any_of(documents))):
            yield Holding(name, path)


def _has_texts(path: str | Path) -> bool:
    """Whether the artifact at a path stores text, by its asset."""
    return not TEXTS.isdisjoint(Path(path).parts)


def any_of(documents: Sequence[Forgotten]) -> Shows:
    """Return a predicate: whether a string shows one of several documents."""
    return lambda string: any(document.is_shown_in(string) for document in documents)


def showing(files: Iterable[Path], shows: Shows) -> Iterator[Path]:
    """Yield the files that show a text. Skips tables and tokens; see `holding_files` for those."""
    for file in sorted(files):
        if file.is_file() and file.suffix not in BINARY and any(map(shows, _strings(file))):
            yield file


def _strings(file: Path) -> Iterator[str]:
    """Yield a file's content in overlapping blocks, or each string column of a DuckDB database."""
    if file.suffix != ".duckdb" or not file.stat().st_size:  # empty: a lock file of that name
        with file.open(encoding="utf-8", errors="ignore") as stream:
            last = ""
            while block := stream.read(BLOCK):
                yield last + block
                last = block[-OVERLAP:]
        return
    with duckdb.connect(str(file), read_only=True) as connection:
        for table, column in fetch(connection, COLUMNS):
            query = f'SELECT string_agg(DISTINCT "{column}", chr(10)) FROM "{table}"'
            yield fetch_row(connection, query)[0] or ""


def _learned(
    artifacts: ArtifactStore, holdings: Iterable[Holding], touched: pl.DataFrame
) -> list[tuple[str, str]]:
    """Return tokenizers and models trained on a document, or initialized from one that was."""
    lineage = Lineage(artifacts)
    held = {holding.path: holding.files for holding in holdings}
    taught: set[tuple[str, str]] = set()
    learned: dict[tuple[str, str], None] = {}
    for entry in artifacts.ledger:
        identity = name_of(entry), str(entry["fingerprint"])
        stage = ArtifactName.parse(entry["asset"]).stage
        files = held.get(entry["path"], ())
        in_down = any(file.startswith("down/") for file in files)
        if (files and stage is Stage.SAMPLE_PLAN) or (in_down and stage is Stage.DOMAIN_TOKENS):
            taught.add(identity)
        trained = stage is Stage.TOKENIZER or {"checkpoint", "checkpoints"} & entry["facts"].keys()
        # Target models are evaluated on a domain's tokens, not trained on them.
        only_seen = Stage.DOMAIN_TOKENS if stage is Stage.TARGET_MODEL else None
        by = {i for i in entry["inputs"].items() if ArtifactName.parse(i[0]).stage != only_seen}
        if trained and (taught & by or _reached(artifacts, lineage, entry, touched)):
            taught.add(identity)
            learned[identity] = None
    return list(learned)


def _reached(
    artifacts: ArtifactStore, lineage: Lineage, model: Entry, touched: pl.DataFrame
) -> bool:
    """Return whether a target model's training reached one of the sequences."""
    for name, fingerprint in model["inputs"].items():
        of_dataset = ArtifactName.parse(name).stage is Stage.FILTERED_DATASET
        for dataset in lineage.find(name, fingerprint) if of_dataset else ():
            rows = artifacts.rows_of(dataset)
            if rows is not None:
                mine = rows.join(touched, on="sha256", how="semi")["row"]
                order = training_order(model["seed"], len(rows))
                if np.isin(order[: max(model["recipe"]["endpoints"])], mine).any():
                    return True
    return False


def take_out(
    artifacts: ArtifactStore, surveys: Sequence[Survey], check: Callable[[], None]
) -> None:
    """Remove documents from every artifact that contains them, leaving a tombstone for each.

    Tombstones are written first, so that the texts are not read again from then on. `check` is
    called while only artifacts that store text still contain them: if it raises, the same call
    knows the texts again.
    """
    for found in surveys:
        sha256 = found.document.sha256
        tombstone = Work(EXCLUSION, sha256[:20], recipe={"sha256": sha256})
        artifacts.make(tombstone, partial(_write_tombstone, found))
    documents = [found.document for found in surveys]
    touched = {sha256 for found in surveys for sha256 in found.touched["sha256"]}
    holdings = list(_holdings(artifacts, documents, touched))
    root, entries = artifacts.at.root, artifacts.ledger.by_path()
    for attempt in (holding for holding in holdings if holding.unfinished):  # starts over
        for file in attempt.files:
            (root / attempt.path / file).unlink()
    whole = [holding for holding in holdings if not holding.unfinished]
    for holding in whole:
        if holding.files and holding.path in entries:
            write = partial(write_redacted, documents=documents, files=holding.files)
            artifacts.replace(entries[holding.path], write)
    without_version = {holding.path for holding in whole if not holding.files}
    for path, entry in artifacts.ledger.by_path().items():
        # A pruned artifact cannot be searched, and backups may still have it.
        gone = path in without_version or not (root / path).exists()
        if gone and not is_removed(entry) and artifacts.ledger.last_version(path) == path:
            artifacts.remove(entry)
    for holding in (h for h in whole if not _has_texts(h.path)):
        artifacts.discard(root / holding.path)
    check()
    for holding in whole:
        artifacts.discard(root / holding.path)


def _write_tombstone(found: Survey, folder: Path) -> dict[str, Any]:
    found.touched.write_parquet(folder / SEQUENCES)
    return {
        "sha256": found.document.sha256,
        "doc_ids": sorted(found.document.doc_ids),
        "places": sorted(found.document.places),
        "sequences": int(found.touched["shard"].count()),
        "held": [holding.name for holding in found.holdings],
        "learned": found.learned,
    }


def remaining(artifacts: ArtifactStore) -> Iterator[Finding]:
    """Find what still contains a forgotten document and, as warnings, models trained on one."""
    known = artifacts.ledger.by_path()
    current = {(name_of(e), e["fingerprint"]) for e in artifacts.entries().values()}
    for made in tombstones(artifacts):
        facts = made.facts
        # Not searched by file and line: another text may be there now.
        document = Forgotten(facts["sha256"], set(facts["doc_ids"]), set())
        what = f"{facts['places'][0]}, which was forgotten"
        touched = set(pl.read_parquet(made.path / SEQUENCES)["sha256"])
        for holding in _holdings(artifacts, [document], touched):
            made_of_it = holding.path in known and not holding.unfinished
            for file in (holding.files or [""]) if made_of_it else ():
                path = f"{holding.path}/{file}"
                yield Finding(holding.name, path, f"nothing of {what}", "text or tokens of it")
        for name, fingerprint in facts["learned"]:
            if (name, fingerprint) in current:
                wanted = f"a model not trained on {what}"
                yield Finding(name, fingerprint[:16], wanted, "one that was", warning=True)
