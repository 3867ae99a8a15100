"""Stage 4, its end: the dataset made of what each arm selects."""

from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.common import OWNERS, all_of, code_version, result
from assets.figures import table
from assets.selected import GROUP, queried_selection
from colorfilter import selection as method
from colorfilter.recipe import Arm, Domain, Recipe
from resources.artifacts import ArtifactStore, Work


def filtered_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """`selection` and `filtered_dataset` for every domain and arm."""
    return [
        asset
        for domain in recipe.domains
        for arm in recipe.arms
        for asset in (
            queried_selection(recipe, domain, arm),
            _filtered_dataset(recipe, domain, arm),
        )
    ]


def _filtered_dataset(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    prefix = [domain.name, arm.name]
    name = "/".join(prefix)

    @dg.asset(
        description=f"{arm.name} for {domain.name}: what the target model trains on (`tokens/`), "
        "and the same as text (`documents/`).",
        key_prefix=prefix,
        deps=[dg.AssetKey([*prefix, "selection"]), all_of("corpus_tokens"), all_of("raw_corpus")],
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

    return filtered_dataset


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
