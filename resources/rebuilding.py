"""The score tables made again from the Parquet record, and compared with those published."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from colorfilter.files import require_space
from colorfilter.tables import fetch
from resources.home import Home
from resources.score_parts import Part, PublishedModel
from resources.score_store import (
    READING_MEMORY,
    PublishedSelection,
    ScoreStore,
    enter_selection,
    limit_memory,
)

# What is compared at a time, by table: the rows that have these columns in common.
GROUPS = {
    "documents": ("shard",),
    "spans": ("shard",),
    "sequences": ("shard",),
    "models": ("role",),
    "losses": ("model", "shard"),
    "paired_losses": ("domain", "shard"),
    "excluded": ("shard",),
    "selections": ("selection",),
    "selection_versions": ("domain", "arm", "selection"),
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
    published = Home(store.home).scores
    require_space(published.parent, 2 * published.stat().st_size, "the tables made again")
    rebuilt = Home(folder)
    rebuilt.leases.mkdir()
    ScoreStore(home=str(folder)).publish(parts, models, length)
    with contextlib.closing(duckdb.connect(str(rebuilt.scores))) as connection:
        limit_memory(connection, rebuilt.scores, READING_MEMORY)
        for selection in selections:
            enter_selection(connection, selection)
    with contextlib.closing(duckdb.connect()) as connection:
        limit_memory(connection, rebuilt.scores, READING_MEMORY)
        for name, path in (("rebuilt", rebuilt.scores), ("published", published)):
            place = str(path).replace("'", "''")
            connection.execute(f"ATTACH '{place}' AS {name} (READ_ONLY)")
        for table in GROUPS:
            yield from _differences(connection, table)


def _differences(connection: duckdb.DuckDBPyConnection, table: str) -> Iterator[Difference]:
    columns = GROUPS[table]
    condition = "true"
    if "selection" in columns:
        condition = (
            "selection IN (SELECT selection FROM rebuilt.selection_versions) OR "
            "selection NOT IN (SELECT selection FROM published.selection_versions)"
        )
    query = DIFFERENT.format(
        columns=", ".join(columns),
        sums=SUMS,
        condition=condition,
        rebuilt=_rows("rebuilt", table),
        published=_rows("published", table),
    )
    for i, (*group, expected, found) in enumerate(fetch(connection, query)):
        rows: list[dict[str, Any] | None] = [None, None]
        if i < SHOWN:
            rows = [
                _only_in(connection, table, columns, group, *databases)
                for databases in (("rebuilt", "published"), ("published", "rebuilt"))
            ]
        yield Difference(table, dict(zip(columns, group, strict=True)), expected, found, *rows)


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
