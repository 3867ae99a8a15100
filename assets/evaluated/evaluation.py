"""Stage 5: evaluate every target model on the domain's held-out text and tasks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import dagster as dg
import polars as pl

from assets.common import Context, Progress, result
from assets.declaration import Declaration, Read, asset
from assets.evaluated.report import report_asset
from assets.evaluated.target_models import GROUP, target_assets
from assets.metadata import table
from colorfilter.config.recipe import Arm, Domain, Recipe
from resources.artifacts import Artifact, ArtifactStore
from resources.gpu import Gpu


def evaluated_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """Return models and `evaluation` of every domain and arm, and `report` of every domain."""
    arms = [
        made
        for domain in recipe.domains
        for arm in recipe.arms
        for made in (*target_assets(recipe, domain, arm), evaluation_asset(recipe, domain, arm))
    ]
    return [*arms, *(report_asset(recipe, d) for d in recipe.domains)]


def evaluation_asset(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    """Return the asset `<domain>/<arm>/evaluation`."""
    name = f"{domain.name}/{arm.name}"
    stages = ["target_model", *(["finetuned_model"] if recipe.evaluation.finetune else [])]
    declared = Declaration(
        f"{name}/evaluation",
        GROUP,
        {"pytorch"},
        inputs=[
            *(Read(f"{name}/{stage}") for stage in stages),
            Read(f"{domain.name}/domain_text"),
            Read(f"{domain.name}/domain_tokens"),
        ],
        pool="gpu",
        arm=arm.name,
        description=f"{arm.name} for {domain.name}: loss and bits per byte of every target model "
        "on held-out text and, for a domain of tasks, accuracy and loss on each task.",
    )

    @asset(declared)
    def evaluation(context: Context, artifacts: ArtifactStore, gpu: Gpu) -> dg.MaterializeResult:
        packed = declared.current(artifacts, f"{domain.name}/domain_tokens")
        text = declared.current(artifacts, f"{domain.name}/domain_text")
        models = {
            stage: [
                declared.current(artifacts, f"{name}/{stage}", f"seed_{seed}")
                for seed in recipe.seeds(arm)
            ]
            for stage in stages
        }
        made = artifacts.make(
            declared.work([*(m for found in models.values() for m in found), packed, text]),
            lambda folder: evaluate(folder, context, gpu, domain, arm, models, packed, text),
        )
        rows = pl.read_parquet(made.path / "evaluations.parquet").drop("domain", "arm")
        return result([made], {"evaluations": table(rows.to_dicts())})

    return evaluation


def evaluate(
    folder: Path,
    context: Context,
    gpu: Gpu,
    domain: Domain,
    arm: Arm,
    models: Mapping[str, Sequence[Artifact]],
    packed: Artifact,
    text: Artifact,
) -> dict[str, int]:
    """Write metrics of all checkpoints of `models`, by stage; return facts for the manifest."""
    from colorfilter.evaluation.metrics import FINETUNED
    from colorfilter.evaluation.report import EVALUATIONS

    ends = [
        (FINETUNED if stage == "finetuned_model" else "", model, int(tokens), model.path / name)
        for stage, found in models.items()
        for model in found
        for tokens, name in model.facts["checkpoints"].items()
    ]
    paths = [path for *_, path in ends]
    measured = _metrics(context, gpu, domain, packed, text, paths, folder)
    rows: list[tuple[str, str, int | None, int | None, str, float]] = []
    for (suffix, model, tokens, _), values in zip(ends, measured, strict=True):
        where = (domain.name, arm.name, model.facts["seed"], tokens)
        rows += [(*where, f"{metric}{suffix}", value) for metric, value in values.items()]
    frame = pl.DataFrame(rows, schema=EVALUATIONS, orient="row")
    frame.write_parquet(folder / "evaluations.parquet")
    return {"rows": len(rows)}


def _metrics(
    context: Context,
    gpu: Gpu,
    domain: Domain,
    packed: Artifact,
    text: Artifact,
    checkpoints: Sequence[Path],
    folder: Path,
) -> list[dict[str, float]]:
    """Return each checkpoint's metrics on the domain's held-out text and tasks."""
    from colorfilter.evaluation import metrics

    if domain.tasks:
        n_bytes = packed.facts["held_out_label_bytes"]
    else:
        path = text.path / "held_out" / "documents.parquet"
        texts = pl.read_parquet(path, columns=["text"])["text"]
        # The first token of a sequence is not a label: exclude its share of the bytes.
        n_tokens = packed.facts["held_out_tokens"]
        labels = n_tokens - packed.facts["held_out_sequences"]
        n_bytes = round(int(texts.str.len_bytes().sum()) * labels / n_tokens)
    found = []
    for nll, n in gpu.evaluate(checkpoints, packed.path / "held_out", folder):
        loss = metrics.mean_loss(nll, n)
        bits = metrics.bits_per_byte(loss, int(n.sum()), n_bytes)
        found.append({"held_out_loss": loss, "bits_per_byte": bits})
    if domain.tasks:
        choices = len(checkpoints) * text.facts["test_choices"]
        progress = Progress(context, choices, "choices")
        on_tasks = gpu.evaluate_tasks(checkpoints, text.path / "tasks", folder, progress)
        for values, of_tasks in zip(found, on_tasks, strict=True):
            values.update(of_tasks, tasks_loss=metrics.mean_over_tasks(of_tasks))
    return found
