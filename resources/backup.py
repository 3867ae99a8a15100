"""Backups of a home, taken while the pipeline may be at work, and homes made of them again.

The folder of a backup holds `backup.json`, which says whose it is; `artifacts/`, as in the home;
and `state-<time>/` with what changes: the ledger, the tables, Dagster's databases. The manifest of
that, written last, lists the artefacts that the ledger names and the backup has, so a backup that
is killed leaves the last one whole, and the next goes on from there. An artefact is copied once and
stays, even when it is pruned in the home, unless it was replaced or removed for good there.
`artifacts/` and what lies in `state-<time>/`, put side by side, are a home.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from colorfilter.errors import InputError
from colorfilter.files import file_sha256, lock, require_space, write_text_atomically
from colorfilter.provenance import MANIFEST, stands, write_manifest
from resources.artifacts import ArtifactStore
from resources.copying import BEGUN, Copying, DamagedError, Listener, is_copied, size
from resources.home import Home
from resources.ledger import Entry, is_removed

OWNER = "backup.json"
# What changes in a home, beside the files that are appended to.
CHANGING = ("shards.json", "*.duckdb", "rows/*.parquet", "dagster/**/*")
JOURNALS = ("-wal", "-shm", "-journal")  # SQLite's; a copy of the database has what is in them


def back_up(home: Home, folder: Path, listener: Listener) -> Copying:
    """Copy a home into a folder, of its artefacts those that are not there yet.

    Raises InputError for a folder that is no backup of this recipe's home, for an artefact that is
    damaged, and while a command works that keeps backups away.
    """
    home.refuse_exclusive()
    copying = Copying(listener)
    with _failures_told(folder):
        _claim(folder, home)
        with lock(home.leases / "backup"):
            _copy(home, folder, copying)
    return copying


def _copy(home: Home, folder: Path, copying: Copying) -> None:
    """Tables and Dagster's history before the ledger, which then knows all that they tell of.

    What the ledger names stands by the time that it is read, and does not change.
    """
    state = folder / f"state-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    state.mkdir()
    found = [file for form in CHANGING for file in home.root.glob(form)]
    changing = [f for f in found if f.is_file() and not f.name.endswith(JOURNALS)]
    copying.total = sum(file.stat().st_size for file in changing)
    require_space(folder, copying.total, "the backup")
    for file in changing:
        copying.changing(file, state / file.relative_to(home.root))
    copying.lines(home.ledger, state / home.ledger.name)
    copying.lines(home.kernel_runs, state / home.kernel_runs.name)
    ledger = list(ArtifactStore(home=str(state)).ledger)
    _remove_gone(folder, ledger)
    named = sorted({entry["path"] for entry in ledger})
    standing = [path for path in named if stands(home.root / path)]
    missing = [path for path in standing if not is_copied(home.root / path, folder / path)]
    copying.there = len(standing) - len(missing)
    rest = sum(size(home.root / path) for path in missing)
    copying.total = copying.done + rest
    require_space(folder, rest, "the backup")
    for path in missing:
        try:
            copying.artifact(path, home.root, folder)
        except DamagedError:
            if stands(home.root / path):  # and was not pruned meanwhile
                raise
    manifests = {path: folder / path / MANIFEST for path in named}
    held = {path: file_sha256(file) for path, file in manifests.items() if file.exists()}
    facts = {"home": str(home.root), "format": home.format, "artifacts": held}
    write_manifest(state, facts)
    for left in {*folder.glob("state-*"), folder / BEGUN} - {state}:
        shutil.rmtree(left, ignore_errors=True)


def _remove_gone(folder: Path, ledger: Sequence[Entry]) -> None:
    """Remove from a backup what the ledger says was replaced or removed for good."""
    last = {entry["path"]: entry for entry in ledger}
    gone = {path for path, entry in last.items() if is_removed(entry)}
    gone |= {str(entry["replaces"]) for entry in ledger if entry.get("replaces")}
    for path in gone:
        shutil.rmtree(folder / path, ignore_errors=True)


def restore(folder: Path, home: Home, listener: Listener) -> Copying:
    """Make a home of a backup: it is one once all is there, and every file hashed again.

    Raises InputError for a home that is not empty, and for a backup that is unfinished or damaged.
    """
    copying = Copying(listener)
    coming = home.root / "restoring"
    with _failures_told(folder):
        recipe = _recipe(folder)
        if recipe is None:
            raise InputError(f"{folder}: is not a backup; name the folder of one")
        _refuse_nested(folder, home)
        if home.root.exists() and set(home.root.iterdir()) - {coming}:
            raise InputError(f"home {home.root}: is not empty; name a new one with --home")
        state = max((s for s in folder.glob("state-*") if stands(s)), default=None)
        if state is None:
            raise InputError(f"backup {folder}: was never finished; back up again")
        facts = json.loads((state / MANIFEST).read_text(encoding="utf-8"))["facts"]
        try:
            _bring(folder, state.name, facts["artifacts"], coming, copying)
        except DamagedError:
            shutil.rmtree(coming, ignore_errors=True)
            raise
        state = coming / state.name
        _point_to(home, facts["home"], state / home.scores.name)
        (state / MANIFEST).unlink()
        for found in [*state.iterdir(), *coming.glob(home.artifacts.name)]:
            found.rename(home.root / found.name)
        shutil.rmtree(coming)
        home.claim(recipe, made_as=int(facts.get("format", 1)))
    return copying


def _bring(
    folder: Path, state: str, artifacts: Mapping[str, str], coming: Path, copying: Copying
) -> None:
    """Copy a backup's state and its artefacts, which are listed with their manifests' sha256."""
    for path, sha256 in artifacts.items():
        manifest = folder / path / MANIFEST
        if not manifest.exists() or file_sha256(manifest) != sha256:
            raise DamagedError(folder / path)
    missing = [path for path in artifacts if not is_copied(folder / path, coming / path)]
    copying.there = len(artifacts) - len(missing)
    copying.total = sum(size(folder / path) for path in [state, *missing])
    coming.mkdir(parents=True, exist_ok=True)
    require_space(coming, copying.total, "the home")
    copying.folder(state, folder, coming)
    for path in missing:
        copying.artifact(path, folder, coming)


def _point_to(home: Home, old: str, scores: Path) -> None:
    """Make the table of models name the checkpoints in this home."""
    if scores.exists():
        with contextlib.closing(duckdb.connect(str(scores))) as connection:
            connection.execute(
                "UPDATE models SET path = $new || substr(path, length($old) + 1) "
                "WHERE starts_with(path, $old || '/')",
                {"old": old, "new": str(home.root)},
            )


def _claim(folder: Path, home: Home) -> None:
    """Make a folder the backup of a home, or check that it is one of the same recipe."""
    recipe = home.owner()
    if recipe is None:
        raise InputError(f"home {home.root}: there is none; name another with --home")
    home.check(recipe)
    _refuse_nested(folder, home)
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        write_text_atomically(folder / OWNER, json.dumps({"recipe": recipe}))
    whose = _recipe(folder)
    if whose is None:
        raise InputError(f"{folder}: holds something else than a backup; name another folder")
    if whose != recipe:
        raise InputError(
            f"backup {folder}: is of the recipe '{whose}', not of '{recipe}'; name another folder"
        )


def _recipe(folder: Path) -> str | None:
    """The recipe that a backup is of, None for a folder that is not a backup."""
    try:
        return str(json.loads((folder / OWNER).read_text(encoding="utf-8"))["recipe"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _refuse_nested(folder: Path, home: Home) -> None:
    place = folder.resolve()
    if place.is_relative_to(home.root) or home.root.is_relative_to(place):
        raise InputError(
            f"{folder}: lies in the home {home.root}, or holds it; name another folder"
        )


@contextlib.contextmanager
def _failures_told(folder: Path) -> Iterator[None]:
    """Say in a line what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"backup {folder}: {error}; the same command goes on from what is copied"
        ) from error
