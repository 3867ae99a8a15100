"""Stage 5: target models trained on what each arm selected, evaluated and compared."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import polars as pl

from assets.auxiliary import checkpoint, finetuning
from assets.common import OWNERS, Context, Progress, all_of, code_version, probe_shard, result
from assets.confidence import FLIPS_FILE, arms_with_confidence
from assets.figures import curve_metadata, table
from assets.measured import cost_rows
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
    """`target_model` and `evaluation` of every domain and arm, and `report` of every domain."""
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
        deps=[
            target_model,
            *([dg.AssetKey([*prefix, "finetuned_model"])] if recipe.evaluation.finetune else []),
            dg.AssetKey([domain.name, "domain_tokens"]),
            "score_tables",
        ],
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

        packed = artifacts.current(f"{domain.name}/domain_tokens")
        text = artifacts.current(f"{domain.name}/domain_text")
        chosen = artifacts.current(f"{name}/selection")
        targets = [artifacts.current(f"{name}/target_model", f"seed_{s}") for s in seeds]
        tuned = []
        if recipe.evaluation.finetune:
            tuned = [artifacts.current(f"{name}/finetuned_model", f"seed_{s}") for s in seeds]

        def build(folder: Path) -> dict[str, Any]:
            ends = [
                (target, int(tokens), target.path / place)
                for target in (*targets, *tuned)
                for tokens, place in target.facts["checkpoints"].items()
            ]
            found = _metrics(context, gpu, domain, packed, text, [place for *_, place in ends])
            rows: list[tuple[str, str, int | None, int | None, str, float]] = []
            for (target, tokens, _), metrics in zip(ends, found, strict=True):
                where = (domain.name, arm.name, target.facts["seed"], tokens)
                suffix = method.FINETUNED if target in tuned else ""
                rows += [(*where, f"{m}{suffix}", value) for m, value in metrics.items()]
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
            Work(f"{name}/evaluation", inputs=[*targets, *tuned, packed, text, *scores]), build
        )
        rows = pl.read_parquet(made.path / "evaluations.parquet").drop("domain", "arm")
        return result([made], {"evaluations": table(rows.to_dicts())})

    finetuned = [_finetuned_model(recipe, domain, arm)] if recipe.evaluation.finetune else []
    return [target_model, *finetuned, evaluation]


def _finetuned_model(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    name = f"{domain.name}/{arm.name}"

    @dg.asset(
        description=f"{arm.name} for {domain.name}: every target model after one epoch over "
        "D_down, as the conditional is trained. The gain of choosing shrinks there (the paper, "
        "section 5).",
        key_prefix=[domain.name, arm.name],
        deps=[
            dg.AssetKey([domain.name, arm.name, "target_model"]),
            dg.AssetKey([domain.name, "domain_tokens"]),
            "tokenizer",
        ],
        group_name=GROUP,
        kinds={"pytorch", arm.name},
        owners=OWNERS,
        pool="gpu",
        code_version=code_version(1, domain.training),
    )
    def finetuned_model(
        context: Context, artifacts: ArtifactStore, gpu: Gpu
    ) -> dg.MaterializeResult:
        from colorfilter.training import planned_tokens

        encoder = artifacts.current("tokenizer")
        packed = artifacts.current(f"{domain.name}/domain_tokens")
        seeds = recipe.seeds(arm)
        targets = [artifacts.current(f"{name}/target_model", f"seed_{s}") for s in seeds]
        works = [
            Work(
                f"{name}/finetuned_model",
                target.partition,
                inputs=[target, packed, encoder],
                recipe=domain.training.facts(),
                seed=target.facts["seed"],
            )
            for target in targets
        ]
        with artifacts.attempts(works) as attempts:
            missing = [
                (target, attempt)
                for target, attempt in zip(targets, attempts, strict=True)
                if not attempt.standing
            ]
            specs = [
                finetuning(
                    domain,
                    _at_equal_tokens(target)[1],
                    encoder,
                    packed,
                    target.facts["seed"],
                    attempt.folder,
                )
                for target, attempt in missing
            ]
            progress = Progress(context, sum(planned_tokens(s) for s in specs), "tokens")
            for i, (*_, done) in gpu.train(specs, share=len(works), progress=progress):
                target, attempt = missing[i]
                tokens = _at_equal_tokens(target)[0]
                attempt.commit(
                    {"seed": target.facts["seed"], "checkpoints": {tokens: done.path.name}}
                )
            made = [a.artifact for a in attempts]
        return result(made, {"seeds": len(made), **curve_metadata(made[0].path)})

    return finetuned_model


def _at_equal_tokens(target: Artifact) -> tuple[str, Path]:
    """The end point that all arms have, in tokens, and its checkpoint."""
    tokens = min(target.facts["checkpoints"], key=int)
    return tokens, target.path / target.facts["checkpoints"][tokens]


def _metrics(
    context: Context,
    gpu: Gpu,
    domain: Domain,
    packed: Artifact,
    text: Artifact,
    checkpoints: Sequence[Path],
) -> list[dict[str, float]]:
    """What is measured of checkpoints on the domain's held-out text and tasks."""
    from colorfilter import evaluation as method

    if domain.tasks:
        n_bytes = packed.facts["held_out_label_bytes"]
    else:
        path = text.path / "held_out" / "documents.parquet"
        texts = pl.read_parquet(path, columns=["text"])["text"]
        n_bytes = int(texts.str.len_bytes().sum())
    found = []
    for nll, n in gpu.evaluate(checkpoints, packed.path / "held_out"):
        loss = method.mean_loss(nll, n)
        bits = method.bits_per_byte(loss, int(n.sum()), n_bytes)
        found.append({"held_out_loss": loss, "bits_per_byte": bits})
    if domain.tasks:
        choices = len(checkpoints) * text.facts["test_choices"]
        progress = Progress(context, choices, "choices")
        on_tasks = gpu.evaluate_tasks(checkpoints, text.path / "tasks", progress)
        for metrics, of_tasks in zip(found, on_tasks, strict=True):
            metrics.update(of_tasks, tasks_loss=method.mean_over_tasks(of_tasks))
    return found


def _report_asset(recipe: Recipe, domain: Domain) -> dg.AssetsDefinition:
    arms = {arm.name: f"{domain.name}/{arm.name}" for arm in recipe.arms}
    sure = [[domain.name, "cutoff_confidence"]] if arms_with_confidence(recipe) else []

    @dg.asset(
        key_prefix=domain.name,
        deps=[
            *(
                dg.AssetKey([domain.name, arm, stage])
                for arm in arms
                for stage in ("evaluation", "selection", "leakage")
            ),
            *(dg.AssetKey(key) for key in sure),
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
        leaking = {arm: artifacts.current(f"{name}/leakage") for arm, name in arms.items()}
        flips = [artifacts.current("/".join(key)) for key in sure]
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
                confidence=_flips(flips),
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
                    *flips,
                    *models,
                    *scored,
                ],
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


def _flips(made: Sequence[Artifact]) -> list[dict[str, Any]]:
    return [row for a in made for row in pl.read_parquet(a.path / FLIPS_FILE).to_dicts()]


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
