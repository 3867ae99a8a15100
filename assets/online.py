"""Stage 4 for RHO-down: what a proxy chooses for itself while it learns is the selection."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.common import OWNERS, Context, Progress, all_of, code_version, result
from assets.figures import curve_metadata
from assets.refined import gathered
from assets.scores import boundary, scored_corpus
from assets.selected import GROUP
from assets.tombstones import forgotten
from colorfilter import selection as method
from colorfilter.recipe import Arm, Domain, Recipe
from colorfilter.train_spec import Online, TrainSpec, planned_tokens
from resources.artifacts import ArtifactStore, Work
from resources.gpu import Gpu
from resources.score_store import ScoreStore

ROLES = {"rho_down": "domain_only", "rho_down_prior": "conditional"}


def online_selection(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    """`<domain>/<arm>/selection` for the methods that choose while a proxy learns."""
    name = f"{domain.name}/{arm.name}"
    role = ROLES[arm.method]

    @dg.asset(
        description=f"{arm.name} for {domain.name}: a fresh proxy of the prior's kind learns from "
        f"what it chooses, of {arm.tau:g} random candidates for each sequence those with the "
        f"lowest loss by {role}_model minus its own; lower is better.",
        key_prefix=[domain.name, arm.name],
        deps=["score_tables", "tokenizer", all_of("corpus_tokens")],
        group_name=GROUP,
        kinds={"pytorch", "duckdb"},
        tags={"arm": arm.name},
        owners=OWNERS,
        pool="gpu",
        code_version=code_version(
            1, arm.name, recipe.prior, recipe.target.training_tokens, recipe.seed
        ),
    )
    def selection(
        context: Context, artifacts: ArtifactStore, gpu: Gpu, score_store: ScoreStore
    ) -> dg.MaterializeResult:
        encoder = artifacts.current("tokenizer")
        packed, losses = scored_corpus(artifacts, recipe, domain, {"prior", "conditional", role})
        tables = artifacts.current_from("score_tables", None, [*packed.values(), *losses])
        model, training = recipe.prior.model, recipe.prior.training
        assert model is not None
        assert training is not None
        assert arm.tau is not None
        tau = arm.tau
        (needed,) = recipe.endpoints(arm, 0)

        def build(folder: Path) -> dict[str, Any]:
            import numpy as np

            from colorfilter.online import chosen_rows

            with score_store.read() as connection:
                candidates = method.count_candidates(connection)
                wanted = min(method.n_to_keep(candidates, tau, needed), recipe.with_spare(arm))
                drawn = method.select(
                    connection, "full", domain.name, int(tau * wanted), recipe.seed
                )
                by_conditional = method.losses_of(connection, drawn, role, domain.name)
            pool = gathered(drawn, {s: a.path for s, a in packed.items()}, folder / "pool")
            places = pl.read_parquet(pool / "sequences.parquet").join(
                by_conditional, on=["shard", "position"], how="left", maintain_order="left"
            )
            conditional = folder / "pool" / "conditional.npy"
            np.save(conditional, places["loss"].to_numpy())
            spec = TrainSpec(
                start=model,
                tokens=pool,
                tokenizer=encoder.path,
                training=training,
                seed=recipe.seed,
                endpoints=(wanted,),
                out=folder / "proxy",
                online=Online(conditional, tau, boundary(artifacts, recipe.scoring)),
            )
            progress = Progress(context, planned_tokens(spec), "tokens")
            for _ in gpu.train([spec], 1, progress, progress.stands):
                pass
            rows = chosen_rows(folder / "proxy")
            chosen = places[rows["row"]].select(
                "shard",
                "position",
                "color",
                rank=pl.int_range(1, pl.len() + 1),
                score=rows["score"],
            )
            method.write_selection(chosen, folder)
            gpu.withdraw(folder / "pool")
            shutil.rmtree(folder / "pool")
            return {
                "candidates": len(drawn),
                "selected": len(chosen),
                "cutoff": chosen["score"].max(),
                "mean_color": chosen["color"].mean(),
            }

        made = artifacts.make(
            Work(
                f"{name}/selection",
                # Not the whole tables: another domain's scores decide nothing here.
                inputs=[encoder, *packed.values(), *losses, *forgotten(artifacts)],
                sources=[tables],
                recipe={
                    "method": arm.method,
                    "tau": tau,
                    "needed": needed,
                    "model": model.facts(),
                    "training": training.facts(),
                },
                seed=recipe.seed,
            ),
            build,
        )
        return result([made], {**made.facts, **curve_metadata(made.path / "proxy")})

    return selection
