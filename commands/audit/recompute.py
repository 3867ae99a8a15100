"""Audit checks that recompute tables, selections and losses and compare them with the record."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import duckdb
import numpy as np
import polars as pl

from assets.common import shard_names
from assets.filtered.select_job import Choice, with_choice
from assets.filtered.selection import choose, selection_declaration
from assets.scores.refined_scores import score_places
from assets.scores.scores import loss_assets, overlays, publication, score_tables_declaration
from colorfilter.config.recipe import Arm, Domain, Recipe
from colorfilter.errors import InputError
from colorfilter.progress import Progress
from colorfilter.selection.score_tables import changed_since_scored
from colorfilter.selection.sql import fetch_frame
from colorfilter.stages import ArtifactName, Stage
from colorfilter.storage.files import require_space
from colorfilter.storage.manifest import stands
from resources.artifacts import ArtifactStore
from resources.audit import Finding, Record, workplace
from resources.databases import READING_MEMORY, attach, limit_memory
from resources.gpu import Gpu, release
from resources.home import Home
from resources.ledger import Entry
from resources.score_store import PublishedSelection, ScoreStore

# Tables are compared group by group. By file and table: the columns to group by.
GROUPS = {
    "scores": dict.fromkeys(["documents", "spans", "sequences", "excluded"], "shard")
    | {"models": "role", "losses": "model, shard", "paired_losses": "domain, shard"},
    "selections": {"selections": "selection", "selection_versions": "domain, arm, selection"},
}
SHOWN = 10  # differing groups per table for which a differing row is reported

# Published selections in the order in which they are published again: current ones last.
VERSIONS = "SELECT * EXCLUDE (cutoff) FROM selected.selection_versions ORDER BY current, created"
# A table without the column that depends on the path of the home.
ROWS = "SELECT COLUMNS(lambda name: name <> 'path') FROM {database}.{table}"
# Published selections whose files are gone cannot be rebuilt and are skipped.
REBUILT = """ WHERE selection IN (SELECT selection FROM rebuilt_selections.selection_versions)
    OR selection NOT IN (SELECT selection FROM published_selections.selection_versions)"""
# Groups that differ in the number of rows or in the sum of row hashes.
DIFFERENT = """
    SELECT {columns}, count(*) FILTER (sign > 0) AS expected, count(*) FILTER (sign < 0) AS found
    FROM (
        SELECT {columns}, 1 AS sign, hash(t)::HUGEINT AS content FROM ({rebuilt}) AS t
        UNION ALL SELECT {columns}, -1, hash(t) FROM ({published}) AS t
    )
    GROUP BY {columns} HAVING expected <> found OR sum(sign * content) <> 0 ORDER BY {columns}
"""
# A row of a group that one side has and the other lacks, or has fewer times.
ONLY = "FROM ({here}) WHERE {group} EXCEPT ALL FROM ({there}) WHERE {group} ORDER BY ALL LIMIT 1"
SELECTED = ["rank", "shard", "position", "score"]  # columns of a selection to compare
# Largest allowed error of a sequence's loss, in nats per token, by precision.
TOLERANCE = {"float32": 1e-5, "bf16": 5e-3, "fp16": 5e-3}


def tables_are_current(artifacts: ArtifactStore, recipe: Recipe) -> Iterator[Finding]:
    """Warn if the published tables lack current artifacts; a run may be about to publish them."""
    try:
        _, _, inputs = publication(artifacts, recipe)
        made = artifacts.current("score_tables")
        if not artifacts.at.scores.exists():
            raise InputError("none; materialize score_tables")
        if made.key != score_tables_declaration(recipe).work(inputs).key:
            raise InputError("older ones; materialize score_tables")
    except InputError as error:
        wanted = "tables of everything current"
        yield Finding("score_tables", "scores.duckdb", wanted, str(error), warning=True)


def tables(record: Record, recipe: Recipe) -> Iterator[Finding]:
    """Rebuild the published tables from the record and compare. They must be up to date."""
    with record.store.read() as connection:
        versions = fetch_frame(connection, VERSIONS, {}).to_dicts()
    published = {(v["domain"], v["arm"], v["selection"]) for v in versions}
    again = []
    for version in versions:
        domain, arm, selection = version["domain"], version["arm"], version["selection"]
        current = version.pop("current")
        name, where = f"{domain}/{arm}/selection", "selections.duckdb, selection_versions"
        made = record.lineage.find(name, selection)
        if not made:
            yield Finding(name, where, "a selection that is in the ledger", selection[:16])
            continue
        dataset = record.artifacts.entries().get((f"{domain}/{arm}/filtered_dataset", None))
        latest = dataset["inputs"].get(name) if dataset else None
        if current != (latest == selection):
            words = ("not current", "current")
            wanted = f"{selection[:16]} {words[latest == selection]}"
            # A run killed between writing a dataset and publishing its selection leaves this.
            waiting = (domain, arm, latest) not in published
            yield Finding(name, where, wanted, words[current], warning=waiting)
        path = record.home.root / made[0]["path"]
        if stands(path):
            # The models come from the score tables it was selected from, if these are recorded.
            by = made[0]["inputs"].get("score_tables", "")
            for scores in record.lineage.find("score_tables", by):
                version["prior"] = scores["inputs"]["prior_model"]
                version["conditional"] = scores["inputs"][f"{domain}/conditional_model"]
            again.append(PublishedSelection(table=path / "selection.parquet", **version))
    yield from _differences(record, recipe, again)


def _differences(
    record: Record, recipe: Recipe, selections: Sequence[PublishedSelection]
) -> Iterator[Finding]:
    """Rebuild the tables, publish the selections in order, and compare all groups."""
    parts, models, _ = publication(record.artifacts, recipe)
    published = [p for p in (record.home.scores, record.home.selections) if p.exists()]
    with workplace(record.home) as folder, contextlib.closing(duckdb.connect()) as connection:
        size = sum(path.stat().st_size for path in published)
        require_space(folder, 2 * size, "the rebuilt tables")
        Home(folder).leases.mkdir()
        rebuilt = ScoreStore(home=str(folder))
        rebuilt.publish(parts, models, recipe.sequence_length)
        rebuilt.publish_selections(selections)
        limit_memory(connection, Home(folder).scores, READING_MEMORY)
        for path in published:
            attach(connection, path, f"published_{path.stem}")
            attach(connection, folder / path.name, f"rebuilt_{path.stem}")
            for table, columns in GROUPS[path.stem].items():
                yield from _different_groups(connection, path.stem, table, columns)


def _different_groups(
    connection: duckdb.DuckDBPyConnection, file: str, table: str, columns: str
) -> Iterator[Finding]:
    """Find groups of a table that differ from the record, with a differing row of each."""
    rebuilt = ROWS.format(database=f"rebuilt_{file}", table=table)
    published = ROWS.format(database=f"published_{file}", table=table)
    published += REBUILT if file == "selections" else ""
    query = DIFFERENT.format(columns=columns, rebuilt=rebuilt, published=published)
    this_group = " AND ".join(f"{c} IS NOT DISTINCT FROM ${c}" for c in columns.split(", "))
    for i, group in enumerate(fetch_frame(connection, query, {}).to_dicts()):
        counts = group.pop("expected"), group.pop("found")
        rows: list[dict[str, Any]] = []
        for here, there in [(rebuilt, published), (published, rebuilt)]:
            one = ONLY.format(here=here, there=there, group=this_group)
            differing = fetch_frame(connection, one, group).to_dicts() if i < SHOWN else []
            rows += differing or [{}]
        missing, extra = rows
        known = {k for k in missing if k != "position" and missing[k] == extra.get(k)} | {*group}
        expected, found = (
            ", ".join([f"{n:,} rows", *(f"{k} {v}" for k, v in row.items() if k not in known)])
            for n, row in zip(counts, rows, strict=True)
        )
        where = ", ".join(f"{k} {str(v)[:30]}" for k, v in group.items())
        yield Finding("score_tables", f"{file}.duckdb, {table} of {where}", expected, found)


def results(artifacts: ArtifactStore, recipe: Recipe) -> Iterator[Finding]:
    """Check that the published evaluations equal those of the reports."""
    path = artifacts.at.results
    made = [artifacts.entries().get((f"{d.name}/report", None)) for d in recipe.domains]
    if not path.exists() or not all(made):
        return
    folders = [artifacts.at.root / entry["path"] for entry in made if entry]
    expected = pl.concat([pl.read_parquet(f / "evaluations.parquet") for f in folders])
    with duckdb.connect(str(path), read_only=True) as connection:
        found = fetch_frame(connection, "FROM evaluations", {}).select(expected.columns)
    if not found.cast(expected.schema).sort(pl.all()).equals(expected.sort(pl.all())):
        wanted, got = f"the {len(expected)} rows of the reports", f"{len(found)} that differ"
        yield Finding("evaluations", "results.duckdb, evaluations", wanted, got)


def reselect(record: Record, recipe: Recipe, entries: Iterable[Entry]) -> Iterator[Finding]:
    """Select again from the current scores and find selections that come out differently.

    A selection made from other scores, or with other settings than the recipe has now, cannot be
    repeated; that is a warning.
    """
    for entry in entries:
        name, where = ArtifactName.parse(entry["asset"]), f"{entry['path']}/selection.parquet"
        if name.stage is not Stage.SELECTION:
            continue
        try:
            if "score_tables" not in entry["inputs"] or record.artifacts.is_behind(entry):
                raise InputError("one made from other scores than the current ones")
            exact = f"{name.domain}/{Stage.REFINED_SCORES}"
            refined = [record.artifacts.current(exact)] if exact in entry["inputs"] else []
            terms = _terms(recipe, name, entry)
            with record.store.read(overlays(refined)) as connection:
                again = choose(connection, *terms).select(SELECTED)
        except InputError as error:
            wanted = "a repeatable selection"
            yield Finding(entry["asset"], where, wanted, str(error), warning=True)
            continue
        kept = pl.read_parquet(record.home.root / where, columns=SELECTED)
        if not kept.cast(again.schema).equals(again):
            rows = zip_longest(again.iter_rows(), kept.iter_rows())
            expected, found = (
                "at rank {} {}:{} with {}".format(*row) if row else "no more sequences"
                for row in next(pair for pair in rows if pair[0] != pair[1])
            )
            yield Finding(entry["asset"], where, expected, found)


def _terms(recipe: Recipe, name: ArtifactName, entry: Entry) -> tuple[Recipe, Domain, Arm]:
    """Return what `choose` needs to repeat a selection. Raises InputError if the recipe changed."""
    terms = entry["recipe"]
    if entry["seed"] in {None, recipe.seed}:
        for domain in (d for d in recipe.domains if d.name == name.domain):
            for arm in (a for a in recipe.arms if a.name == name.arm):
                if selection_declaration(recipe, domain, arm).settings == terms:
                    return recipe, domain, arm
        if terms["tau"] is not None:
            choice = {part: terms[part] for part in ("method", "tau", "batch")}
            tokens = terms["needed"] * recipe.sequence_length
            return with_choice(recipe, Choice(domain=str(name.domain), tokens=tokens, **choice))
    raise InputError("one made with other settings than the recipe has now")


@dataclass(frozen=True)
class Rescored:
    """The outcome of scoring again: how many losses were compared, and their largest difference."""

    losses: int
    largest: float  # difference, nats per token
    seconds: float

    def __str__(self) -> str:
        again = f"{self.losses:,} losses recomputed in {self.seconds:.1f} s"
        return f"{again}, largest difference {self.largest:.1e} nats per token"


def rescore(
    record: Record, recipe: Recipe, sample: int, seed: int, progress: Progress
) -> tuple[Rescored, list[Finding]]:
    """Score `sample` random sequences of every shard again with all current models, and compare.

    A shard that has not been scored with all of the models is skipped. `progress` is called with
    tokens.
    """
    artifacts = record.artifacts
    models = {losses.asset: artifacts.current(losses.model) for losses in loss_assets(recipe)}
    with record.store.read() as connection:
        changed = changed_since_scored(connection)
    rng = np.random.default_rng(seed)
    drawn, chunks = [], []
    for shard in shard_names(artifacts, recipe):
        try:
            packed = artifacts.current("corpus_tokens", shard)
            scored = [artifacts.current_from(a, shard, [m, packed]) for a, m in models.items()]
        except InputError:
            continue
        others = changed.filter(shard=shard)["position"]
        there = np.setdiff1d(np.arange(packed.facts["sequences"]), others)
        positions = rng.choice(there, min(sample, len(there)), replace=False)
        drawn.append(pl.DataFrame({"position": positions}).with_columns(shard=pl.lit(shard)))
        chunks += [chunk for losses in scored for chunk in losses.path.glob("losses-*.parquet")]
    keys, places = ["model", "shard", "position"], pl.concat(drawn)
    recorded = pl.scan_parquet(chunks).join(places.lazy(), on=keys[1:], how="semi").collect()
    by, precision, begun = list(models.values()), recipe.scoring.precision, time.monotonic()
    with workplace(record.home) as folder:
        gpu = Gpu(home=str(folder))  # its kernel runs are not recorded in the audited home
        try:
            again = score_places(artifacts, gpu, recipe, by, places, folder, precision, progress)
        finally:
            release()
    seconds = time.monotonic() - begun
    both = again.join(recorded, on=keys, how="full", coalesce=True, suffix="_recorded").sort(keys)
    both = both.with_columns(
        difference=(pl.col("loss").cast(pl.Float64) - pl.col("loss_recorded")).abs(),
        tolerance=2 * pl.col("precision_recorded").replace_strict(TOLERANCE, default=0.0),
    )
    largest = both.select(pl.col("difference").max()).item() or 0.0
    names = {model.fingerprint: asset for asset, model in models.items()}
    return Rescored(len(both), largest, seconds), _beyond_tolerance(both, names)


def _beyond_tolerance(both: pl.DataFrame, names: Mapping[str, str]) -> list[Finding]:
    """Return a finding for each loss that is off or missing. `names` maps models to assets."""
    within = (pl.col("difference") <= pl.col("tolerance")).fill_null(False)
    return [
        Finding(
            f"{names[row['model']]}[{row['shard']}]",
            f"position {row['position']}",
            f"a loss of {row['loss']} within {row['tolerance']:.0e}",
            str(row["loss_recorded"]),
        )
        for row in both.filter(~within).iter_rows(named=True)
    ]
