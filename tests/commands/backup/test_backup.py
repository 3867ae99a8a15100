"""Backups are consistent during writes, never partial, and verified when restored."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import duckdb
import pytest

from colorfilter.errors import InputError
from colorfilter.storage.files import BLOCK, is_locked
from commands.backup.backup import back_up, restore
from resources.artifacts import ArtifactStore, Work
from resources.home import Home
from resources.pruning import leftovers
from tests.conftest import Project, made_since


def unheard(done: int, total: int) -> None:
    pass


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    Home(tmp_path / "home").claim("tests")
    return ArtifactStore(home=str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "backup"


def make(store: ArtifactStore, asset: str, text: str, shard: str | None = None) -> Path:
    def build(place: Path) -> dict[str, int]:
        (place / "below").mkdir()
        (place / "below" / "file.txt").write_text(text)
        (place / "file.txt").write_text("another")
        return {}

    return store.make(Work(asset, shard, recipe={"text": text}), build).path


def saved(store: ArtifactStore, folder: Path) -> tuple[int, int]:
    """Back up; how many artifacts were copied, and how many were there."""
    done = back_up(store.at, folder, unheard)
    return done.copied, done.there


def restored(folder: Path) -> ArtifactStore:
    """The artifacts of a new home made of a backup."""
    home = Home(folder.parent / f"restored-{len(list(folder.parent.iterdir()))}")
    restore(folder, home, unheard)
    assert home.owner() == "tests"
    return ArtifactStore(home=str(home.root))


def text_of(store: ArtifactStore, asset: str, shard: str | None = None) -> str:
    return (store.current(asset, shard).path / "below" / "file.txt").read_text()


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class KilledError(BaseException):
    """Ends what it is raised in as a kill does: nothing is tidied up."""


def killed_when(reached: Callable[[], bool]) -> Callable[[int, int], None]:
    def listener(done: int, total: int) -> None:
        if reached():
            raise KilledError

    return listener


def test_a_restored_project_has_everything_and_computes_nothing(
    finished: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    done = back_up(finished.home, tmp_path / "backup", lambda *amounts: told.append(amounts))
    assert done.copied == len({entry["path"] for entry in finished.ledger()})
    assert told == sorted(told)
    assert told[-1][0] == pytest.approx(told[-1][1], rel=0.02)
    (tmp_path / "elsewhere").mkdir()
    project = Project(tmp_path / "elsewhere", finished.facts)
    assert restore(tmp_path / "backup", project.home, unheard).copied == done.copied

    names = [{p.name for p in home.root.iterdir()} for home in (project.home, finished.home)]
    assert names[0] == names[1]
    assert files_of(project.home.artifacts) == files_of(finished.home.artifacts)
    assert project.home.kernel_runs.read_bytes() == finished.home.kernel_runs.read_bytes()
    with duckdb.connect(str(project.home.scores), read_only=True) as scores:
        paths = [Path(row[0]) for row in scores.execute("SELECT path FROM models").fetchall()]
    assert len(paths) == 2
    assert all(path.is_relative_to(project.home.root) for path in paths)
    assert all((path / "config.json").exists() for path in paths)

    before, kernels = len(project.ledger()), len(project.kernel_runs())
    assert project.run(monkeypatch) is None
    assert made_since(project, before) == {}
    assert len(project.kernel_runs()) == kernels
    with dg.DagsterInstance.get() as instance:
        new, *_, old = instance.get_runs()  # between them what other tests ran in that home
        assert old.status == new.status == dg.DagsterRunStatus.SUCCESS
        events = instance.all_logs(old.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
        assert len(events) > len(paths)


def test_a_second_backup_copies_what_is_new(store: ArtifactStore, folder: Path) -> None:
    make(store, "books/model", "one")
    make(store, "scores", "s", "web-1")
    assert saved(store, folder) == (2, 0)
    copies = {path: path.stat().st_ino for path in folder.glob("artifacts/**/file.txt")}
    make(store, "scores", "t", "web-2")
    assert saved(store, folder) == (1, 2)
    assert all(path.stat().st_ino == inode for path, inode in copies.items())
    assert saved(store, folder) == (0, 3)
    assert len(list(folder.glob("state-*"))) == 1
    home = restored(folder)
    assert text_of(home, "books/model") == "one"
    assert text_of(home, "scores", "web-2") == "t"
    assert list(home.ledger) == list(store.ledger)


def test_leases_and_unfinished_work_are_not_copied(store: ArtifactStore, folder: Path) -> None:
    made = make(store, "books/model", "one")
    with store.attempts([Work("books/scores")]) as (attempt,):
        (attempt.folder / "chunk").write_text("half")
        assert saved(store, folder) == (1, 0)
    assert (folder / made.relative_to(store.at.root) / "manifest.json").exists()
    assert not list(folder.rglob("chunk"))
    assert not list(folder.rglob("leases"))


def test_what_happens_meanwhile_leaves_the_backup_as_it_began(
    store: ArtifactStore, folder: Path
) -> None:
    for shard in ("web-1", "web-2"):
        make(store, "raw_corpus", shard, shard)
    with store.at.ledger.open("a") as ledger:
        ledger.write('{"asset": "raw_co')  # somebody is about to write a line
    log = store.at.dagster / "storage" / "step.out"
    log.parent.mkdir()
    log.write_text("printed")
    happened = []

    def meanwhile(done: int, total: int) -> None:
        if total:
            log.unlink(missing_ok=True)
        copied = (folder / "artifacts" / "raw_corpus" / "web-1").exists()
        if copied and (folder / "begun" / "below").exists() and not happened:
            for left in leftovers(store, ["web-1"]):  # web-2 is being copied
                store.discard(left.path)
                happened.append(left.asset)
            make(store, "raw_corpus", "web-3", "web-3")

    done = back_up(store.at, folder, meanwhile)
    assert happened == ["raw_corpus/web-2"]
    assert (done.copied, done.there) == (1, 0)
    assert not (folder / "begun").exists()
    home = restored(folder)
    assert text_of(home, "raw_corpus", "web-1") == "web-1"
    assert [entry["partition"] for entry in home.ledger] == ["web-1", "web-2"]
    assert home.at.ledger.read_bytes().endswith(b"}\n")
    assert [path.parent.name for path in home.at.artifacts.glob("*/*/*")] == ["web-1"]
    assert saved(store, folder) == (1, 1)
    assert text_of(restored(folder), "raw_corpus", "web-3") == "web-3"


@pytest.mark.parametrize("name", ["runs.db", ".db"])  # Dagster has both
def test_a_database_in_use_is_copied_with_what_its_journal_holds(
    store: ArtifactStore, folder: Path, name: str
) -> None:
    place = store.at.dagster / "history" / name
    place.parent.mkdir()
    writer = sqlite3.connect(place)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("CREATE TABLE runs(n)")
    writer.execute("INSERT INTO runs VALUES (1)")
    writer.commit()
    writer.execute("INSERT INTO runs VALUES (2)")  # and not yet committed
    assert place.with_name(f"{name}-wal").stat().st_size
    (store.at.dagster / "storage").mkdir()
    (store.at.dagster / "storage" / "step.out").write_text("printed")
    saved(store, folder)
    writer.close()
    home = restored(folder).at
    with sqlite3.connect(home.dagster / "history" / name) as copy:
        assert copy.execute("SELECT n FROM runs").fetchall() == [(1,)]
    assert (home.dagster / "storage" / "step.out").read_text() == "printed"
    assert (home.dagster / "dagster.yaml").exists()
    assert not list(folder.rglob("*-wal"))


def test_a_file_that_is_replaced_meanwhile_is_the_old_one(
    store: ArtifactStore, folder: Path
) -> None:
    store.at.scores.write_bytes(b"1" * (BLOCK + 1))

    def meanwhile(done: int, total: int) -> None:
        (folder.parent / "next").write_bytes(b"2" * (BLOCK + 1))
        (folder.parent / "next").replace(store.at.scores)

    back_up(store.at, folder, meanwhile)
    (copy,) = folder.glob("state-*/scores.duckdb")
    assert set(copy.read_bytes()) == {ord("1")}


def test_a_backup_that_was_killed_leaves_the_last_one_and_goes_on(
    store: ArtifactStore, folder: Path
) -> None:
    make(store, "books/model", "one")
    saved(store, folder)
    for shard in ("web-1", "web-2", "web-3"):
        make(store, "scores", shard, shard)
    make(store, "books/model", "two")
    copied = folder / "artifacts" / "scores"
    with pytest.raises(KilledError):
        back_up(store.at, folder, killed_when((folder / "begun" / "below").exists))
    with pytest.raises(KilledError):
        back_up(store.at, folder, killed_when((copied / "web-1").exists))
    assert text_of(restored(folder), "books/model") == "one"
    assert not (copied / "web-2").exists()
    assert saved(store, folder) == (2, 3)
    (state,) = folder.glob("state-*")
    assert set(folder.iterdir()) == {state, folder / "artifacts", folder / "backup.json"}
    home = restored(folder)
    assert text_of(home, "books/model") == "two"
    assert text_of(home, "scores", "web-3") == "web-3"


def test_a_first_backup_that_was_killed_is_none_until_it_is_made_again(
    store: ArtifactStore, folder: Path
) -> None:
    made = make(store, "books/model", "one")
    copy = folder / made.relative_to(store.at.root)
    make(store, "scores", "s")
    with pytest.raises(KilledError):
        back_up(store.at, folder, killed_when(copy.exists))
    with pytest.raises(InputError, match="was never finished; run `colorfilter backup` again"):
        restored(folder)
    assert saved(store, folder) == (1, 1)
    assert text_of(restored(folder), "scores") == "s"


def test_what_was_pruned_stays_in_the_backup(store: ArtifactStore, folder: Path) -> None:
    for shard in ("web-1", "web-2"):
        make(store, "raw_corpus", shard, shard)
    saved(store, folder)
    for left in leftovers(store, ["web-2"]):
        store.discard(left.path)
    assert saved(store, folder) == (0, 1)
    assert text_of(restored(folder), "raw_corpus", "web-1") == "web-1"


def test_what_was_pruned_before_is_not_missed(store: ArtifactStore, folder: Path) -> None:
    for shard in ("web-1", "web-2"):
        make(store, "raw_corpus", shard, shard)
    for left in leftovers(store, ["web-2"]):
        store.discard(left.path)
    assert saved(store, folder) == (1, 0)
    home = restored(folder)
    assert text_of(home, "raw_corpus", "web-2") == "web-2"
    with pytest.raises(InputError, match=r"files at .* are missing"):
        home.current("raw_corpus", "web-1")


def test_what_was_made_again_takes_the_place_of_its_copy(
    store: ArtifactStore, folder: Path
) -> None:
    work = Work("books/model")
    for text in ("one", "two"):

        def build(place: Path, text: str = text) -> dict[str, int]:
            (place / "below").mkdir()
            (place / "below" / "file.txt").write_text(text)
            return {}

        made = store.make(work, build).path
        assert saved(store, folder) == (1, 0)
        (made / "manifest.json").unlink()
        (made / "below" / "file.txt").unlink()
        (made / "below").rmdir()
    assert text_of(restored(folder), "books/model") == "two"


def test_an_artifact_that_is_damaged_is_not_backed_up(store: ArtifactStore, folder: Path) -> None:
    made = make(store, "books/model", "one")
    (made / "below" / "file.txt").write_text("two")
    with pytest.raises(InputError, match=f"{made}: is damaged"):
        saved(store, folder)


def flip(copy: Path) -> None:
    (copy / "below" / "file.txt").write_text("two")


def cut(copy: Path) -> None:
    (copy / "below" / "file.txt").write_text("o")


def lose(copy: Path) -> None:
    (copy / "manifest.json").unlink()


def forge(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "facts": {"n": 1}}))


@pytest.mark.parametrize("damage", [flip, cut, lose, forge])
def test_a_damaged_backup_is_refused_and_leaves_nothing(
    damage: Callable[[Path], None], store: ArtifactStore, folder: Path, tmp_path: Path
) -> None:
    made = make(store, "books/model", "one")
    make(store, "a", "first to be copied")
    saved(store, folder)
    damage(folder / made.relative_to(store.at.root))
    home = Home(tmp_path / "restored")
    with pytest.raises(InputError, match=f"artifacts/books/model/{made.name}: is damaged"):
        restore(folder, home, unheard)
    assert not list(home.root.glob("*"))
    assert home.owner() is None


def test_a_damaged_ledger_is_refused(store: ArtifactStore, folder: Path, tmp_path: Path) -> None:
    make(store, "books/model", "one")
    saved(store, folder)
    (ledger,) = folder.glob("state-*/ledger.jsonl")
    ledger.write_bytes(ledger.read_bytes().replace(b"books/model", b"books/medal"))
    with pytest.raises(InputError, match="is damaged"):
        restore(folder, Home(tmp_path / "restored"), unheard)
    assert not list((tmp_path / "restored").iterdir())


def test_a_restore_that_was_killed_leaves_no_home_and_goes_on(
    store: ArtifactStore, folder: Path, tmp_path: Path
) -> None:
    made = make(store, "a", "one")
    make(store, "b", "two")
    saved(store, folder)
    home = Home(tmp_path / "restored")
    copy = home.root / "restoring" / made.relative_to(store.at.root)
    with pytest.raises(KilledError):
        restore(folder, home, killed_when(copy.exists))
    assert home.owner() is None
    assert not home.ledger.exists()
    done = restore(folder, home, unheard)
    assert (done.copied, done.there) == (1, 1)
    assert {path.name for path in home.root.iterdir()} == {
        "artifacts",
        "dagster",
        "home.json",
        "leases",
        "ledger.jsonl",
    }
    assert text_of(ArtifactStore(home=str(home.root)), "b") == "two"


def test_a_folder_that_is_no_backup_of_this_home_is_refused(
    store: ArtifactStore, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and not a backup; give another folder"):
        saved(store, tmp_path / "full")
    assert files_of(tmp_path / "full") == {"notes.txt"}
    for place in (store.at.root / "backup", store.at.root, tmp_path):
        with pytest.raises(InputError, match=r"is inside the home .* or contains it; give another"):
            saved(store, place)
    assert not (store.at.root / "backup").exists()
    saved(store, folder)
    other = Home(tmp_path / "other").claim("others")
    with pytest.raises(InputError, match="belongs to recipe 'tests', not 'others'; give another"):
        back_up(other, folder, unheard)
    with pytest.raises(InputError, match="does not exist; give another with --home"):
        back_up(Home(tmp_path / "nothing"), tmp_path / "new", unheard)
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "nothing").exists()


def test_a_home_is_restored_only_where_there_is_nothing(
    store: ArtifactStore, folder: Path, tmp_path: Path
) -> None:
    make(store, "a", "one")
    saved(store, folder)
    for place in (tmp_path / "nothing", store.at.root):
        with pytest.raises(InputError, match="is not a backup; give the folder of one"):
            restore(place, Home(tmp_path / "restored"), unheard)
    before = files_of(store.at.root)
    with pytest.raises(InputError, match="is not empty; give a new folder with --home"):
        restore(folder, store.at, unheard)
    assert files_of(store.at.root) == before
    with pytest.raises(InputError, match=r"is inside the home .* or contains it; give another"):
        restore(folder, Home(folder / "home"), unheard)
    (tmp_path / "empty").mkdir()
    assert restore(folder, Home(tmp_path / "empty"), unheard).copied == 1
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file"):
        saved(store, tmp_path / "file" / "backup")


def test_a_home_in_which_nothing_was_made_is_backed_up(store: ArtifactStore, folder: Path) -> None:
    assert saved(store, folder) == (0, 0)
    assert list(restored(folder).ledger) == []


def test_a_database_that_cannot_be_read_is_named(store: ArtifactStore, folder: Path) -> None:
    (store.at.dagster / "runs.db").write_text("no database, and long enough to be seen as none" * 9)
    with pytest.raises(InputError, match=r"runs.db: .*not a database; run the same command again"):
        saved(store, folder)


def test_a_disk_without_room_is_told_beforehand(
    store: ArtifactStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(store, "a", "one")
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=100))
    with pytest.raises(InputError, match=r"the backup takes about .* are free at"):
        saved(store, folder)
    assert not list(folder.rglob("manifest.json"))
    monkeypatch.undo()
    saved(store, folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=100))
    with pytest.raises(InputError, match=r"the home takes about .* are free at"):
        restore(folder, Home(tmp_path / "restored"), unheard)
    monkeypatch.undo()
    assert restore(folder, Home(tmp_path / "restored"), unheard).copied == 1


def test_two_backups_of_a_home_take_turns(store: ArtifactStore, folder: Path) -> None:
    make(store, "a", "one")
    turns: list[bool] = []
    back_up(store.at, folder, lambda *_: turns.append(is_locked(store.at.leases / "backup")))
    assert all(turns)
    assert not is_locked(store.at.leases / "backup")
