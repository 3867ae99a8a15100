"""Upgrade a home that an earlier version created to the current format."""

import contextlib
from functools import partial
from pathlib import Path

import duckdb

from colorfilter.errors import InputError
from colorfilter.selection.sql import fetch
from colorfilter.storage.files import link_folder, lock
from colorfilter.storage.manifest import MANIFEST, read_manifest
from resources.artifacts import ArtifactStore
from resources.databases import attach, next_version
from resources.home import FORMAT, Home
from resources.ledger import is_removed
from resources.pruning import folders
from resources.score_store import MOVED, SELECTIONS_SCHEMA

TABLES = ("selections", "selection_versions")


def upgrade(home: Home) -> None:
    """Upgrade a home to the current format, one process at a time.

    Nothing is scored or trained again. An interrupted step is repeated. Raises InputError if a
    run is at work.
    """
    with lock(home.leases / "upgrade"):
        if home.format == FORMAT:
            return
        if home.is_at_work():
            raise InputError(
                f"home {home.root}: must be upgraded from an earlier version, but a run is at "
                "work; wait for it or cancel it"
            )
        if (home.root / "forgetting").exists():
            raise InputError(
                f"home {home.root}: `colorfilter forget` of an earlier version was interrupted; "
                "complete it with that version"
            )
        _move_selections(home)
        _replace_amended(home)
        home.record_format()


def _move_selections(home: Home) -> None:
    """Move the selection tables from `scores.duckdb` to `selections.duckdb` (format 2)."""
    if not home.scores.exists() or not _selections_in(home):
        return
    with next_version(home.selections, home.leases, SELECTIONS_SCHEMA, fresh=True) as connection:
        attach(connection, home.scores, "scores")
        for table in TABLES:
            connection.execute(f"INSERT INTO {table} BY NAME FROM scores.{table}")
    with next_version(home.scores, home.leases) as connection:
        for table in TABLES:
            connection.execute(f"DROP TABLE {table}")
        connection.execute(MOVED)


def _replace_amended(home: Home) -> None:
    """Replace artifacts that `forget` had changed in place by new versions (format 2)."""
    artifacts = ArtifactStore(home=str(home.root))
    entries = artifacts.ledger.by_path()
    for folder in list(folders(home.artifacts)):
        if not (folder / MANIFEST).exists():
            continue
        now = {f["path"]: f["now"] for f in read_manifest(folder)["files"] if "now" in f}
        entry = entries.get(str(folder.relative_to(home.root)))
        if not now or entry is None:
            continue
        if is_removed(entry):
            artifacts.remove(entry)
        else:
            artifacts.replace(entry, partial(_link_all, list(now)))
            artifacts.discard(folder)


def _link_all(changed: list[str], old: Path, new: Path) -> list[str]:
    link_folder(old, new, without=MANIFEST)
    return changed


def _selections_in(home: Home) -> bool:
    """Whether `scores.duckdb` still contains the selection tables."""
    with contextlib.closing(duckdb.connect(str(home.scores), read_only=True)) as connection:
        names = {name for (name,) in fetch(connection, "SELECT table_name FROM duckdb_tables()")}
    return names.issuperset(TABLES)
