"""Stage 5: target models trained on what each arm selected, and fine-tuned where asked for."""

from collections.abc import Callable, Mapping
from pathlib import Path

import dagster as dg

from assets.auxiliary import domain_epoch
from assets.common import OWNERS, Context, Progress, code_version, result
from assets.figures import curve_metadata
from colorfilter.recipe import Arm, Domain, Recipe
from colorfilter.train_spec import Checkpoint, TrainSpec, planned_tokens
from resources.artifacts import Artifact, ArtifactStore, Work
from resources.gpu import Gpu

GROUP = "evaluated"


def target_assets(recipe: Recipe, domain: Domain, arm: Arm) -> list[dg.AssetsDefinition]:
    """`target_model` of an arm and, where asked for, `finetuned_model`."""
    finetuned = [_finetuned_model(recipe, domain, arm)] if recipe.evaluation.finetune else []
    return [_target_model(recipe, domain, arm), *finetuned]


def _target_model(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    name = f"{domain.name}/{arm.name}"
    seeds = recipe.seeds(arm)

    @dg.asset(
        description=f"{arm.name} for {domain.name}: a fresh model per seed, trained in a single "
        "pass over the filtered dataset. Of several end points each is a branch of one trunk, "
        "with a full decay.",
        key_prefix=[domain.name, arm.name],
        deps=[
            dg.AssetKey([domain.name, arm.name, "filtered_dataset"]),
            dg.AssetKey([domain.name, "domain_tokens"]),
            "tokenizer",
        ],
        group_name=GROUP,
        kinds={"pytorch"},
        tags={"arm": arm.name},
        owners=OWNERS,
        pool="gpu",
        code_version=code_version(
            1, recipe.target, str(recipe.evaluation.random_multiples), str(seeds)
        ),
    )
    def target_model(context: Context, artifacts: ArtifactStore, gpu: Gpu) -> dg.MaterializeResult:
        dataset = artifacts.current(f"{name}/filtered_dataset")
        tokens = dataset.part("tokens")
        ends = recipe.endpoints(arm, dataset.facts["sequences"])
        held_out = artifacts.current(f"{domain.name}/domain_tokens")
        encoder = artifacts.current("tokenizer")

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
            seed: Work(
                f"{name}/target_model",
                f"seed_{seed}",
                # A color that changes beside the tokens does not train random's models again.
                inputs=[tokens, held_out, encoder],
                recipe={
                    "model": recipe.target.model.facts(),
                    "training": recipe.target.training.facts(),
                    "endpoints": ends,
                },
                seed=seed,
            )
            for seed in seeds
        }
        return _trained(context, artifacts, gpu, works, spec, lambda _, done: str(done.tokens))

    return target_model


def _finetuned_model(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    name = f"{domain.name}/{arm.name}"
    seeds = recipe.seeds(arm)

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
        kinds={"pytorch"},
        tags={"arm": arm.name},
        owners=OWNERS,
        pool="gpu",
        code_version=code_version(1, domain.training),
    )
    def finetuned_model(
        context: Context, artifacts: ArtifactStore, gpu: Gpu
    ) -> dg.MaterializeResult:
        encoder = artifacts.current("tokenizer")
        packed = artifacts.current(f"{domain.name}/domain_tokens")
        targets = {s: artifacts.current(f"{name}/target_model", f"seed_{s}") for s in seeds}

        def spec(seed: int, out: Path) -> TrainSpec:
            _, start = _at_equal_tokens(targets[seed])
            return domain_epoch(start, domain.training, encoder, packed, seed, out)

        works = {
            seed: Work(
                f"{name}/finetuned_model",
                target.partition,
                inputs=[target, packed, encoder],
                recipe=domain.training.facts(),
                seed=seed,
            )
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
