from pathlib import Path

import pytest

from resources.artifacts import ArtifactStore, Work
from resources.home import Home
from resources.pruning import leftovers


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    Home(tmp_path).claim("tests")
    return ArtifactStore(home=str(tmp_path))


def write(text: str, file: str = "file.txt") -> object:
    def build(folder: Path) -> dict[str, int]:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
        return {}

    return build


def found(store: ArtifactStore, shards: list[str]) -> dict[tuple[str, str], int]:
    return {(left.asset, left.why): left.size for left in leftovers(store, shards)}


def test_older_versions_go_and_what_the_current_came_from_stays(store: ArtifactStore) -> None:
    first = store.make(Work("books/model"), write("one"))
    dataset = store.make(Work("books/dataset", inputs=[first]), write("from one"))
    store.make(Work("books/model", seed=2), write("second"))
    assert found(store, []) == {}  # the dataset that stands was made from the first
    third = store.make(Work("books/model", seed=3), write("third"))
    assert found(store, []) == {("books/model", "older"): 6 + manifest(store, "books/model", 2)}
    newer = store.make(Work("books/dataset", inputs=[third]), write("from three"))
    gone = leftovers(store, [])
    assert {left.path for left in gone} >= {first.path, dataset.path}
    for left in gone:
        store.discard(left.path)
    assert leftovers(store, []) == []
    assert store.current("books/dataset").path == newer.path
    assert store.current("books/model").path == third.path
    assert not first.path.exists()


def manifest(store: ArtifactStore, asset: str, seed: int) -> int:
    path = store.folder(asset, None, Work(asset, seed=seed).key)
    return (path / "manifest.json").stat().st_size


def test_what_a_part_was_used_of_stays(store: ArtifactStore) -> None:
    dataset = store.make(Work("dataset"), write("tokens", "tokens/a"))
    store.make(Work("model", inputs=[dataset.part("tokens")]), write("model"))
    store.make(Work("dataset", seed=2), write("others", "tokens/a"))
    assert found(store, []) == {}
    store.make(Work("dataset", seed=3), write("others", "tokens/b"))
    assert set(found(store, [])) == {("dataset", "older")}


def test_shards_that_were_retired_go(store: ArtifactStore) -> None:
    for shard in ("web-1", "web-2"):
        raw = store.make(Work("raw_corpus", shard), write(shard))
        store.make(Work("corpus_tokens", shard, inputs=[raw]), write(f"tokens of {shard}"))
    store.make(Work("model", "seed_1"), write("not of a shard"))
    assert found(store, ["web-1", "web-2"]) == {}
    assert set(found(store, ["web-2"])) == {
        ("raw_corpus/web-1", "older"),
        ("corpus_tokens/web-1", "older"),
    }


def test_unfinished_work_goes_unless_somebody_is_at_it(store: ArtifactStore) -> None:
    work = Work("scores")
    with store.attempts([work]) as (attempt,):
        (attempt.folder / "chunk").write_text("half")
        assert found(store, []) == {}
    assert found(store, []) == {("scores", "unfinished"): 4}


def test_what_the_ledger_does_not_know_goes(store: ArtifactStore) -> None:
    made = store.make(Work("thing"), write("content"))
    made.path.rename(made.path.with_name("0" * 16))
    assert set(found(store, [])) == {("thing", "not in the ledger")}
