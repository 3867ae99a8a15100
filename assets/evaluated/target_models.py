"""Stage 5: train target models on each arm's dataset and, if requested, fine-tune them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from assets.auxiliary.models import domain_epoch
from assets.common import Context, Progress, result
from assets.declaration import Declaration, Read, asset
from assets.metadata import curve_metadata
from colorfilter.config.recipe import Arm, Domain, Recipe
from colorfilter.training.spec import Checkpoint, TrainSpec, planned_tokens
from resources.artifacts import Artifact, ArtifactStore, Work
from resources.gpu import Gpu

GROUP = "evaluated"


def target_assets(recipe: Recipe, domain: Domain, arm: Arm) -> list[dg.AssetsDefinition]:
    """Return an arm's asset `target_model` and, if the recipe requests it, `finetuned_model`."""
    finetuned = [finetuned_asset(recipe, domain, arm)] if recipe.evaluation.finetune else []
    return [target_asset(recipe, domain, arm), *finetuned]


def learned(recipe: Recipe) -> dict[str, Any]:
    """Return the model and training settings that all target models share."""
    return {
        "model": recipe.target.model.facts(),
        "training": recipe.target.training.facts(),
    }


def target_declaration(recipe: Recipe, domain: Domain, arm: Arm) -> Declaration:
    """Declare `<domain>/<arm>/target_model`."""
    name = f"{domain.name}/{arm.name}"
    return Declaration(
        f"{name}/target_model",
        GROUP,
        {"pytorch"},
        inputs=[
            Read(f"{name}/filtered_dataset"),
            Read(f"{domain.name}/domain_tokens"),
            Read("tokenizer"),
        ],
        settings={
            **learned(recipe),
            "training_tokens": recipe.target.training_tokens,
            "random_multiples": recipe.evaluation.random_multiples,
            "seeds": recipe.seeds(arm),
        },
        pool="gpu",
        arm=arm.name,
        description=f"{arm.name} for {domain.name}: one new model per seed, trained in a single "
        "pass over the filtered dataset. An arm with several training lengths has one run per "
        "seed that branches for each length, with a full learning-rate decay in every branch.",
    )


def target_asset(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    """Return the asset `<domain>/<arm>/target_model`; each seed is a partition in the ledger."""
    declared = target_declaration(recipe, domain, arm)

    @asset(declared)
    def target_model(context: Context, artifacts: ArtifactStore, gpu: Gpu) -> dg.MaterializeResult:
        dataset = declared.current(artifacts, f"{domain.name}/{arm.name}/filtered_dataset")
        tokens = dataset.part("tokens")
        ends = recipe.endpoints(arm, dataset.facts["sequences"])
        held_out = declared.current(artifacts, f"{domain.name}/domain_tokens")
        encoder = declared.current(artifacts, "tokenizer")

        def spec(seed: int, out: Path) -> TrainSpec:
            return TrainSpec(
                start=recipe.target.model,
                tokens=tokens.path,
                tokenizer=encoder.path,
                training=recipe.target.training,
                seed=seed,
                endpoints=ends,
                out=out,
                held_out=held_out.path / "held_out",
            )

        works = {
            seed: declared.work(
                # Only the tokens: a change of color alone does not retrain random's models.
                [tokens, held_out, encoder],
                f"seed_{seed}",
                settings={**learned(recipe), "endpoints": ends},
                seed=seed,
            )
            for seed in recipe.seeds(arm)
        }
        return _trained(context, artifacts, gpu, works, spec, lambda _, done: str(done.tokens))

    return target_model


def finetuned_asset(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    """Return the asset `<domain>/<arm>/finetuned_model`; each seed is a partition in the ledger."""
    name = f"{domain.name}/{arm.name}"
    declared = Declaration(
        f"{name}/finetuned_model",
        GROUP,
        {"pytorch"},
        inputs=[
            Read(f"{name}/target_model"),
            Read(f"{domain.name}/domain_tokens"),
            Read("tokenizer"),
        ],
        settings=domain.training.facts(),
        pool="gpu",
        arm=arm.name,
        description=f"{arm.name} for {domain.name}: every target model after one epoch of "
        "fine-tuning on D_down, with the training settings of the conditional. Fine-tuning "
        "reduces the benefit of data selection (section 5 of the CoLoR-Filter paper).",
    )

    @asset(declared)
    def finetuned_model(
        context: Context, artifacts: ArtifactStore, gpu: Gpu
    ) -> dg.MaterializeResult:
        encoder = declared.current(artifacts, "tokenizer")
        packed = declared.current(artifacts, f"{domain.name}/domain_tokens")
        targets = {
            seed: declared.current(artifacts, f"{name}/target_model", f"seed_{seed}")
            for seed in recipe.seeds(arm)
        }

        def spec(seed: int, out: Path) -> TrainSpec:
            _, start = _at_equal_tokens(targets[seed])
            return domain_epoch(start, domain.training, encoder, packed, seed, out)

        works = {
            seed: declared.work([target, packed, encoder], target.partition, seed=seed)
            for seed, target in targets.items()
        }
        # Label a fine-tuned model with its target's training tokens, without those of D_down.
        return _trained(
            context, artifacts, gpu, works, spec, lambda s, _: _at_equal_tokens(targets[s])[0]
        )

    return finetuned_model


def _at_equal_tokens(target: Artifact) -> tuple[str, Path]:
    """Return the end point that all arms share, in tokens, and its checkpoint."""
    tokens = min(target.facts["checkpoints"], key=int)
    return tokens, target.path / target.facts["checkpoints"][tokens]


def _trained(
    context: Context,
    artifacts: ArtifactStore,
    gpu: Gpu,
    works: Mapping[int, Work],
    spec: Callable[[int, Path], TrainSpec],
    label: Callable[[int, Checkpoint], str],
) -> dg.MaterializeResult:
    """Train a model per seed as `spec(seed, folder)` says.

    `label(seed, checkpoint)` is the number of training tokens under which a checkpoint is stored.
    """
    with artifacts.attempts(list(works.values())) as attempts:
        missing = [(s, a) for s, a in zip(works, attempts, strict=True) if not a.standing]
        specs = [spec(seed, attempt.folder) for seed, attempt in missing]
        progress = Progress(context, sum(planned_tokens(s) for s in specs), "tokens")
        for i, checkpoints in gpu.train(specs, len(works), progress, progress.stands):
            seed, attempt = missing[i]
            attempt.commit(
                {
                    "seed": seed,
                    "checkpoints": {label(seed, c): c.path.name for c in checkpoints},
                    **checkpoints[0].sizes,
                }
            )
        made = [a.artifact for a in attempts]
    shown = {"seeds": len(made), "parameters": made[0].facts["parameters"]}
    if specs:
        shown["tokens per second"] = round(progress.rate)
    return result(made, {**shown, **curve_metadata(made[0].path)})
