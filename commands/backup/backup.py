"""Back up a home while the pipeline may be running, and restore a home from a backup.

A backup is a folder with `backup.json`, which names the recipe; `artifacts/`, as in the home; and
`state-<time>/`, a copy of the files that change: the ledger, the tables, Dagster's databases. The
manifest of the state is written last and lists the artifacts that belong to it. So a backup that is
killed leaves the previous one intact, and the next one resumes. Each artifact is copied once. It
stays in the backup when it is pruned from the home, unless `forget` replaced or removed it.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from colorfilter.errors import InputError
from colorfilter.storage.files import (
    copy_file,
    file_sha256,
    lock,
    require_space,
    write_text_atomically,
)
from colorfilter.storage.manifest import MANIFEST, content, read_manifest, stands, write_manifest
from resources.databases import copy_sqlite
from resources.home import Home
from resources.ledger import Ledger, is_removed
from resources.score_store import move_models

OWNER = "backup.json"
BEGUN = "begun"  # folder of the artifact that is being copied
# Files of a home that change. The ledger is copied after the tables and Dagster's history, so that
# it has every artifact that they refer to.
CHANGING = ("shards.json", "*.duckdb", "rows/*.parquet", "dagster/**/*", "*.jsonl")
JOURNALS = ("-wal", "-shm", "-journal")  # SQLite's; copying a database includes their content


class DamagedError(InputError):
    """The files of a folder do not match its manifest."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"{folder}: is damaged, its files do not match its manifest; remove the folder, then "
            "`colorfilter run` (rebuilds it in the home) and `colorfilter backup` (copies it again)"
        )


@dataclass
class Copying:
    """Copies folders and files, counts them, and calls `listener` with bytes done and in total."""

    listener: Callable[[int, int], None]
    copied: int = 0
    there: int = 0
    done: int = 0
    total: int = 0

    @property
    def summary(self) -> str:
        return (
            f"{self.copied} artifacts copied, {self.there} already there; "
            f"{self.done / 1e6:,.1f} MB copied"
        )

    def progress(self, amount: int) -> None:
        """Count and report bytes that were copied."""
        self.done += amount
        self.listener(self.done, self.total)

    def expect(self, size: int, place: Path, what: str) -> None:
        """Add bytes to the total. Raises OSError if the disk has no room for them."""
        require_space(place, size, what)
        self.total = self.done + size

    def artifacts(self, paths: Collection[str], source: Path, target: Path, what: str) -> None:
        """Copy the artifacts that the target does not have.

        Raises DamagedError for an artifact that does not match its manifest, unless it was pruned
        in the meantime.
        """
        missing = [path for path in paths if not _same(source / path, target / path)]
        self.there = len(paths) - len(missing)
        self.expect(sum(_size(source / path) for path in missing), target, what)
        for path in missing:
            try:
                self.folder(path, source, target)
                self.copied += 1
            except DamagedError:
                if stands(source / path):
                    raise

    def folder(self, path: str, source: Path, target: Path) -> None:
        """Copy the folder at a path. It appears in the target once every file is verified.

        Raises DamagedError for a file that does not match the manifest.
        """
        begun = target / BEGUN
        shutil.rmtree(begun, ignore_errors=True)
        try:
            for file in read_manifest(source / path)["files"]:
                copy = begun / file["path"]
                if copy_file(source / path / file["path"], copy, self.progress) != file["sha256"]:
                    raise DamagedError(source / path)
            copy_file(source / path / MANIFEST, begun / MANIFEST, self.progress)
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise DamagedError(source / path) from error
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target / path, ignore_errors=True)
        begun.rename(target / path)

    def changing(self, source: Path, target: Path) -> None:
        """Copy a file that may be replaced or removed in the meantime.

        An SQLite database is copied in a committed state, a JSON Lines file up to its last newline.
        """
        with contextlib.suppress(FileNotFoundError):
            if source.name.endswith(".db"):
                copy_sqlite(source, target)
                self.progress(target.stat().st_size)
            else:
                copy_file(source, target, self.progress)
            if source.name.endswith(".jsonl"):
                with target.open("rb+") as copy:
                    copy.truncate(copy.read().rfind(b"\n") + 1)


def back_up(home: Home, folder: Path, listener: Callable[[int, int], None]) -> Copying:
    """Copy a home into a folder: the files that change, and artifacts the folder does not have.

    Raises InputError for a folder that is not a backup of a home of this recipe, for a damaged
    artifact, and while another command holds the home exclusively.
    """
    home.refuse_exclusive()
    copying = Copying(listener)
    with _failures_told(folder):
        _claim(folder, home)
        with lock(home.leases / "backup"):
            _copy(home, folder, copying)
    return copying


def _copy(home: Home, folder: Path, copying: Copying) -> None:
    state = folder / f"state-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    state.mkdir()
    found = [file for pattern in CHANGING for file in home.root.glob(pattern) if file.is_file()]
    changing = [file for file in found if not file.name.endswith(JOURNALS)]
    copying.expect(sum(file.stat().st_size for file in changing), folder, "the backup")
    for file in changing:
        copying.changing(file, state / file.relative_to(home.root))
    ledger = Ledger(state / home.ledger.name)
    entries = sorted(ledger.by_path().items())
    for path, entry in entries:
        if is_removed(entry) or ledger.last_version(path) != path:
            shutil.rmtree(folder / path, ignore_errors=True)
    standing = [path for path, _ in entries if stands(home.root / path)]
    copying.artifacts(standing, home.root, folder, "the backup")
    manifests = {path: folder / path / MANIFEST for path, _ in entries}
    held = {path: file_sha256(file) for path, file in manifests.items() if file.exists()}
    write_manifest(state, {"home": str(home.root), "format": home.format, "artifacts": held})
    for left in {*folder.glob("state-*"), folder / BEGUN} - {state}:
        shutil.rmtree(left, ignore_errors=True)


def restore(folder: Path, home: Home, listener: Callable[[int, int], None]) -> Copying:
    """Restore a backup into a new home, which appears once every file is copied and verified.

    Raises InputError for a home that is not empty, and for an unfinished or damaged backup.
    """
    copying = Copying(listener)
    coming = home.root / "restoring"
    with _failures_told(folder):
        recipe = _recipe(folder)
        if recipe is None:
            raise InputError(f"{folder}: is not a backup; give the folder of one")
        _refuse_nested(folder, home)
        if home.root.exists() and set(home.root.iterdir()) - {coming}:
            raise InputError(f"home {home.root}: is not empty; give a new folder with --home")
        state = max((s for s in folder.glob("state-*") if stands(s)), default=None)
        if state is None:
            raise InputError(f"backup {folder}: was never finished; run `colorfilter backup` again")
        facts = read_manifest(state)["facts"]
        coming.mkdir(parents=True, exist_ok=True)
        try:
            for path, sha256 in facts["artifacts"].items():
                if not stands(folder / path) or file_sha256(folder / path / MANIFEST) != sha256:
                    raise DamagedError(folder / path)
            lacking = (folder / path for path in facts["artifacts"] if not (coming / path).exists())
            copying.expect(_size(state) + sum(map(_size, lacking)), coming, "the home")
            copying.folder(state.name, folder, coming)
            copying.artifacts(facts["artifacts"], folder, coming, "the home")
        except DamagedError:
            shutil.rmtree(coming)
            raise
        if copying.copied + copying.there < len(facts["artifacts"]):
            raise InputError(f"backup {folder}: changed during the restore; restore again")
        move_models(coming / state.name / home.scores.name, facts["home"], str(home.root))
        (coming / state.name / MANIFEST).unlink()
        for found in [*(coming / state.name).iterdir(), *coming.glob(home.artifacts.name)]:
            found.rename(home.root / found.name)
        shutil.rmtree(coming)
        home.claim(recipe, made_as=int(facts.get("format", 1)))
    return copying


def _size(folder: Path) -> int:
    return content(folder).bytes + (folder / MANIFEST).stat().st_size


def _same(source: Path, target: Path) -> bool:
    """Return whether the target is complete and has the same manifest as the source."""
    return stands(target) and (source / MANIFEST).read_bytes() == (target / MANIFEST).read_bytes()


def _claim(folder: Path, home: Home) -> None:
    """Mark a new folder as a backup of a home, or check that it is one of the same recipe."""
    recipe = home.owner()
    if recipe is None:
        raise InputError(f"home {home.root}: does not exist; give another with --home")
    home.check(recipe)
    _refuse_nested(folder, home)
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        write_text_atomically(folder / OWNER, json.dumps({"recipe": recipe}))
    whose = _recipe(folder)
    if whose is None:
        raise InputError(f"{folder}: is not empty and not a backup; give another folder")
    if whose != recipe:
        raise InputError(
            f"backup {folder}: belongs to recipe '{whose}', not '{recipe}'; give another folder"
        )


def _recipe(folder: Path) -> str | None:
    """Return the recipe name of a backup, or None for a folder that is not a backup."""
    try:
        return str(json.loads((folder / OWNER).read_text(encoding="utf-8"))["recipe"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _refuse_nested(folder: Path, home: Home) -> None:
    place = folder.resolve()
    if place.is_relative_to(home.root) or home.root.is_relative_to(place):
        raise InputError(
            f"{folder}: is inside the home {home.root} or contains it; give another folder"
        )


@contextlib.contextmanager
def _failures_told(folder: Path) -> Iterator[None]:
    """Turn an OSError into a one-line InputError that says how to resume."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"backup {folder}: {error}; run the same command again to resume"
        ) from error
