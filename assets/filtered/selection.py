"""Stage 4: selections computed by a query on the score tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import polars as pl

from assets.common import result
from assets.declaration import Declaration, Read, Shards, asset
from assets.metadata import table
from assets.scores.refined_scores import is_refined, near
from assets.scores.scores import overlays, refined_of
from colorfilter.config.recipe import SCORED, Arm, Domain, Recipe
from colorfilter.errors import InputError
from colorfilter.evaluation.examples import excerpts, extremes
from colorfilter.evaluation.metrics import probe
from colorfilter.selection import select
from colorfilter.stages import ShardKind
from resources.artifacts import Artifact, ArtifactStore
from resources.score_store import ScoreStore

GROUP = "filtered"
PACKED = "packed"  # subfolder of a selection, with the sequences that DSIR packed itself


def selection_declaration(recipe: Recipe, domain: Domain, arm: Arm) -> Declaration:
    """Declare `<domain>/<arm>/selection` for methods that query the score tables."""
    scored = arm.method in SCORED
    refined = [Read(f"{domain.name}/refined_scores")] if is_refined(recipe) and scored else []
    return Declaration(
        f"{domain.name}/{arm.name}/selection",
        GROUP,
        {"duckdb"},
        inputs=[Read("score_tables"), *refined],
        consults=[Read("raw_corpus", Shards.ALL)] if arm.method == "color" else [],
        settings={
            **arm.choice(),
            "needed": recipe.endpoints(arm, 0)[-1],
            "sequence_length": recipe.sequence_length,
        },
        code=3,
        seed=recipe.seed if not scored or arm.batch else None,
        description=f"{arm.name} for {domain.name}: the selected sequences with rank and score "
        "(lower is better). For methods that rank by losses, also how the probe ranks against the "
        "corpus: text of the domain, which is never selected. No model is loaded.",
        pool="scores",
        arm=arm.name,
    )


def queried_selection(recipe: Recipe, domain: Domain, arm: Arm) -> dg.AssetsDefinition:
    """Return the asset `<domain>/<arm>/selection` for methods that query the score tables."""

    @asset(selection_declaration(recipe, domain, arm))
    def selection(artifacts: ArtifactStore, score_store: ScoreStore) -> dg.MaterializeResult:
        made = select_by_query(artifacts, score_store, recipe, domain, arm)
        return result([made], {**made.facts, **_documents(made.path)})

    return selection


def select_by_query(
    artifacts: ArtifactStore, score_store: ScoreStore, recipe: Recipe, domain: Domain, arm: Arm
) -> Artifact:
    """Build an arm's `selection` by a query on the score tables."""
    declared = selection_declaration(recipe, domain, arm)
    tables = declared.current(artifacts, "score_tables")
    refined = []
    if arm.method in SCORED:
        refined = refined_of(artifacts, domain.name, tables.fingerprint)

    def build(folder: Path) -> dict[str, Any]:
        with score_store.read(overlays(refined)) as connection:
            candidates = select.count_candidates(connection)
            chosen = choose(connection, recipe, domain, arm)
            if arm.method == "color":
                assert arm.tau is not None
                found = extremes(connection, domain.name, recipe.sequence_length, 1 / arm.tau)
                texts = {
                    shard: declared.current(artifacts, "raw_corpus", shard).path
                    / "documents.parquet"
                    for shard in found["shard"].unique()
                }
                excerpts(found, texts).write_parquet(folder / "samples.parquet")
            unsure = near_cutoff(connection, recipe, domain.name, arm, refined)
            probed = _probed(connection, domain.name, arm, chosen["score"][-1])
        select.write_selection(chosen, folder)
        return {
            "candidates": candidates,
            "selected": len(chosen),
            "cutoff": chosen["score"][-1],
            "mean_color": chosen["color"].mean(),
            **unsure,
            **probed,
        }

    return artifacts.make(declared.work([tables, *refined]), build)


def choose(
    connection: duckdb.DuckDBPyConnection, recipe: Recipe, domain: Domain, arm: Arm
) -> pl.DataFrame:
    """Return what an arm selects, with the columns of `select.select`.

    Raises InputError if fewer sequences can be selected than training needs.
    """
    needed = recipe.endpoints(arm, 0)[-1]
    fits = select.n_to_keep(select.count_candidates(connection), arm.tau or 1, needed)
    keep = min(fits, recipe.with_spare(arm)) if arm.method == "random" else fits
    scores = connection, arm.method, domain.name
    if not (arm.tau and arm.batch):
        return select.select(*scores, keep, recipe.seed)
    chosen = select.select_by_batch(*scores, arm.tau, arm.batch, recipe.seed)
    select.n_to_keep(len(chosen), 1, needed)  # raises if these are too few
    return chosen


def origin_reads(arm: Arm) -> list[Read]:
    """Return the assets that contain the sequences of an arm's selection.

    There are none for DSIR, whose selections contain their own sequences.
    """
    if arm.method == "dsir":
        return []
    return [Read("corpus_tokens", Shards.ALL), Read("raw_corpus", Shards.ALL)]


def origins(
    artifacts: ArtifactStore, declared: Declaration, chosen: Artifact, shards: list[str]
) -> tuple[dict[str, Path], dict[str, Path], list[Artifact]]:
    """Return where a selection's sequences are, and the artifacts that contain them.

    By shard, the folder of packed tokens and the path of documents.parquet. A selection by DSIR
    contains its own sequences, so it has no artifacts. `declared` declares the asset that reads
    them. Raises InputError if the score tables or the packed tokens have changed since.
    """
    own = chosen.path / PACKED
    if own.exists():
        return dict.fromkeys(shards, own), dict.fromkeys(shards, own / "documents.parquet"), []
    packed = {s: declared.current(artifacts, "corpus_tokens", s) for s in shards}
    raw = {s: declared.current(artifacts, "raw_corpus", s) for s in shards}
    made_from = [*packed.values(), *raw.values()]
    tables = declared.current(artifacts, "score_tables", made_from=made_from)
    if chosen.inputs.get("score_tables", tables.fingerprint) != tables.fingerprint:
        raise InputError(f"{chosen.name}: built from older score_tables; materialize it again")
    return (
        {s: a.path for s, a in packed.items()},
        {s: a.path / "documents.parquet" for s, a in raw.items()},
        made_from,
    )


def near_cutoff(
    connection: duckdb.DuckDBPyConnection,
    recipe: Recipe,
    domain: str,
    arm: Arm,
    refined: Sequence[Artifact],
) -> dict[str, Any]:
    """Return the scores' error, and how many sequences are within it of the cutoff.

    Empty without refined scores.
    """
    if not refined:
        return {}
    found = near(connection, recipe, domain, arm, refined[0].facts["radius"])
    return {
        "score_error": refined[0].facts["score_error"],
        "near_cutoff": len(found),
        "near_cutoff_not_refined": len(found) - int(found["exact"].sum()),
    }


def _probed(
    connection: duckdb.DuckDBPyConnection, domain: str, arm: Arm, cutoff: float
) -> dict[str, float]:
    """Return how the probe ranks against the corpus, for methods that rank by losses."""
    if arm.method not in SCORED:
        return {}
    found = probe(connection, arm.method, domain, ShardKind.PROBE.named(domain), cutoff)
    if arm.batch:  # each batch has its own cutoff, so there is no recall
        return {"probe_auc": found.auc}
    return {"probe_auc": found.auc, "probe_recall": found.recall}


def _documents(folder: Path) -> dict[str, dg.TableMetadataValue]:
    """Return a table of the best, cutoff, median and worst documents of a selection, if any."""
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
