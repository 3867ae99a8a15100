"""Stage 3: how much selections would change with another seed of the conditional."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.auxiliary.models import checkpoint, domain_epoch, trained
from assets.common import Context, Progress, result
from assets.declaration import Declaration, Read, Shards, asset
from assets.metadata import table
from assets.scores.refined_scores import gathered
from assets.scores.scores import GROUP, eot_id
from colorfilter.config.recipe import Domain, Recipe
from resources.artifacts import Artifact, ArtifactStore
from resources.gpu import Gpu, ScoreJob
from resources.score_store import ScoreStore

LOSSES_FILE = "losses.parquet"


def confidence_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """Return `<domain>/cutoff_confidence` of every domain, if an arm selects with one cutoff."""
    if not recipe.arms_with_one_cutoff():
        return []
    return [confidence_asset(recipe, domain) for domain in recipe.domains]


def flips(
    artifacts: ArtifactStore, score_store: ScoreStore, recipe: Recipe, domain: Domain
) -> list[dict[str, Any]]:
    """Return what another seed of the conditional would change, a row per arm with a cutoff."""
    from colorfilter.selection import confidence

    made = artifacts.current(f"{domain.name}/cutoff_confidence")
    losses = pl.read_parquet(made.path / LOSSES_FILE)
    with score_store.read() as connection:
        return [
            confidence.flips(connection, arm, domain.name, losses)
            for arm in recipe.arms_with_one_cutoff()
        ]


def confidence_asset(recipe: Recipe, domain: Domain) -> dg.AssetsDefinition:
    """Return the asset `<domain>/cutoff_confidence`.

    The second conditional is a partition of it in the ledger.
    """
    name, seed = f"{domain.name}/cutoff_confidence", recipe.seed + 1
    tokens = f"{domain.name}/domain_tokens"
    # Declared separately: the model is kept when new shards arrive and a new sample is drawn.
    conditional = Declaration(
        name,
        GROUP,
        {"pytorch"},
        inputs=[Read("prior_model"), Read("tokenizer"), Read(tokens)],
        settings=domain.training.facts(),
        seed=seed,
    )
    declared = Declaration(
        name,
        GROUP,
        {"pytorch", "duckdb"},
        inputs=[*conditional.inputs, Read("corpus_tokens", Shards.ALL)],
        consults=[Read("score_tables")],
        settings={"scoring": recipe.scoring.facts(), "training": domain.training.facts()},
        code=2,
        seed=seed,
        description="How much of each selection would change if the conditional were trained "
        "with another seed. A second conditional is trained and scores a random sample of the "
        "corpus. A change of tau needs no new losses.",
        pool="gpu",
    )

    @asset(declared)
    def cutoff_confidence(
        context: Context, artifacts: ArtifactStore, gpu: Gpu, score_store: ScoreStore
    ) -> dg.MaterializeResult:
        prior = conditional.current(artifacts, "prior_model")
        encoder = conditional.current(artifacts, "tokenizer")
        packed = conditional.current(artifacts, tokens)
        shards = [s.name for s in artifacts.at.shards()]
        corpus = {s: declared.current(artifacts, "corpus_tokens", s) for s in shards}

        def train(folder: Path) -> dict[str, Any]:
            start = checkpoint(prior)
            spec = domain_epoch(start, domain.training, encoder, packed, seed, folder)
            return trained(context, gpu, spec)

        second = artifacts.make(conditional.work([prior, encoder, packed], "conditional"), train)
        eot = eot_id(artifacts, recipe.scoring)
        made = artifacts.make(
            declared.work([second, *corpus.values()], settings=recipe.scoring.facts()),
            lambda folder: score_sample(folder, context, gpu, recipe, second, corpus, eot),
        )
        rows = flips(artifacts, score_store, recipe, domain)
        return result([second, made], {**made.facts, "changes with another seed": table(rows)})

    return cutoff_confidence


def score_sample(
    folder: Path,
    context: Context,
    gpu: Gpu,
    recipe: Recipe,
    model: Artifact,
    corpus: Mapping[str, Artifact],
    eot: int | None,
) -> dict[str, Any]:
    """Write a model's losses on a random sample of the corpus; return facts for the manifest.

    `corpus` maps shards to packed tokens. A label after `eot`, the end-of-text id, is ignored.
    """
    from colorfilter.selection import refinement

    seed = recipe.seed + 1
    sizes = {s: int(a.facts["sequences"]) for s, a in corpus.items()}
    sample = refinement.draw_sample(sizes, seed)
    progress = Progress(context, len(sample) * recipe.sequence_length, "tokens")
    rows = gathered(sample, {s: a.path for s, a in corpus.items()}, folder / "sample")
    job = ScoreJob(
        models={model.fingerprint: checkpoint(model)},
        outs={model.fingerprint: folder / "sample" / "losses"},
        parameters=model.facts["parameters"],
        tokens=rows,
        shard="sample",
        precision=recipe.scoring.precision,
        eot_id=eot,
    )
    for _ in gpu.score([job], progress, progress.stands):
        pass
    losses = refinement.losses_of(folder / "sample" / "losses", rows)
    losses.write_parquet(folder / LOSSES_FILE, compression="zstd")
    gpu.discard_copies(folder / "sample")
    shutil.rmtree(folder / "sample")
    return {"seed": seed, "sequences": len(losses)}
