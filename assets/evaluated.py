"""Stage 5: every target model on the domain's held-out text and tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.common import OWNERS, Context, Progress, code_version, result
from assets.figures import table
from assets.report import report_asset
from assets.targets import GROUP, target_assets
from colorfilter.recipe import Arm, Domain, Recipe
from resources.artifacts import Artifact, ArtifactStore, Work
from resources.gpu import Gpu


def evaluated_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """The models and the `evaluation` of every domain and arm, and the `report` of every domain."""
    arms = [
        asset
        for domain in recipe.domains
        for arm in recipe.arms
        for asset in (*target_assets(recipe, domain, arm), _evaluation(recipe, domain, arm))
    ]
    return [*arms, *(report_asset(recipe, d) for d in recipe.domains)]


def _evaluation(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    prefix = [domain.name, arm.name]
    name = "/".join(prefix)
    seeds = recipe.seeds(arm)

    @dg.asset(
        description=f"{arm.name} for {domain.name}: held-out loss and bits per byte of every "
        "target model, and its accuracies and losses on the domain's tasks.",
        key_prefix=prefix,
        deps=[
            dg.AssetKey([*prefix, "target_model"]),
            *([dg.AssetKey([*prefix, "finetuned_model"])] if recipe.evaluation.finetune else []),
            dg.AssetKey([domain.name, "domain_text"]),
            dg.AssetKey([domain.name, "domain_tokens"]),
        ],
        group_name=GROUP,
        kinds={"pytorch"},
        tags={"arm": arm.name},
        owners=OWNERS,
        pool="gpu",
        code_version=code_version(1),
    )
    def evaluation(context: Context, artifacts: ArtifactStore, gpu: Gpu) -> dg.MaterializeResult:
        from colorfilter import evaluation as method
        from colorfilter.report import EVALUATIONS

        packed = artifacts.current(f"{domain.name}/domain_tokens")
        text = artifacts.current(f"{domain.name}/domain_text")
        models = [("", artifacts.current(f"{name}/target_model", f"seed_{s}")) for s in seeds]
        if recipe.evaluation.finetune:
            models += [
                (method.FINETUNED, artifacts.current(f"{name}/finetuned_model", f"seed_{s}"))
                for s in seeds
            ]

        def build(folder: Path) -> dict[str, Any]:
            ends = [
                (suffix, model.facts["seed"], int(tokens), model.path / place)
                for suffix, model in models
                for tokens, place in model.facts["checkpoints"].items()
            ]
            found = _metrics(
                context, gpu, domain, packed, text, [place for *_, place in ends], folder
            )
            rows: list[tuple[str, str, int | None, int | None, str, float]] = []
            for (suffix, seed, tokens, _), metrics in zip(ends, found, strict=True):
                where = (domain.name, arm.name, seed, tokens)
                rows += [(*where, f"{m}{suffix}", value) for m, value in metrics.items()]
            frame = pl.DataFrame(rows, schema=EVALUATIONS, orient="row")
            frame.write_parquet(folder / "evaluations.parquet")
            return {"rows": len(rows)}

        evaluated = [model for _, model in models]
        made = artifacts.make(Work(f"{name}/evaluation", inputs=[*evaluated, packed, text]), build)
        rows = pl.read_parquet(made.path / "evaluations.parquet").drop("domain", "arm")
        return result([made], {"evaluations": table(rows.to_dicts())})

    return evaluation


def _metrics(
    context: Context,
    gpu: Gpu,
    domain: Domain,
    packed: Artifact,
    text: Artifact,
    checkpoints: Sequence[Path],
    folder: Path,
) -> list[dict[str, float]]:
    """What is measured of checkpoints on the domain's held-out text and tasks."""
    from colorfilter import evaluation as method

    if domain.tasks:
        n_bytes = packed.facts["held_out_label_bytes"]
    else:
        path = text.path / "held_out" / "documents.parquet"
        texts = pl.read_parquet(path, columns=["text"])["text"]
        # The first token of a sequence is no label, so its share of the bytes does not count.
        n_tokens = packed.facts["held_out_tokens"]
        labels = n_tokens - packed.facts["held_out_sequences"]
        n_bytes = round(int(texts.str.len_bytes().sum()) * labels / n_tokens)
    found = []
    for nll, n in gpu.evaluate(checkpoints, packed.path / "held_out", folder):
        loss = method.mean_loss(nll, n)
        bits = method.bits_per_byte(loss, int(n.sum()), n_bytes)
        found.append({"held_out_loss": loss, "bits_per_byte": bits})
    if domain.tasks:
        choices = len(checkpoints) * text.facts["test_choices"]
        progress = Progress(context, choices, "choices")
        on_tasks = gpu.evaluate_tasks(checkpoints, text.path / "tasks", folder, progress)
        for metrics, of_tasks in zip(found, on_tasks, strict=True):
            metrics.update(of_tasks, tasks_loss=method.mean_over_tasks(of_tasks))
    return found
