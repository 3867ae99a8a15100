"""Remove text from Dagster's records in a home: events, checks, ticks and run logs."""

import contextlib
import re
import shutil
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as db
from dagster._core.instance.utils import RUNLESS_RUN_ID

from colorfilter.errors import InputError
from commands.forget.artifacts import Shows, showing

BUSY = 30  # seconds to wait for a database that other processes are reading
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"(:?)')  # in JSON; a colon follows a key


def remove_from_history(folder: Path, shows: Shows) -> int:
    """Remove every run, event, check, tick and log that shows a text. Return the number of runs.

    `folder` is the DAGSTER_HOME of a home. The databases are files in it or, if its dagster.yaml
    says so, on a server.
    """
    storage = folder / "storage"
    logs = list(showing((f for f in folder.rglob("*") if ".db" not in f.name), shows))
    runs = {file.relative_to(storage).parts[0] for file in logs if storage in file.parents}
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        found = {c.engine.url: list(_rows(c, shows)) for c in _databases(instance)}
        runs |= {row["run_id"] for rows in found.values() for _, row in rows if row.get("run_id")}
        known = runs & {run.run_id for run in instance.get_runs()}
        for run_id in known:
            instance.delete_run(run_id)
        for run_id in runs:
            instance.compute_log_manager.delete_logs(prefix=[run_id])
            shutil.rmtree(storage / run_id, ignore_errors=True)
        # Not deleted with runs: the last event of an asset, check results and ticks.
        for connection in _databases(instance):
            for table, row in found.get(connection.engine.url, ()):
                connection.execute(table.delete().where(*(c == row[c.name] for c in _keys(table))))
    for file in logs:
        file.unlink(missing_ok=True)
    for database in folder.rglob("*.db"):  # SQLite leaves deleted data in free pages
        with contextlib.closing(sqlite3.connect(database, timeout=BUSY)) as sqlite:
            sqlite.execute("VACUUM")
            busy, *_ = sqlite.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:  # the write-ahead log still contains deleted rows
            raise InputError(
                f"{database}: in use, so deleted text stays in its log; stop the web UI and run "
                "the same command again"
            )
    return len(known)


def _databases(instance: dg.DagsterInstance) -> Iterator[db.Connection]:
    """Yield connections to Dagster's databases, one at a time. SQLite has one per run and more."""
    events: Any = instance.event_log_storage
    others: tuple[Any, ...] = (instance.run_storage, instance.schedule_storage)
    runs = [RUNLESS_RUN_ID, *events.get_all_run_ids()] if events.is_run_sharded else []
    of_runs = [partial(events.run_connection, run_id) for run_id in runs]
    seen: set[db.URL] = set()
    for connect in (*of_runs, events.index_connection, *(storage.connect for storage in others)):
        with connect() as connection:
            if connection.engine.url not in seen:  # on a server all are one database
                seen.add(connection.engine.url)
                yield connection


def _keys(table: db.Table) -> list[db.Column[Any]]:
    """Return the columns that identify a row."""
    return list(table.primary_key) or list(table.columns)


def _rows(connection: db.Connection, shows: Shows) -> Iterator[tuple[db.Table, db.RowMapping]]:
    """Yield the rows of a database that show a text, each with its table."""
    schema = db.MetaData()
    schema.reflect(connection)
    for table in schema.sorted_tables:
        keys = {column.name for column in _keys(table)}
        columns = [c for c in table.columns if c.name in keys or isinstance(c.type, db.String)]
        for row in connection.execute(db.select(*columns)).mappings():
            strings = [value for value in row.values() if isinstance(value, str)]
            strings += [part for s in strings for part, key in STRING.findall(s) if not key]
            if shows("\n".join(strings).replace("\\n", "\n")):
                yield table, row
