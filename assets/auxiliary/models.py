"""Stage 2: the auxiliary models: prior, conditional and, for RHO-down, domain-only."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from assets.common import Context, Progress, result
from assets.declaration import Declaration, Read, asset
from assets.metadata import curve_metadata
from colorfilter.config.recipe import Domain, Model, Recipe, Training
from colorfilter.data.corpus import pack_shard
from colorfilter.storage.files import checkpoint_content
from colorfilter.training.spec import TrainSpec, planned_tokens
from resources.artifacts import Artifact, ArtifactStore
from resources.gpu import Gpu

GROUP = "auxiliary"


def checkpoint(model: Artifact) -> Path:
    """Return the folder of an auxiliary model's checkpoint in Hugging Face format."""
    return model.path / str(model.facts["checkpoint"])


def auxiliary_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """Return the prior and, per domain, the conditional and any domain-only model."""
    assets = [prior_asset(recipe), *(conditional_asset(recipe, d) for d in recipe.domains)]
    if recipe.has_domain_only_model:
        assets += [domain_only_asset(recipe, d) for d in recipe.domains]
    return assets


def prior_asset(recipe: Recipe) -> dg.AssetsDefinition:
    """Return the asset `prior_model`."""
    given = recipe.prior.path is not None
    declared = Declaration(
        "prior_model",
        GROUP,
        {"pytorch"},
        inputs=[Read("tokenizer")] if given else [Read("sample_plan"), Read("tokenizer")],
        settings={
            **recipe.prior.facts(without=("sample_chars", "score_sample")),
            "sequence_length": recipe.sequence_length,
        },
        seed=recipe.seed,
        pool="gpu",
    )

    @asset(declared)
    def prior_model(context: Context, artifacts: ArtifactStore, gpu: Gpu) -> dg.MaterializeResult:
        """The prior: a small causal language model trained on D_prior (`sample_plan`), or the
        checkpoint given in the recipe.
        """
        encoder = declared.current(artifacts, "tokenizer")
        if recipe.prior.path:
            path = recipe.prior.path
            content = {**declared.settings, "content": checkpoint_content(path)}
            made = artifacts.make(
                declared.work([encoder], settings=content),
                lambda folder: copy_prior(folder, path, encoder, recipe.sequence_length),
            )
        else:
            plan = declared.current(artifacts, "sample_plan")
            made = artifacts.make(
                declared.work([plan, encoder]),
                lambda folder: train_prior(folder, context, gpu, recipe, plan, encoder),
            )
        return result([made], {**made.facts, **curve_metadata(made.path)})

    return prior_model


def train_prior(
    folder: Path, context: Context, gpu: Gpu, recipe: Recipe, plan: Artifact, encoder: Artifact
) -> Mapping[str, Any]:
    """Train the prior for one epoch on D_prior; return facts for the manifest."""
    assert recipe.prior.model is not None
    assert recipe.prior.training is not None
    packed = folder / "d_prior"
    counts = pack_shard(packed, plan.path, encoder.path, [], recipe.sequence_length)
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


def copy_prior(
    folder: Path, path: str, encoder: Artifact, sequence_length: int
) -> Mapping[str, Any]:
    """Copy the prior that the recipe gives; return facts for the manifest.

    Raises InputError if it does not fit the tokenizer or the sequence length.
    """
    from colorfilter.models import checkpoints

    checkpoints.check_fit(path, encoder.facts["vocab_size"], sequence_length)
    model = checkpoints.load(path)
    checkpoints.save(model, folder / "model", encoder.path)
    return {"checkpoint": "model", **checkpoints.n_parameters(model)}


def conditional_asset(recipe: Recipe, domain: Domain) -> dg.AssetsDefinition:
    """Return the asset `<domain>/conditional_model`."""
    tokens = f"{domain.name}/domain_tokens"
    declared = Declaration(
        f"{domain.name}/conditional_model",
        GROUP,
        {"pytorch"},
        inputs=[Read("prior_model"), Read("tokenizer"), Read(tokens)],
        settings=domain.training.facts(),
        seed=recipe.seed,
        pool="gpu",
    )

    @asset(declared)
    def conditional_model(
        context: Context, artifacts: ArtifactStore, gpu: Gpu
    ) -> dg.MaterializeResult:
        """The conditional: a copy of the prior, trained for one epoch on D_down, the training
        split of the domain's text.
        """
        prior = declared.current(artifacts, "prior_model")
        encoder = declared.current(artifacts, "tokenizer")
        packed = declared.current(artifacts, tokens)

        def build(folder: Path) -> Mapping[str, Any]:
            start = checkpoint(prior)
            spec = domain_epoch(start, domain.training, encoder, packed, recipe.seed, folder)
            facts = trained(context, gpu, spec)
            own = folder / str(facts["checkpoint"])
            return {**facts, **held_out_losses(gpu, start, own, packed, folder)}

        made = artifacts.make(declared.work([prior, encoder, packed]), build)
        return result([made], {**made.facts, **curve_metadata(made.path)})

    return conditional_model


def held_out_losses(
    gpu: Gpu, prior: Path, conditional: Path, packed: Artifact, folder: Path
) -> dict[str, float]:
    """Return both models' mean losses on held-out text and the mean color, in nats per token."""
    from colorfilter.evaluation.metrics import mean_loss

    before, after = gpu.evaluate([prior, conditional], packed.path / "held_out", folder)
    color = (after[0].astype("float64") - before[0])[before[1] > 0]
    return {
        "prior_held_out_loss": mean_loss(*before),
        "held_out_loss": mean_loss(*after),
        "held_out_color": float(color.mean()),
    }


def domain_epoch(
    start: Model | Path,
    training: Training,
    encoder: Artifact,
    packed: Artifact,
    seed: int,
    out: Path,
) -> TrainSpec:
    """Return the spec of one epoch over D_down, from a new model or a checkpoint.

    `seed` determines the order of the sequences.
    """
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
    """Return the asset `<domain>/domain_only_model`."""
    model, training = recipe.prior.model, recipe.prior.training
    assert model is not None
    assert training is not None
    tokens = f"{domain.name}/domain_tokens"
    declared = Declaration(
        f"{domain.name}/domain_only_model",
        GROUP,
        {"pytorch"},
        inputs=[Read("tokenizer"), Read(tokens)],
        settings={"model": model.facts(), "training": training.facts()},
        seed=recipe.seed,
        pool="gpu",
    )

    @asset(declared)
    def domain_only_model(
        context: Context, artifacts: ArtifactStore, gpu: Gpu
    ) -> dg.MaterializeResult:
        """The reference model of RHO-down: a new model of the prior's architecture, trained for
        one epoch on D_down alone.
        """
        encoder = declared.current(artifacts, "tokenizer")
        packed = declared.current(artifacts, tokens)

        def build(folder: Path) -> Mapping[str, Any]:
            spec = domain_epoch(model, training, encoder, packed, recipe.seed, folder)
            return trained(context, gpu, spec)

        made = artifacts.make(declared.work([encoder, packed]), build)
        return result([made], {**made.facts, **curve_metadata(made.path)})

    return domain_only_model


def auxiliary_checks(recipe: Recipe) -> list[dg.AssetChecksDefinition]:
    """Return the check `conditional_beats_prior` of every domain."""
    return [_conditional_beats_prior(d.name) for d in recipe.domains]


def _conditional_beats_prior(domain: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(asset=dg.AssetKey([domain, "conditional_model"]), blocking=True)
    def conditional_beats_prior(artifacts: ArtifactStore) -> dg.AssetCheckResult:
        """The conditional's loss on held-out text of the domain is below the prior's."""
        facts = artifacts.current(f"{domain}/conditional_model").facts
        prior, conditional = facts["prior_held_out_loss"], facts["held_out_loss"]
        passed = math.isfinite(conditional) and conditional < prior
        found = "below" if passed else "not below"
        fix = "" if passed else "; adjust the domain's training settings in the recipe"
        return dg.AssetCheckResult(
            passed=passed,
            description=f"held-out loss {conditional:.3f} is {found} the prior's {prior:.3f}{fix}",
            metadata={"prior": prior, "conditional": conditional},
        )

    return conditional_beats_prior


def trained(context: Context, gpu: Gpu, spec: TrainSpec) -> dict[str, Any]:
    """Train to the only end point of a spec; return facts for the manifest."""
    progress = Progress(context, planned_tokens(spec), "tokens")
    ((_, ends),) = gpu.train([spec], 1, progress, progress.stands)
    done = ends[-1]
    return {"checkpoint": done.path.name, "tokens": done.tokens, **done.sizes}
