"""Forgetting documents from end to end: artifacts, score tables, and what Dagster has on record."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from assets import forgetting
from assets.forgetting import Survey
from colorfilter.errors import InputError
from colorfilter.redaction import Forgotten
from colorfilter.tables import fetch
from pipelines.history import Shows, remove_from_history, showing_files
from resources.artifacts import ArtifactStore
from resources.audit import WORKPLACE
from resources.gpu import Gpu
from resources.home import Home

PAGES = {".html", ".md", ".json", ".jsonl", ".yaml", ".txt"}


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
    """Take the documents out of all that holds them, and of the copies that `gpu` works from.

    Returns how many runs of Dagster went too. The score tables are removed: they are published
    again without the documents. Raises InputError while a run is at work, and where a text is still
    shown in the end; UnreachableError as Gpu.discard_copies does.
    """
    artifacts = ArtifactStore(home=str(home.root))
    documents = [found.document for found in surveys]
    shows = _shows(documents)
    names = sorted(min(document.doc_ids) for document in documents)
    gpu.reach()  # before it is begun, for nothing runs until it has come to its end
    with home.exclusively(f"colorfilter forget {' '.join(names)}"):
        gpu.discard_copies(home.artifacts)
        runs = remove_from_history(home, shows)
        shutil.rmtree(home.root / WORKPLACE, ignore_errors=True)
        forgetting.forget(artifacts, surveys)
        home.scores.unlink(missing_ok=True)
        left = [str(path) for path in _showing(home, shows)]
        if left:
            raise InputError(
                f"{min(documents[0].places)}: {len(left)} files still show text of it, the first "
                f"{left[0]}; remove it and run the same command again"
            )
    return runs


def _shows(documents: Sequence[Forgotten]) -> Shows:
    return lambda page: any(document.is_shown_in(page) for document in documents)


def _showing(home: Home, shows: Shows) -> Iterator[Path]:
    """Files of a home that show a text, beside Parquet tables and tokens."""
    yield from showing_files(home, shows)
    pages = (p for p in sorted(home.root.rglob("*")) if p.suffix in PAGES and p.is_file())
    for path in pages:
        if shows(path.read_text(encoding="utf-8", errors="ignore")):
            yield path
    for database in (home.selections, home.results):
        if database.exists() and any(shows(words) for words in _columns(database)):
            yield database


def _columns(database: Path) -> Iterator[str]:
    """The text columns of a DuckDB file, each as one string."""
    with contextlib.closing(duckdb.connect(str(database), read_only=True)) as connection:
        columns = fetch(
            connection,
            "SELECT table_name, column_name FROM duckdb_columns() SEMI JOIN duckdb_tables() "
            "USING (table_oid) WHERE data_type = 'VARCHAR'",
        )
        for table, column in columns:
            rows = fetch(connection, f'SELECT DISTINCT "{column}" FROM "{table}"')
            yield "\n".join(str(value) for (value,) in rows)


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
            files = ", ".join(holding.redacted)
            what = f"replaced by a version without it in {files}" if files else "removed"
            table.add_row(escape(holding.name), escape(what))
        console.print(table)
        for name, fingerprint in found.learned:
            console.print("learned from it:", escape(name), fingerprint[:16], highlight=False)
