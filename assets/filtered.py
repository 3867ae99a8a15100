"""Stage 4, its end: the dataset made of what each arm selects."""

from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.common import OWNERS, all_of, code_version, result
from assets.dsir import dsir_selection
from assets.figures import table
from assets.online import online_selection
from assets.selected import GROUP, PACKED, queried_selection
from colorfilter import selection as method
from colorfilter.recipe import Arm, Domain, Recipe
from resources.artifacts import Artifact, ArtifactStore, Work

# How an arm's `selection` is made. A further method is a line here and one in recipe.Arm; if a
# query on the score tables decides it, one in selection.SCORES instead of a module of its own.
SELECTIONS = {
    "color": queried_selection,
    "conditional_only": queried_selection,
    "random": queried_selection,
    "full": queried_selection,
    "rho_down": online_selection,
    "rho_down_prior": online_selection,
    "dsir": dsir_selection,
}


def filtered_assets(recipe: Recipe) -> list[dg.AssetsDefinition]:
    """`selection` and `filtered_dataset` for every domain and arm."""
    return [
        asset
        for domain in recipe.domains
        for arm in recipe.arms
        for asset in (
            SELECTIONS[arm.method](recipe, domain, arm),
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
        tokens, texts, made_from = _origins(artifacts, chosen, shards)

        def build(folder: Path) -> dict[str, Any]:
            counts = method.write_tokens(rows, tokens, recipe.seed, folder / "tokens")
            counts |= method.write_selected_text(
                rows, tokens, texts, recipe.filtered.whole_documents_from, folder / "documents"
            )
            method.write_card(
                folder,
                f"{recipe.name}: {domain.name}, {arm.name}",
                f"Selected for the domain '{domain.name}' by the method '{arm.name}'.",
                counts["sequences"],
                recipe.sequence_length,
            )
            return counts

        made = artifacts.make(
            Work(
                f"{name}/filtered_dataset",
                inputs=[chosen, *made_from],
                recipe=recipe.filtered.facts(),
                seed=recipe.seed,
            ),
            build,
        )
        return result([made], {**made.facts, "sample": _sample(made.path)})

    return filtered_dataset


def _origins(
    artifacts: ArtifactStore, chosen: Artifact, shards: list[str]
) -> tuple[dict[str, Path], dict[str, Path], list[Artifact]]:
    """Packed tokens and documents.parquet of each shard, and the artefacts that they lie in.

    A selection may bring sequences of its own, which stand beside it.
    """
    own = chosen.path / PACKED
    if own.exists():
        return dict.fromkeys(shards, own), dict.fromkeys(shards, own / "documents.parquet"), []
    packed = {s: artifacts.current("corpus_tokens", s) for s in shards}
    raw = {s: artifacts.current("raw_corpus", s) for s in shards}
    return (
        {s: a.path for s, a in packed.items()},
        {s: a.path / "documents.parquet" for s, a in raw.items()},
        [*packed.values(), *raw.values()],
    )


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
