import json
import multiprocessing
import time
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from colorfilter.errors import InputError, UnreachableError
from resources.artifacts import ArtifactStore, Work
from resources.home import Home
from resources.lineage import Lineage


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    Home(tmp_path).claim("tests")
    return ArtifactStore(home=str(tmp_path))


def write(folder: Path, text: str = "content") -> dict[str, int]:
    (folder / "file.txt").write_text(text)
    return {"size": len(text)}


def refuse(folder: Path) -> dict[str, int]:
    raise AssertionError("was built again")


def test_a_second_request_finds_it_standing(store: ArtifactStore) -> None:
    made = store.make(Work("thing"), write)
    found = store.make(Work("thing"), refuse)
    assert found.reused
    assert not made.reused
    assert (found.fingerprint, found.path, found.facts) == (
        made.fingerprint,
        made.path,
        {"size": 7},
    )


def test_every_part_of_the_key_makes_other_work(store: ArtifactStore) -> None:
    source = store.make(Work("source"), write)
    works = [
        Work("thing"),
        Work("thing", "part"),
        Work("thing", inputs=[source]),
        Work("thing", recipe={"a": 1}),
        Work("thing", code=2),
        Work("thing", seed=1),
        Work("thing", precision="bf16"),
    ]
    assert len({w.key for w in works}) == len(works)
    assert Work("thing", sources=[source]).key == Work("thing").key


def test_the_fingerprint_is_of_the_content_alone(store: ArtifactStore) -> None:
    one = store.make(Work("thing", seed=1), write)
    same = store.make(Work("thing", seed=2), write)
    other = store.make(Work("thing", seed=3), lambda folder: write(folder, "else"))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_missing_or_cut_files_are_made_again(store: ArtifactStore) -> None:
    made = store.make(Work("thing"), write)
    (made.path / "file.txt").write_text("cut")
    again = store.make(Work("thing"), write)
    assert not again.reused
    assert again.fingerprint == made.fingerprint


def test_bad_input_leaves_nothing(store: ArtifactStore) -> None:
    def build(folder: Path) -> dict[str, int]:
        write(folder)
        raise InputError("wrong")

    with pytest.raises(InputError):
        store.make(Work("thing"), build)
    assert not store.folder("thing", None, Work("thing").key).exists()
    assert not store.entries()


def test_an_interrupted_build_is_gone_on_with(store: ArtifactStore) -> None:
    def interrupted(folder: Path) -> dict[str, int]:
        (folder / "first.txt").write_text("first")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.make(Work("thing"), interrupted)
    with pytest.raises(InputError, match="not exist yet"):
        store.current("thing")

    def resumed(folder: Path) -> dict[str, int]:
        assert (folder / "first.txt").read_text() == "first"
        return write(folder)

    assert not store.make(Work("thing"), resumed).reused


@pytest.mark.parametrize(
    "error", [InputError("bad"), UnreachableError("no cluster"), RuntimeError("other")]
)
def test_of_several_works_what_is_committed_stands(store: ArtifactStore, error: Exception) -> None:
    works = [Work("thing", name) for name in ("one", "two")]
    folders: list[Path] = []

    def fail_at_the_second() -> None:
        with store.attempts(works) as attempts:
            folders.extend(a.folder for a in attempts)
            attempts[0].commit(write(folders[0]))
            write(folders[1], "half")
            raise error

    with pytest.raises(type(error)):
        fail_at_the_second()
    assert [f.exists() for f in folders] == [True, type(error) is not InputError]
    with store.attempts(works) as again:
        assert [a.standing is not None for a in again] == [True, False]
        again[1].commit(write(again[1].folder))
    assert [a.artifact.reused for a in again] == [True, False]


def test_what_is_current_follows_the_last_request(store: ArtifactStore) -> None:
    one = store.make(Work("thing", seed=1), write)
    two = store.make(Work("thing", seed=2), lambda folder: write(folder, "else"))
    assert store.current("thing").fingerprint == two.fingerprint
    store.make(Work("thing", seed=1), refuse)
    assert store.current("thing").fingerprint == one.fingerprint


def test_made_from_something_older_is_refused(store: ArtifactStore) -> None:
    old = store.make(Work("source", seed=1), write)
    store.make(Work("thing", inputs=[old]), write)
    new = store.make(Work("source", seed=2), lambda folder: write(folder, "new"))
    assert store.current_from("thing", None, [old])
    with pytest.raises(InputError, match="not built from the current source"):
        store.current_from("thing", None, [new])


def test_the_ledger_names_inputs_and_environment(store: ArtifactStore) -> None:
    source = store.make(Work("source", "s1"), write)
    store.make(Work("thing", inputs=[source], recipe={"a": 1}, seed=3), write)
    entry = list(store.ledger)[-1]
    assert entry["inputs"] == {"source[s1]": source.fingerprint}
    assert entry["recipe"] == {"a": 1}
    assert entry["seed"] == 3
    assert "polars" in entry["environment"]
    assert not Path(entry["path"]).is_absolute()


def test_a_line_cut_by_a_crash_is_passed_over_and_not_joined(store: ArtifactStore) -> None:
    store.make(Work("one"), write)
    with store.at.ledger.open("a") as stream:
        stream.write('{"asset": "cut')
    store.make(Work("two"), write)
    assert {asset for asset, _ in store.entries()} == {"one", "two"}


def test_a_ledger_written_anew_is_read_anew(store: ArtifactStore) -> None:
    store.make(Work("one"), write)
    store.make(Work("two"), write)
    assert store.entries()["one", None]["facts"] == {"size": 7}
    text = store.at.ledger.read_text()
    store.at.ledger.write_text(text.replace('{"size": 7}', '{"size": 8}', 1))
    assert store.entries()["one", None]["facts"] == {"size": 8}
    store.at.ledger.write_text(text[: text.index("\n") + 1])
    assert store.entries().keys() == {("one", None)}


def test_entries_that_somebody_goes_through_stay_as_they_are(store: ArtifactStore) -> None:
    store.make(Work("one"), write)
    for _ in store.entries():
        store.make(Work("two"), write)
        assert store.entries().keys() == {("one", None), ("two", None)}


def test_a_part_of_an_artifact_is_an_input_that_does_not_know_the_rest(
    store: ArtifactStore,
) -> None:
    def build(number: int, note: str, folder: Path) -> dict[str, int]:
        (folder / "tokens").mkdir()
        (folder / "tokens" / "n.txt").write_text(str(number))
        (folder / "note.txt").write_text(note)
        return {}

    def behind() -> bool:
        return store.is_behind(store.entries()["model", None])

    keys = []
    for i, (number, note) in enumerate([(1, "a"), (1, "b"), (2, "b")]):
        whole = store.make(Work("data", code=i), partial(build, number, note))
        work = Work("model", inputs=[whole.part("tokens")])
        keys.append(work.key)
        if i == 0:
            store.make(work, write)
        assert behind() == (number == 2)
    assert keys[0] == keys[1] != keys[2]


def slow_build(folder: Path) -> dict[str, int]:
    with (folder.parent / "builds").open("a") as stream:
        stream.write("built\n")
    time.sleep(1)
    return write(folder)


def make_slowly(home: str) -> None:
    ArtifactStore(home=home).make(Work("thing"), slow_build)


def test_two_requests_meet_at_a_lease(store: ArtifactStore) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=make_slowly, args=(store.home,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (store.at.artifacts / "thing" / "builds").read_text() == "built\n"
    assert [e["reused"] for e in store.ledger] == [False]


def test_the_manifest_lists_every_file_with_its_hash(store: ArtifactStore) -> None:
    made = store.make(Work("thing"), write)
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert [f["path"] for f in manifest["files"]] == ["file.txt"]
    assert manifest["files"][0]["bytes"] == 7
    assert len(manifest["files"][0]["sha256"]) == 64
    assert manifest["fingerprint"] == made.fingerprint


def write_two(folder: Path) -> dict[str, int]:
    (folder / "tokens").mkdir()
    (folder / "tokens" / "a.txt").write_text("secret")
    (folder / "b.txt").write_text("kept")
    return {"size": 2}


def redact(old: Path, new: Path) -> list[str]:
    (new / "tokens").mkdir(parents=True)
    (new / "tokens" / "a.txt").write_text("")
    (new / "b.txt").write_text((old / "b.txt").read_text())
    return ["tokens/a.txt"]


def test_a_replaced_artifact_is_the_same_to_whatever_was_made_from_it(store: ArtifactStore) -> None:
    old = store.make(Work("thing", "a"), write_two)
    work = Work("model", inputs=[old, old.part("tokens")])
    model = store.make(work, write)
    entry = store.entries()["thing", "a"]
    store.replace(entry, redact)
    now = store.current("thing", "a")
    assert now.path != old.path
    path = str(now.path.relative_to(store.at.root))
    assert (now.key, now.fingerprint) == (old.key, old.fingerprint)
    assert now.part("tokens").fingerprint == old.part("tokens").fingerprint
    assert (now.path / "tokens" / "a.txt").read_text() == ""
    again = Work("model", inputs=[now, now.part("tokens")])
    assert store.make(again, refuse).fingerprint == model.fingerprint
    assert store.make(Work("thing", "a"), refuse).path == now.path
    lineage = Lineage(store)
    for name, fingerprint in model.inputs.items():
        assert [e["path"] for e in lineage.find(name, fingerprint)] == [path]
    store.discard(old.path)
    assert store.make(Work("thing", "a"), refuse).path == now.path


def test_a_replacement_that_was_interrupted_is_completed_once(store: ArtifactStore) -> None:
    store.make(Work("thing"), write_two)
    entry = store.entries()["thing", None]

    def stopped(_old: Path, new: Path) -> list[str]:
        new.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.replace(entry, stopped)
    assert store.entries()["thing", None] == entry
    store.replace(entry, lambda old, new: (new.rmdir(), redact(old, new))[1])
    replaced = store.entries()["thing", None]
    lines = len(list(store.ledger))
    store.replace(entry, refuse_again)
    assert store.entries()["thing", None] == replaced != entry
    assert len(list(store.ledger)) == lines


def refuse_again(_old: Path, _new: Path) -> list[str]:
    raise AssertionError("was written again")


def test_what_is_removed_is_found_by_its_parts_and_made_anew(store: ArtifactStore) -> None:
    old = store.make(Work("dataset"), write_two)
    tokens = old.part("tokens")
    store.remove(store.entries()["dataset", None])
    assert not old.path.exists()
    assert ("dataset", None) not in store.entries()
    with pytest.raises(InputError, match="does not exist yet"):
        store.current("dataset")
    (found,) = Lineage(store).find(tokens.name, tokens.fingerprint)
    assert found["fingerprint"] == old.fingerprint
    assert store.make(Work("dataset"), write_two).path == old.path


def test_a_discarded_dataset_leaves_its_table_of_rows(store: ArtifactStore) -> None:
    rows = pl.DataFrame(
        {"row": [0], "shard": ["a"], "position": [7], "sha256": ["ab"], "score": [1.5]}
    )

    def build(folder: Path) -> dict[str, int]:
        (folder / "tokens").mkdir()
        rows.write_parquet(folder / "tokens" / "sequences.parquet")
        return {}

    made = store.make(Work("dataset"), build)
    entry = store.entries()["dataset", None]
    expected = rows.drop("score")
    assert expected.equals(store.rows_of(entry))
    store.discard(made.path)
    assert not made.path.exists()
    assert expected.equals(store.rows_of(entry))
    assert store.rows_of({**entry, "fingerprint": "another"}) is None
