"""The score store: DuckDB tables published from the Parquet record.

Parquet is the record, DuckDB the publication: a reader gets a new file by rename and never blocks
the pipeline, a crash leaves the last good file, and the file can be made again from Parquet.
Nothing here holds the file open between calls.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb

from colorfilter.errors import InputError
from colorfilter.files import lock, require_space, write_atomically
from colorfilter.score_tables import exclude, pair
from colorfilter.tables import fetch, fetch_row
from resources.home import Home
from resources.score_parts import Key, Part, PublishedModel, exclusion, insert, pairs, remove

# What DuckDB may hold of the tables before it spills to disk.
READING_MEMORY = "1GB"
PUBLISHING_MEMORY = "2GB"
# The newest form that every supported DuckDB reads.
STORAGE_VERSION = "v1.2.0"

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
CREATE TABLE IF NOT EXISTS selections(
    selection VARCHAR, shard VARCHAR, position BIGINT, rank BIGINT, score DOUBLE);
CREATE TABLE IF NOT EXISTS selection_versions(
    selection VARCHAR, domain VARCHAR, arm VARCHAR, prior VARCHAR, conditional VARCHAR,
    cutoff DOUBLE, created VARCHAR, current BOOLEAN);
CREATE TABLE IF NOT EXISTS parts(kind VARCHAR, shard VARCHAR, model VARCHAR, fingerprint VARCHAR);
CREATE TABLE IF NOT EXISTS excluded(shard VARCHAR, position BIGINT, reason VARCHAR);
CREATE TABLE IF NOT EXISTS paired_losses(
    domain VARCHAR, shard VARCHAR, position BIGINT, loss_prior FLOAT, loss_conditional FLOAT);
CREATE OR REPLACE VIEW color AS
    SELECT *, loss_conditional::DOUBLE - loss_prior::DOUBLE AS color FROM paired_losses;
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
    experiment VARCHAR, environment VARCHAR, recorded VARCHAR, withdrawn VARCHAR,
    previous VARCHAR);
"""


@dataclass(frozen=True)
class PublishedSelection:
    """What an arm selected, by its fingerprint, the file it is in, and the models it is by."""

    selection: str
    table: Path
    domain: str
    arm: str
    prior: str
    conditional: str | None
    created: str


class ScoreStore(dg.ConfigurableResource):
    """Publishes and reads `scores.duckdb` and `results.duckdb` of a home."""

    home: str

    @contextlib.contextmanager
    def read(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A read-only connection to the scores as published last.

        Raises InputError where none have been published yet.
        """
        path = Home(self.home).scores
        if not path.exists():
            raise InputError(f"{path} is not there yet; materialize score_tables first")
        with contextlib.closing(duckdb.connect(str(path), read_only=True)) as connection:
            limit_memory(connection, path, READING_MEMORY)
            yield connection

    def publish(
        self, parts: Sequence[Part], models: Sequence[PublishedModel], length: int
    ) -> dict[str, int]:
        """Bring the tables to hold exactly these parts and models; returns rows per table.

        Only new and changed parts are read, and what is worked out from them is worked out anew
        only where they changed. `length` is that of a sequence in tokens. Raises ValueError, and
        leaves the last good file, where a loss is not finite or a sequence has two rows for a
        model.
        """
        read = {(p.kind, p.shard, p.model, p.fingerprint): p for p in parts}
        derived = {exclusion(parts, length), *pairs(parts, models)}
        wanted = read.keys() | derived
        if Home(self.home).scores.exists():
            with self.read() as connection:
                if _holds(connection, wanted, models):
                    return _row_counts(connection)
        with self._next(Home(self.home).scores, SCHEMA) as connection:
            there = set(fetch(connection, "SELECT kind, shard, model, fingerprint FROM parts"))
            remove(connection, there - wanted)
            for key in sorted(read.keys() - there, key=str):
                with _transaction(connection):
                    insert(connection, read[key])
                    connection.execute("INSERT INTO parts VALUES (?, ?, ?, ?)", list(key))
            connection.execute("DELETE FROM models")
            for m in models:
                connection.execute(
                    "INSERT INTO models VALUES (?, ?, ?, ?, true)",
                    [m.model, m.role, m.domain, m.path],
                )
            work_out = sorted(derived - there, key=str)
            for domain in dict.fromkeys(key[2] for key in work_out):
                if domain is None:
                    exclude(connection, length)
                else:
                    pair(connection, domain, [key[1] for key in work_out if key[2] == domain])
            with _transaction(connection):
                for key in work_out:
                    connection.execute("INSERT INTO parts VALUES (?, ?, ?, ?)", list(key))
            return _row_counts(connection)

    def publish_selection(self, selection: PublishedSelection) -> None:
        """Enter a selection, as the current one of its domain and arm."""
        # Looked at first: a change, even to the same, costs a copy of the tables.
        with self.read() as connection:
            found = fetch(
                connection,
                "SELECT current FROM selection_versions "
                "WHERE selection = ? AND domain = ? AND arm = ?",
                [selection.selection, selection.domain, selection.arm],
            )
        if found == [(True,)]:
            return
        # The tables as they are: those of an older version stay whole until the next publication.
        with self._next(Home(self.home).scores) as connection:
            enter_selection(connection, selection)

    def forget(self, texts: Sequence[str]) -> None:
        """Take what documents carried along out of the tables, by the sha256 of their texts.

        The file is written anew: pages that were freed still have what was on them.
        """
        path = Home(self.home).scores
        if not path.exists():
            return
        require_space(path.parent, path.stat().st_size * 3 // 2, f"a new {path.name}")
        carried = (
            "* REPLACE (CASE WHEN list_contains($texts, sha256) THEN '{}' ELSE extra END AS extra, "
            "CASE WHEN list_contains($texts, sha256) THEN 0 ELSE n_chars END AS n_chars)"
        )
        with self._next(path, SCHEMA, fresh=True) as connection:
            place = str(path).replace("'", "''")
            connection.execute(f"ATTACH '{place}' AS old (READ_ONLY)")
            tables = "SELECT table_name FROM duckdb_tables() WHERE database_name = 'old'"
            for (table,) in fetch(connection, tables):
                columns = carried if table == "documents" else "*"
                query = f"INSERT INTO {table} BY NAME SELECT {columns} FROM old.{table}"
                connection.execute(query, {"texts": list(texts)} if columns == carried else {})

    def publish_results(
        self,
        evaluations: Sequence[Mapping[str, Any]],
        kernel_runs: Sequence[Mapping[str, Any]],
        ledger: Sequence[Mapping[str, Any]],
    ) -> None:
        """Make `results.duckdb` anew from the records."""
        path = Home(self.home).results
        with self._next(path, RESULTS_SCHEMA, fresh=True) as connection:
            tables = {"evaluations": evaluations, "kernel_runs": kernel_runs, "artifacts": ledger}
            with _transaction(connection):
                for table, rows in tables.items():
                    columns = [r[0] for r in fetch(connection, f"DESCRIBE {table}")]
                    marks = ", ".join("?" * len(columns))
                    values = [[_plain(row.get(c)) for c in columns] for row in rows]
                    if values:
                        connection.executemany(f"INSERT INTO {table} VALUES ({marks})", values)

    @contextlib.contextmanager
    def _next(
        self, path: Path, schema: str = "", fresh: bool = False
    ) -> Iterator[duckdb.DuckDBPyConnection]:
        """A copy of a database to change; in the end it takes its place.

        One publication at a time: what another one changes meanwhile would be lost. What is changed
        may be committed bit by bit: a transaction holds memory for all that it has inserted.
        """
        turn = lock(Home(self.home).leases / path.name)
        with turn, self._copied(path, schema, fresh) as connection:
            yield connection

    @contextlib.contextmanager
    def _copied(self, path: Path, schema: str, fresh: bool) -> Iterator[duckdb.DuckDBPyConnection]:
        temporary = path.with_suffix(".next")
        _unlink(temporary)
        if path.exists() and not fresh:
            require_space(path.parent, path.stat().st_size * 3 // 2, f"a new {path.name}")
            shutil.copyfile(path, temporary)
        connection = duckdb.connect()
        try:
            limit_memory(connection, path, PUBLISHING_MEMORY)
            place = str(temporary).replace("'", "''")
            connection.execute(f"ATTACH '{place}' AS next (STORAGE_VERSION '{STORAGE_VERSION}')")
            connection.execute("USE next")
            connection.execute(schema)
            yield connection
            connection.execute("USE memory")
            connection.execute("DETACH next")
        except BaseException:
            connection.close()
            _unlink(temporary)
            raise
        connection.close()
        write_atomically(temporary, path)


@contextlib.contextmanager
def _transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Commit what is done within, in the end. Where that fails the database is given up."""
    connection.execute("BEGIN")
    yield
    connection.execute("COMMIT")


def _unlink(database: Path) -> None:
    """Remove a database and what DuckDB has not yet written into it, where they are there."""
    database.unlink(missing_ok=True)
    database.with_name(f"{database.name}.wal").unlink(missing_ok=True)


def enter_selection(connection: duckdb.DuckDBPyConnection, new: PublishedSelection) -> None:
    """Make a selection the current one of its domain and arm, as of publish_selection."""
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
    rows = connection.read_parquet(str(new.table))  # noqa: F841  (read by name below)
    # Another arm may have selected exactly the same.
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


def limit_memory(connection: duckdb.DuckDBPyConnection, path: Path, memory: str) -> None:
    """Let a connection hold so much before it spills beside the file at `path`."""
    connection.execute(f"SET memory_limit = '{memory}'")
    connection.execute("SET preserve_insertion_order = false")
    connection.execute("SET enable_progress_bar = false")
    connection.execute("SET temp_directory = ?", [str(path.with_suffix(".spill"))])


def _holds(
    connection: duckdb.DuckDBPyConnection,
    parts: Set[Key],
    models: Sequence[PublishedModel],
) -> bool:
    """Whether the tables hold exactly these parts and models already."""
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
