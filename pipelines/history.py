"""Removing text from what Dagster keeps in a home: events, checks, ticks and logs of runs."""

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.storage.event_log import SqlEventLogStorage
from dagster._core.storage.event_log.schema import AssetCheckExecutionsTable

from resources.home import Home

BUSY = 30  # seconds to wait for a database that others read

Shows = Callable[[str], bool]


def remove_from_history(home: Home, shows: Shows) -> int:
    """Remove every run, event, check, tick and log that shows a text; return how many runs went.

    `shows(string)` says whether a string does. Dagster keeps the last event of an asset apart from
    its run, so the history of assets whose events show the text is wiped as well.
    """
    with dg.DagsterInstance.from_config(str(home.dagster)) as instance:
        runs, assets = _showing(instance, shows)
        runs |= {f.relative_to(home.dagster).parts[1] for f in _logs(home) if shows(_text(f))}
        instance.wipe_assets(sorted(assets))
        _delete_checks(instance, shows)
        known = {run.run_id for run in instance.get_runs()}
        for run_id in runs:
            if run_id in known:
                instance.delete_run(run_id)
            instance.compute_log_manager.delete_logs(prefix=[run_id])
            shutil.rmtree(home.dagster / "storage" / run_id, ignore_errors=True)
    for file in _files(home):
        if shows(_text(file)):
            file.unlink()
    for database in _databases(home):
        _delete_rows(database, shows)
    return len(runs & known)


def showing_files(home: Home, shows: Shows) -> list[Path]:
    """Dagster's files in a home that show a text."""
    files = [file for file in _files(home) if shows(_text(file))]
    return [*files, *(d for d in _databases(home) if any(_rows(d, shows)))]


def _showing(instance: dg.DagsterInstance, shows: Shows) -> tuple[set[str], set[dg.AssetKey]]:
    """Runs with an event that shows a text, and the assets of these events."""
    runs: set[str] = set()
    assets: set[dg.AssetKey] = set()
    for run in instance.get_runs():
        for event in instance.all_logs(run.run_id):
            if shows("\n".join(_strings(json.loads(dg.serialize_value(event))))):
                runs.add(run.run_id)
                if event.dagster_event and event.dagster_event.asset_key:
                    assets.add(event.dagster_event.asset_key)
    return runs, assets


def _delete_checks(instance: dg.DagsterInstance, shows: Shows) -> None:
    """Delete results of asset checks that show a text, which outlive their runs."""
    storage = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage):
        return
    table = AssetCheckExecutionsTable
    with storage.index_connection() as connection:
        rows = connection.execute(table.select()).mappings().all()
        shown = [row["id"] for row in rows if shows(_words(row["evaluation_event"] or ""))]
        for identity in shown:
            connection.execute(table.delete().where(table.c.id == identity))


def _delete_rows(database: Path, shows: Shows) -> None:
    """Delete rows of a SQLite database that show a text, and the pages that they were on."""
    found = list(_rows(database, shows))
    with contextlib.closing(sqlite3.connect(database, timeout=BUSY)) as connection:
        for table, row in found:
            connection.execute(f'DELETE FROM "{table}" WHERE rowid = ?', [row])
        connection.commit()
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _rows(database: Path, shows: Shows) -> Iterator[tuple[str, int]]:
    """Tables and row ids of a SQLite database whose values show a text."""
    with contextlib.closing(sqlite3.connect(database, timeout=BUSY)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        for (table,) in tables.fetchall():
            for row, *values in connection.execute(f'SELECT rowid, * FROM "{table}"'):
                words = (_words(value) for value in values if isinstance(value, str))
                if shows("\n".join(words)):
                    yield table, row


def _databases(home: Home) -> list[Path]:
    return sorted(home.dagster.rglob("*.db"))


def _files(home: Home) -> list[Path]:
    """Dagster's files beside its databases."""
    every = sorted(home.dagster.rglob("*"))
    return [file for file in every if file.is_file() and ".db" not in file.name]


def _logs(home: Home) -> list[Path]:
    """What steps printed, in a folder of its run."""
    return [file for file in _files(home) if (home.dagster / "storage") in file.parents]


def _text(file: Path) -> str:
    return file.read_bytes().decode("utf-8", "ignore")


def _words(value: str) -> str:
    """All strings in a value that may be JSON, one a line."""
    try:
        return "\n".join(_strings(json.loads(value)))
    except ValueError:
        return value


def _strings(value: Any) -> Iterator[str]:
    """All strings in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
