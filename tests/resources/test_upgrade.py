"""A home of format 1 is upgraded without recomputing anything."""

import json
from pathlib import Path

import duckdb
import polars as pl
import pytest

from colorfilter.errors import InputError
from colorfilter.storage.files import file_sha256, lock
from colorfilter.storage.manifest import MANIFEST, read_manifest
from pipelines.settings import Job
from resources.artifacts import ArtifactStore
from resources.home import FORMAT, Home
from resources.lineage import Lineage
from resources.upgrade import TABLES
from tests.commands.audit.tampering import audited
from tests.conftest import Project, made_since

ARM = "reference/color_tau4"


def as_format_1(home: Home) -> None:
    """Move selections into the scores, and take the format from `home.json`."""
    with duckdb.connect(str(home.scores)) as connection:
        connection.execute(f"ATTACH '{home.selections}' AS selected (READ_ONLY)")
        for table in TABLES:
            connection.execute(f"DROP VIEW {table}")
            connection.execute(f"CREATE TABLE {table} AS FROM selected.{table}")
    home.selections.unlink()
    owner = home.root / "home.json"
    facts = json.loads(owner.read_text())
    del facts["format"]
    owner.write_text(json.dumps(facts))


def amend(store: ArtifactStore, entry: dict, names: set[str], withdrawn: str) -> None:
    """Record as format 1 did that files of an artifact were changed, or removed."""
    folder = store.at.root / entry["path"]
    manifest = read_manifest(folder)
    for file in manifest["files"]:
        path = folder / file["path"]
        if file["path"] in names:
            there = path.exists()
            size = path.stat().st_size if there else 0
            file["now"] = {"bytes": size, "sha256": file_sha256(path) if there else None}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    sha256 = file_sha256(folder / MANIFEST)
    amended = {**entry, "reused": True, "manifest": sha256, "withdrawn": withdrawn}
    amended.pop("previous", None)
    amended.pop("parts", None)
    store.ledger.append(amended)


def test_selections_are_moved_and_nothing_is_made_again(
    movable: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = movable.home
    with duckdb.connect(str(home.selections), read_only=True) as connection:
        before = [connection.execute(f"FROM {t} ORDER BY ALL").fetchall() for t in TABLES]
    as_format_1(home)
    entries, scored = len(movable.ledger()), len(movable.kernel_runs())
    home.check(movable.recipe.name)
    assert home.format == FORMAT
    with duckdb.connect(str(home.selections), read_only=True) as connection:
        assert [connection.execute(f"FROM {t} ORDER BY ALL").fetchall() for t in TABLES] == before
    with (
        duckdb.connect(str(home.scores), read_only=True) as connection,
        pytest.raises(duckdb.Error, match="the table selections is in"),
    ):
        connection.execute("SELECT count(*) FROM selections")
    assert movable.run(monkeypatch, Job.EVERYTHING) is None
    assert made_since(movable, entries) == {}
    assert len(movable.kernel_runs()) == scored
    assert [str(f) for f in audited(movable, again=True).findings] == []


def test_what_was_changed_in_place_becomes_a_version_of_its_own(
    movable: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, store = movable.home, ArtifactStore(home=str(movable.home.root))
    shard = home.shards()[0].name
    raw = store.entries()["raw_corpus", shard]
    table = home.root / raw["path"] / "documents.parquet"
    changed = pl.read_parquet(table).with_columns(text=pl.lit(""))
    changed.write_parquet(table)
    amend(store, raw, {"documents.parquet"}, "part")
    dataset = store.entries()[f"{ARM}/filtered_dataset", None]
    folder = home.root / dataset["path"]
    rows = pl.read_parquet(folder / "tokens" / "sequences.parquet")
    gone = {f["path"] for f in read_manifest(folder)["files"]} - {"tokens/sequences.parquet"}
    for name in gone:
        (folder / name).unlink()
    amend(store, dataset, gone, "whole")
    as_format_1(home)
    entries, scored = len(movable.ledger()), len(movable.kernel_runs())
    home.claim(movable.recipe.name)
    now = store.current("raw_corpus", shard)
    assert now.path != home.root / raw["path"]
    assert now.fingerprint == raw["fingerprint"]
    assert pl.read_parquet(now.path / "documents.parquet").equals(changed)
    assert not (home.root / raw["path"]).exists()
    assert not folder.exists()
    kept = store.rows_of(dataset)
    assert kept is not None
    assert kept["sha256"].equals(rows["sha256"])
    tokens = store.current(f"{ARM}/target_model", "seed_1").inputs
    name = f"{ARM}/filtered_dataset/tokens"
    assert [e["fingerprint"] for e in Lineage(store).find(name, tokens[name])]
    assert movable.run(monkeypatch, Job.EVERYTHING) is None
    assert set(made_since(movable, entries)) == {f"{ARM}/filtered_dataset"}
    assert len(movable.kernel_runs()) == scored
    assert [str(f) for f in audited(movable).findings] == []


def test_a_home_is_not_changed_while_a_run_is_at_work(tmp_path: Path) -> None:
    home = Home(tmp_path).claim("tests")
    (tmp_path / "home.json").write_text('{"recipe": "tests"}')
    with lock(home.run_lease("some")), pytest.raises(InputError, match="a run is at work"):
        home.check("tests")
    assert home.format == 1
    home.check("tests")
    assert home.format == FORMAT


def test_what_an_earlier_version_did_not_complete_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path).claim("tests")
    (tmp_path / "home.json").write_text('{"recipe": "tests"}')
    (tmp_path / "forgetting").touch()
    with pytest.raises(InputError, match="complete it with that version"):
        home.check("tests")
