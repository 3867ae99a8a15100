"""Stage 3, beside its end: how sure the cutoffs are."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.auxiliary import checkpoint, domain_epoch
from assets.common import OWNERS, Context, Progress, all_of, code_version, result
from assets.figures import table
from assets.refined import arms_with_a_cutoff, gathered
from assets.scores import GROUP, boundary
from colorfilter.recipe import Arm, Domain, Recipe
from resources.artifacts import ArtifactStore, Work
from resources.gpu import Gpu, ScoreJob
from resources.score_store import ScoreStore

LOSSES_FILE = "losses.parquet"


def confidence_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """`<domain>/cutoff_confidence`, where arms select by the conditional's losses."""
    arms = arms_with_confidence(recipe)
    return [_cutoff_confidence(recipe, domain) for domain in recipe.domains if arms]


def arms_with_confidence(recipe: Recipe) -> list[Arm]:
    """Those with one cutoff over the whole corpus."""
    return [arm for arm in arms_with_a_cutoff(recipe) if not arm.batch]


def flips(
    artifacts: ArtifactStore, score_store: ScoreStore, recipe: Recipe, domain: Domain
) -> list[dict[str, Any]]:
    """What another seed of the conditional would change, a row per arm with a cutoff."""
    from colorfilter import confidence

    made = artifacts.current(f"{domain.name}/cutoff_confidence")
    losses = pl.read_parquet(made.path / LOSSES_FILE)
    with score_store.read() as connection:
        return [
            confidence.flips(connection, arm, domain.name, losses)
            for arm in arms_with_confidence(recipe)
        ]


def _cutoff_confidence(recipe: Recipe, domain: Domain) -> dg.AssetsDefinition:
    seed = recipe.seed + 1

    @dg.asset(
        description="Losses of a sample of the corpus by a conditional trained with another seed: "
        "how much of each selection that would change. Another tau needs no new losses.",
        key_prefix=domain.name,
        deps=[
            "score_tables",
            "prior_model",
            "tokenizer",
            dg.AssetKey([domain.name, "domain_tokens"]),
            all_of("corpus_tokens"),
        ],
        group_name=GROUP,
        kinds={"pytorch", "duckdb"},
        owners=OWNERS,
        pool="gpu",
        code_version=code_version(2, domain.training, recipe.scoring, seed),
    )
    def cutoff_confidence(
        context: Context, artifacts: ArtifactStore, gpu: Gpu, score_store: ScoreStore
    ) -> dg.MaterializeResult:
        prior, encoder = artifacts.current("prior_model"), artifacts.current("tokenizer")
        packed = artifacts.current(f"{domain.name}/domain_tokens")
        corpus = {s.name: artifacts.current("corpus_tokens", s.name) for s in artifacts.at.shards()}

        def build(folder: Path) -> dict[str, Any]:
            from colorfilter import refinement
            from colorfilter.training import planned_tokens

            second = folder / "conditional"
            start = checkpoint(prior)
            spec = domain_epoch(start, domain.training, encoder, packed, seed, second)
            sizes = {s: int(a.facts["sequences"]) for s, a in corpus.items()}
            sample = refinement.draw_sample(sizes, seed)
            tokens = len(sample) * recipe.sequence_length
            progress = Progress(context, planned_tokens(spec) + tokens, "tokens")
            ((_, (*_, trained)),) = gpu.train([spec], progress=progress)
            rows = gathered(sample, {s: a.path for s, a in corpus.items()}, folder / "sample")
            job = ScoreJob(
                models={str(trained.path): trained.path},
                outs={str(trained.path): folder / "sample" / "losses"},
                parameters=prior.facts["parameters"],
                tokens=rows,
                shard="sample",
                precision=recipe.scoring.precision,
                boundary=boundary(artifacts, recipe.scoring),
            )
            for _ in gpu.score([job], progress):
                pass
            losses = refinement.losses_of(folder / "sample" / "losses", rows).drop("model")
            losses.write_parquet(folder / LOSSES_FILE, compression="zstd")
            shutil.rmtree(folder / "sample")
            return {"seed": seed, "sequences": len(losses)}

        made = artifacts.make(
            Work(
                f"{domain.name}/cutoff_confidence",
                inputs=[prior, encoder, packed, *corpus.values()],
                recipe={"training": domain.training.facts(), "scoring": recipe.scoring.facts()},
                code=2,
                seed=seed,
            ),
            build,
        )
        rows = flips(artifacts, score_store, recipe, domain)
        return result([made], {**made.facts, "another seed would change": table(rows)})

    return cutoff_confidence
