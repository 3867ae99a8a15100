"""Compare tokens, losses, selections and datasets with their inputs; asset checks of an audit."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import dagster as dg
import polars as pl

from assets.filtered.selection import PACKED
from colorfilter.config.recipe import SCORED, Recipe
from colorfilter.data.tokens import open_tokens
from colorfilter.errors import one_line
from colorfilter.selection.decontamination import without_leaks
from colorfilter.stages import ArtifactName, Stage
from colorfilter.storage.manifest import stands
from resources.artifacts import ArtifactStore
from resources.audit import Finding, Record
from resources.ledger import Entry
from resources.lineage import name_of

SCORES = (Stage.PRIOR_SCORES, Stage.CONDITIONAL_SCORES, Stage.DOMAIN_ONLY_SCORES)
SLICE = 65_536  # sequences of a dataset that are in memory at once

# What is compared, the expected value, and the value found.
Compared = Iterator[tuple[str, object, object]]
Sources = dict[str, Path]  # folders of inputs by name


def audit_checks(recipe: Recipe) -> list[dg.AssetChecksDefinition]:
    """Return the checks `audit_lineage` and `audit_contents` of every domain and arm."""
    names = [f"{d.name}/{a.name}/filtered_dataset" for d in recipe.domains for a in recipe.arms]
    return [check for name in names for check in _checks(name)]


def _checks(name: str) -> list[dg.AssetChecksDefinition]:
    key = dg.AssetKey(name.split("/"))

    @dg.asset_check(asset=key)
    def audit_lineage(artifacts: ArtifactStore) -> dg.AssetCheckResult:
        """The ledger's hash chain is intact and links the dataset to everything it was built
        from.
        """
        record = Record(artifacts)
        made = record.lineage.ancestry([artifacts.entries()[name, None]])
        findings = [*record.chain(), *record.reuse(), *record.links(made.values())]
        return _result(
            findings,
            f"{len(made):,} artifacts traced back to raw files; ledger head {record.head}",
        )

    @dg.asset_check(asset=key)
    def audit_contents(artifacts: ArtifactStore) -> dg.AssetCheckResult:
        """The dataset's files match their recorded hashes and contain exactly the selected
        sequences.
        """
        record, entry = Record(artifacts), artifacts.entries()[name, None]
        findings = [*record.files([entry]), *counts(record, [entry])]
        return _result(findings, f"{entry['facts']['sequences']:,} sequences match the selection")

    return [audit_lineage, audit_contents]


def _result(findings: Iterable[Finding], passed: str) -> dg.AssetCheckResult:
    broken = [str(finding) for finding in findings if not finding.warning]
    words = f"{len(broken)} findings, the first: {broken[0]}" if broken else passed
    metadata = {"findings": dg.MetadataValue.json(broken[:20])} if broken else {}
    return dg.AssetCheckResult(passed=not broken, description=words, metadata=metadata)


def counts(record: Record, entries: Iterable[Entry]) -> Iterator[Finding]:
    """Find tokens, losses, selections and datasets that do not match their inputs."""
    for entry in entries:
        name, path = name_of(entry), entry["path"]
        check, folder = CHECKS.get(ArtifactName.parse(name).stage), record.home.root / path
        if check is None or not stands(folder):
            continue
        made = {source: record.lineage.find(source, f) for source, f in entry["inputs"].items()}
        paths = {s: record.home.root / found[0]["path"] for s, found in made.items() if found}
        sources = {source: made_path for source, made_path in paths.items() if stands(made_path)}
        try:
            for what, expected, found in check(folder, entry, sources):
                if expected != found:
                    yield Finding(name, f"{path}, {what}", str(expected), str(found))
        except (OSError, KeyError, ValueError, pl.exceptions.PolarsError) as error:
            yield Finding(name, path, "readable tables", one_line(error))


def _source(sources: Sources, stage: Stage) -> Path:
    """Return the folder of the only input of a stage. Raises KeyError if it does not exist."""
    for name, path in sources.items():
        if ArtifactName.parse(name).stage is stage:
            return path
    raise KeyError(f"the input {stage} does not exist")


def _tokens(folder: Path, entry: Entry, sources: Sources) -> Compared:
    facts, corpus = entry["facts"], _source(sources, Stage.RAW_CORPUS)
    sequences = pl.read_parquet(folder / "sequences.parquet", columns=["n_tokens"])
    spans = pl.read_parquet(folder / "spans.parquet", columns=["doc_id", "n_tokens"])
    documents = pl.read_parquet(corpus / "documents.parquet", columns=["doc_id", "n_chars"])
    yield "sequences", facts["sequences"], len(sequences)
    yield "rows of tokens.npy", len(sequences), len(open_tokens(folder))
    yield "tokens", facts["tokens"], sequences["n_tokens"].sum()
    yield "tokens of the spans", facts["tokens"], spans["n_tokens"].sum()
    yield "documents of the spans", facts["documents"], spans["doc_id"].n_unique()
    # A document whose text is empty now may have been excluded, or was empty when packed.
    empty = documents.filter(pl.col("n_chars") == 0).join(spans, on="doc_id", how="anti")
    packed, read = facts["documents"] + facts["left_out"], len(documents)
    yield "documents packed and excluded", min(max(packed, read - len(empty)), read), packed


def _losses(folder: Path, entry: Entry, sources: Sources) -> Compared:
    corpus = _source(sources, Stage.CORPUS_TOKENS)
    packed = pl.read_parquet(corpus / "sequences.parquet", columns=["position"])["position"]
    scored = len(packed) - entry["facts"]["unscored"]
    chunks = sorted(folder.glob("losses-*.parquet"))
    if not chunks:  # a shard without a sequence
        yield "losses", scored, 0
        return
    losses = pl.read_parquet(chunks)
    stages = {ArtifactName.parse(n).stage: made for n, made in entry["inputs"].items()}
    model = [made for stage, made in stages.items() if stage is not Stage.CORPUS_TOKENS]
    yield "losses", scored, len(losses)
    yield "sequences scored once", len(losses), losses["position"].n_unique()
    yield "sequences scored", True, losses["position"].is_in(packed.to_list()).all()
    yield "models", model, losses["model"].unique().to_list()
    yield "shards", [entry["partition"]], losses["shard"].unique().to_list()
    yield "losses not finite", 0, len(losses) - losses["loss"].is_finite().sum()


def _selection(folder: Path, entry: Entry, _sources: Sources) -> Compared:
    facts, recipe = entry["facts"], entry["recipe"]
    rows = pl.read_parquet(folder / "selection.parquet")
    yield "sequences", facts["selected"], len(rows)
    yield "ranks", True, (rows["rank"] == pl.int_range(1, len(rows) + 1, eager=True)).all()
    yield "sequences selected once", len(rows), rows.select("shard", "position").n_unique()
    if recipe.get("method") in SCORED and not recipe.get("batch"):
        yield "scores sorted by rank", True, rows["score"].is_sorted()
        yield "cutoff", facts["cutoff"], rows["score"][-1]


def _dataset(folder: Path, entry: Entry, sources: Sources) -> Compared:
    selection, leakage = _source(sources, Stage.SELECTION), _source(sources, Stage.LEAKAGE)
    rows = pl.read_parquet(selection / "selection.parquet", columns=["shard", "position"])
    if entry["recipe"]["leaks"] == "remove":
        rows = without_leaks(rows, pl.read_parquet(leakage / "leakage.parquet"))
    written = pl.read_parquet(folder / "tokens" / "sequences.parquet")
    yield "sequences", entry["facts"]["sequences"], len(written)
    same = written.select(rows.columns).sort(rows.columns).equals(rows.sort(rows.columns))
    yield "sequences of the selection", True, same
    own = selection / PACKED
    tokens, others, unlike = open_tokens(folder / "tokens"), 0, 0
    for (shard, _), part in written.group_by("shard", pl.col("row") // SLICE):
        corpus = own if own.exists() else sources[f"corpus_tokens[{shard}]"]
        here = tokens[part["row"].to_numpy()]
        others += int((here != open_tokens(corpus)[part["position"].to_numpy()]).any(1).sum())
        real = (row[:n].astype("<u4") for row, n in zip(here, part["n_tokens"], strict=True))
        hashes = (hashlib.sha256(row.tobytes()).hexdigest() for row in real)
        unlike += sum(h != was for h, was in zip(hashes, part["sha256"], strict=True))
    yield "sequences whose tokens differ from the corpus", 0, others
    yield "sequences whose sha256 differs from the recorded one", 0, unlike


CHECKS: dict[Stage, Callable[[Path, Entry, Sources], Compared]] = {
    Stage.CORPUS_TOKENS: _tokens,
    **dict.fromkeys(SCORES, _losses),
    Stage.SELECTION: _selection,
    Stage.FILTERED_DATASET: _dataset,
}
