import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import polars as pl
import pytest

from colorfilter.errors import InputError
from colorfilter.selection.sql import fetch
from resources.home import Home
from resources.score_parts import PublishedModel
from resources.score_store import PublishedSelection, ScoreStore
from tests.resources.published import LENGTH, MODELS, colors, excluded, parts


def publish(store: ScoreStore, selection: str, table: Path, domain: str, arm: str) -> None:
    new = PublishedSelection(selection, table, domain, arm, "p", "c", "now")
    store.publish_selections([new])


def test_color_is_conditional_minus_prior(store: ScoreStore, tmp_path: Path) -> None:
    counts = store.publish(parts(tmp_path, "a", {"p": [3.0, 2.0], "c": [1.0, 4.0]}), MODELS, LENGTH)
    assert counts == {"documents": 1, "spans": 2, "sequences": 2, "losses": 4}
    assert colors(store) == [("a", 0, -2.0), ("a", 1, 2.0)]
    with store.read() as connection:
        assert fetch(connection, "SELECT n_tokens FROM documents") == [(16,)]


def test_only_what_changed_is_read(store: ScoreStore, tmp_path: Path) -> None:
    a = parts(tmp_path, "a", {"p": [3.0], "c": [1.0]})
    store.publish(a, MODELS, LENGTH)
    for path in tmp_path.glob("a-1/**/*.parquet"):
        path.unlink()
    b = parts(tmp_path, "b", {"p": [1.0], "c": [1.0]})
    store.publish([*a, *b], MODELS, LENGTH)
    assert colors(store) == [("a", 0, -2.0), ("b", 0, 0.0)]
    store.publish(b, MODELS, LENGTH)
    assert colors(store) == [("b", 0, 0.0)]


def test_a_changed_part_takes_the_place_of_the_old(store: ScoreStore, tmp_path: Path) -> None:
    store.publish(parts(tmp_path, "a", {"p": [3.0], "c": [1.0]}), MODELS, LENGTH)
    store.publish(parts(tmp_path, "a", {"p": [3.0, 1.0], "c": [2.0, 1.0]}, "2"), MODELS, LENGTH)
    assert colors(store) == [("a", 0, -1.0), ("a", 1, 0.0)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_last_good_file(
    store: ScoreStore, tmp_path: Path, bad: float
) -> None:
    store.publish(parts(tmp_path, "a", {"p": [3.0], "c": [1.0]}), MODELS, LENGTH)
    with pytest.raises(ValueError, match="not finite"):
        store.publish(parts(tmp_path, "b", {"p": [bad], "c": [1.0]}), MODELS, LENGTH)
    assert colors(store) == [("a", 0, -2.0)]
    assert not list(Path(store.home).glob("*.next"))


def test_what_a_killed_publication_left_is_not_taken_up(store: ScoreStore, tmp_path: Path) -> None:
    a = parts(tmp_path, "a", {"p": [3.0], "c": [1.0]})
    store.publish(a, MODELS, LENGTH)
    left = Home(store.home).scores.with_suffix(".next")
    script = (
        "import duckdb, os, sys; c = duckdb.connect(sys.argv[1]); "
        "c.execute('CREATE TABLE losses(model VARCHAR)'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script, str(left)], check=True)
    assert left.with_name("scores.next.wal").exists()
    store.publish([*a, *parts(tmp_path, "b", {"p": [1.0], "c": [1.0]})], MODELS, LENGTH)
    assert colors(store) == [("a", 0, -2.0), ("b", 0, 0.0)]
    assert not list(Path(store.home).glob("scores.next*"))


def test_two_losses_for_one_sequence_are_refused(store: ScoreStore, tmp_path: Path) -> None:
    made = parts(tmp_path, "a", {"p": [3.0], "c": [1.0]})
    chunk = next((tmp_path / "a-1" / "p").glob("*.parquet"))
    pl.read_parquet(chunk).write_parquet(chunk.with_name("losses-0-1-y.parquet"))
    with pytest.raises(ValueError, match="several losses"):
        store.publish(made, MODELS, LENGTH)


def test_a_reader_and_the_pipeline_do_not_block_each_other(
    store: ScoreStore, tmp_path: Path
) -> None:
    a = parts(tmp_path, "a", {"p": [3.0], "c": [1.0]})
    store.publish(a, MODELS, LENGTH)
    with store.read() as reader:
        store.publish([*a, *parts(tmp_path, "b", {"p": [3.0], "c": [1.0]})], MODELS, LENGTH)
        assert fetch(reader, "SELECT count(*) FROM color") == [(1,)]
    assert len(colors(store)) == 2


def test_nothing_published_yet_says_so(store: ScoreStore) -> None:
    with pytest.raises(InputError, match="materialize score_tables first"), store.read():
        pass


def test_selections_have_one_current_version_per_arm(store: ScoreStore, tmp_path: Path) -> None:
    store.publish(parts(tmp_path, "a", {"p": [3.0, 1.0], "c": [1.0, 1.0]}), MODELS, LENGTH)
    table = tmp_path / "selection.parquet"
    pl.DataFrame(
        {"rank": [1], "shard": ["a"], "position": [0], "score": [-2.0], "color": [-2.0]}
    ).write_parquet(table)
    for selection in ("one", "two", "one"):
        publish(store, selection, table, "books", "color_tau2")
    with store.read() as connection:
        versions = fetch(
            connection,
            "SELECT selection, cutoff, current FROM selected.selection_versions ORDER BY ALL",
        )
        assert versions == [("one", -2.0, True), ("two", -2.0, False)]
        assert fetch(connection, "SELECT count(*) FROM selected.selections") == [(2,)]


def test_what_two_arms_select_alike_stands_once(store: ScoreStore, tmp_path: Path) -> None:
    store.publish(parts(tmp_path, "a", {"p": [3.0, 1.0], "c": [1.0, 1.0]}), MODELS, LENGTH)
    table = tmp_path / "selection.parquet"
    pl.DataFrame({"rank": [1], "shard": ["a"], "position": [0], "score": [-2.0]}).write_parquet(
        table
    )
    for arm in ("color_tau2", "color_tau2_leaks"):
        publish(store, "one", table, "books", arm)
    with store.read() as connection:
        counts = fetch(
            connection,
            "SELECT arm, count(*) FROM selected.selections "
            "JOIN selected.selection_versions USING (selection) "
            "WHERE current GROUP BY arm ORDER BY arm",
        )
    assert counts == [("color_tau2", 1), ("color_tau2_leaks", 1)]


def test_the_file_opens_without_any_of_this_code(store: ScoreStore, tmp_path: Path) -> None:
    store.publish(parts(tmp_path, "a", {"p": [3.0], "c": [1.0]}), MODELS, LENGTH)
    with duckdb.connect(str(Home(store.home).scores), read_only=True) as connection:
        assert fetch(connection, "SELECT domain, color FROM color") == [("books", -2.0)]


# What is worked out when scores are published -------------------------------------------------


OLD_COLOR = """
    DROP TABLE excluded;
    DROP VIEW color;
    DROP TABLE paired_losses;
    DELETE FROM parts WHERE kind NOT IN ('text', 'losses');
    CREATE VIEW color AS
        SELECT
            c_model.domain, c.shard, c.position, p.loss AS loss_prior, c.loss AS loss_conditional,
            c.loss::DOUBLE - p.loss::DOUBLE AS color
        FROM losses AS c
        JOIN models AS c_model
            ON c_model.model = c.model AND c_model.role = 'conditional' AND c_model.current
        JOIN models AS p_model ON p_model.role = 'prior' AND p_model.current
        JOIN losses AS p
            ON p.model = p_model.model AND p.shard = c.shard AND p.position = c.position;
"""


def test_a_file_from_before_these_tables_is_completed(store: ScoreStore, tmp_path: Path) -> None:
    losses = {"p": [3.0, 2.0], "c": [1.0, 4.0]}
    made = [*parts(tmp_path, "a", losses), *parts(tmp_path, "b", losses, text="a")]
    store.publish(made, MODELS, LENGTH)
    expected = colors(store), excluded(store)
    with duckdb.connect(str(Home(store.home).scores)) as connection:
        connection.execute(OLD_COLOR)
    table = tmp_path / "selection.parquet"
    pl.DataFrame({"rank": [1], "shard": ["a"], "position": [0], "score": [-2.0]}).write_parquet(
        table
    )
    publish(store, "one", table, "books", "color_tau2")
    assert colors(store) == expected[0]
    for path in tmp_path.glob("?-1/**/*.parquet"):
        path.unlink()
    store.publish(made, MODELS, LENGTH)
    assert (colors(store), excluded(store)) == expected


def test_results_are_made_anew(store: ScoreStore) -> None:
    row = {"domain": "d", "arm": "a", "seed": 1, "tokens": 5, "metric": "m", "value": 0.5}
    for _ in range(2):
        store.publish_results([row], [{"verb": "score", "versions": {"torch": "2"}}], [])
    with duckdb.connect(str(Home(store.home).results), read_only=True) as connection:
        assert fetch(connection, "SELECT arm, value FROM evaluations") == [("a", 0.5)]
        assert fetch(connection, "SELECT versions FROM kernel_runs") == [('{"torch": "2"}',)]


def refined(path: Path, losses: dict[tuple[str, str, int], float]) -> Path:
    pl.DataFrame(
        [(*place, loss, 7, "float32") for place, loss in losses.items()],
        schema=["model", "shard", "position", "loss", "n_tokens", "precision"],
        orient="row",
    ).cast({"loss": pl.Float32}).write_parquet(path)
    return path


def test_refined_losses_are_read_instead_of_the_others_where_they_are_asked_for(
    store: ScoreStore, tmp_path: Path
) -> None:
    made = parts(tmp_path, "a", {"p": [3.0, 2.0, 1.0], "c": [1.0, 4.0, 1.0], "d": [1.0, 1.0, 1.0]})
    for path in tmp_path.glob("a-1/*/losses*.parquet"):
        pl.read_parquet(path).with_columns(precision=pl.lit("bf16")).write_parquet(path)
    web = PublishedModel("d", "conditional", "web", "/d")
    store.publish(made, [*MODELS, web], LENGTH)
    published = colors(store)
    # Two domains may have refined the same loss of the prior: each reads its own.
    books = refined(tmp_path / "b", {("p", "a", 1): 2.5, ("c", "a", 1): 4.25, ("p", "b", 0): 9.0})
    other = refined(tmp_path / "w", {("p", "a", 1): 2.25, ("d", "a", 2): 0.5})

    def read(**overlays: Path) -> tuple[list[tuple], list[tuple]]:
        with store.read(overlays) as connection:
            query = "SELECT domain, position, color FROM color ORDER BY ALL"
            exact = "SELECT model, position FROM losses WHERE precision = 'float32' ORDER BY ALL"
            count = fetch(connection, "SELECT count(*) FROM losses")
            assert count == [(9,)]
            return fetch(connection, query), fetch(connection, exact)

    color, exact = read(books=books)
    assert color[:3] == [("books", 0, -2.0), ("books", 1, 1.75), ("books", 2, 0.0)]
    assert color[3:] == [("web", 0, -2.0), ("web", 1, -1.0), ("web", 2, 0.0)]
    assert exact == [("c", 1), ("p", 1)]
    color, exact = read(books=books, web=other)
    assert color[:3] == [("books", 0, -2.0), ("books", 1, 1.75), ("books", 2, 0.0)]
    assert color[3:] == [("web", 0, -2.0), ("web", 1, -1.25), ("web", 2, -0.5)]
    assert exact == [("c", 1), ("d", 2), ("p", 1)]
    assert colors(store) == published


def test_publications_wait_for_each_other(store: ScoreStore, tmp_path: Path) -> None:
    shards = [parts(tmp_path, name, {"p": [3.0], "c": [1.0]}) for name in "abcdef"]
    store.publish(shards[0], MODELS, LENGTH)

    def enter(i: int) -> None:
        table = tmp_path / f"{i}.parquet"
        rows = {"shard": ["a"], "position": [0], "rank": [1], "score": [float(i)]}
        pl.DataFrame(rows).write_parquet(table)
        publish(store, f"s{i}", table, "books", f"arm{i}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(enter, range(6)))
    with store.read() as connection:
        found = fetch(connection, "SELECT selection FROM selected.selections ORDER BY ALL")
    assert found == [(f"s{i}",) for i in range(6)]


@pytest.mark.parametrize("table", ["selections", "selection_versions"])
def test_a_query_on_the_old_place_of_the_selections_names_the_new_one(
    store: ScoreStore, tmp_path: Path, table: str
) -> None:
    store.publish(parts(tmp_path, "a", {"p": [3.0], "c": [1.0]}), MODELS, LENGTH)
    with (
        duckdb.connect(str(Home(store.home).scores), read_only=True) as connection,
        pytest.raises(duckdb.Error, match=f"the table {table} is in selections.duckdb"),
    ):
        connection.execute(f"SELECT * FROM {table} WHERE selection = 'one'")


def test_a_selection_is_published_without_a_copy_of_the_scores(
    store: ScoreStore, tmp_path: Path
) -> None:
    store.publish(parts(tmp_path, "a", {"p": [3.0, 1.0], "c": [1.0, 1.0]}), MODELS, LENGTH)
    before = Home(store.home).scores.stat()
    table = tmp_path / "selection.parquet"
    rows = {"rank": [1], "shard": ["a"], "position": [0], "score": [-2.0]}
    pl.DataFrame(rows).write_parquet(table)
    publish(store, "one", table, "books", "color_tau2")
    assert Home(store.home).scores.stat() == before


def test_a_folder_named_like_a_column_is_not_read_as_one(store: ScoreStore, tmp_path: Path) -> None:
    folder = tmp_path / "model=x" / "position=7"
    store.publish(parts(folder, "a", {"p": [3.0], "c": [1.0]}), MODELS, LENGTH)
    assert colors(store) == [("a", 0, -2.0)]
