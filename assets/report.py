"""Stage 5, its end: all arms compared, for people and as tables."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.auxiliary import checkpoint
from assets.common import OWNERS, all_of, code_version, probe_shard, result
from assets.confidence import flips
from assets.figures import table
from assets.measured import cost_rows, kernel_runs
from assets.scores import boundary, refined_of
from assets.targets import GROUP
from colorfilter import report as method
from colorfilter.recipe import Arm, Domain, Recipe
from colorfilter.tables import fetch
from resources.artifacts import Artifact, ArtifactStore, Work
from resources.gpu import Gpu
from resources.score_store import ScoreStore

if TYPE_CHECKING:
    from colorfilter.examples import Example


def report_asset(recipe: Recipe, domain: Domain) -> dg.AssetsDefinition:
    """`<domain>/report`."""
    arms = {arm.name: f"{domain.name}/{arm.name}" for arm in recipe.arms}
    sure = [[domain.name, "cutoff_confidence"]] if recipe.arms_with_one_cutoff() else []

    @dg.asset(
        key_prefix=domain.name,
        deps=[
            *(
                dg.AssetKey([domain.name, arm, stage])
                for arm in arms
                for stage in ("target_model", "evaluation", "selection", "leakage")
            ),
            *(dg.AssetKey(key) for key in sure),
            "score_tables",
            "tokenizer",
            "prior_model",
            dg.AssetKey([domain.name, "conditional_model"]),
            dg.AssetKey([domain.name, "domain_tokens"]),
            all_of("corpus_tokens"),
            all_of("raw_corpus"),
        ],
        group_name=GROUP,
        kinds={"html", "duckdb"},
        owners=OWNERS,
        pool="gpu",
        code_version=code_version(5),
    )
    def report(artifacts: ArtifactStore, gpu: Gpu, score_store: ScoreStore) -> dg.MaterializeResult:
        """All arms compared, for people (`report.html`) and as tables (`results.duckdb`).

        tokens-to-match above 1: random needs that many times the tokens for the same loss.
        """
        evaluated = [artifacts.current(f"{name}/evaluation") for name in arms.values()]
        selected = {arm: artifacts.current(f"{name}/selection") for arm, name in arms.items()}
        models = [
            artifacts.current("prior_model"),
            artifacts.current(f"{domain.name}/conditional_model"),
        ]
        tables = artifacts.current_from("score_tables", None, models)
        scored = [tables, *refined_of(artifacts, domain.name, tables.fingerprint)]
        leaking = {arm: artifacts.current(f"{name}/leakage") for arm, name in arms.items()}
        second = [artifacts.current("/".join(key)) for key in sure]
        frames = [pl.read_parquet(a.path / "evaluations.parquet") for a in evaluated]
        rows = pl.concat([*frames, _probed(domain, selected)])
        matched = pl.DataFrame(method.match_rows(rows), schema=method.EVALUATIONS)

        def build(folder: Path) -> dict[str, Any]:
            cutoffs = {
                arm.name: float(selected[arm.name].facts["cutoff"])
                for arm in recipe.arms_with_one_cutoff()
                if arm.method == "color"
            }
            sections = method.sections(
                rows,
                recipe.arms,
                {arm.name: _curves(artifacts, recipe, domain, arm) for arm in recipe.arms},
                _colors(score_store, domain),
                cutoffs,
                _examples(artifacts, gpu, score_store, recipe, domain, models, cutoffs, folder),
                confidence=flips(artifacts, score_store, recipe, domain) if second else [],
                leakage=[{"arm": arm, **_leaks(made)} for arm, made in leaking.items()],
                cost=cost_rows(artifacts, recipe, domain),
            )
            method.write_report(folder, f"{recipe.name}: {domain.name}", sections)
            pl.concat([rows, matched]).write_parquet(folder / "evaluations.parquet")
            return {"rows": len(rows) + len(matched)}

        made = artifacts.make(
            Work(
                f"{domain.name}/report",
                inputs=[
                    *evaluated,
                    *selected.values(),
                    *leaking.values(),
                    *second,
                    *models,
                    *scored,
                ],
                code=5,
            ),
            build,
        )
        _publish_results(artifacts, score_store, recipe)
        lines = method.comparison_rows(method.arm_lines(rows))
        return result(
            [made],
            {
                "page": dg.MetadataValue.path(str(made.path / "report.html")),
                "comparison": table(
                    [dict(zip(method.COMPARISON_HEADER, line, strict=True)) for line in lines]
                ),
                "report": dg.MetadataValue.md(_with_pictures(made.path)),
            },
        )

    return report


def _probed(domain: Domain, selected: Mapping[str, Artifact]) -> pl.DataFrame:
    """Where the probe ranks by the arms that losses rank, as evaluations."""
    rows = [
        (domain.name, arm, None, None, metric, made.facts[metric])
        for arm, made in selected.items()
        for metric in ("probe_auc", "probe_recall")
        if metric in made.facts
    ]
    return pl.DataFrame(rows, schema=method.EVALUATIONS, orient="row")


def _leaks(made: Artifact) -> dict[str, Any]:
    facts = ("texts", "matches", "sequences", "share")
    return {fact: made.facts[fact] for fact in facts}


def _with_pictures(folder: Path) -> str:
    """The report's Markdown with its pictures within it, for the web UI."""
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
    models: Sequence[Artifact],
    cutoffs: Mapping[str, float],
    folder: Path,
) -> list["Example"]:
    """Sequences from the best to the worst with the losses of their tokens, prior's first."""
    from colorfilter import examples as shown
    from colorfilter.tokens import Encoder

    cut_at = {1 / arm.tau for arm in recipe.arms if arm.name in cutoffs and arm.tau}
    shares = [share for share in shown.SHARES if share not in cut_at]
    with score_store.read() as connection:
        chosen = shown.sequences(connection, domain.name, cutoffs, shares)
    encoder = artifacts.current("tokenizer")
    raw = {shard: artifacts.current("raw_corpus", shard) for shard in chosen["shard"].unique()}
    packed = {
        shard: artifacts.current_from("corpus_tokens", shard, [source, encoder]).path
        for shard, source in raw.items()
    }
    documents = {shard: source.path / "documents.parquet" for shard, source in raw.items()}
    prior, conditional = gpu.token_losses(
        [checkpoint(model) for model in models],
        shown.sequence_tokens(chosen, packed),
        folder,
        boundary(artifacts, recipe.scoring),
    )
    texts = shown.token_texts(chosen, documents, Encoder(encoder.path))
    return shown.examples(chosen, texts, prior, conditional)


def _colors(score_store: ScoreStore, domain: Domain) -> dict[str, list[float]]:
    """Color of a sample of the corpus and of the probe, for the histogram."""
    query = (
        "SELECT color FROM color WHERE domain = $domain AND {} "
        "USING SAMPLE reservoir(20000 ROWS) REPEATABLE (0)"
    )
    with score_store.read() as connection:
        corpus = fetch(
            connection, query.format("NOT starts_with(shard, '_')"), {"domain": domain.name}
        )
        probe = fetch(
            connection,
            query.format("shard = $probe"),
            {"domain": domain.name, "probe": probe_shard(domain.name)},
        )
    return {"corpus": [r[0] for r in corpus], "probe": [r[0] for r in probe]}


def _publish_results(artifacts: ArtifactStore, score_store: ScoreStore, recipe: Recipe) -> None:
    entries = artifacts.entries()
    reports = [entries.get((f"{d.name}/report", None)) for d in recipe.domains]
    paths = [artifacts.at.root / e["path"] / "evaluations.parquet" for e in reports if e]
    evaluations = pl.concat([pl.read_parquet(p) for p in paths]).to_dicts()
    score_store.publish_results(evaluations, kernel_runs(artifacts.at), list(artifacts.ledger))
