"""Whether tokens, losses, selections and datasets agree with their inputs: for an audit."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import polars as pl

from assets.selected import PACKED
from colorfilter.errors import one_line
from colorfilter.leakage import without_leaks
from colorfilter.provenance import stands
from colorfilter.recipe import SCORED
from colorfilter.stages import ArtifactName, Stage
from colorfilter.tokens import open_tokens
from resources.audit import Finding
from resources.ledger import Entry
from resources.lineage import Lineage, name_of

SLICE = 65_536  # sequences of a dataset that are held at once


def counts(root: Path, lineage: Lineage, entries: Iterable[Entry]) -> Iterator[Finding]:
    """Whether tokens, losses, selections and datasets agree, each with what it was made from."""
    for entry in entries:
        check = _COUNTED.get(ArtifactName.parse(entry["asset"]).stage)
        if check and stands(root / entry["path"]):
            sources = {
                name: root / made[0]["path"]
                for name, fingerprint in entry["inputs"].items()
                if (made := lineage.find(name, fingerprint)) and stands(root / made[0]["path"])
            }
            try:
                for what, expected, found in check(root / entry["path"], entry, sources):
                    if expected != found:
                        yield Finding(
                            name_of(entry), f"{entry['path']}, {what}", str(expected), str(found)
                        )
            except (OSError, KeyError, ValueError, pl.exceptions.PolarsError) as error:
                yield Finding(name_of(entry), entry["path"], "readable tables", one_line(error))


Compared = Iterator[tuple[str, object, object]]
Sources = dict[str, Path]


def _source(sources: Sources, stage: Stage) -> Path:
    """The folder of the one input of a stage. Raises KeyError where it does not exist."""
    for name, path in sources.items():
        if ArtifactName.parse(name).stage is stage:
            return path
    raise KeyError(f"its {stage} does not exist")


def _tokens(folder: Path, entry: Entry, sources: Sources) -> Compared:
    facts = entry["facts"]
    sequences = pl.read_parquet(folder / "sequences.parquet")
    spans = pl.scan_parquet(folder / "spans.parquet")
    spanned, named = (
        spans.select(pl.col("n_tokens").sum(), pl.col("doc_id").n_unique()).collect().row(0)
    )
    documents = pl.scan_parquet(_source(sources, Stage.RAW_CORPUS) / "documents.parquet")
    yield "sequences", facts["sequences"], len(sequences)
    yield "rows of tokens.npy", len(sequences), len(open_tokens(folder))
    yield "tokens", facts["tokens"], int(sequences["n_tokens"].sum())
    yield "tokens of the spans", facts["tokens"], int(spanned)
    yield "documents of the spans", facts["documents"], named
    read = int(documents.select(pl.len()).collect().item())
    # A document that has no text by now may have been left out, or have had none when packed.
    empty = documents.filter(pl.col("n_chars") == 0).join(spans, on="doc_id", how="anti")
    unknown = int(empty.select(pl.len()).collect().item())
    packed = facts["documents"] + facts["left_out"]
    yield "documents read and left out", min(max(packed, read - unknown), read), packed


def _losses(folder: Path, entry: Entry, sources: Sources) -> Compared:
    packed = pl.read_parquet(_source(sources, Stage.CORPUS_TOKENS) / "sequences.parquet")
    chunks = sorted(folder.glob("losses-*.parquet"))
    if not chunks:  # a shard without a sequence
        yield "losses", len(packed) - entry["facts"]["unscored"], 0
        return
    losses = pl.read_parquet(chunks)
    (model,) = (
        made_of
        for name, made_of in entry["inputs"].items()
        if ArtifactName.parse(name).stage is not Stage.CORPUS_TOKENS
    )
    yield "losses", len(packed) - entry["facts"]["unscored"], len(losses)
    yield "sequences scored once", len(losses), losses["position"].n_unique()
    yield "sequences scored", True, losses["position"].is_in(packed["position"].to_list()).all()
    yield "models", [model], losses["model"].unique().to_list()
    yield "shards", [entry["partition"]], losses["shard"].unique().to_list()
    yield "losses not finite", 0, len(losses) - int(losses["loss"].is_finite().sum())


def _selection(folder: Path, entry: Entry, _sources: Sources) -> Compared:
    rows = pl.read_parquet(folder / "selection.parquet")
    yield "sequences", entry["facts"]["selected"], len(rows)
    yield "ranks", True, (rows["rank"] == pl.int_range(1, len(rows) + 1, eager=True)).all()
    yield "sequences selected once", len(rows), rows.select("shard", "position").n_unique()
    if entry["recipe"].get("method") in SCORED and not entry["recipe"].get("batch"):
        yield "scores in order of rank", True, rows["score"].is_sorted()
        yield "cutoff", entry["facts"]["cutoff"], rows["score"][-1]


def _dataset(folder: Path, entry: Entry, sources: Sources) -> Compared:
    selection, leakage = _source(sources, Stage.SELECTION), _source(sources, Stage.LEAKAGE)
    rows = pl.read_parquet(selection / "selection.parquet")
    if entry["recipe"]["leaks"] == "remove":
        rows = without_leaks(rows, pl.read_parquet(leakage / "leakage.parquet"))
    written = pl.read_parquet(folder / "tokens" / "sequences.parquet")
    yield "sequences", entry["facts"]["sequences"], len(written)
    places = ["shard", "position"]
    yield (
        "sequences of the selection",
        True,
        written.select(places).sort(places).equals(rows.select(places).sort(places)),
    )
    own = selection / PACKED
    tokens, others, unlike = open_tokens(folder / "tokens"), 0, 0
    for part in written.iter_slices(SLICE):
        for (shard,), rows in part.group_by("shard"):
            corpus = own if own.exists() else sources[f"corpus_tokens[{shard}]"]
            here = tokens[rows["row"].to_numpy()]
            others += int((here != open_tokens(corpus)[rows["position"].to_numpy()]).any(1).sum())
            real = (row[:n].astype("<u4") for row, n in zip(here, rows["n_tokens"], strict=True))
            hashes = (hashlib.sha256(row.tobytes()).hexdigest() for row in real)
            unlike += sum(h != was for h, was in zip(hashes, rows["sha256"], strict=True))
    yield "sequences with other tokens than the corpus has there", 0, others
    yield "sequences of another sha256 than is on record", 0, unlike


_COUNTED: dict[Stage, Callable[[Path, Entry, Sources], Compared]] = {
    Stage.CORPUS_TOKENS: _tokens,
    Stage.PRIOR_SCORES: _losses,
    Stage.CONDITIONAL_SCORES: _losses,
    Stage.DOMAIN_ONLY_SCORES: _losses,
    Stage.SELECTION: _selection,
    Stage.FILTERED_DATASET: _dataset,
}
