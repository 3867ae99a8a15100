"""The score tables made again from the Parquet record, and compared with those published."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from colorfilter.files import require_space
from colorfilter.tables import fetch
from resources.databases import READING_MEMORY, attach, limit_memory
from resources.home import Home
from resources.score_parts import Part, PublishedModel
from resources.score_store import PublishedSelection, ScoreStore

# What is compared at a time, by file and table: the rows that have these columns in common.
GROUPS = {
    ("scores", "documents"): ("shard",),
    ("scores", "spans"): ("shard",),
    ("scores", "sequences"): ("shard",),
    ("scores", "models"): ("role",),
    ("scores", "losses"): ("model", "shard"),
    ("scores", "paired_losses"): ("domain", "shard"),
    ("scores", "excluded"): ("shard",),
    ("selections", "selections"): ("selection",),
    ("selections", "selection_versions"): ("domain", "arm", "selection"),
}
SHOWN = 10  # groups of a table of which differing rows are looked for

# Of a group in both: how many rows, and sums that neither their order nor their number hides.
DIFFERENT = """
    WITH
    expected AS (SELECT {columns}, {sums} FROM {rebuilt} AS t GROUP BY {columns}),
    found AS (SELECT {columns}, {sums} FROM {published} AS t WHERE {condition} GROUP BY {columns})
    SELECT {columns}, coalesce(expected.n, 0), coalesce(found.n, 0)
    FROM expected FULL JOIN found USING ({columns})
    WHERE (expected.n, expected.folded, expected.added)
        IS DISTINCT FROM (found.n, found.folded, found.added)
    ORDER BY {columns}
"""
SUMS = "count(*) AS n, bit_xor(hash(t)) AS folded, sum(hash(t)::HUGEINT) AS added"


class Difference(NamedTuple):
    """Rows of a table that are not as the record has them: how many there are, and one of each."""

    file: str
    table: str
    group: dict[str, Any]
    expected: int
    found: int
    missing: dict[str, Any] | None
    extra: dict[str, Any] | None


def differences(
    store: ScoreStore,
    parts: Sequence[Part],
    models: Sequence[PublishedModel],
    selections: Sequence[PublishedSelection],
    length: int,
    folder: Path,
) -> Iterator[Difference]:
    """Where the published tables differ from what the record makes of these parts.

    `selections` are entered in their order; what else `selection_versions` has is not looked at.
    The tables are made in `folder`, which wants as much room.
    """
    published, rebuilt = Home(store.home), Home(folder)
    files = [path for path in (published.scores, published.selections) if path.exists()]
    size = sum(path.stat().st_size for path in files)
    require_space(published.root, 2 * size, "the tables made again")
    rebuilt.leases.mkdir()
    again = ScoreStore(home=str(folder))
    again.publish(parts, models, length)
    again.publish_selections(selections)
    with contextlib.closing(duckdb.connect()) as connection:
        limit_memory(connection, rebuilt.scores, READING_MEMORY)
        for path in files:
            attach(connection, path, f"published_{path.stem}")
            attach(connection, rebuilt.root / path.name, f"rebuilt_{path.stem}")
        for file, table in GROUPS:
            if file in {path.stem for path in files}:
                yield from _differences(connection, file, table)


def _differences(
    connection: duckdb.DuckDBPyConnection, file: str, table: str
) -> Iterator[Difference]:
    columns = GROUPS[file, table]
    condition = "true"
    if "selection" in columns:
        condition = (
            "selection IN (SELECT selection FROM rebuilt_selections.selection_versions) OR "
            "selection NOT IN (SELECT selection FROM published_selections.selection_versions)"
        )
    rebuilt, published = f"rebuilt_{file}", f"published_{file}"
    query = DIFFERENT.format(
        columns=", ".join(columns),
        sums=SUMS,
        condition=condition,
        rebuilt=_rows(rebuilt, table),
        published=_rows(published, table),
    )
    for i, (*group, expected, found) in enumerate(fetch(connection, query)):
        rows: list[dict[str, Any] | None] = [None, None]
        if i < SHOWN:
            rows = [
                _only_in(connection, table, columns, group, *databases)
                for databases in ((rebuilt, published), (published, rebuilt))
            ]
        of = dict(zip(columns, group, strict=True))
        yield Difference(f"{file}.duckdb", table, of, expected, found, *rows)


def _only_in(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    columns: Sequence[str],
    group: Sequence[Any],
    here: str,
    there: str,
) -> dict[str, Any] | None:
    """A row of a group that one database has, or has more often, than the other."""
    where = " AND ".join(f"{column} IS NOT DISTINCT FROM ?" for column in columns)
    query = (
        f"SELECT * FROM {_rows(here, table)} WHERE {where} "
        f"EXCEPT ALL SELECT * FROM {_rows(there, table)} WHERE {where} ORDER BY ALL LIMIT 1"
    )
    found = connection.execute(query, [*group, *group])
    names = [column[0] for column in found.description or []]
    rows = found.fetchall()
    return dict(zip(names, rows[0], strict=True)) if rows else None


def _rows(database: str, table: str) -> str:
    """A table of a database, without what depends on where the home lies."""
    whole = f"{database}.{table}"
    return f"(SELECT * EXCLUDE (path) FROM {whole})" if table == "models" else whole
