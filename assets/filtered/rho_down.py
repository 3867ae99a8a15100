"""Stage 4 for RHO-down: select the sequences that a proxy model chooses while it is trained."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.common import Context, Progress, result
from assets.declaration import Declaration, Read, Shards, asset
from assets.filtered.selection import GROUP
from assets.metadata import curve_metadata
from assets.scores.refined_scores import gathered
from assets.scores.scores import eot_id, losses_by
from colorfilter.config.recipe import Arm, Domain, Recipe
from colorfilter.selection import select
from colorfilter.training.spec import Online, TrainSpec, planned_tokens
from resources.artifacts import Artifact, ArtifactStore
from resources.gpu import Gpu
from resources.score_store import ScoreStore

ROLES = {"rho_down": "domain_only", "rho_down_prior": "conditional"}
CONDITIONAL = "conditional.npy"  # the candidates' losses with the conditional, in the pool


def losses_read(recipe: Recipe, domain: Domain, arm: Arm) -> list[str]:
    """Return the assets with the losses that determine what an arm selects."""
    return losses_by(recipe, domain, {"prior", "conditional", ROLES[arm.method]})


def online_declaration(recipe: Recipe, domain: Domain, arm: Arm) -> Declaration:
    """Declare `<domain>/<arm>/selection` for methods that select while a proxy is trained."""
    model, training = recipe.prior.model, recipe.prior.training
    assert model is not None
    assert training is not None
    (needed,) = recipe.endpoints(arm, 0)
    return Declaration(
        f"{domain.name}/{arm.name}/selection",
        GROUP,
        {"pytorch", "duckdb"},
        # Not `score_tables`: other domains' scores do not affect this selection.
        inputs=[
            Read("tokenizer"),
            Read("corpus_tokens", Shards.ALL),
            *(Read(name, Shards.ALL) for name in losses_read(recipe, domain, arm)),
        ],
        consults=[Read("score_tables")],
        settings={
            "method": arm.method,
            "tau": arm.tau,
            "needed": needed,
            "model": model.facts(),
            "training": training.facts(),
        },
        seed=recipe.seed,
        description=f"{arm.name} for {domain.name}: sequences that a new proxy model with the "
        f"prior's architecture chooses while it is trained on them. Out of {arm.tau:g} random "
        "candidates per sequence it takes those with the lowest loss of "
        f"{ROLES[arm.method]}_model minus its own current loss. A lower score is better.",
        pool="gpu",
        arm=arm.name,
    )


def online_selection(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    """Return `<domain>/<arm>/selection` for methods that select while a proxy is trained."""
    declared = online_declaration(recipe, domain, arm)
    model, training, tau = recipe.prior.model, recipe.prior.training, arm.tau
    assert model is not None
    assert training is not None
    assert tau is not None
    losses = losses_read(recipe, domain, arm)

    @asset(declared)
    def selection(
        context: Context, artifacts: ArtifactStore, gpu: Gpu, score_store: ScoreStore
    ) -> dg.MaterializeResult:
        encoder = declared.current(artifacts, "tokenizer")
        shards = [s.name for s in artifacts.at.shards()]
        packed = {s: declared.current(artifacts, "corpus_tokens", s) for s in shards}
        scored = [declared.current(artifacts, name, s) for name in losses for s in shards]
        made_from = [*packed.values(), *scored]
        tables = declared.current(artifacts, "score_tables", made_from=made_from)
        eot = eot_id(artifacts, recipe.scoring)

        def build(folder: Path) -> dict[str, Any]:
            pool = folder / "pool"
            wanted = draw_pool(pool, score_store, recipe, domain, arm, packed)
            spec = TrainSpec(
                start=model,
                tokens=pool / "tokens",
                tokenizer=encoder.path,
                training=training,
                seed=recipe.seed,
                endpoints=(wanted,),
                out=folder / "proxy",
                online=Online(pool / CONDITIONAL, tau, eot),
            )
            progress = Progress(context, planned_tokens(spec), "tokens")
            for _ in gpu.train([spec], 1, progress, progress.stands):
                pass
            facts = write_chosen(folder, pool / "tokens")
            gpu.discard_copies(pool)
            shutil.rmtree(pool)
            return facts

        inputs = [encoder, *made_from, *declared.exclusions(artifacts)]
        made = artifacts.make(declared.work(inputs, sources=[tables]), build)
        return result([made], {**made.facts, **curve_metadata(made.path / "proxy")})

    return selection


def draw_pool(
    pool: Path,
    score_store: ScoreStore,
    recipe: Recipe,
    domain: Domain,
    arm: Arm,
    packed: Mapping[str, Artifact],
) -> int:
    """Draw an arm's candidates into `pool/tokens`; return how many of them to select.

    The candidates' losses with the conditional are written to `pool/conditional.npy`. Raises
    InputError if the corpus has too few candidates.
    """
    import numpy as np

    assert arm.tau is not None
    (needed,) = recipe.endpoints(arm, 0)
    with score_store.read() as connection:
        candidates = select.count_candidates(connection)
        wanted = min(select.n_to_keep(candidates, arm.tau, needed), recipe.with_spare(arm))
        size = int(arm.tau * wanted)
        drawn = select.select(connection, "full", domain.name, size, recipe.seed)
        losses = select.losses_of(connection, drawn, ROLES[arm.method], domain.name)
    tokens = gathered(drawn, {s: a.path for s, a in packed.items()}, pool)
    rows = pl.read_parquet(tokens / "sequences.parquet", columns=["shard", "position"])
    in_order = rows.join(losses, on=["shard", "position"], how="left", maintain_order="left")
    np.save(pool / CONDITIONAL, in_order["loss"].to_numpy())
    return wanted


def write_chosen(folder: Path, candidates: Path) -> dict[str, Any]:
    """Write the selection that the proxy in `folder` made; return facts for the manifest."""
    from colorfilter.training.rho_down import chosen_rows

    sequences = pl.read_parquet(candidates / "sequences.parquet")
    rows = chosen_rows(folder / "proxy")
    chosen = sequences[rows["row"]].select(
        "shard",
        "position",
        "color",
        rank=pl.int_range(1, pl.len() + 1),
        score=rows["score"],
    )
    select.write_selection(chosen, folder)
    return {
        "candidates": len(sequences),
        "selected": len(chosen),
        "cutoff": chosen["score"].max(),
        "mean_color": chosen["color"].mean(),
    }
