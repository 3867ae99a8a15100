"""Forgetting a document: found, taken out of all that holds it, and left as a tombstone.

All folders of artefacts are looked through, whatever asset they are of and however old. What is
stopped on the way goes on when it is asked for again: the tables that have the text itself, by
which the rest is known, come last.
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from assets.explained import DOC_ID, PLACE
from assets.tombstones import SEQUENCES, tombstones
from colorfilter import withdrawal
from colorfilter.errors import InputError
from colorfilter.order import training_order
from colorfilter.provenance import MANIFEST
from colorfilter.withdrawal import Forgotten
from resources.artifacts import Artifact, ArtifactStore, Work
from resources.audit import Finding
from resources.ledger import FORGOTTEN, Entry
from resources.lineage import Lineage, name_of
from resources.pruning import folders

TEXTS = {"raw_corpus", "sample_plan", "domain_text"}  # the assets that have texts themselves
TOUCHED = {"shard": pl.String, "position": pl.Int64, "sha256": pl.String}


@dataclass(frozen=True)
class Holding:
    """A folder that holds a document: files that it is taken out of, and files that go.

    `name` is that of the artefact, `path` relative to the home.
    """

    name: str
    path: str
    emptied: list[str]
    removed: list[str]


@dataclass(frozen=True)
class Survey:
    """Where a document is.

    `touched` are the sequences that carry it: shard (null where it is none of the corpus),
    position, sha256. `learned` are the models that it taught, by name and fingerprint.
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
            rows = withdrawal.touched_sequences(spans.parent, document)
            shards = pl.lit(shard, dtype=pl.String).alias("shard")
            tables.append(rows.select(shards, "position", "sha256"))
    here = pl.concat(tables)
    # Before another document was taken out of them, some had another sha256, by which datasets may
    # hold them; and where this one was begun to be taken out, all had.
    before = {m.facts["sha256"]: pl.read_parquet(m.path / SEQUENCES) for m in tombstones(artifacts)}
    earlier = [t.join(here, on=["shard", "position"], how="semi") for t in before.values()]
    mine = before.get(document.sha256, here)
    touched = pl.concat([here, *earlier, mine]).unique(maintain_order=True)
    holdings = list(_holdings(artifacts, document, touched, entries))
    learned = _learned(artifacts, holdings, touched)
    return Survey(document, holdings, touched, [(name_of(e), e["fingerprint"]) for e in learned])


def _folders(artifacts: ArtifactStore) -> list[Path]:
    """The folders of artefacts, finished or not; those that have texts themselves come last."""
    root = artifacts.at.artifacts
    found = [f for f in folders(root) if f.relative_to(root).parts[0] != FORGOTTEN]
    return sorted(found, key=lambda f: (not TEXTS.isdisjoint(f.parts), f))


def _holdings(
    artifacts: ArtifactStore,
    document: Forgotten,
    touched: pl.DataFrame,
    entries: Mapping[str, Entry],
) -> Iterator[Holding]:
    for folder in _folders(artifacts):
        path = str(folder.relative_to(artifacts.at.root))
        asset = str(folder.parent.relative_to(artifacts.at.artifacts))
        emptied, removed = _held(folder, document, set(touched["sha256"]))
        if emptied or removed:
            name = name_of(entries[path]) if path in entries else asset
            yield Holding(name, path, emptied, removed)


def _held(folder: Path, document: Forgotten, touched: Set[str]) -> tuple[list[str], list[str]]:
    """Files of a folder that a document can be taken out of, and files that have to go."""

    def names(files: Iterable[Path]) -> list[str]:
        return [str(file.relative_to(folder)) for file in files]

    every = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != MANIFEST]
    if not (folder / MANIFEST).exists():  # an attempt that was stopped: begun anew, but for losses
        return [], names(f for f in every if not f.match("losses-*.parquet"))
    dataset = folder / "tokens" / "sequences.parquet"
    if dataset.exists():
        carried = pl.read_parquet(dataset, columns=["sha256"])["sha256"]
        # By that table, which has no text, it is known later what was trained on what.
        return [], [] if touched.isdisjoint(carried) else names(f for f in every if f != dataset)
    # The texts themselves, by which the rest is known, come last.
    tables = sorted(folder.rglob("*.parquet"), key=lambda t: (t.name == "documents.parquet", t))
    emptied = names(t for t in tables if withdrawal.holds_in_table(t, document))
    for packed in sorted(spans.parent for spans in folder.rglob("spans.parquet")):
        if withdrawal.holds_in_tokens(packed, document):
            emptied += names([packed / "tokens.npy", packed / "sequences.parquet"])
    pages = sorted([*folder.glob("*.html"), *folder.glob("*.md")])
    told = (p for p in pages if document.is_told_in(p.read_text(encoding="utf-8")))
    return emptied, names(told)


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
        asset = str(entry["asset"]).rpartition("/")[2]
        holding = held.get(entry["path"])
        in_down = holding and any(f.startswith("down/") for f in holding.emptied)
        if (holding and asset == "sample_plan") or (in_down and asset == "domain_tokens"):
            taught.add(identity)
        trained = asset == "tokenizer" or {"checkpoint", "checkpoints"} & entry["facts"].keys()
        # A target model is only evaluated on a domain's tokens.
        only_seen = "domain_tokens" if asset == "target_model" else None
        by = {i for i in entry["inputs"].items() if i[0].rpartition("/")[2] != only_seen}
        if trained and (taught & by or _reached(artifacts, lineage, entry, touched)):
            taught.add(identity)
            learned[identity] = entry
    return list(learned.values())


def _reached(
    artifacts: ArtifactStore, lineage: Lineage, model: Entry, touched: pl.DataFrame
) -> bool:
    """Whether a target model's training came to one of the sequences."""
    for name, fingerprint in model["inputs"].items():
        if not name.endswith("/filtered_dataset/tokens"):
            continue
        for dataset in lineage.find(name, fingerprint):
            table = artifacts.at.root / dataset["path"] / "tokens" / "sequences.parquet"
            if table.exists():
                rows = pl.read_parquet(table, columns=["row", "sha256"])
                mine = set(rows.join(touched, on="sha256", how="semi")["row"])
                order = training_order(model["seed"], len(rows))
                if not mine.isdisjoint(order[: max(model["recipe"]["endpoints"])].tolist()):
                    return True
    return False


def forget(artifacts: ArtifactStore, found: Survey) -> Artifact:
    """Take a document out of all artefacts that hold it, and leave a tombstone.

    The tombstone comes first: from then on the text is not read in again.
    """
    document = found.document

    def build(folder: Path) -> dict[str, Any]:
        found.touched.write_parquet(folder / SEQUENCES)
        return {
            "sha256": document.sha256,
            "doc_ids": sorted(document.doc_ids),
            "places": sorted(document.places),
            "sequences": int(found.touched["shard"].count()),
            "held": [asdict(holding) for holding in found.holdings],
            "learned": found.learned,
        }

    work = Work(FORGOTTEN, document.sha256[:20], recipe={"sha256": document.sha256})
    tombstone = artifacts.make(work, build)
    # What an attempt that was stopped has taken out, and may not have entered, is in its tombstone.
    before = [Holding(**facts) for facts in tombstone.facts["held"]]
    entries = artifacts.ledger.by_path()
    for holding in [*found.holdings, *before]:
        folder = artifacts.at.root / holding.path
        for file in [folder / name for name in holding.emptied]:
            if file.suffix == ".npy" and file.exists():
                withdrawal.withdraw_from_tokens(file.parent, document)
            elif file.exists() and withdrawal.holds_in_table(file, document):
                withdrawal.withdraw_from_table(file, document)
        for name in holding.removed:
            (folder / name).unlink(missing_ok=True)
        if holding.path in entries and (folder / MANIFEST).exists():
            names = {*holding.emptied, *holding.removed}
            entries[holding.path] = artifacts.withdraw(entries[holding.path], names)
    return tombstone


def remaining(artifacts: ArtifactStore) -> Iterator[Finding]:
    """What still holds a forgotten document and, as warnings, what learned from one."""
    entries = artifacts.ledger.by_path()
    current = {(name_of(e), e["fingerprint"]) for e in artifacts.entries().values()}
    for made in tombstones(artifacts):
        facts = made.facts
        # Not by its places: what stands there by now may be another text.
        document = Forgotten(facts["sha256"], set(facts["doc_ids"]), set())
        what = f"{facts['places'][0]}, which was forgotten"
        touched = pl.read_parquet(made.path / SEQUENCES)
        for holding in _holdings(artifacts, document, touched, entries):
            if holding.path not in entries:
                continue  # an attempt, made of what there is by now
            for file in (*holding.emptied, *holding.removed):
                where = f"{holding.path}/{file}"
                yield Finding(holding.name, where, f"nothing of {what}", "it")
        for name, fingerprint in facts["learned"]:
            if (name, fingerprint) in current:
                wanted = f"a model that never saw {what}"
                yield Finding(name, fingerprint[:16], wanted, "one that did", warning=True)
