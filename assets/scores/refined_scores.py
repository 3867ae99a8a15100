"""Stage 3: score sequences near a cutoff again in float32."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.auxiliary.models import checkpoint
from assets.common import AnyContext, Context, Progress, result
from assets.declaration import Declaration, Read, Shards, asset
from assets.scores.scores import GROUP, REFINED, end_of_text_read, eot_id
from colorfilter.config.recipe import Arm, Domain, Recipe
from colorfilter.progress import Progress as Counting
from colorfilter.progress import silent
from colorfilter.selection.select import count_candidates
from resources.artifacts import Artifact, ArtifactStore
from resources.gpu import Gpu, ScoreJob
from resources.score_store import ScoreStore

if TYPE_CHECKING:
    import duckdb
    import polars as pl

# Subfolders of an attempt for intermediate scores.
SAMPLE, NEAR = "sample", "near"


def refined_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """Return `<domain>/refined_scores` of every domain, if the recipe's scores are refined."""
    return [refined_asset(recipe, d) for d in recipe.domains] if is_refined(recipe) else []


def is_refined(recipe: Recipe) -> bool:
    """Whether the precision of scoring is below float32 and an arm selects with a cutoff."""
    return recipe.scoring.precision != "float32" and bool(recipe.arms_with_cutoffs())


def near(
    connection: "duckdb.DuckDBPyConnection", recipe: Recipe, domain: str, arm: Arm, radius: float
) -> "pl.DataFrame":
    """Return the candidates within `radius` of an arm's cutoff, or of its batches' cutoffs."""
    from colorfilter.selection import refinement

    assert arm.tau is not None
    if arm.batch:
        of_batches = arm.tau, arm.batch, recipe.seed
        return refinement.near_cutoffs_of_batches(
            connection, arm.method, domain, *of_batches, radius
        )
    keep = int(count_candidates(connection) / arm.tau)
    return refinement.near_cutoff(connection, arm.method, domain, keep, radius)


def refined_declaration(recipe: Recipe, domain: Domain) -> Declaration:
    """Declare `<domain>/refined_scores`."""
    return Declaration(
        f"{domain.name}/refined_scores",
        GROUP,
        {"pytorch", "parquet"},
        inputs=[
            Read("score_tables"),
            Read("prior_model"),
            Read(f"{domain.name}/conditional_model"),
        ],
        consults=[Read("corpus_tokens", Shards.ALL), *end_of_text_read(recipe.scoring)],
        settings={
            "scoring": recipe.scoring.facts(),
            "arms": [arm.choice() for arm in recipe.arms_with_cutoffs()],
        },
        seed=recipe.seed,
        precision="float32",
        description="Losses in float32 of the sequences so near an arm's cutoff that the error of "
        "the scores could affect their selection, and that error. Selections use these losses "
        "instead of the original ones. Loads models. A selection works without this asset, and "
        "reports how many sequences near its cutoff are not refined.",
        pool="gpu",
    )


def refined_asset(recipe: Recipe, domain: Domain) -> dg.AssetsDefinition:
    """Return the asset `<domain>/refined_scores`."""

    @asset(refined_declaration(recipe, domain))
    def refined_scores(
        context: Context, artifacts: ArtifactStore, gpu: Gpu, score_store: ScoreStore
    ) -> dg.MaterializeResult:
        made = refine(context, artifacts, gpu, score_store, recipe, domain)
        return result([made], made.facts)

    return refined_scores


def refine(
    context: AnyContext,
    artifacts: ArtifactStore,
    gpu: Gpu,
    score_store: ScoreStore,
    recipe: Recipe,
    domain: Domain,
) -> Artifact:
    """Build a domain's `refined_scores` for all arms of the recipe."""
    declared = refined_declaration(recipe, domain)
    models = [
        declared.current(artifacts, "prior_model"),
        declared.current(artifacts, f"{domain.name}/conditional_model"),
    ]
    corpus = [s.name for s in artifacts.at.shards()]
    packed = {s: declared.current(artifacts, "corpus_tokens", s) for s in corpus}
    tables = declared.current(artifacts, "score_tables", made_from=[*models, *packed.values()])

    def scored(places: "pl.DataFrame", folder: Path, precision: str) -> "pl.DataFrame":
        size = len(models) * len(places) * recipe.sequence_length
        progress = Progress(context, size, "tokens")
        return score_places(artifacts, gpu, recipe, models, places, folder, precision, progress)

    def build(folder: Path) -> dict[str, Any]:
        facts = score_near_cutoffs(folder, score_store, recipe, domain, models, packed, scored)
        for part in (SAMPLE, NEAR):
            gpu.discard_copies(folder / part)
            shutil.rmtree(folder / part, ignore_errors=True)
        return facts

    return artifacts.make(declared.work([tables, *models]), build)


def score_near_cutoffs(
    folder: Path,
    score_store: ScoreStore,
    recipe: Recipe,
    domain: Domain,
    models: Sequence[Artifact],
    packed: Mapping[str, Artifact],
    scored: Callable[["pl.DataFrame", Path, str], "pl.DataFrame"],
) -> dict[str, Any]:
    """Write float32 losses of a sample and of everything near a cutoff.

    Returns facts for the manifest. `scored(rows, folder, precision)` returns the losses of the
    sequences in `rows` (shard, position). The error of the scores, measured on the sample,
    determines the radius around a cutoff.
    """
    import polars as pl

    from colorfilter.selection import refinement

    sizes = {s: int(a.facts["sequences"]) for s, a in packed.items()}
    sample = refinement.draw_sample(sizes, recipe.seed)
    coarse = scored(sample, folder / SAMPLE, recipe.scoring.precision)
    exact = scored(sample, folder / SAMPLE, "float32")
    facts = refinement.score_error(coarse, exact, *(m.fingerprint for m in models))
    wide = (refinement.RADIUS + refinement.MARGIN) * facts["score_error"]
    with score_store.read() as connection:
        found = [
            near(connection, recipe, domain.name, arm, wide) for arm in recipe.arms_with_cutoffs()
        ]
    places = pl.concat([f.select("shard", "position") for f in found]).unique()
    places = places.join(sample, on=["shard", "position"], how="anti")
    losses = [exact]
    if len(places):
        losses.append(scored(places, folder / NEAR, "float32"))
    table = pl.concat(losses).sort("model", "shard", "position")
    table.write_parquet(folder / REFINED, compression="zstd")
    radius = refinement.RADIUS * facts["score_error"]
    return {**facts, "radius": radius, "near": len(places), "refined": len(table) // 2}


def score_places(
    artifacts: ArtifactStore,
    gpu: Gpu,
    recipe: Recipe,
    models: Sequence[Artifact],
    places: "pl.DataFrame",
    folder: Path,
    precision: str,
    progress: Counting = silent,
) -> "pl.DataFrame":
    """Score the sequences in `places` (shard, position) with models.

    Returns losses like `refinement.losses_of`. `folder` keeps the scored chunks, so that another
    attempt resumes.
    """
    from colorfilter.selection import refinement

    shards = places["shard"].unique()
    packed = {s: artifacts.current("corpus_tokens", s).path for s in shards}
    tokens = gathered(places, packed, folder)
    job = ScoreJob(
        models={m.fingerprint: checkpoint(m) for m in models},
        outs={m.fingerprint: folder / precision / m.fingerprint[:16] for m in models},
        parameters=max(m.facts["parameters"] for m in models),
        tokens=tokens,
        shard=folder.name,
        precision=precision,
        eot_id=eot_id(artifacts, recipe.scoring),
    )
    for _ in gpu.score([job], progress, progress):
        pass
    return refinement.losses_of(folder / precision, tokens)


def gathered(places: "pl.DataFrame", tokens: Mapping[str, Path], folder: Path) -> Path:
    """Copy the sequences in `places` (shard, position) into one folder of tokens; return its path.

    `tokens` maps shards to packed tokens. A complete folder is reused.
    """
    from colorfilter.selection.dataset import write_tokens

    complete, begun = folder / "tokens", folder / "tokens.begun"
    if not complete.exists():
        shutil.rmtree(begun, ignore_errors=True)
        write_tokens(places.sort("shard", "position"), tokens, 0, begun)
        begun.rename(complete)
    return complete
