"""Stage 5: target models trained on what each arm selected, and fine-tuned where asked for."""

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
    """`target_model` of an arm and, where asked for, `finetuned_model`."""
    finetuned = [finetuned_asset(recipe, domain, arm)] if recipe.evaluation.finetune else []
    return [target_asset(recipe, domain, arm), *finetuned]


def learned(recipe: Recipe) -> dict[str, Any]:
    """The model and the training of every target model, as facts."""
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
        description=f"{arm.name} for {domain.name}: a fresh model per seed, trained in a single "
        "pass over the filtered dataset. Of several end points each is a branch of one trunk, "
        "with a full decay.",
    )


def target_asset(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    """`<domain>/<arm>/target_model`, a partition of the ledger per seed."""
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
                # A color that changes beside the tokens does not train random's models again.
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
    """`<domain>/<arm>/finetuned_model`, a partition of the ledger per seed."""
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
        description=f"{arm.name} for {domain.name}: every target model after one epoch over "
        "D_down, as the conditional is trained. The gain of choosing shrinks there (the paper, "
        "section 5).",
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
        # A fine-tuned model stands where its target did: at the tokens that were chosen for it.
        return _trained(
            context, artifacts, gpu, works, spec, lambda s, _: _at_equal_tokens(targets[s])[0]
        )

    return finetuned_model


def _at_equal_tokens(target: Artifact) -> tuple[str, Path]:
    """The end point that all arms have, in tokens, and its checkpoint."""
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
    """Train a model per seed, by `spec(seed, folder)`; `label(seed, checkpoint)` is its tokens."""
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
