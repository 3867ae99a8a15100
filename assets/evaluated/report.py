"""Stage 5: compare all arms, in a human-readable report and as tables."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.auxiliary.models import checkpoint
from assets.common import result
from assets.declaration import Declaration, Read, Shards, asset
from assets.evaluated.measured_cost import cost_rows, kernel_runs
from assets.evaluated.target_models import GROUP
from assets.metadata import table
from assets.scores.cutoff_confidence import flips
from assets.scores.refined_scores import is_refined
from assets.scores.scores import eot_id, overlays, refined_of
from colorfilter.config.recipe import Arm, Domain, Recipe
from colorfilter.evaluation import report
from colorfilter.evaluation.report import COMPARISON_HEADER, arm_lines, comparison_rows
from colorfilter.selection.sql import fetch
from colorfilter.stages import IN_CORPUS, ShardKind
from resources.artifacts import Artifact, ArtifactStore
from resources.gpu import Gpu
from resources.score_store import ScoreStore

if TYPE_CHECKING:
    from colorfilter.evaluation.examples import Example


def report_declaration(recipe: Recipe, domain: Domain) -> Declaration:
    """Declare `<domain>/report`."""
    stages = ("evaluation", "selection", "leakage")
    confidence = [Read(f"{domain.name}/cutoff_confidence")] if recipe.arms_with_one_cutoff() else []
    refined = [Read(f"{domain.name}/refined_scores")] if is_refined(recipe) else []
    return Declaration(
        f"{domain.name}/report",
        GROUP,
        {"html", "duckdb"},
        inputs=[
            *(Read(f"{domain.name}/{arm.name}/{s}") for arm in recipe.arms for s in stages),
            *confidence,
            Read("prior_model"),
            Read(f"{domain.name}/conditional_model"),
            Read("score_tables"),
            *refined,
        ],
        consults=[
            *(Read(f"{domain.name}/{arm.name}/target_model") for arm in recipe.arms),
            Read("tokenizer"),
            Read(f"{domain.name}/domain_tokens"),
            Read("corpus_tokens", Shards.ALL),
            Read("raw_corpus", Shards.ALL),
        ],
        code=5,
        pool="gpu",
    )


def report_asset(recipe: Recipe, domain: Domain) -> dg.AssetsDefinition:
    """Return the asset `<domain>/report`."""

    @asset(report_declaration(recipe, domain))
    def report(artifacts: ArtifactStore, gpu: Gpu, score_store: ScoreStore) -> dg.MaterializeResult:
        """Comparison of all arms, as a page to read (`report.html`) and as tables
        (`results.duckdb`).

        tokens-to-match is how many times as many tokens random needs for the same loss; above 1
        the arm is better than random.
        """
        read = read_for_report(artifacts, recipe, domain)
        rows = pl.concat([*read.evaluations(), _probed(domain, read.selected)])
        made = artifacts.make(
            report_declaration(recipe, domain).work(read.inputs),
            lambda folder: write_report(
                folder, artifacts, gpu, score_store, recipe, domain, read, rows
            ),
        )
        _publish_results(artifacts, score_store, recipe)
        lines = comparison_rows(arm_lines(rows))
        return result(
            [made],
            {
                "page": dg.MetadataValue.path(str(made.path / "report.html")),
                "comparison": table(
                    [dict(zip(COMPARISON_HEADER, line, strict=True)) for line in lines]
                ),
                "report": dg.MetadataValue.md(_with_pictures(made.path)),
            },
        )

    return report


@dataclass(frozen=True)
class ReportInputs:
    """The artifacts that a report is built from; those of arms are keyed by arm name."""

    evaluated: Mapping[str, Artifact]
    selected: Mapping[str, Artifact]
    leaking: Mapping[str, Artifact]
    confidence: Sequence[Artifact]  # at most one
    models: Sequence[Artifact]  # prior and conditional
    tables: Artifact
    refined: Sequence[Artifact]  # at most one

    @property
    def inputs(self) -> list[Artifact]:
        """All the artifacts, as a list."""
        of_arms = (self.evaluated, self.selected, self.leaking)
        return [
            *(made for by_arm in of_arms for made in by_arm.values()),
            *self.confidence,
            *self.models,
            self.tables,
            *self.refined,
        ]

    def evaluations(self) -> list[pl.DataFrame]:
        """Return the evaluations of every arm, a table each."""
        return [pl.read_parquet(a.path / "evaluations.parquet") for a in self.evaluated.values()]


def read_for_report(artifacts: ArtifactStore, recipe: Recipe, domain: Domain) -> ReportInputs:
    """Return the current artifacts that a domain's report is built from.

    Raises InputError if one does not exist or the score tables are older than the models.
    """
    declared = report_declaration(recipe, domain)

    def of_arms(stage: str) -> dict[str, Artifact]:
        return {
            arm.name: declared.current(artifacts, f"{domain.name}/{arm.name}/{stage}")
            for arm in recipe.arms
        }

    models = [
        declared.current(artifacts, "prior_model"),
        declared.current(artifacts, f"{domain.name}/conditional_model"),
    ]
    tables = declared.current(artifacts, "score_tables", made_from=models)
    confidence = []
    if recipe.arms_with_one_cutoff():
        confidence = [declared.current(artifacts, f"{domain.name}/cutoff_confidence")]
    return ReportInputs(
        of_arms("evaluation"),
        of_arms("selection"),
        of_arms("leakage"),
        confidence,
        models,
        tables,
        refined_of(artifacts, domain.name, tables.fingerprint),
    )


def write_report(
    folder: Path,
    artifacts: ArtifactStore,
    gpu: Gpu,
    score_store: ScoreStore,
    recipe: Recipe,
    domain: Domain,
    read: ReportInputs,
    rows: pl.DataFrame,
) -> dict[str, int]:
    """Write a domain's report and its evaluations; return facts for the manifest.

    `rows` are the evaluations of all arms. tokens-to-match is added to them.
    """
    cutoffs = {
        arm.name: float(read.selected[arm.name].facts["cutoff"])
        for arm in recipe.arms_with_one_cutoff()
        if arm.method == "color"
    }
    confidence = flips(artifacts, score_store, recipe, domain) if read.confidence else []
    sections = report.sections(
        rows,
        recipe.arms,
        {arm.name: _curves(artifacts, recipe, domain, arm) for arm in recipe.arms},
        _colors(score_store, domain, read),
        cutoffs,
        _examples(artifacts, gpu, score_store, recipe, domain, read, cutoffs, folder),
        confidence=confidence,
        leakage=[{"arm": arm, **_leaks(made)} for arm, made in read.leaking.items()],
        cost=cost_rows(artifacts, recipe, domain),
    )
    report.write_report(folder, f"{recipe.name}: {domain.name}", sections)
    matched = pl.DataFrame(report.match_rows(rows), schema=report.EVALUATIONS)
    pl.concat([rows, matched]).write_parquet(folder / "evaluations.parquet")
    return {"rows": len(rows) + len(matched)}


def _probed(domain: Domain, selected: Mapping[str, Artifact]) -> pl.DataFrame:
    """Return the probe's AUC and recall for arms that rank by losses, as evaluations."""
    rows = [
        (domain.name, arm, None, None, metric, made.facts[metric])
        for arm, made in selected.items()
        for metric in ("probe_auc", "probe_recall")
        if metric in made.facts
    ]
    return pl.DataFrame(rows, schema=report.EVALUATIONS, orient="row")


def _leaks(made: Artifact) -> dict[str, Any]:
    facts = ("texts", "matches", "sequences", "share")
    return {fact: made.facts[fact] for fact in facts}


def _with_pictures(folder: Path) -> str:
    """Return the report's Markdown with its pictures embedded, for the web UI."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    for picture in folder.glob("*.svg"):
        encoded = base64.b64encode(picture.read_bytes()).decode()
        text = text.replace(f"({picture.name})", f"(data:image/svg+xml;base64,{encoded})")
    return text


def _curves(artifacts: ArtifactStore, recipe: Recipe, domain: Domain, arm: Arm) -> list[Any]:
    targets = [
        artifacts.current(f"{domain.name}/{arm.name}/target_model", f"seed_{seed}")
        for seed in recipe.seeds(arm)
    ]
    return [pl.read_parquet(t.path / "curve.parquet") for t in targets]


def _examples(
    artifacts: ArtifactStore,
    gpu: Gpu,
    score_store: ScoreStore,
    recipe: Recipe,
    domain: Domain,
    read: ReportInputs,
    cutoffs: Mapping[str, float],
    folder: Path,
) -> list["Example"]:
    """Return example sequences, best to worst, with each token's prior and conditional losses."""
    from colorfilter.data.tokens import Encoder
    from colorfilter.evaluation import examples

    cut_at = {1 / arm.tau for arm in recipe.arms if arm.name in cutoffs and arm.tau}
    shares = [share for share in examples.SHARES if share not in cut_at]
    with score_store.read(overlays(read.refined)) as connection:
        chosen = examples.sequences(connection, domain.name, cutoffs, shares)
    encoder = artifacts.current("tokenizer")
    raw = {shard: artifacts.current("raw_corpus", shard) for shard in chosen["shard"].unique()}
    packed = {
        shard: artifacts.current_from("corpus_tokens", shard, [source, encoder]).path
        for shard, source in raw.items()
    }
    documents = {shard: source.path / "documents.parquet" for shard, source in raw.items()}
    prior, conditional = gpu.token_losses(
        [checkpoint(model) for model in read.models],
        examples.sequence_tokens(chosen, packed),
        folder,
        eot_id(artifacts, recipe.scoring),
    )
    texts = examples.token_texts(chosen, documents, Encoder(encoder.path))
    return examples.examples(chosen, texts, prior, conditional)


def _colors(score_store: ScoreStore, domain: Domain, read: ReportInputs) -> dict[str, list[float]]:
    """Return the color of samples of the corpus and of the probe, for the histogram."""
    query = (
        "SELECT color FROM color WHERE domain = $domain AND {} "
        "USING SAMPLE reservoir(20000 ROWS) REPEATABLE (0)"
    )
    with score_store.read(overlays(read.refined)) as connection:
        corpus = fetch(connection, query.format(IN_CORPUS), {"domain": domain.name})
        probe = fetch(
            connection,
            query.format("shard = $probe"),
            {"domain": domain.name, "probe": ShardKind.PROBE.named(domain.name)},
        )
    return {"corpus": [r[0] for r in corpus], "probe": [r[0] for r in probe]}


def _publish_results(artifacts: ArtifactStore, score_store: ScoreStore, recipe: Recipe) -> None:
    entries = artifacts.entries()
    reports = [entries.get((f"{d.name}/report", None)) for d in recipe.domains]
    paths = [artifacts.at.root / e["path"] / "evaluations.parquet" for e in reports if e]
    evaluations = pl.concat([pl.read_parquet(p) for p in paths]).to_dicts()
    score_store.publish_results(evaluations, kernel_runs(artifacts.at), list(artifacts.ledger))
