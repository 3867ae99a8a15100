"""Forgetting documents from end to end: artefacts, score tables, and what Dagster has on record."""

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from assets import forgetting
from assets.forgetting import Survey
from colorfilter.errors import InputError
from colorfilter.withdrawal import Forgotten
from resources.artifacts import ArtifactStore
from resources.audit import WORKPLACE
from resources.gpu import Gpu
from resources.home import Home
from resources.score_store import ScoreStore

BUSY = 30  # seconds to wait for a database that others read


def look_up(home: Home, whats: Sequence[str]) -> list[Survey]:
    """Where the documents of these names are, and what learned from them.

    Raises InputError for what names none or several, and what is an item of a task.
    """
    artifacts = ArtifactStore(home=str(home.root))
    documents = {found.sha256: found for found in (forgetting.find(artifacts, w) for w in whats)}
    surveys = [forgetting.survey(artifacts, document) for document in documents.values()]
    for found in surveys:
        for holding in found.holdings:
            if (home.root / holding.path / "tasks").exists():
                raise InputError(
                    f"{min(found.document.places)}: is an item of a task; take it out of the "
                    "task's files and run, which reads them anew"
                )
    return surveys


def forget(home: Home, surveys: Sequence[Survey], gpu: Gpu) -> int:
    """Take the documents out of all that holds them, and of the copies that `gpu` works from;
    returns how many runs of Dagster went too.

    Raises InputError while a run is at work, and UnreachableError as Gpu.withdraw does.
    """
    artifacts = ArtifactStore(home=str(home.root))
    documents = [found.document for found in surveys]
    gpu.reach()  # before it is begun, for nothing runs until it has come to its end
    with home.forgetting():
        gpu.withdraw(home.artifacts)
        runs = _forget_runs(home, documents)
        shutil.rmtree(home.root / WORKPLACE, ignore_errors=True)
        for found in surveys:
            forgetting.forget(artifacts, found)
        ScoreStore(home=str(home.root)).forget([document.sha256 for document in documents])
    return runs


def _forget_runs(home: Home, documents: Sequence[Forgotten]) -> int:
    """Delete the runs whose events show text of a document, and what their databases had on it.

    Of each asset Dagster keeps its last event once more, so the history of those is wiped as well.
    """
    telling: set[str] = set()
    with dg.DagsterInstance.from_config(str(home.dagster)) as instance:
        assets = set()
        for run in instance.get_runs():
            for event in instance.all_logs(run.run_id):
                page = "\n".join(_words(json.loads(dg.serialize_value(event))))
                if any(document.is_told_in(page) for document in documents):
                    telling.add(run.run_id)
                    if event.dagster_event and event.dagster_event.asset_key:
                        assets.add(event.dagster_event.asset_key)
        instance.wipe_assets(sorted(assets))
        for run_id in telling:
            instance.delete_run(run_id)
    for database in sorted(home.dagster.rglob("*.db")):
        with contextlib.closing(sqlite3.connect(database, timeout=BUSY)) as connection:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return len(telling)


def _words(value: Any) -> Iterator[str]:
    """All strings in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _words(part)


# Shown to people -----------------------------------------------------------------------------


def print_surveys(console: Console, surveys: Sequence[Survey]) -> None:
    """Say what will be taken out where, and what learned from it."""
    for found in surveys:
        document = found.document
        chars = f", {len(document.text):,} characters" if document.text else ""
        console.print(f"{min(document.places)}{chars}", highlight=False, soft_wrap=True)
        for place in sorted(document.places)[1:]:
            console.print(f"  and at {place}", highlight=False, soft_wrap=True)
        table = Table("held by", "what happens to it", box=box.SIMPLE)
        for holding in found.holdings:
            parts = [", ".join(holding.emptied) and f"taken out of {', '.join(holding.emptied)}"]
            parts.append(", ".join(holding.removed) and f"{len(holding.removed)} files removed")
            table.add_row(escape(holding.name), "; ".join(filter(None, parts)))
        console.print(table)
        for name, fingerprint in found.learned:
            console.print("learned from it:", escape(name), fingerprint[:16], highlight=False)
