import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import duckdb
import polars as pl
import pytest

from colorfilter.errors import InputError
from colorfilter.score_tables import pair
from colorfilter.tables import fetch
from resources.home import Home
from resources.score_parts import Part, PublishedModel
from resources.score_store import PublishedSelection, ScoreStore

LENGTH = 8
MODELS = [
    PublishedModel("p", "prior", None, "/p"),
    PublishedModel("c", "conditional", "books", "/c"),
]


@pytest.fixture
def store(tmp_path: Path) -> ScoreStore:
    Home(tmp_path / "home").claim("tests")
    return ScoreStore(home=str(tmp_path / "home"))


def parts(
    root: Path,
    shard: str,
    losses: dict[str, list[float]],
    version: str = "1",
    text: str | None = None,
) -> list[Part]:
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
            "sha256": [text or shard],
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


def publish(store: ScoreStore, selection: str, table: Path, domain: str, arm: str) -> None:
    new = PublishedSelection(selection, table, domain, arm, "p", "c", "now")
    store.publish_selection(new)


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
            connection, "SELECT selection, cutoff, current FROM selection_versions ORDER BY ALL"
        )
        assert versions == [("one", -2.0, True), ("two", -2.0, False)]
        assert fetch(connection, "SELECT count(*) FROM selections") == [(2,)]


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
            "SELECT arm, count(*) FROM selections JOIN selection_versions USING (selection) "
            "WHERE current GROUP BY arm ORDER BY arm",
        )
    assert counts == [("color_tau2", 1), ("color_tau2_leaks", 1)]


def test_the_file_opens_without_any_of_this_code(store: ScoreStore, tmp_path: Path) -> None:
    store.publish(parts(tmp_path, "a", {"p": [3.0], "c": [1.0]}), MODELS, LENGTH)
    with duckdb.connect(str(Home(store.home).scores), read_only=True) as connection:
        assert fetch(connection, "SELECT domain, color FROM color") == [("books", -2.0)]


# What is worked out when scores are published -------------------------------------------------


def excluded(store: ScoreStore) -> list[tuple]:
    with store.read() as connection:
        return fetch(connection, "SELECT shard, position, reason FROM excluded ORDER BY ALL")


def test_a_copy_comes_back_when_the_first_shard_retires(store: ScoreStore, tmp_path: Path) -> None:
    losses = {"p": [3.0, 3.0], "c": [1.0, 2.0]}
    a, b, c = (parts(tmp_path, s, losses, text="same") for s in ("a", "b", "c"))
    store.publish([*b, *c], MODELS, LENGTH)
    assert excluded(store) == [("c", 0, "copy"), ("c", 1, "copy")]
    store.publish([*a, *b, *c], MODELS, LENGTH)
    assert {s for s, _, _ in excluded(store)} == {"b", "c"}
    store.publish([*b, *c], MODELS, LENGTH)
    assert {s for s, _, _ in excluded(store)} == {"c"}
    store.publish(c, MODELS, LENGTH)
    assert excluded(store) == []


def test_a_changed_text_is_compared_anew(store: ScoreStore, tmp_path: Path) -> None:
    losses = {"p": [3.0], "c": [1.0]}
    a = parts(tmp_path, "a", losses)
    store.publish([*a, *parts(tmp_path, "b", losses, text="a")], MODELS, LENGTH)
    assert excluded(store) == [("b", 0, "copy")]
    store.publish([*a, *parts(tmp_path, "b", losses, "2")], MODELS, LENGTH)
    assert excluded(store) == []


def test_sequences_shorter_than_the_length_are_padded(store: ScoreStore, tmp_path: Path) -> None:
    a = parts(tmp_path, "a", {"p": [3.0, 1.0], "c": [1.0, 1.0]})
    store.publish(a, MODELS, LENGTH)
    assert excluded(store) == []
    store.publish(a, MODELS, LENGTH + 1)
    assert excluded(store) == [("a", 0, "padded"), ("a", 1, "padded")]


def mark_pairs(store: ScoreStore) -> None:
    """Make the colors that stand tell themselves from those made anew."""
    with duckdb.connect(str(Home(store.home).scores)) as connection:
        connection.execute("UPDATE paired_losses SET loss_conditional = 100, loss_prior = 0")


def test_pairs_are_made_anew_only_where_losses_changed(store: ScoreStore, tmp_path: Path) -> None:
    models = [*MODELS, PublishedModel("k", "conditional", "code", "/k")]

    def published(a: list[Part], b: list[Part]) -> list[tuple]:
        store.publish([*a, *b], models, LENGTH)
        with store.read() as connection:
            found = fetch(connection, "SELECT domain, shard, color FROM color ORDER BY ALL")
        mark_pairs(store)
        return found

    a, b = (parts(tmp_path, s, {"p": [3.0], "c": [1.0], "k": [4.0]}) for s in ("a", "b"))
    assert published(a, b) == [
        ("books", "a", -2.0),
        ("books", "b", -2.0),
        ("code", "a", 1.0),
        ("code", "b", 1.0),
    ]
    changed = parts(tmp_path, "b", {"p": [3.5], "c": [2.0], "k": [4.5]}, "2")
    kept = {("books", "a", 100.0), ("code", "a", 100.0)}
    by_code = [changed[3] if p.model == "k" else p for p in b]
    assert set(published(a, by_code)) == kept | {("books", "b", 100.0), ("code", "b", 1.5)}
    by_prior = [changed[1] if p.model == "p" else p for p in by_code]
    assert set(published(a, by_prior)) == kept | {("books", "b", -2.5), ("code", "b", 1.0)}
    by_text = [changed[0], *by_prior[1:]]
    assert {c for _, _, c in published(a, by_text)} == {100.0}
    assert set(published(a, [])) == kept


def test_another_model_makes_the_pairs_of_its_domain_anew(
    store: ScoreStore, tmp_path: Path
) -> None:
    old = [*MODELS, PublishedModel("k", "conditional", "code", "/k")]
    made = parts(tmp_path, "a", {"p": [3.0], "c": [1.0], "k": [4.0], "c2": [3.5], "p2": [0.0]})
    by_model = {p.model: p for p in made}

    def colors_by(*models: PublishedModel) -> list[tuple]:
        store.publish([by_model[None], *(by_model[m.model] for m in models)], models, LENGTH)
        with store.read() as connection:
            return fetch(connection, "SELECT domain, color FROM color ORDER BY ALL")

    assert colors_by(*old) == [("books", -2.0), ("code", 1.0)]
    mark_pairs(store)
    books = PublishedModel("c2", "conditional", "books", "/c2")
    assert colors_by(old[0], books, old[2]) == [("books", 0.5), ("code", 100.0)]
    prior = PublishedModel("p2", "prior", None, "/p2")
    assert colors_by(prior, books, old[2]) == [("books", 3.5), ("code", 4.0)]
    assert colors_by(prior, old[2]) == [("code", 4.0)]


def test_losses_changed_in_place_are_paired_anew_by_shard(
    store: ScoreStore, tmp_path: Path
) -> None:
    losses = {"p": [3.0, 2.0], "c": [1.0, 4.0]}
    store.publish([*parts(tmp_path, "a", losses), *parts(tmp_path, "b", losses)], MODELS, LENGTH)
    mark_pairs(store)
    with duckdb.connect(str(Home(store.home).scores)) as connection:
        connection.execute("UPDATE losses SET loss = 2.5 WHERE model = 'p' AND position = 0")
        pair(connection, "books", ["b"])
    assert colors(store) == [("a", 0, 100.0), ("a", 1, 100.0), ("b", 0, -1.5), ("b", 1, 2.0)]


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


def refined(folder: Path, losses: dict[tuple[str, str, int], float]) -> Path:
    folder.mkdir()
    pl.DataFrame(
        [(*place, loss, 7, "float32") for place, loss in losses.items()],
        schema=["model", "shard", "position", "loss", "n_tokens", "precision"],
        orient="row",
    ).cast({"loss": pl.Float32}).write_parquet(folder / "refined.parquet")
    return folder / "refined.parquet"


def test_refined_losses_take_the_place_of_the_others_and_give_it_back(
    store: ScoreStore, tmp_path: Path
) -> None:
    made = parts(tmp_path, "a", {"p": [3.0, 2.0, 1.0], "c": [1.0, 4.0, 1.0]})
    for path in tmp_path.glob("a-1/*/losses*.parquet"):
        pl.read_parquet(path).with_columns(precision=pl.lit("bf16")).write_parquet(path)
    store.publish(made, MODELS, LENGTH)
    # Two domains may have refined the same loss of the prior; what is another's stays out.
    one = refined(tmp_path / "1", {("p", "a", 1): 2.5, ("c", "a", 1): 4.0, ("p", "b", 0): 9.0})
    two = refined(tmp_path / "2", {("p", "a", 1): 2.5, ("p", "a", 2): 0.5})
    again = [
        replace(p, fingerprint=f"{p.fingerprint}+r", refined=(one, two)) if p.losses else p
        for p in made
    ]
    store.publish(again, MODELS, LENGTH)
    assert colors(store) == [("a", 0, -2.0), ("a", 1, 1.5), ("a", 2, 0.5)]
    with store.read() as connection:
        rows = fetch(connection, "SELECT model, position, precision FROM losses ORDER BY ALL")
    exact = {("p", 1), ("c", 1), ("p", 2)}
    assert rows == [
        (m, i, "float32" if (m, i) in exact else "bf16") for m in ("c", "p") for i in range(3)
    ]
    store.publish(made, MODELS, LENGTH)
    assert colors(store) == [("a", 0, -2.0), ("a", 1, 2.0), ("a", 2, 0.0)]


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
        found = fetch(connection, "SELECT selection FROM selections ORDER BY ALL")
    assert found == [(f"s{i}",) for i in range(6)]


def test_what_a_forgotten_document_carried_leaves_the_tables_and_the_file(
    store: ScoreStore, tmp_path: Path
) -> None:
    """On pages that were freed it could still be read."""
    both = [
        *parts(tmp_path, "a", {"p": [3.0, 2.0], "c": [1.0, 4.0]}),
        *parts(tmp_path, "b", {"p": [3.0], "c": [1.0]}),
    ]
    secret = "written-by-somebody" * 40
    folder = both[0].documents
    assert folder is not None
    table = pl.read_parquet(folder / "documents.parquet")
    table.with_columns(extra=pl.lit(secret)).write_parquet(folder / "documents.parquet")
    store.publish(both, MODELS, LENGTH)
    scored = colors(store)
    assert secret.encode() in Home(store.home).scores.read_bytes()
    store.forget(["a"])
    assert b"written-by-somebody" not in Home(store.home).scores.read_bytes()
    assert colors(store) == scored
    with store.read() as connection:
        rows = fetch(connection, "SELECT shard, n_chars, extra FROM documents ORDER BY shard")
    assert rows == [("a", 0, "{}"), ("b", 9, "{}")]


def test_sequences_that_carry_a_forgotten_document_are_no_candidates(
    store: ScoreStore, tmp_path: Path
) -> None:
    made = parts(tmp_path, "a", {"p": [3.0, 2.0], "c": [1.0, 4.0]})
    store.publish(made, MODELS, LENGTH)
    assert made[0].documents is not None
    path = made[0].documents / "documents.parquet"
    pl.read_parquet(path).with_columns(n_chars=pl.lit(0, dtype=pl.Int64)).write_parquet(path)
    store.publish([replace(made[0], fingerprint="text-2"), *made[1:]], MODELS, LENGTH)
    with store.read() as connection:
        excluded = fetch(connection, "SELECT * FROM excluded ORDER BY ALL")
    assert excluded == [("a", 0, "forgotten"), ("a", 1, "forgotten")]
