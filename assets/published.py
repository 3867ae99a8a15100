"""Whether the published tables are what the record makes: for an audit."""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import polars as pl

from assets.scores import publication, score_tables_declaration
from colorfilter.errors import InputError
from colorfilter.provenance import stands
from colorfilter.recipe import Recipe
from colorfilter.tables import fetch, fetch_frame
from resources.artifacts import ArtifactStore
from resources.audit import Finding
from resources.ledger import Entry
from resources.lineage import Lineage
from resources.rebuilding import Difference, differences
from resources.score_store import PublishedSelection, ScoreStore

STORE = "scores.duckdb"
SELECTIONS = "selections.duckdb"


def tables_are_current(artifacts: ArtifactStore, recipe: Recipe) -> Iterator[Finding]:
    """Whether all that is current has been published; a warning, for a run may be on its way."""
    try:
        _, _, inputs = publication(artifacts, recipe)
        made = artifacts.current("score_tables")
        if not artifacts.at.scores.exists():
            raise InputError("none; materialize score_tables")
        if made.key != score_tables_declaration(recipe).work(inputs).key:
            raise InputError("older ones; materialize score_tables")
    except InputError as error:
        wanted = "tables of all that is current"
        yield Finding("score_tables", STORE, wanted, str(error), warning=True)


def tables(
    artifacts: ArtifactStore, store: ScoreStore, recipe: Recipe, folder: Path
) -> Iterator[Finding]:
    """Whether the published tables, which are current, are what the record makes.

    They are made again in `folder`.
    """
    parts, models, _ = publication(artifacts, recipe)
    with store.read() as connection:
        versions = fetch(
            connection,
            "SELECT selection, domain, arm, prior, conditional, created, current "
            "FROM selected.selection_versions ORDER BY created, current",
        )
    lineage = Lineage(artifacts)
    where = f"{SELECTIONS}, selection_versions"
    selections = []
    published = {(domain, arm, selection) for selection, domain, arm, *_ in versions}
    for selection, domain, arm, prior, conditional, created, current in versions:
        name = f"{domain}/{arm}/selection"
        made = lineage.find(name, selection)
        if not made:
            yield Finding(name, where, "a selection that was made", selection[:16])
            continue
        dataset = artifacts.entries().get((f"{domain}/{arm}/filtered_dataset", None))
        latest = dataset["inputs"].get(name) if dataset else None
        if current != (latest == selection):
            words = ("not current", "current")
            # A run that was killed makes a dataset and does not publish its selection.
            waiting = (domain, arm, latest) not in published
            wanted = f"{selection[:16]} {words[latest == selection]}"
            yield Finding(name, where, wanted, words[current], warning=waiting)
        path = artifacts.at.root / made[0]["path"]
        if stands(path):
            by_prior, by_conditional = _scored_by(lineage, made[0], domain) or (prior, conditional)
            table = path / "selection.parquet"
            entered = PublishedSelection(
                selection, table, domain, arm, by_prior, by_conditional, created
            )
            selections.append((current, entered))
    inserts = [entered for _, entered in sorted(selections, key=lambda s: s[0])]
    length = recipe.sequence_length
    for difference in differences(store, parts, models, inserts, length, folder):
        yield _told(difference)


def _scored_by(lineage: Lineage, selection: Entry, domain: str) -> tuple[str, str] | None:
    """The prior and the conditional whose losses a selection was made by, where it says."""
    tables_ = selection["inputs"].get("score_tables")
    for made in lineage.find("score_tables", tables_) if tables_ else []:
        return made["inputs"]["prior_model"], made["inputs"][f"{domain}/conditional_model"]
    return None


def _told(difference: Difference) -> Finding:
    group = ", ".join(f"{k} {str(v)[:30]}" for k, v in difference.group.items())
    missing, extra = difference.missing or {}, difference.extra or {}
    same = {k for k in missing if k != "position" and missing[k] == extra.get(k)}
    expected, found = (
        ", ".join(
            [f"{rows:,} rows"]
            + [f"{k} {v}" for k, v in row.items() if k not in {*same, *difference.group}]
        )
        for rows, row in ((difference.expected, missing), (difference.found, extra))
    )
    return Finding(
        "score_tables", f"{difference.file}, {difference.table} of {group}", expected, found
    )


def results(artifacts: ArtifactStore, recipe: Recipe) -> Iterator[Finding]:
    """Whether the published evaluations are those of the reports."""
    path = artifacts.at.results
    made = [artifacts.entries().get((f"{d.name}/report", None)) for d in recipe.domains]
    if not path.exists() or not all(made):
        return
    frames = [
        pl.read_parquet(artifacts.at.root / e["path"] / "evaluations.parquet") for e in made if e
    ]
    expected = pl.concat(frames)
    with duckdb.connect(str(path), read_only=True) as connection:
        found = fetch_frame(connection, "SELECT * FROM evaluations", {}).select(expected.columns)
    names = expected.columns
    if not found.cast(expected.schema).sort(names).equals(expected.sort(names)):
        wanted, got = f"the {len(expected)} rows of the reports", f"{len(found)}, others"
        yield Finding("evaluations", "results.duckdb, evaluations", wanted, got)
