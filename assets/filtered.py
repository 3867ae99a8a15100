"""Stage 4: what each arm selects, and the dataset made of it."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import polars as pl

from assets.common import OWNERS, all_of, code_version, result
from assets.figures import table
from assets.refined import near
from assets.scores import refined_of
from colorfilter import selection as method
from colorfilter.examples import excerpts, extremes
from colorfilter.recipe import Arm, Domain, Recipe
from resources.artifacts import Artifact, ArtifactStore, Work
from resources.score_store import ScoreStore

GROUP = "filtered"


def endpoints(recipe: Recipe, arm: Arm) -> tuple[int, ...]:
    """End points of an arm's target models, in sequences: random's are several."""
    multiples = recipe.evaluation.random_multiples if arm.method == "random" else [1.0]
    sequences = recipe.target.training_tokens / recipe.sequence_length
    return tuple(max(1, math.floor(m * sequences)) for m in multiples)


def filtered_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """`selection` and `filtered_dataset` for every domain and arm."""
    return [
        asset
        for domain in recipe.domains
        for arm in recipe.arms
        for asset in _arm_assets(recipe, domain, arm)
    ]


def _arm_assets(recipe: Recipe, domain: Domain, arm: Arm) -> list[dg.AssetsDefinition]:
    prefix = [domain.name, arm.name]
    name = "/".join(prefix)

    scored: list[str | dg.AssetKey] = ["score_tables"]
    if arm.tau and recipe.scoring.precision != "float32":
        scored.append(dg.AssetKey([domain.name, "refined_scores"]))
    what = f"{arm.name} for {domain.name}:"

    @dg.asset(
        description=f"{what} the selected sequences with rank and score; lower is better. "
        "No model is loaded.",
        key_prefix=prefix,
        deps=[*scored, all_of("raw_corpus")],
        group_name=GROUP,
        kinds={"duckdb", arm.name},
        owners=OWNERS,
        pool="scores",
        code_version=code_version(1, arm, recipe.target.training_tokens, recipe.seed),
    )
    def selection(artifacts: ArtifactStore, score_store: ScoreStore) -> dg.MaterializeResult:
        tables = artifacts.current("score_tables")
        refined = refined_of(artifacts, domain.name, tables.fingerprint) if arm.tau else []
        needed = endpoints(recipe, arm)[-1]

        def build(folder: Path) -> dict[str, Any]:
            with score_store.read() as connection:
                candidates = method.count_candidates(connection)
                fits = method.n_to_keep(candidates, arm.tau or 1, needed)
                keep = needed if arm.method == "random" else fits
                scores = connection, arm.method, domain.name
                if arm.tau and arm.batch:
                    chosen = method.select_by_batch(*scores, arm.tau, arm.batch, recipe.seed)
                    method.n_to_keep(len(chosen), 1, needed)
                else:
                    chosen = method.select(*scores, keep, recipe.seed)
                if arm.tau:
                    found = extremes(connection, domain.name, recipe.sequence_length, 1 / arm.tau)
                    texts = {
                        shard: artifacts.current("raw_corpus", shard).path / "documents.parquet"
                        for shard in found["shard"].unique()
                    }
                    excerpts(found, texts).write_parquet(folder / "samples.parquet")
                unsure = _unsure(connection, recipe, domain.name, arm, refined)
            chosen.write_parquet(folder / "selection.parquet", compression="zstd")
            return {
                "candidates": candidates,
                "selected": len(chosen),
                "cutoff": chosen["score"][-1],
                "mean_color": chosen["color"].mean(),
                **unsure,
            }

        made = artifacts.make(
            Work(
                f"{name}/selection",
                inputs=[tables, *refined],
                recipe={
                    **arm.facts(),
                    "needed": needed,
                    "sequence_length": recipe.sequence_length,
                },
                seed=recipe.seed if arm.method == "random" or arm.batch else None,
            ),
            build,
        )
        models = (
            artifacts.current("prior_model").fingerprint,
            artifacts.current(f"{domain.name}/conditional_model").fingerprint,
        )
        score_store.publish_selection(
            made.fingerprint,
            made.path / "selection.parquet",
            domain.name,
            arm.name,
            models,
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return result([made], {**made.facts, **_documents(made.path)})

    @dg.asset(
        description=f"{what} what the target model trains on (`tokens/`), and the same as text "
        "(`documents/`).",
        key_prefix=prefix,
        deps=[selection, all_of("corpus_tokens"), all_of("raw_corpus")],
        group_name=GROUP,
        kinds={"parquet", "numpy", arm.name},
        owners=OWNERS,
        code_version=code_version(1, recipe.filtered, recipe.seed),
    )
    def filtered_dataset(artifacts: ArtifactStore) -> dg.MaterializeResult:
        chosen = artifacts.current(f"{name}/selection")
        rows = pl.read_parquet(chosen.path / "selection.parquet")
        shards = sorted(rows["shard"].unique())
        packed = {s: artifacts.current("corpus_tokens", s) for s in shards}
        raw = {s: artifacts.current("raw_corpus", s) for s in shards}

        def build(folder: Path) -> dict[str, Any]:
            tokens = {s: a.path for s, a in packed.items()}
            texts = {s: a.path / "documents.parquet" for s, a in raw.items()}
            counts = method.write_tokens(rows, tokens, recipe.seed, folder / "tokens")
            counts |= method.write_selected_text(
                rows, tokens, texts, recipe.filtered.whole_documents_from, folder / "documents"
            )
            method.write_card(
                folder,
                f"{recipe.name}: {domain.name}, {arm.name}",
                f"Selected for the domain '{domain.name}' by the method '{arm.name}' from "
                f"{chosen.facts['candidates']:,} sequences.",
                counts["sequences"],
                recipe.sequence_length,
            )
            return counts

        made = artifacts.make(
            Work(
                f"{name}/filtered_dataset",
                inputs=[chosen, *packed.values(), *raw.values()],
                recipe=recipe.filtered.facts(),
                seed=recipe.seed,
            ),
            build,
        )
        return result([made], {**made.facts, "sample": _sample(made.path)})

    return [selection, filtered_dataset]


def _unsure(
    connection: duckdb.DuckDBPyConnection,
    recipe: Recipe,
    domain: str,
    arm: Arm,
    refined: Sequence[Artifact],
) -> dict[str, Any]:
    """How many sequences lie so near the cutoff that the scores' error could decide."""
    if not refined:
        return {}
    found = near(connection, recipe, domain, arm, refined[0].facts["radius"])
    return {
        "score_error": refined[0].facts["score_error"],
        "near_cutoff": len(found),
        "near_cutoff_not_refined": len(found) - int(found["exact"].sum()),
    }


def _documents(folder: Path) -> dict[str, dg.TableMetadataValue]:
    """The best, cutoff, median and worst documents of a selection, where it has them."""
    path = folder / "samples.parquet"
    if not path.exists():
        return {}
    shown = pl.read_parquet(path).select(
        "place",
        "color",
        file=pl.col("source_file").str.split("/").list.last(),
        begins=pl.col("excerpt").str.slice(0, 70),
    )
    return {"documents": table(shown.to_dicts())}


def _sample(folder: Path) -> dg.TableMetadataValue:
    """The texts of lowest color of a filtered dataset, cut short."""
    files = sorted((folder / "documents").glob("*.parquet"))
    best = (
        pl.scan_parquet(files)
        .filter(pl.col("n_tokens") > 32)
        .bottom_k(5, by="color")
        .select("color", "fraction", "source", begins=pl.col("text").str.slice(0, 90))
        .collect()
    )
    return table(best.to_dicts())
