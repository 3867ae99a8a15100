"""Whether the published tables are what the record makes: for an audit."""

from collections.abc import Iterator

import duckdb
import polars as pl

from assets.scores import publication
from colorfilter.errors import InputError, one_line
from colorfilter.provenance import stands
from colorfilter.recipe import Recipe
from colorfilter.tables import fetch, fetch_frame
from resources.artifacts import ArtifactStore
from resources.audit import Finding
from resources.ledger import Entry
from resources.lineage import Lineage
from resources.rebuilding import Difference, differences
from resources.score_store import ScoreStore

STORE = "scores.duckdb"


def tables(artifacts: ArtifactStore, store: ScoreStore, recipe: Recipe) -> Iterator[Finding]:
    """Whether the published tables are what the record makes of all that is current."""
    try:
        parts, models, _ = publication(artifacts, recipe)
        with store.read() as connection:
            versions = fetch(
                connection,
                "SELECT selection, domain, arm, prior, conditional, created, current "
                "FROM selection_versions ORDER BY created, current",
            )
    except InputError as error:
        wanted = "tables of all that is current"
        yield Finding("score_tables", STORE, wanted, str(error), warning=True)
        return
    lineage = Lineage(artifacts)
    selections = []
    for selection, domain, arm, prior, conditional, created, current in versions:
        name = f"{domain}/{arm}/selection"
        made = lineage.find(name, selection)
        where = f"{STORE}, selection_versions"
        if not made:
            yield Finding(name, where, "a selection that was made", selection[:16])
            continue
        dataset = artifacts.entries().get((f"{domain}/{arm}/filtered_dataset", None))
        is_current = dataset is not None and dataset["inputs"].get(name) == selection
        if current != is_current:
            words = ("not current", "current")
            yield Finding(name, where, f"{selection[:16]} {words[is_current]}", words[current])
        path = artifacts.at.root / made[0]["path"]
        if stands(path):
            scored_by = _scored_by(lineage, made[0], domain) or (prior, conditional)
            table = path / "selection.parquet"
            selections.append((current, (selection, table, domain, arm, scored_by, created)))
    inserts = [arguments for _, arguments in sorted(selections, key=lambda s: s[0])]
    try:
        for difference in differences(store, parts, models, inserts, recipe.sequence_length):
            yield _told(difference)
    except (duckdb.Error, ValueError) as error:
        yield Finding("score_tables", STORE, "a record that can be published", one_line(error))


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
    return Finding("score_tables", f"{STORE}, {difference.table} of {group}", expected, found)


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
