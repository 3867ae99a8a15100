"""Stage 2: the two auxiliary models, prior and conditional."""

import math
from pathlib import Path
from typing import Any

import dagster as dg

from assets.common import OWNERS, Context, Progress, code_version, result
from assets.figures import curve_metadata
from colorfilter.corpus import pack_shard
from colorfilter.files import checkpoint_content
from colorfilter.recipe import Domain, Model, Recipe, Training
from colorfilter.train_spec import TrainSpec, planned_tokens
from resources.artifacts import Artifact, ArtifactStore, Work
from resources.gpu import Gpu

GROUP = "auxiliary"


def checkpoint(model: Artifact) -> Path:
    """The folder of an auxiliary model's checkpoint, in Hugging Face form."""
    return model.path / str(model.facts["checkpoint"])


def auxiliary_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """The prior, and per domain the conditional and, where asked for, the domain-only model."""

    @dg.asset(
        deps=["sample_plan", "tokenizer"],
        group_name=GROUP,
        kinds={"pytorch"},
        owners=OWNERS,
        pool="gpu",
        code_version=code_version(1, recipe.prior, recipe.sequence_length, recipe.seed),
    )
    def prior_model(context: Context, artifacts: ArtifactStore, gpu: Gpu) -> dg.MaterializeResult:
        """The prior: a small causal LM trained on D_prior, or the one the recipe names."""
        plan = artifacts.current("sample_plan")
        encoder = artifacts.current("tokenizer")

        path = recipe.prior.path

        def fresh(folder: Path) -> dict[str, Any]:
            packed = folder / "d_prior"
            counts = pack_shard(packed, plan.path, encoder.path, [], recipe.sequence_length)
            assert recipe.prior.model is not None
            assert recipe.prior.training is not None
            spec = TrainSpec(
                start=recipe.prior.model,
                tokens=packed,
                tokenizer=encoder.path,
                training=recipe.prior.training,
                seed=recipe.seed,
                endpoints=(counts["sequences"],),
                out=folder,
            )
            return trained(context, gpu, spec)

        def given(folder: Path) -> dict[str, Any]:
            from colorfilter import models

            assert path is not None
            models.check_fit(path, encoder.facts["vocab_size"], recipe.sequence_length)
            model = models.load(path)
            models.save(model, folder / "model", encoder.path)
            return {"checkpoint": "model", **models.n_parameters(model)}

        made = artifacts.make(
            Work(
                "prior_model",
                inputs=[encoder] if path else [plan, encoder],
                recipe={
                    **recipe.prior.facts(without=("sample_chars", "score_sample")),
                    **({"content": checkpoint_content(path)} if path else {}),
                    "sequence_length": recipe.sequence_length,
                },
                seed=recipe.seed,
            ),
            given if path else fresh,
        )
        return result([made], {**made.facts, **curve_metadata(made.path)})

    per_domain = [conditional_asset(recipe, d) for d in recipe.domains]
    if recipe.has_domain_only_model:
        per_domain += [domain_only_asset(recipe, d) for d in recipe.domains]
    return [prior_model, *per_domain]


def conditional_asset(recipe: Recipe, domain: Domain) -> dg.AssetsDefinition:
    """`<domain>/conditional_model`."""

    @dg.asset(
        key_prefix=domain.name,
        deps=["prior_model", "tokenizer", dg.AssetKey([domain.name, "domain_tokens"])],
        group_name=GROUP,
        kinds={"pytorch"},
        owners=OWNERS,
        pool="gpu",
        code_version=code_version(1, domain.training, recipe.seed),
    )
    def conditional_model(
        context: Context, artifacts: ArtifactStore, gpu: Gpu
    ) -> dg.MaterializeResult:
        """The conditional: a copy of the prior after one epoch over D_down."""
        prior = artifacts.current("prior_model")
        encoder = artifacts.current("tokenizer")
        packed = artifacts.current(f"{domain.name}/domain_tokens")

        def build(folder: Path) -> dict[str, Any]:
            from colorfilter.evaluation import mean_loss

            spec = domain_epoch(
                checkpoint(prior), domain.training, encoder, packed, recipe.seed, folder
            )
            facts = trained(context, gpu, spec)
            held_out = packed.path / "held_out"
            own = folder / facts["checkpoint"]
            before, after = gpu.evaluate([checkpoint(prior), own], held_out, folder)
            color = (after[0].astype("float64") - before[0])[before[1] > 0]
            return {
                **facts,
                "prior_held_out_loss": mean_loss(*before),
                "held_out_loss": mean_loss(*after),
                "held_out_color": float(color.mean()),
            }

        made = artifacts.make(
            Work(
                f"{domain.name}/conditional_model",
                inputs=[prior, encoder, packed],
                recipe=domain.training.facts(),
                seed=recipe.seed,
            ),
            build,
        )
        return result([made], {**made.facts, **curve_metadata(made.path)})

    return conditional_model


def domain_epoch(
    start: Model | Path,
    training: Training,
    encoder: Artifact,
    packed: Artifact,
    seed: int,
    out: Path,
) -> TrainSpec:
    """One epoch over D_down of a fresh model or from a checkpoint, in the order of a seed."""
    return TrainSpec(
        start=str(start) if isinstance(start, Path) else start,
        tokens=packed.path / "down",
        tokenizer=encoder.path,
        training=training,
        seed=seed,
        endpoints=(packed.facts["down_sequences"],),
        out=out,
        held_out=packed.path / "held_out",
    )


def domain_only_asset(recipe: Recipe, domain: Domain) -> dg.AssetsDefinition:
    """`<domain>/domain_only_model`."""

    @dg.asset(
        key_prefix=domain.name,
        deps=["tokenizer", dg.AssetKey([domain.name, "domain_tokens"])],
        group_name=GROUP,
        kinds={"pytorch"},
        owners=OWNERS,
        pool="gpu",
        code_version=code_version(1, recipe.prior, recipe.seed),
    )
    def domain_only_model(
        context: Context, artifacts: ArtifactStore, gpu: Gpu
    ) -> dg.MaterializeResult:
        """RHO-down's conditional: of the prior's kind, fresh, after one epoch over D_down alone."""
        encoder = artifacts.current("tokenizer")
        packed = artifacts.current(f"{domain.name}/domain_tokens")
        model, training = recipe.prior.model, recipe.prior.training
        assert model is not None
        assert training is not None

        def build(folder: Path) -> dict[str, Any]:
            spec = domain_epoch(model, training, encoder, packed, recipe.seed, folder)
            return trained(context, gpu, spec)

        made = artifacts.make(
            Work(
                f"{domain.name}/domain_only_model",
                inputs=[encoder, packed],
                recipe={"model": model.facts(), "training": training.facts()},
                seed=recipe.seed,
            ),
            build,
        )
        return result([made], {**made.facts, **curve_metadata(made.path)})

    return domain_only_model


def auxiliary_checks(recipe: Recipe) -> list[dg.AssetChecksDefinition]:
    """`conditional_beats_prior` for every domain."""
    return [_conditional_beats_prior(d.name) for d in recipe.domains]


def _conditional_beats_prior(domain: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset=dg.AssetKey([domain, "conditional_model"]), blocking=True)
    def conditional_beats_prior(artifacts: ArtifactStore) -> dg.AssetCheckResult:
        """On held-out text of the domain the conditional's loss is below the prior's."""
        facts = artifacts.current(f"{domain}/conditional_model").facts
        prior, conditional = facts["prior_held_out_loss"], facts["held_out_loss"]
        passed = math.isfinite(conditional) and conditional < prior
        words = "below" if passed else "not below; look at the domain's training"
        return dg.AssetCheckResult(
            passed=passed,
            description=f"held-out loss {conditional:.3f}, {words} the prior's {prior:.3f}",
            metadata={"prior": prior, "conditional": conditional},
        )

    return conditional_beats_prior


def trained(context: Context, gpu: Gpu, spec: TrainSpec) -> dict[str, Any]:
    """Train to the one end point of a spec; facts for the manifest."""
    progress = Progress(context, planned_tokens(spec), "tokens")
    ((_, checkpoints),) = gpu.train([spec], 1, progress, progress.stands)
    done = checkpoints[-1]
    return {"checkpoint": done.path.name, "tokens": done.tokens, **done.sizes}
