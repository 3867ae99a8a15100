"""Stage 4: the filtered dataset, written from each arm's selection."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from assets.common import result
from assets.declaration import Declaration, Read, asset
from assets.filtered.dsir import dsir_selection
from assets.filtered.rho_down import online_selection
from assets.filtered.selection import GROUP, origin_reads, origins, queried_selection
from assets.metadata import table
from colorfilter.config.operation import Refresh
from colorfilter.config.recipe import Arm, Domain, Recipe
from colorfilter.errors import InputError
from colorfilter.selection import dataset
from colorfilter.selection.croissant import write_croissant
from colorfilter.selection.decontamination import without_leaks
from colorfilter.storage.files import require_space
from resources.artifacts import Artifact, ArtifactStore
from resources.score_store import PublishedSelection, ScoreStore

# The factory of `selection` by method. To add a method, add a line here, one in recipe.Arm and one
# in cost.METHODS. A method that selects by a query on the score tables needs a line in
# selection.SCORES; any other needs a module.
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
    """Return the assets `selection` and `filtered_dataset` of every domain and arm."""
    return [
        made
        for domain in recipe.domains
        for arm in recipe.arms
        for made in (
            SELECTIONS[arm.method](recipe, domain, arm),
            dataset_asset(recipe, domain, arm),
        )
    ]


def dataset_declaration(recipe: Recipe, domain: Domain, arm: Arm) -> Declaration:
    """Declare `<domain>/<arm>/filtered_dataset`."""
    name = f"{domain.name}/{arm.name}"
    return Declaration(
        f"{name}/filtered_dataset",
        GROUP,
        {"parquet", "numpy"},
        inputs=[Read(f"{name}/selection"), Read(f"{name}/leakage"), *origin_reads(arm)],
        consults=[Read("score_tables")],
        settings={**recipe.filtered.facts(), "leaks": arm.leaks},
        seed=recipe.seed,
        description=f"{arm.name} for {domain.name}: the data that the target model trains on "
        "(`tokens/`), and the same data as text (`documents/`). Sequences that quote held-out "
        "text are excluded, unless the arm sets `leaks: keep`.",
        arm=arm.name,
        freshness=_freshness(recipe.refresh),
    )


def dataset_asset(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    """Return the asset `<domain>/<arm>/filtered_dataset`."""

    @asset(dataset_declaration(recipe, domain, arm))
    def filtered_dataset(artifacts: ArtifactStore, score_store: ScoreStore) -> dg.MaterializeResult:
        made = make_dataset(artifacts, score_store, recipe, domain, arm)
        return result([made], {**made.facts, "sample": _sample(made.path)})

    return filtered_dataset


def _freshness(refresh: Refresh) -> dg.FreshnessPolicy | None:
    if refresh.stale_after_hours is None:
        return None
    return dg.FreshnessPolicy.time_window(timedelta(hours=refresh.stale_after_hours))


def make_dataset(
    artifacts: ArtifactStore, score_store: ScoreStore, recipe: Recipe, domain: Domain, arm: Arm
) -> Artifact:
    """Build an arm's `filtered_dataset` and publish its selection.

    Raises InputError if too few sequences remain for training.
    """
    declared = dataset_declaration(recipe, domain, arm)
    name = f"{domain.name}/{arm.name}"
    chosen = declared.current(artifacts, f"{name}/selection")
    # The artifact that took forgotten documents into account: the score tables or the selection.
    decided = "score_tables" if "score_tables" in chosen.inputs else chosen.asset
    declared.current(artifacts, decided, made_from=declared.exclusions(artifacts))
    leaking = declared.current(artifacts, f"{name}/leakage", made_from=[chosen])
    rows = pl.scan_parquet(chosen.path / "selection.parquet")
    leaks = pl.read_parquet(leaking.path / "leakage.parquet")
    leaks = leaks if arm.leaks == "remove" else leaks.clear()
    selected = rows.select(pl.len()).collect().item()
    shards = rows.select(pl.col("shard").unique().sort()).collect()["shard"].to_list()
    kept = without_leaks(rows, leaks)
    needed = recipe.endpoints(arm, 0)[-1]
    if len(kept) < needed:
        raise InputError(
            f"{name}: {selected - len(kept)} of {selected} selected sequences quote "
            f"held-out text and are excluded, but training needs {needed}; lower "
            "target.training_tokens or tau, or set `leaks: keep` for this arm"
        )
    tokens, texts, made_from = origins(artifacts, declared, chosen, shards)

    def build(folder: Path) -> dict[str, Any]:
        # Per token: two or four bytes in tokens/, and about two in documents/.
        require_space(folder, 6 * len(kept) * recipe.sequence_length, declared.name)
        counts = dataset.write_tokens(kept.drop("color"), tokens, recipe.seed, folder / "tokens")
        counts["left_out"] = selected - len(kept)
        about = f"{counts['left_out']:,} sequences that quote held-out text were excluded."
        if arm.leaks == "keep":
            about = f"{leaking.facts['sequences']:,} of its sequences quote held-out text."
        counts |= dataset.write_selected_text(
            kept,
            tokens,
            texts,
            recipe.filtered.whole_documents_from,
            folder / "documents",
            left_out=leaks["doc_id"].unique(),
        )
        title = f"{recipe.name}: {domain.name}, {arm.name}"
        sentence = f"Selected for the domain '{domain.name}' by the method '{arm.name}'. {about}"
        length = recipe.sequence_length
        dataset.write_card(folder, title, sentence, counts["texts"], counts["sequences"], length)
        write_croissant(folder, title, sentence)
        return counts

    made = artifacts.make(declared.work([chosen, leaking, *made_from]), build)
    scored_by = declared.current(artifacts, "score_tables").inputs
    _publish(score_store, domain, arm, chosen, scored_by)
    return made


def _publish(
    score_store: ScoreStore,
    domain: Domain,
    arm: Arm,
    selection: Artifact,
    scored_by: Mapping[str, str],
) -> None:
    """Publish a selection as the current one of its domain and arm.

    `scored_by` maps assets to the fingerprints of the models whose losses are in the score tables.
    """
    published = PublishedSelection(
        selection.fingerprint,
        selection.path / "selection.parquet",
        domain.name,
        arm.name,
        prior=scored_by["prior_model"],
        conditional=scored_by[f"{domain.name}/conditional_model"],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    score_store.publish_selections([published])


def _sample(folder: Path) -> dg.TableMetadataValue:
    """Return the beginnings of the texts with the lowest color in a filtered dataset."""
    files = sorted((folder / "documents").glob("*.parquet"))
    best = (
        pl.scan_parquet(files)
        .filter(pl.col("n_tokens") > 32)
        .bottom_k(5, by="color")
        .select("color", "fraction", "source", begins=pl.col("text").str.slice(0, 90))
        .collect()
    )
    return table(best.to_dicts())
