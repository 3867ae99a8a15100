"""Stage 5: target models trained on what each arm selected, evaluated and compared."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.auxiliary import checkpoint
from assets.common import OWNERS, Context, Progress, all_of, code_version, probe_shard, result
from assets.figures import curve_metadata, table
from assets.scores import boundary, refined_of
from colorfilter.recipe import SCORED, Arm, Domain, Recipe
from colorfilter.tables import fetch
from resources.artifacts import Artifact, ArtifactStore, Work
from resources.gpu import Gpu
from resources.score_store import ScoreStore

if TYPE_CHECKING:
    from colorfilter.examples import Example

GROUP = "evaluated"


def evaluated_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """`target_model` and `evaluation` for every domain and arm, and `report` for every domain."""
    arms = [
        asset
        for domain in recipe.domains
        for arm in recipe.arms
        for asset in _arm_assets(recipe, domain, arm)
    ]
    return [*arms, *(_report_asset(recipe, d) for d in recipe.domains)]


def _arm_assets(recipe: Recipe, domain: Domain, arm: Arm) -> list[dg.AssetsDefinition]:
    prefix = [domain.name, arm.name]
    name = "/".join(prefix)

    seeds = recipe.seeds(arm)
    what = f"{arm.name} for {domain.name}:"

    @dg.asset(
        description=f"{what} a fresh model per seed, trained in a single pass over the filtered "
        "dataset. Of several end points each is a branch of one trunk, with a full decay.",
        key_prefix=prefix,
        deps=[
            dg.AssetKey([*prefix, "filtered_dataset"]),
            dg.AssetKey([domain.name, "domain_tokens"]),
            "tokenizer",
        ],
        group_name=GROUP,
        kinds={"pytorch", arm.name},
        owners=OWNERS,
        pool="gpu",
        code_version=code_version(1, recipe.target, recipe.evaluation, str(seeds)),
    )
    def target_model(context: Context, artifacts: ArtifactStore, gpu: Gpu) -> dg.MaterializeResult:
        from colorfilter.models import load, n_parameters
        from colorfilter.training import TrainSpec, planned_tokens

        dataset = artifacts.current(f"{name}/filtered_dataset")
        ends = recipe.endpoints(arm, dataset.facts["sequences"])
        held_out = artifacts.current(f"{domain.name}/domain_tokens")
        encoder = artifacts.current("tokenizer")
        works = [
            Work(
                f"{name}/target_model",
                f"seed_{seed}",
                inputs=[dataset, held_out, encoder],
                recipe={
                    "model": recipe.target.model.facts(),
                    "training": recipe.target.training.facts(),
                    "endpoints": ends,
                },
                seed=seed,
            )
            for seed in seeds
        ]
        with artifacts.attempts(works) as attempts:
            missing = [
                (seed, attempt)
                for seed, attempt in zip(seeds, attempts, strict=True)
                if not attempt.standing
            ]
            specs = [
                TrainSpec(
                    start=recipe.target.model,
                    tokens=dataset.path / "tokens",
                    tokenizer=encoder.path,
                    training=recipe.target.training,
                    seed=seed,
                    endpoints=ends,
                    out=attempt.folder,
                    held_out=held_out.path / "held_out",
                )
                for seed, attempt in missing
            ]
            progress = Progress(context, sum(planned_tokens(s) for s in specs), "tokens")
            for i, checkpoints in gpu.train(specs, share=len(works), progress=progress):
                seed, attempt = missing[i]
                attempt.commit(
                    {
                        "seed": seed,
                        "checkpoints": {str(c.tokens): c.path.name for c in checkpoints},
                        **n_parameters(load(checkpoints[0].path)),
                    }
                )
            made = [a.artifact for a in attempts]
        shown = curve_metadata(made[0].path)
        if specs:
            shown["tokens per second"] = round(progress.rate)
        return result(
            made, {"seeds": len(made), "parameters": made[0].facts["parameters"], **shown}
        )

    @dg.asset(
        description=f"{what} held-out loss and bits per byte of every target model, and its "
        "accuracies and losses on the domain's tasks; where text of the domain ranks against the "
        "corpus (the probe).",
        key_prefix=prefix,
        deps=[target_model, dg.AssetKey([domain.name, "domain_tokens"]), "score_tables"],
        group_name=GROUP,
        kinds={"pytorch", arm.name},
        owners=OWNERS,
        pool="gpu",
        code_version=code_version(1),
    )
    def evaluation(
        context: Context, artifacts: ArtifactStore, gpu: Gpu, score_store: ScoreStore
    ) -> dg.MaterializeResult:
        from colorfilter import evaluation as method
        from colorfilter.report import EVALUATIONS

        held_out = artifacts.current(f"{domain.name}/domain_tokens")
        text = artifacts.current(f"{domain.name}/domain_text")
        chosen = artifacts.current(f"{name}/selection")
        targets = [artifacts.current(f"{name}/target_model", f"seed_{s}") for s in seeds]

        def build(folder: Path) -> dict[str, Any]:
            split = held_out.path / "held_out"
            rows: list[tuple[str, str, int | None, int | None, str, float]] = []
            if domain.tasks:
                n_bytes = held_out.facts["held_out_label_bytes"]
            else:
                path = text.path / "held_out" / "documents.parquet"
                texts = pl.read_parquet(path, columns=["text"])["text"]
                n_bytes = int(texts.str.len_bytes().sum())
            ends = [
                (target, int(tokens), place)
                for target in targets
                for tokens, place in target.facts["checkpoints"].items()
            ]
            checkpoints = [t.path / place for t, _, place in ends]
            losses = gpu.evaluate(checkpoints, split)
            on_tasks: list[dict[str, float]] = [{} for _ in ends]
            if domain.tasks:
                choices = len(ends) * text.facts["test_choices"]
                progress = Progress(context, choices, "choices")
                on_tasks = gpu.evaluate_tasks(checkpoints, text.path / "tasks", progress)
            for (target, tokens, _), (nll, n), metrics in zip(ends, losses, on_tasks, strict=True):
                loss = method.mean_loss(nll, n)
                bits = method.bits_per_byte(loss, int(n.sum()), n_bytes)
                where = (domain.name, arm.name, target.facts["seed"], tokens)
                rows += [(*where, "held_out_loss", loss), (*where, "bits_per_byte", bits)]
                rows += [(*where, metric, value) for metric, value in metrics.items()]
            if arm.method in SCORED:
                cutoff = chosen.facts["cutoff"]
                with score_store.read() as connection:
                    probe = method.probe(
                        connection, arm.method, domain.name, probe_shard(domain.name), cutoff
                    )
                for metric, value in (("probe_auc", probe.auc), ("probe_recall", probe.recall)):
                    rows.append((domain.name, arm.name, None, None, metric, value))
            frame = pl.DataFrame(rows, schema=EVALUATIONS, orient="row")
            frame.write_parquet(folder / "evaluations.parquet")
            return {"rows": len(rows)}

        scores = [artifacts.current("score_tables"), chosen]
        made = artifacts.make(
            Work(f"{name}/evaluation", inputs=[*targets, held_out, text, *scores]), build
        )
        rows = pl.read_parquet(made.path / "evaluations.parquet").drop("domain", "arm")
        return result([made], {"evaluations": table(rows.to_dicts())})

    return [target_model, evaluation]


def _report_asset(recipe: Recipe, domain: Domain) -> dg.AssetsDefinition:
    arms = {arm.name: f"{domain.name}/{arm.name}" for arm in recipe.arms}

    @dg.asset(
        key_prefix=domain.name,
        deps=[
            *(
                dg.AssetKey([domain.name, arm, stage])
                for arm in arms
                for stage in ("evaluation", "selection")
            ),
            "score_tables",
            "tokenizer",
            "prior_model",
            dg.AssetKey([domain.name, "conditional_model"]),
            all_of("corpus_tokens"),
            all_of("raw_corpus"),
        ],
        group_name=GROUP,
        kinds={"html", "duckdb"},
        owners=OWNERS,
        pool="gpu",
        code_version=code_version(2),
    )
    def report(artifacts: ArtifactStore, gpu: Gpu, score_store: ScoreStore) -> dg.MaterializeResult:
        """All arms compared, for people (`report.html`) and as tables (`results.duckdb`).

        tokens-to-match above 1: random needs that many times the tokens for the same loss.
        """
        from colorfilter import report as method

        evaluated = [artifacts.current(f"{name}/evaluation") for name in arms.values()]
        selected = {arm: artifacts.current(f"{name}/selection") for arm, name in arms.items()}
        models = [
            artifacts.current("prior_model"),
            artifacts.current(f"{domain.name}/conditional_model"),
        ]
        tables = artifacts.current_from("score_tables", None, models)
        scored = [tables, *refined_of(artifacts, domain.name, tables.fingerprint)]
        frames = [pl.read_parquet(a.path / "evaluations.parquet") for a in evaluated]
        rows = pl.concat(frames)
        matched = pl.DataFrame(method.match_rows(rows), schema=method.EVALUATIONS)

        def build(folder: Path) -> dict[str, Any]:
            cutoffs = {
                arm.name: float(selected[arm.name].facts["cutoff"])
                for arm in recipe.arms
                if arm.method == "color"
            }
            sections = method.sections(
                rows,
                recipe.arms,
                {arm.name: _curves(artifacts, recipe, domain, arm) for arm in recipe.arms},
                _colors(score_store, domain),
                cutoffs,
                _examples(artifacts, gpu, score_store, recipe, domain, models, cutoffs),
            )
            method.write_report(folder, f"{recipe.name}: {domain.name}", sections)
            pl.concat([rows, matched]).write_parquet(folder / "evaluations.parquet")
            return {"rows": len(rows) + len(matched)}

        made = artifacts.make(
            Work(
                f"{domain.name}/report",
                inputs=[*evaluated, *selected.values(), *models, *scored],
                code=2,
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
) -> list["Example"]:
    """Sequences from the best to the worst with the losses of their tokens, prior's first."""
    from colorfilter import examples as method
    from colorfilter.tokens import Encoder

    cut_at = {1 / arm.tau for arm in recipe.arms if arm.name in cutoffs and arm.tau}
    shares = [share for share in method.SHARES if share not in cut_at]
    with score_store.read() as connection:
        chosen = method.sequences(connection, domain.name, cutoffs, shares)
    encoder = artifacts.current("tokenizer")
    raw = {shard: artifacts.current("raw_corpus", shard) for shard in chosen["shard"].unique()}
    packed = {
        shard: artifacts.current_from("corpus_tokens", shard, [source, encoder]).path
        for shard, source in raw.items()
    }
    documents = {shard: source.path / "documents.parquet" for shard, source in raw.items()}
    prior, conditional = gpu.token_losses(
        [checkpoint(model) for model in models],
        method.sequence_tokens(chosen, packed),
        boundary(artifacts, recipe.scoring),
    )
    texts = method.token_texts(chosen, documents, Encoder(encoder.path))
    return method.examples(chosen, texts, prior, conditional)


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
    runs = artifacts.at.kernel_runs
    lines = runs.read_text(encoding="utf-8").splitlines() if runs.exists() else []
    score_store.publish_results(
        evaluations, [json.loads(line) for line in lines], list(artifacts.ledger())
    )
