from pathlib import Path

import duckdb
import polars as pl
import pytest

from colorfilter.errors import InputError
from colorfilter.tables import fetch
from resources.home import Home
from resources.score_store import Part, PublishedModel, ScoreStore

MODELS = [
    PublishedModel("p", "prior", None, "/p"),
    PublishedModel("c", "conditional", "books", "/c"),
]


@pytest.fixture
def store(tmp_path: Path) -> ScoreStore:
    Home(tmp_path / "home").claim("tests")
    return ScoreStore(home=str(tmp_path / "home"))


def parts(root: Path, shard: str, losses: dict[str, list[float]], version: str = "1") -> list[Part]:
    """The text of a shard with one document over all its sequences, and losses by models."""
    folder = root / f"{shard}-{version}"
    folder.mkdir(parents=True)
    n = len(next(iter(losses.values())))
    pl.DataFrame(
        {
            "doc_id": [f"{shard}-doc"],
            "source_file": ["f"],
            "source_line": [1],
            "source": ["s"],
            "n_chars": [9],
            "sha256": [shard],
            "extra": ["{}"],
            "text": ["some text"],
        }
    ).write_parquet(folder / "documents.parquet")
    pl.DataFrame(
        {"position": range(n), "n_tokens": pl.Series([8] * n, dtype=pl.Int32), "sha256": ["x"] * n}
    ).write_parquet(folder / "sequences.parquet")
    pl.DataFrame(
        {
            "position": range(n),
            "offset": [0] * n,
            "doc_id": [f"{shard}-doc"] * n,
            "doc_start": [8 * i for i in range(n)],
            "n_tokens": [8] * n,
            "char_start": [0] * n,
            "char_end": [9] * n,
        }
    ).write_parquet(folder / "spans.parquet")
    made = [Part(shard, f"text-{version}", documents=folder, tokens=folder)]
    for model, values in losses.items():
        out = folder / model
        out.mkdir()
        # Columns in another order than the table's: they must go in by name.
        pl.DataFrame(
            {
                "precision": ["float32"] * n,
                "n_tokens": pl.Series([7] * n, dtype=pl.Int32),
                "loss": pl.Series(values, dtype=pl.Float32),
                "position": range(n),
                "shard": [shard] * n,
                "model": [model] * n,
            }
        ).write_parquet(out / f"losses-0-{n}-x.parquet")
        made.append(Part(shard, f"{model}-{version}", model=model, losses=out))
    return made


def colors(store: ScoreStore) -> list[tuple]:
    with store.read() as connection:
        return fetch(connection, "SELECT shard, position, color FROM color ORDER BY ALL")


def test_color_is_conditional_minus_prior(store: ScoreStore, tmp_path: Path) -> None:
    counts = store.publish(parts(tmp_path, "a", {"p": [3.0, 2.0], "c": [1.0, 4.0]}), MODELS)
    assert counts == {"documents": 1, "spans": 2, "sequences": 2, "losses": 4}
    assert colors(store) == [("a", 0, -2.0), ("a", 1, 2.0)]
    with store.read() as connection:
        assert fetch(connection, "SELECT n_tokens FROM documents") == [(16,)]


def test_only_what_changed_is_read(store: ScoreStore, tmp_path: Path) -> None:
    a = parts(tmp_path, "a", {"p": [3.0], "c": [1.0]})
    store.publish(a, MODELS)
    for path in tmp_path.glob("a-1/**/*.parquet"):
        path.unlink()
    b = parts(tmp_path, "b", {"p": [1.0], "c": [1.0]})
    store.publish([*a, *b], MODELS)
    assert colors(store) == [("a", 0, -2.0), ("b", 0, 0.0)]
    store.publish(b, MODELS)
    assert colors(store) == [("b", 0, 0.0)]


def test_a_changed_part_takes_the_place_of_the_old(store: ScoreStore, tmp_path: Path) -> None:
    store.publish(parts(tmp_path, "a", {"p": [3.0], "c": [1.0]}), MODELS)
    store.publish(parts(tmp_path, "a", {"p": [3.0, 1.0], "c": [2.0, 1.0]}, "2"), MODELS)
    assert colors(store) == [("a", 0, -1.0), ("a", 1, 0.0)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_last_good_file(
    store: ScoreStore, tmp_path: Path, bad: float
) -> None:
    store.publish(parts(tmp_path, "a", {"p": [3.0], "c": [1.0]}), MODELS)
    with pytest.raises(ValueError, match="not finite"):
        store.publish(parts(tmp_path, "b", {"p": [bad], "c": [1.0]}), MODELS)
    assert colors(store) == [("a", 0, -2.0)]
    assert not list(Path(store.home).glob("*.next"))


def test_two_losses_for_one_sequence_are_refused(store: ScoreStore, tmp_path: Path) -> None:
    made = parts(tmp_path, "a", {"p": [3.0], "c": [1.0]})
    chunk = next((tmp_path / "a-1" / "p").glob("*.parquet"))
    pl.read_parquet(chunk).write_parquet(chunk.with_name("losses-0-1-y.parquet"))
    with pytest.raises(ValueError, match="several losses"):
        store.publish(made, MODELS)


def test_a_reader_and_the_pipeline_do_not_block_each_other(
    store: ScoreStore, tmp_path: Path
) -> None:
    a = parts(tmp_path, "a", {"p": [3.0], "c": [1.0]})
    store.publish(a, MODELS)
    with store.read() as reader:
        store.publish([*a, *parts(tmp_path, "b", {"p": [3.0], "c": [1.0]})], MODELS)
        assert fetch(reader, "SELECT count(*) FROM color") == [(1,)]
    assert len(colors(store)) == 2


def test_nothing_published_yet_says_so(store: ScoreStore) -> None:
    with pytest.raises(InputError, match="materialize score_tables first"), store.read():
        pass


def test_selections_have_one_current_version_per_arm(store: ScoreStore, tmp_path: Path) -> None:
    store.publish(parts(tmp_path, "a", {"p": [3.0, 1.0], "c": [1.0, 1.0]}), MODELS)
    table = tmp_path / "selection.parquet"
    pl.DataFrame(
        {"rank": [1], "shard": ["a"], "position": [0], "score": [-2.0], "color": [-2.0]}
    ).write_parquet(table)
    for selection in ("one", "two", "one"):
        store.publish_selection(selection, table, "books", "color_tau2", ("p", "c"), "now")
    with store.read() as connection:
        versions = fetch(
            connection, "SELECT selection, cutoff, current FROM selection_versions ORDER BY ALL"
        )
        assert versions == [("one", -2.0, True), ("two", -2.0, False)]
        assert fetch(connection, "SELECT count(*) FROM selections") == [(2,)]


def test_the_file_opens_without_any_of_this_code(store: ScoreStore, tmp_path: Path) -> None:
    store.publish(parts(tmp_path, "a", {"p": [3.0], "c": [1.0]}), MODELS)
    with duckdb.connect(str(Home(store.home).scores), read_only=True) as connection:
        assert fetch(connection, "SELECT domain, color FROM color") == [("books", -2.0)]


def test_results_are_made_anew(store: ScoreStore) -> None:
    row = {"domain": "d", "arm": "a", "seed": 1, "tokens": 5, "metric": "m", "value": 0.5}
    for _ in range(2):
        store.publish_results([row], [{"verb": "score", "versions": {"torch": "2"}}], [])
    with duckdb.connect(str(Home(store.home).results), read_only=True) as connection:
        assert fetch(connection, "SELECT arm, value FROM evaluations") == [("a", 0.5)]
        assert fetch(connection, "SELECT versions FROM kernel_runs") == [('{"torch": "2"}',)]
