"""Stage 3, beside its end: how sure the cutoffs are."""

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.auxiliary import checkpoint, domain_epoch, trained
from assets.common import OWNERS, Context, Progress, all_of, code_version, result
from assets.figures import table
from assets.refined import gathered
from assets.scores import GROUP, boundary
from colorfilter.recipe import Domain, Recipe
from resources.artifacts import ArtifactStore, Work
from resources.gpu import Gpu, ScoreJob
from resources.score_store import ScoreStore

LOSSES_FILE = "losses.parquet"


def confidence_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """`<domain>/cutoff_confidence`, where arms select by the conditional's losses."""
    if not recipe.arms_with_one_cutoff():
        return []
    return [_cutoff_confidence(recipe, domain) for domain in recipe.domains]


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
            for arm in recipe.arms_with_one_cutoff()
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
        name = f"{domain.name}/cutoff_confidence"

        def train(folder: Path) -> dict[str, Any]:
            start = checkpoint(prior)
            spec = domain_epoch(start, domain.training, encoder, packed, seed, folder)
            return trained(context, gpu, spec)

        def score(folder: Path) -> dict[str, Any]:
            from colorfilter import refinement

            sizes = {s: int(a.facts["sequences"]) for s, a in corpus.items()}
            sample = refinement.draw_sample(sizes, seed)
            progress = Progress(context, len(sample) * recipe.sequence_length, "tokens")
            rows = gathered(sample, {s: a.path for s, a in corpus.items()}, folder / "sample")
            job = ScoreJob(
                models={second.fingerprint: checkpoint(second)},
                outs={second.fingerprint: folder / "sample" / "losses"},
                parameters=second.facts["parameters"],
                tokens=rows,
                shard="sample",
                precision=recipe.scoring.precision,
                boundary=boundary(artifacts, recipe.scoring),
            )
            for _ in gpu.score([job], progress, progress.stands):
                pass
            losses = refinement.losses_of(folder / "sample" / "losses", rows)
            losses.write_parquet(folder / LOSSES_FILE, compression="zstd")
            gpu.withdraw(folder / "sample")
            shutil.rmtree(folder / "sample")
            return {"seed": seed, "sequences": len(losses)}

        # By itself, for a sample is drawn anew when shards arrive, and the model stays.
        second = artifacts.make(
            Work(
                name,
                "conditional",
                inputs=[prior, encoder, packed],
                recipe=domain.training.facts(),
                seed=seed,
            ),
            train,
        )
        made = artifacts.make(
            Work(
                name,
                inputs=[second, *corpus.values()],
                recipe=recipe.scoring.facts(),
                code=2,
                seed=seed,
            ),
            score,
        )
        rows = flips(artifacts, score_store, recipe, domain)
        return result([second, made], {**made.facts, "another seed would change": table(rows)})

    return cutoff_confidence
