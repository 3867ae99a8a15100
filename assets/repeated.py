"""Selecting and scoring again what was selected and scored before: for an audit."""

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from assets.common import shard_names
from assets.refined import score_places
from assets.scores import loss_assets, overlays
from assets.selected import choose
from assets.selecting import Choice, with_choice
from colorfilter.errors import InputError
from colorfilter.progress import Progress, silent
from colorfilter.recipe import Arm, Domain, Recipe
from colorfilter.score_tables import changed_since_scored
from colorfilter.stages import ArtifactName, Stage
from resources.artifacts import ArtifactStore
from resources.audit import Finding
from resources.gpu import Gpu, release
from resources.ledger import Entry
from resources.score_store import ScoreStore

# Nats per token by which a sequence's loss may lie off the true one, by the precision it is in.
TOLERANCE = {"float32": 1e-5, "bf16": 5e-3, "fp16": 5e-3}


def reselect(
    artifacts: ArtifactStore, store: ScoreStore, recipe: Recipe, entries: Iterable[Entry]
) -> Iterator[Finding]:
    """Whether the current scores give exactly the selections that were made by them.

    A warning where that cannot be said: of one by other scores, or by what the recipe was before.
    """
    scores = artifacts.current("score_tables").fingerprint
    for entry in entries:
        if ArtifactName.parse(entry["asset"]).stage is not Stage.SELECTION:
            continue
        name, where = entry["asset"], f"{entry['path']}/selection.parquet"
        if entry["inputs"].get("score_tables") != scores:
            yield Finding(name, where, "a selection by the current scores", "another", warning=True)
            continue
        try:
            narrowed, domain, arm = _terms(recipe, entry)
            with store.read(_refined(artifacts, entry)) as connection:
                again = choose(connection, narrowed, domain, arm)
        except InputError as error:
            yield Finding(name, where, "a selection that can be repeated", str(error), warning=True)
            continue
        columns = ["rank", "shard", "position", "score"]
        kept = pl.read_parquet(artifacts.at.root / where, columns=columns)
        again = again.select(columns)
        if not kept.equals(again):
            yield Finding(name, where, *_first_difference(again, kept))


def _refined(artifacts: ArtifactStore, selection: Entry) -> dict[str, Path]:
    """The refined losses that a selection was made by, where there are any.

    Raises InputError where they are no longer current.
    """
    name = f"{ArtifactName.parse(selection['asset']).domain}/{Stage.REFINED_SCORES}"
    if name not in selection["inputs"]:
        return {}
    refined = artifacts.current(name)
    if refined.fingerprint != selection["inputs"][name]:
        raise InputError(f"one by older {name}")
    return overlays([refined])


def _terms(recipe: Recipe, entry: Entry) -> tuple[Recipe, Domain, Arm]:
    """By what a selection was made: an arm of the recipe, or a choice.

    Raises InputError where it was neither as the recipe is now.
    """
    name = ArtifactName.parse(entry["asset"])
    terms = entry["recipe"]
    domain = next((d for d in recipe.domains if d.name == name.domain), None)
    arm = next((a for a in recipe.arms if a.name == name.arm), None)
    if domain and arm:
        needed = recipe.endpoints(arm, 0)[-1]
        now = {**arm.choice(), "needed": needed, "sequence_length": recipe.sequence_length}
        if now == terms and entry["seed"] in {None, recipe.seed}:
            return recipe, domain, arm
    choice = {"domain": name.domain, "tokens": terms["needed"] * recipe.sequence_length}
    choice |= {part: terms[part] for part in ("method", "tau", "batch")}
    if choice["tau"] is None or entry["seed"] not in {None, recipe.seed}:
        raise InputError("one by another recipe than the present")
    return with_choice(recipe, Choice.model_validate(choice))


def _first_difference(again: pl.DataFrame, kept: pl.DataFrame) -> tuple[str, str]:
    """The first row in which two selections differ, in words."""
    for expected, found in zip(again.iter_rows(), kept.iter_rows(), strict=False):
        if expected != found:
            return _row(expected), _row(found)
    return f"{len(again):,} sequences", f"{len(kept):,}"


def _row(row: tuple[Any, ...]) -> str:
    rank, shard, position, score = row
    return f"at rank {rank} {shard}:{position} with {score}"


class Rescored(NamedTuple):
    """How scoring again went: what was drawn, and how far the losses lie from those on record."""

    losses: int
    largest: float  # difference, nats per token
    seconds: float


def rescore(
    artifacts: ArtifactStore,
    store: ScoreStore,
    gpu: Gpu,
    recipe: Recipe,
    sample: int,
    seed: int,
    folder: Path,
    progress: Progress = silent,
) -> tuple[Rescored, list[Finding]]:
    """Score so many random sequences of every shard again by all current models, as they were.

    They are scored in `folder`, and compared with the chunks on record; a shard that has not been
    scored by all of the models is passed over. Either loss may lie off by what its precision
    allows: on a device of the same kind they are the same.
    """
    assets = {losses.model: losses.asset for losses in loss_assets(recipe)}
    models = {model: artifacts.current(model) for model in assets}
    with store.read() as connection:
        changed = changed_since_scored(connection)
    rng = np.random.default_rng(seed)
    places, recorded = [], []
    for shard in shard_names(artifacts, recipe):
        try:
            packed = artifacts.current("corpus_tokens", shard)
            scored = [
                artifacts.current_from(asset, shard, [models[model], packed])
                for model, asset in assets.items()
            ]
        except InputError:
            continue
        others = changed.filter(shard=shard)["position"]
        there = np.setdiff1d(np.arange(packed.facts["sequences"]), others)
        if not len(there):
            continue
        drawn = rng.choice(there, min(sample, len(there)), replace=False)
        places.append(pl.DataFrame({"position": np.sort(drawn)}).with_columns(shard=pl.lit(shard)))
        for losses in scored:
            rows = pl.scan_parquet(losses.path / "losses-*.parquet")
            recorded.append(rows.filter(pl.col("position").is_in(drawn.tolist())).collect())
    begun = time.monotonic()
    drawn_places, by, precision = pl.concat(places), list(models.values()), recipe.scoring.precision
    try:
        again = score_places(artifacts, gpu, recipe, by, drawn_places, folder, precision, progress)
    finally:
        release()
    seconds = time.monotonic() - begun
    both = _compared(again, pl.concat(recorded))
    names = {made.fingerprint: assets[model] for model, made in models.items()}
    largest = both["difference"].max()
    return Rescored(len(both), float(largest or 0.0), seconds), _beyond_tolerance(both, names)  # type: ignore[arg-type]


def _compared(again: pl.DataFrame, recorded: pl.DataFrame) -> pl.DataFrame:
    """Losses computed again beside those on record, with their difference and what it may be."""
    exact, kept = (pl.col(c).cast(pl.Float64) for c in ("loss", "loss_recorded"))
    allowed = pl.col("precision_recorded").replace_strict(TOLERANCE, default=0.0)
    return again.join(
        recorded.select("model", "shard", "position", "loss", "precision"),
        on=["model", "shard", "position"],
        how="full",
        coalesce=True,
        suffix="_recorded",
    ).with_columns(difference=(exact - kept).abs(), tolerance=2 * allowed)


def _beyond_tolerance(both: pl.DataFrame, names: Mapping[str, str]) -> list[Finding]:
    """A finding for each loss that is off or that one side lacks; `names` are assets by model."""
    within = (pl.col("difference") <= pl.col("tolerance")).fill_null(False)
    return [
        Finding(
            f"{names[row['model']]}[{row['shard']}]",
            f"position {row['position']}",
            f"a loss of {row['loss']}, to {row['tolerance']:.0e}",
            str(row["loss_recorded"]),
        )
        for row in both.filter(~within).sort("model", "shard", "position").iter_rows(named=True)
    ]
