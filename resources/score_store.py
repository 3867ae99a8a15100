"""The score store: DuckDB tables published from the Parquet record.

The Parquet files are the record, from which the databases can be rebuilt. A new database replaces
the old file by a rename, so readers never block the pipeline, and a crash leaves the last good
file. No method keeps a file open after it returns.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb

from colorfilter.errors import InputError
from colorfilter.selection.score_tables import exclude, overlay, pair
from colorfilter.selection.sql import fetch, fetch_row
from resources.databases import (
    READING_MEMORY,
    attach,
    limit_memory,
    next_version,
    transaction,
)
from resources.home import Home
from resources.score_parts import Key, Part, PublishedModel, exclusion, insert, pairs, remove

SCHEMA = """
CREATE TABLE IF NOT EXISTS documents(
    doc_id VARCHAR, shard VARCHAR, source_file VARCHAR, source_line BIGINT, source VARCHAR,
    n_chars BIGINT, n_tokens BIGINT, sha256 VARCHAR, extra VARCHAR);
CREATE TABLE IF NOT EXISTS spans(
    shard VARCHAR, position BIGINT, "offset" INTEGER, doc_id VARCHAR, doc_start BIGINT,
    n_tokens INTEGER, char_start BIGINT, char_end BIGINT);
CREATE TABLE IF NOT EXISTS sequences(
    shard VARCHAR, position BIGINT, n_tokens INTEGER, sha256 VARCHAR);
CREATE TABLE IF NOT EXISTS models(
    model VARCHAR, role VARCHAR, domain VARCHAR, path VARCHAR, current BOOLEAN);
CREATE TABLE IF NOT EXISTS losses(
    model VARCHAR, shard VARCHAR, position BIGINT, loss FLOAT, n_tokens INTEGER,
    precision VARCHAR);
CREATE TABLE IF NOT EXISTS parts(kind VARCHAR, shard VARCHAR, model VARCHAR, fingerprint VARCHAR);
CREATE TABLE IF NOT EXISTS excluded(shard VARCHAR, position BIGINT, reason VARCHAR);
CREATE TABLE IF NOT EXISTS paired_losses(
    domain VARCHAR, shard VARCHAR, position BIGINT, loss_prior FLOAT, loss_conditional FLOAT);
CREATE OR REPLACE VIEW color AS
    SELECT *, loss_conditional::DOUBLE - loss_prior::DOUBLE AS color FROM paired_losses;
"""

SELECTIONS_SCHEMA = """
CREATE TABLE IF NOT EXISTS selections(
    selection VARCHAR, shard VARCHAR, position BIGINT, rank BIGINT, score DOUBLE);
CREATE TABLE IF NOT EXISTS selection_versions(
    selection VARCHAR, domain VARCHAR, arm VARCHAR, prior VARCHAR, conditional VARCHAR,
    cutoff DOUBLE, created VARCHAR, current BOOLEAN);
"""

# These tables used to be in scores.duckdb. A query on them there fails and names the new file.
MOVED = """
CREATE OR REPLACE VIEW selections AS
    SELECT why AS selection, why AS shard, why::BIGINT AS position, why::BIGINT AS rank,
        why::DOUBLE AS score
    FROM (
        SELECT error('the table selections is in selections.duckdb, next to this file')
            ::VARCHAR AS why
    )
    WHERE why IS NOT NULL;
CREATE OR REPLACE VIEW selection_versions AS
    SELECT why AS selection, why AS domain, why AS arm, why AS prior, why AS conditional,
        why::DOUBLE AS cutoff, why AS created, why::BOOLEAN AS current
    FROM (
        SELECT error('the table selection_versions is in selections.duckdb, next to this file')
            ::VARCHAR AS why
    )
    WHERE why IS NOT NULL;
"""

RESULTS_SCHEMA = """
CREATE TABLE evaluations(
    domain VARCHAR, arm VARCHAR, seed BIGINT, tokens BIGINT, metric VARCHAR, value DOUBLE);
CREATE TABLE kernel_runs(
    run_id VARCHAR, verb VARCHAR, folder VARCHAR, model VARCHAR, shard VARCHAR, chunk VARCHAR,
    sequences BIGINT, tokens BIGINT, seconds DOUBLE, device VARCHAR, node VARCHAR,
    precision VARCHAR,
    kernel VARCHAR, matrix_share DOUBLE, recorded VARCHAR, versions VARCHAR);
CREATE TABLE artifacts(
    asset VARCHAR, partition VARCHAR, key VARCHAR, fingerprint VARCHAR, path VARCHAR,
    manifest VARCHAR, bytes BIGINT, rows BIGINT, run VARCHAR, reused BOOLEAN, facts VARCHAR,
    inputs VARCHAR, sources VARCHAR, recipe VARCHAR, code BIGINT, seed BIGINT, precision VARCHAR,
    experiment VARCHAR, environment VARCHAR, recorded VARCHAR, replaces VARCHAR,
    removed BOOLEAN, previous VARCHAR);
"""


@dataclass(frozen=True)
class PublishedSelection:
    """An arm's selection to publish: its fingerprint, its file, and the models that scored it."""

    selection: str
    table: Path
    domain: str
    arm: str
    prior: str
    conditional: str | None
    created: str


class ScoreStore(dg.ConfigurableResource):
    """Publish and read a home's `scores.duckdb`, `selections.duckdb` and `results.duckdb`."""

    home: str

    @contextlib.contextmanager
    def read(
        self, refined: Mapping[str, Path] | None = None
    ) -> Iterator[duckdb.DuckDBPyConnection]:
        """Open a read-only connection to the last published scores.

        `refined` maps domains to Parquet files of float32 losses, which the connection shows
        instead of the published losses. The published selections are attached as the database
        `selected`. Raises InputError if no scores have been published yet.
        """
        home = Home(self.home)
        if not home.scores.exists():
            raise InputError(f"{home.scores} does not exist yet; materialize score_tables first")
        with contextlib.closing(duckdb.connect()) as connection:
            limit_memory(connection, home.scores, READING_MEMORY)
            if home.selections.exists():
                attach(connection, home.selections, "selected")
            else:
                connection.execute("ATTACH ':memory:' AS selected; USE selected;")
                connection.execute(SELECTIONS_SCHEMA)
            attach(connection, home.scores, "scores")
            connection.execute("USE scores")
            if refined:
                overlay(connection, refined)
            yield connection

    def publish(
        self, parts: Sequence[Part], models: Sequence[PublishedModel], length: int
    ) -> dict[str, int]:
        """Update the tables to contain exactly these parts and models; return rows per table.

        Only new and changed parts are read, and only what is derived from them is recomputed.
        `length` is the number of tokens of a sequence. Raises ValueError, and leaves the last good
        file, if a loss is not finite or a sequence has two losses with one model.
        """
        read = {(p.kind, p.shard, p.model, p.fingerprint): p for p in parts}
        derived = {exclusion(parts, length), *pairs(parts, models)}
        wanted = read.keys() | derived
        home = Home(self.home)
        if home.scores.exists():
            with self.read() as connection:
                if _holds(connection, wanted, models):
                    return _row_counts(connection)
        with next_version(home.scores, home.leases, SCHEMA + MOVED) as connection:
            there = set(fetch(connection, "SELECT kind, shard, model, fingerprint FROM parts"))
            remove(connection, there - wanted)
            for key in sorted(read.keys() - there, key=str):
                with transaction(connection):
                    insert(connection, read[key])
                    connection.execute("INSERT INTO parts VALUES (?, ?, ?, ?)", list(key))
            connection.execute("DELETE FROM models")
            for m in models:
                connection.execute(
                    "INSERT INTO models VALUES (?, ?, ?, ?, true)",
                    [m.model, m.role, m.domain, m.path],
                )
            to_derive = sorted(derived - there, key=str)
            for domain in dict.fromkeys(key[2] for key in to_derive):
                if domain is None:
                    exclude(connection, length)
                else:
                    pair(connection, domain, [key[1] for key in to_derive if key[2] == domain])
            with transaction(connection):
                for key in to_derive:
                    connection.execute("INSERT INTO parts VALUES (?, ?, ?, ?)", list(key))
            return _row_counts(connection)

    def publish_selections(self, selections: Sequence[PublishedSelection]) -> None:
        """Publish selections in order, each as the current one of its domain and arm."""
        home = Home(self.home)
        # Checked first, because even a change without effect copies the file.
        if home.selections.exists():
            with contextlib.closing(
                duckdb.connect(str(home.selections), read_only=True)
            ) as connection:
                if all(_is_current(connection, selection) for selection in selections):
                    return
        with next_version(home.selections, home.leases, SELECTIONS_SCHEMA) as connection:
            for selection in selections:
                _enter_selection(connection, selection)

    def publish_results(
        self,
        evaluations: Sequence[Mapping[str, Any]],
        kernel_runs: Sequence[Mapping[str, Any]],
        ledger: Sequence[Mapping[str, Any]],
    ) -> None:
        """Rebuild `results.duckdb` from evaluations, records of kernel runs and the ledger."""
        home = Home(self.home)
        with next_version(home.results, home.leases, RESULTS_SCHEMA, fresh=True) as connection:
            tables = {"evaluations": evaluations, "kernel_runs": kernel_runs, "artifacts": ledger}
            with transaction(connection):
                for table, rows in tables.items():
                    columns = [r[0] for r in fetch(connection, f"DESCRIBE {table}")]
                    marks = ", ".join("?" * len(columns))
                    values = [[_plain(row.get(c)) for c in columns] for row in rows]
                    if values:
                        connection.executemany(f"INSERT INTO {table} VALUES ({marks})", values)


def _is_current(connection: duckdb.DuckDBPyConnection, new: PublishedSelection) -> bool:
    """Whether a selection is already the current one of its domain and arm."""
    found = fetch(
        connection,
        "SELECT current FROM selection_versions WHERE selection = ? AND domain = ? AND arm = ?",
        [new.selection, new.domain, new.arm],
    )
    return found == [(True,)]


def _enter_selection(connection: duckdb.DuckDBPyConnection, new: PublishedSelection) -> None:
    """Make a selection the current one of its domain and arm."""
    mine = [new.selection, new.domain, new.arm]
    connection.execute(
        "UPDATE selection_versions SET current = (selection = ?) WHERE domain = ? AND arm = ?", mine
    )
    known = _count(
        connection,
        "SELECT count(*) FROM selection_versions WHERE selection = ? AND domain = ? AND arm = ?",
        mine,
    )
    if known:
        return
    rows = connection.read_parquet(str(new.table), hive_partitioning=False)  # noqa: F841  (read by name below)
    # Another arm may have selected exactly the same sequences.
    same = "SELECT count(*) FROM selections WHERE selection = ?"
    if not _count(connection, same, [new.selection]):
        connection.execute(
            "INSERT INTO selections BY NAME "
            "SELECT ? AS selection, shard, position, rank, score FROM rows",
            [new.selection],
        )
    connection.execute(
        "INSERT INTO selection_versions SELECT ?, ?, ?, ?, ?, max(score), ?, true FROM rows",
        [*mine, new.prior, new.conditional, new.created],
    )


def move_models(scores: Path, old: str, new: str) -> None:
    """Change the paths of models in a scores database from one home to another."""
    if scores.exists():
        with contextlib.closing(duckdb.connect(str(scores))) as connection:
            connection.execute(
                "UPDATE models SET path = $new || substr(path, length($old) + 1) "
                "WHERE starts_with(path, $old || '/')",
                {"old": old, "new": new},
            )


def _holds(
    connection: duckdb.DuckDBPyConnection,
    parts: Set[Key],
    models: Sequence[PublishedModel],
) -> bool:
    """Whether the tables already contain exactly these parts and models."""
    published = fetch(connection, "SELECT model, role, domain, path FROM models")
    return set(fetch(connection, "SELECT kind, shard, model, fingerprint FROM parts")) == set(
        parts
    ) and set(published) == {(m.model, m.role, m.domain, m.path) for m in models}


def _row_counts(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    tables = ("documents", "spans", "sequences", "losses")
    return {t: _count(connection, f"SELECT count(*) FROM {t}") for t in tables}


def _count(
    connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[Any] = ()
) -> int:
    return int(fetch_row(connection, query, parameters)[0])


def _plain(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
